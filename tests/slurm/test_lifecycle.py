"""A cluster's day: nodes crash, daemons die, time runs out, others come first."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from slurm_jobs import FOREVER, SlurmJob, outcome_of, resumed, service, task

Submit = Callable[..., SlurmJob]

HETEROGENEOUS = ({"nodes": 1, "partition": "gpu"}, {"nodes": 2, "partition": "gpu", "gpus_per_node": 2})

# Runs until it is told to save and stop; its next life ends well.
TRAINER = """
import os, signal, sys, time
print('attempt', os.environ['HPC_GYM_ATTEMPT'], flush=True)
if os.environ['HPC_GYM_ATTEMPT'] != '1': time.sleep(1); sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: time.sleep(0.1)
"""


def small_job(submit: Submit, **how: object) -> SlurmJob:
    run = submit([service("server", FOREVER)], [task("rank-0", TRAINER)], [task("rank-1", TRAINER)], **how)
    run.all_started()
    return run


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
def test_near_the_time_limit_tasks_stop_at_a_checkpoint_and_the_job_is_requeued(
    submit: Submit, components: tuple[dict[str, object], ...]
) -> None:
    run = small_job(submit, components=components, options={"time": 1}, time_limit_margin_s=40.0)
    stopped = outcome_of(run, within_s=150)["time"]
    resumed(run, "time limit near", stopped)
    assert {event["exit_code"] for event in run.events("exited", attempt=1)} == {85}
    assert run.events("outcome", attempt=1)[0]["kind"] == "requeue"


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
@pytest.mark.parametrize("node", ["train-1", "rollout-0"])
def test_after_a_node_crashed_the_job_goes_on_without_it(
    submit: Submit, components: tuple[dict[str, object], ...], node: str
) -> None:
    run = small_job(submit, components=components)
    host = run.host(node)
    crashed = time.time()
    run.cluster.crash(host)
    if node != "rollout-0":
        # Long before Slurm would, where its time-out is production's.
        noticed = run.until(lambda: run.events("silent", attempt=1))[0]["time"]
        run.figure("a node crashes: noticed", noticed - crashed, within=15)
    if node == "rollout-0":
        assert host not in resumed(run, "the coordinator's node crashes", crashed)
        return
    # The node is given back to Slurm. Else the job would wait for SlurmdTimeout, be refused its step, and leave GPUs
    # that count as used by nobody.
    assert host not in resumed(run, "another node crashes", crashed, within=90)
    assert not run.attempt(3).exists(), run.story()
    assert all(":0(" in line for line in run.cluster.slurm("sinfo", "-hN", "-O", "GresUsed:40").splitlines())


def test_slurmd_killed_alone_does_not_disturb_the_job(submit: Submit) -> None:
    run = small_job(submit)
    run.cluster.kill_daemon(run.host("train-1"), "slurmd")
    time.sleep(4)
    run.cluster.up()
    time.sleep(6)
    assert run.job.get_info()["State"] == "RUNNING"
    assert not run.events("outcome")
    assert not run.attempt(2).exists()


def test_a_restart_of_the_controller_does_not_disturb_the_job_and_a_requeue_that_falls_due_meanwhile_waits_for_it(
    submit: Submit,
) -> None:
    run = small_job(submit)
    time.sleep(6)  # the controller saves its state every few seconds
    run.cluster.kill_daemon("head", "slurmctld")
    time.sleep(3)
    run.cluster.up()
    time.sleep(5)
    assert run.job.get_info()["State"] == "RUNNING"
    assert not run.events("outcome")
    run.cluster.kill_daemon("head", "slurmctld")
    run.signal("train-0", "rank-0", "USR2")
    stopped = outcome_of(run)["time"]
    run.until(lambda: "asking again once the controller answers" in run.output())
    run.cluster.up()
    resumed(run, "asked to stop at a checkpoint, controller away", stopped)
    assert not run.attempt(3).exists()


@pytest.mark.parametrize("node", ["rollout-0", "train-1"])
def test_a_killed_supervisor_fails_the_job_and_leaves_nothing(submit: Submit, node: str) -> None:
    run = small_job(submit)
    joined = next(event for event in run.events("joined") if event["node"] == node)
    killed = time.time()
    assert run.cluster.on(joined["host"], "kill", "-9", str(joined["pid"])).returncode == 0
    run.figure("supervisor killed: nodes free", run.freed() - killed, within=10)
    assert run.job.state == "FAILED"
    role = node.partition("-")[0]
    assert (
        f"FAILED: role {role}, node {node}, process supervisor was killed by SIGKILL" in run.output().splitlines()[-1]
    )
    assert run.left() == {}


def test_nodes_lost_three_times_in_a_row_fail_the_job(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)])
    for attempt in (1, 2, 3):
        run.all_started(attempt, within_s=run.patience)
        run.cluster.crash(run.host("train-0", attempt))
        outcome_of(run, attempt)
    run.freed(run.patience)
    assert run.job.state == "FAILED"
    assert "role train, node train-0" in run.output().splitlines()[-1]


@pytest.mark.parametrize("what", ["time limit", "node crash"])
def test_where_requeues_are_not_allowed_the_next_job_of_a_chain_goes_on_and_the_rest_vanish(
    submit: Submit, what: str
) -> None:
    run = small_job(submit, chain=2)
    first, second, third = run.job.record.job_ids
    lost = run.host("train-1") if what == "node crash" else ""
    if lost:
        run.cluster.crash(lost)
    else:
        run.cluster.slurm("scancel", "--batch", "--signal=USR2", first)
    run.until(lambda: run.events("joined", attempt=2), run.patience)
    assert run.job.get_info()["State"] == "RUNNING"
    assert f"job {second}, the next one of the chain, goes on from the last checkpoint" in run.output()
    told = run.cluster.slurm("scontrol", "show", "job", second)
    assert f"ExcNodeList={lost or '(null)'}" in told
    run.freed()
    assert run.job.get_info()["State"] == "COMPLETED", run.story()
    states = dict(line.split() for line in run.cluster.slurm("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines())
    assert states[first] in ("FAILED", "NODE_FAIL")
    assert (states[second], states[third]) == ("COMPLETED", "CANCELLED")
    assert not run.attempt(3).exists()


def test_cancel_ends_a_chain(submit: Submit) -> None:
    run = small_job(submit, chain=2)
    run.job.cancel()
    run.freed()
    assert run.job.get_info()["State"] == "CANCELLED", run.story()
    assert not run.attempt(2).exists()


def test_a_node_that_is_not_fit_is_left_out_before_anything_is_started(submit: Submit) -> None:
    shrunk = "mount -o remount,size=64m /dev/shm"
    run = submit([task("rank-0", FOREVER)], options={"begin": "now+1hour", "nodelist": "node2"})
    assert run.cluster.on("node2", "sh", "-c", shrunk).returncode == 0
    try:
        run.cluster.slurm("scontrol", "update", f"JobId={run.id}", "StartTime=now")
        run.until(lambda: run.events("unfit", attempt=1))
        run.until(lambda: run.job.get_info()["State"] == "PENDING")
        assert not run.events("started", attempt=1)
        assert "/dev/shm has 64 MiB free, 256 are needed" in run.output()
        told = run.cluster.slurm("scontrol", "show", "job", run.id)
        assert "ExcNodeList=node2" in told
    finally:
        run.cluster.on("node2", "mount", "-o", "remount,size=1g", "/dev/shm")


def test_a_rank_that_fails_because_its_peer_s_node_crashed_does_not_fail_the_job(submit: Submit) -> None:
    loses_its_peer = """
import os, sys, time
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
while not os.path.exists(os.environ['HPC_GYM_RUN_DIR'] + '/peer-is-gone'): time.sleep(0.05)
raise RuntimeError('whatever a library says of it')
"""
    run = submit([service("server", FOREVER)], [task("rank-0", loses_its_peer)], [task("rank-1", TRAINER)])
    run.all_started()
    host, crashed = run.host("train-1"), time.time()
    run.cluster.crash(host)
    (run.run_dir / "peer-is-gone").touch()
    assert host not in resumed(run, "a node crashes and a rank fails of it", crashed)
    assert "no heartbeat" in run.events("outcome", attempt=1)[0]["sentence"]
