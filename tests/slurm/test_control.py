"""Who else decides over a job: its user at the terminal, an administrator, Slurm's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_jobs import FOREVER, SlurmJob, outcome_of, resumed, service, task
from small_project import Project

Submit = Callable[..., SlurmJob]

HETEROGENEOUS = ({"nodes": 1, "partition": "gpu"}, {"nodes": 1, "partition": "gpu", "gpus_per_node": 2})
HPC_GYM = str(Path(sys.executable).with_name("hpc-gym"))

TRAINER = """
import os, signal, sys, time
if os.environ['HPC_GYM_ATTEMPT'] != '1': sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: time.sleep(0.1)
"""


def at_the_terminal(*command: str) -> subprocess.Popen[str]:
    """A command in the foreground: what is typed reaches its process group."""
    return subprocess.Popen(
        [HPC_GYM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ctrl_c(command: subprocess.Popen[str]) -> str:
    """What it says on stderr when it is left."""
    os.killpg(command.pid, signal.SIGINT)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 130, said
    return said


def test_ctrl_c_leaves_submit_follow_and_the_job_goes_on(
    slurm_cluster: Cluster, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(project.folder / "state"))
    later = ["cluster.kind=slurm", "cluster.slurm.begin=now+1day", f"cluster.runs_dir={slurm_cluster.shared}/runs"]
    command = at_the_terminal("submit", str(project.write()), *later, "--follow")
    assert command.stdout is not None
    job_id = command.stdout.readline().split()[2]
    while "queue" not in command.stdout.readline():
        pass
    assert f"job {job_id} goes on" in ctrl_c(command)
    assert slurm_cluster.slurm("squeue", "-h", "-o", "%i %T").split() == [job_id, "PENDING"]


def test_ctrl_c_leaves_the_view_of_a_running_job_which_goes_on(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)])
    run.all_started()
    command = at_the_terminal("status", str(run.run_dir), "--follow")
    assert command.stdout is not None
    assert command.stdout.readline()
    assert "goes on" in ctrl_c(command)
    time.sleep(2)
    assert run.job.state == "RUNNING"
    assert not run.events("outcome")


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
def test_a_job_that_somebody_requeues_goes_on_as_the_next_attempt(
    submit: Submit, components: tuple[dict[str, object], ...]
) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", TRAINER)], components=components)
    run.all_started()
    begin = time.time()
    run.cluster.slurm("scontrol", "requeue", run.id)
    resumed(run, "requeued by its user", begin)
    assert outcome_of(run)["sentence"] == "TO BE REQUEUED: Slurm queues the job again"
    assert {event["exit_code"] for event in run.events("exited", "rank-0", attempt=1)} == {85}
    assert "does not requeue" not in run.output()
    assert not run.attempt(3).exists()
    assert run.left() == {}


@pytest.mark.parametrize("component", [0, 1])
def test_scancel_of_one_component_ends_the_whole_job_in_good_order(submit: Submit, component: int) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)], components=HETEROGENEOUS)
    run.all_started()
    begin = time.time()
    run.cluster.slurm("scancel", f"{run.id}+{component}")
    run.figure("scancel of one component: nodes free", run.freed() - begin, within=10)
    assert run.job.state == "CANCELLED", run.story()
    assert run.output().splitlines()[-1].startswith("CANCELLED")
    assert run.left() == {}


def test_a_suspended_job_goes_on_where_it_was(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)])
    run.all_started()
    run.cluster.slurm("scontrol", "suspend", run.id)
    time.sleep(13)  # longer than a node may be silent
    assert run.job.state == "RUNNING"
    run.cluster.slurm("scontrol", "resume", run.id)
    time.sleep(4)
    assert not run.events("silent")
    assert not run.events("outcome")
    assert run.cluster.slurm("squeue", "-h", "-o", "%T").split() == ["RUNNING"]
