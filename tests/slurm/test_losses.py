"""Parts of a job that are lost together, or in a place that only one of them knows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from chaos_faults import programs
from cluster import Cluster
from slurm_jobs import FOREVER, SlurmJob, outcome_of, resumed, service, task
from submitit.core.utils import FailedJobError

Submit = Callable[..., SlurmJob]

HETEROGENEOUS = ({"nodes": 1, "partition": "gpu"}, {"nodes": 2, "partition": "gpu", "gpus_per_node": 2})

GOES_ON = """
import os, sys, time
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
while True: time.sleep(0.1)
"""
SAVES_FOR_EVER = """
import time
from hpc_gym.protocol.notify import notify
notify(X_SAVING=1)
time.sleep(600)
"""


def test_a_second_node_of_the_first_component_is_lost_and_the_next_attempt_has_all_nodes_again(submit: Submit) -> None:
    run = submit(
        [service("server", FOREVER)],
        [task("rank-0", GOES_ON)],
        components=({"nodes": 2, "partition": "gpu"}, {"nodes": 1, "partition": "gpu", "gpus_per_node": 2}),
        rollout_nodes=2,
    )
    run.all_started()
    host, crashed = run.host("rollout-1"), time.time()
    run.cluster.crash(host)
    assert host not in resumed(run, "a second rollout node crashes", crashed)
    assert len(run.events("joined", attempt=2)) == 3
    assert not run.attempt(3).exists()


def test_of_a_cluster_without_a_spare_node_the_job_waits_for_the_one_it_lost(
    submit: Submit, slurm_cluster: Cluster
) -> None:
    ranks = [[task(f"rank-{rank}", GOES_ON)] for rank in range(4)]
    run = submit([service("server", FOREVER)], *ranks)
    run.all_started()
    host = run.host("train-2")
    run.cluster.crash(host)
    assert outcome_of(run)["kind"] == "requeue"
    run.until(lambda: f"may run on {host} again: gpu has too few other nodes" in run.output())
    slurm_cluster.up()
    assert host in resumed(run, "a node crashes and comes back, there is no other", time.time())


def test_a_node_that_lost_its_supervisor_and_the_guardian_above_it_fails_the_job_at_once(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)], [task("rank-1", FOREVER)])
    run.all_started()
    both = [each for each in programs(run) if each.node == "train-1" and each.kind in ("guardian", "supervisor")]
    assert len(both) == 2
    killed = time.time()
    # The supervisor first: it would tell of its guardian's death.
    for each in reversed(both):
        os.kill(each.pid, signal.SIGKILL)
    run.figure("supervisor and guardian of a node killed: nodes free", run.freed() - killed, within=10)
    assert run.job.state == "FAILED"
    assert "node train-1, process supervisor was killed by SIGKILL" in run.output().splitlines()[-1]


def test_a_supervisor_killed_while_its_rank_saves_is_not_waited_for(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", SAVES_FOR_EVER)], [task("rank-1", FOREVER)])
    run.all_started()
    run.until(lambda: run.events("saving", "rank-0"))
    killed = time.time()
    pid = next(each["pid"] for each in run.events("joined") if each["node"] == "train-0")
    assert run.cluster.on(run.host("train-0"), "kill", "-9", str(pid)).returncode == 0
    run.figure("a supervisor killed while its rank saves: nodes free", run.freed() - killed, within=10)
    assert "node train-0, process supervisor was killed by SIGKILL" in run.output().splitlines()[-1]
    assert run.left() == {}


def test_a_job_script_that_was_stopped_does_not_hold_the_nodes(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", "import time; time.sleep(4)")])
    run.all_started()
    script = next(each for each in programs(run) if each.kind == "script")
    os.kill(script.pid, signal.SIGSTOP)
    ended = outcome_of(run)["time"]
    run.figure("training ends, the job script is stopped: nodes free", run.freed() - ended, within=10)
    assert run.job.state == "COMPLETED"


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_without_room_for_private_files_is_left_out(submit: Submit, slurm_cluster: Cluster, node: str) -> None:
    def on_node(*command: str) -> None:
        done = slurm_cluster.on(node, *command)
        assert done.returncode == 0, done.stderr

    # Where Python finds a place for temporary files.
    on_node("mount", "--bind", "/var/tmp", "/var/tmp")
    for folder in ("/tmp", "/var/tmp"):
        on_node("mount", "-o", "remount,ro,bind", folder)
    try:
        run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)])
        run.all_started(attempt=2)
        outcome = run.events("outcome", attempt=1)
        said = outcome[0]["sentence"] if outcome else run.output()
        assert f"{node}: not fit for the job: /tmp/hg-" in said and "Read-only file system" in said
        assert node not in {run.host(each.name, attempt=2) for each in run.plan.nodes}
    finally:
        on_node("mount", "-o", "remount,rw,bind", "/tmp")
        on_node("umount", "/var/tmp")


def test_every_task_has_its_output(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], *([task(f"rank-{rank}", "pass")] for rank in range(2)))
    run.freed()
    for rank, node in enumerate(run.plan.nodes):
        said = run.job.task(rank).stdout()
        assert said is not None and f"hostname={run.host(node.name)}" in said
        assert run.job.task(rank).stderr() == ""
    said = run.job.stdout()
    assert said is not None and said.splitlines()[-1] == "COMPLETED"


VICTIM = """
import os, time
while not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/failing'): time.sleep(0.02)
raise ConnectionError('gloo: Connection closed by peer')
"""
CULPRIT = """
import os, time
open(os.environ['HPC_GYM_RUN_DIR'] + '/failing', 'w')
time.sleep(0.7)
raise ValueError('the true cause')
"""


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
def test_the_exception_is_the_first_cause_and_not_that_of_the_lowest_rank(
    submit: Submit, components: tuple[dict[str, object], ...]
) -> None:
    run = submit(
        [service("server", FOREVER)], [task("rank-0", VICTIM)], [task("rank-1", CULPRIT)], components=components
    )
    error = run.job.exception()
    assert isinstance(error, FailedJobError)
    assert "role train, node train-1, process rank-1 exited with code 1: ValueError: the true cause" in str(error)
    with pytest.raises(FailedJobError, match="the true cause"):
        run.job.result()


def test_what_a_crashed_node_kept_is_removed_by_the_next_job_there(submit: Submit, slurm_cluster: Cluster) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", GOES_ON)])
    run.all_started()
    host, folder, crashed = run.host("train-0"), run.private_dirs()["train-0"], time.time()
    slurm_cluster.crash(host)
    resumed(run, "another node crashes", crashed, within=90)
    slurm_cluster.up()
    assert folder.exists()
    after = submit([task("rank-0", "pass")], options={"nodelist": host})
    after.freed(run.patience)
    assert not folder.exists()
    said = (after.run_dir / "submitit" / f"{after.id}_0_log.out").read_text()
    assert "train-0: removed what a dead job left: /tmp/hg-" in said
