"""What another node sees of a job: the coordinator's port, which tells nobody anything who has no token."""

from __future__ import annotations

from collections.abc import Callable

from slurm_jobs import FOREVER, SlurmJob, service, task

Submit = Callable[..., SlurmJob]

KNOCK = """
import json, socket, sys
host, port = sys.argv[1].rsplit(":", 1)
for words in (b"GET / HTTP/1.1\\r\\n\\r\\n", b'{"hello": "{}", "nonce": "a", "proof": "b"}\\n', b"\\x00" * 2000000):
    with socket.create_connection((host, int(port)), timeout=15) as link:
        try:
            link.sendall(words)
            print(link.recv(100))
        except ConnectionError:
            print(b"")
"""


def test_only_the_coordinator_listens_and_is_silent_to_whoever_has_no_token(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)])
    run.all_started()
    first = run.host("rollout-0")
    of_the_job = [
        each for each in run.listening(first) if not each.program.startswith(("slurmd", "slurmstepd", "srun"))
    ]
    assert [each.program for each in of_the_job] == ["python"]
    assert [each.program for each in run.listening(run.host("train-0")) if "slurm" not in each.program] == []
    address = f"{run.address('rollout-0')}:{of_the_job[0].port}"
    knocked = run.cluster.on("node5", "/usr/bin/python3", "-c", KNOCK, address)
    assert knocked.stdout.split() == ["b''"] * 3, knocked.stderr
    assert not run.events("outcome")
