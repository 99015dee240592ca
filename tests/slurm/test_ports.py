"""What another node sees of a job: the coordinator's port, which tells nobody anything who has no token."""

from __future__ import annotations

from collections.abc import Callable

from slurm_jobs import FOREVER, Listener, SlurmJob, service, task

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

    def of_the_job(host: str) -> list[Listener]:
        return [each for each in run.listening(host) if not each.program.startswith(("slurmd", "slurmstepd", "srun"))]

    # For a moment, each node listens to those that try whether they reach it.
    run.until(lambda: len(run.events("reached")) == 2 and not of_the_job(run.host("train-0")))
    run.until(lambda: len(of_the_job(first)) == 1)
    (coordinator,) = of_the_job(first)
    assert coordinator.program == "python"
    address = f"{run.address('rollout-0')}:{coordinator.port}"
    knocked = run.cluster.on("node5", "/usr/bin/python3", "-c", KNOCK, address)
    assert knocked.stdout.split() == ["b''"] * 3, knocked.stderr
    assert not run.events("outcome")
