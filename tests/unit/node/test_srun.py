"""What srun tells of the tasks that it has started."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_gym.node import scontrol
from hpc_gym.node.srun import NotStarted, Srun, TaskEnd, not_started, task_ends

# As Slurm 22.05 writes them.
LINES = {
    "srun: error: node3: task 2: Killed": TaskEnd("node3", 2, "SIGKILL", None, 0.0),
    "srun: error: node[2-3,7]: tasks 1-2,6: Killed": TaskEnd("node2", 1, "SIGKILL", None, 0.0),
    "srun: error: gpu-007: task 0: Segmentation fault (core dumped)": TaskEnd("gpu-007", 0, "SIGSEGV", None, 0.0),
    "srun: error: node1: task 0: Exited with exit code 85": TaskEnd("node1", 0, None, 85, 0.0),
}


@pytest.mark.parametrize("line", LINES)
def test_the_end_of_a_task_is_understood(line: str) -> None:
    assert [replace(each, seen=0.0) for each in task_ends(line + "\n")] == [LINES[line]]


@pytest.mark.parametrize(
    "line",
    [
        "srun: Force Terminated StepId=9520385.0",
        "srun: cluster configuration lacks support for cpu binding",
        "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-20T19:46:41 ***",
        "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification",
    ],
)
def test_what_else_it_says_is_no_end_of_a_task(line: str) -> None:
    assert list(task_ends(line)) == []


def test_a_node_on_which_nothing_could_be_started_is_understood() -> None:
    line = "srun: error: Task launch for StepId=9520817.0 failed on node node2: Communication connection failure\n"
    assert not_started(line) == NotStarted("node2", "Communication connection failure")
    assert [not_started(other) for other in LINES] == [None] * len(LINES)


def test_the_words_of_a_running_srun_are_heard_and_passed_on(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    srun = Srun(["bash", "-c", "echo 'srun: error: node1: task 0: Killed' >&2; sleep 600"])
    deadline = time.monotonic() + 20
    while not srun.ends and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [end.host for end in srun.ends] == ["node1"]
    assert srun.code() is None
    assert srun.last_words() == "srun: error: node1: task 0: Killed"
    srun.kill()
    while (code := srun.code()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert code == -9
    assert capfdbinary.readouterr().err == b"srun: error: node1: task 0: Killed\n"


@pytest.fixture
def scontrol_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts words of Slurm's into the mouth of `scontrol`: states that last a moment cannot be asked for."""

    def says(text: str) -> None:
        program = tmp_path / "scontrol"
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return says


@pytest.mark.parametrize(
    "told, by",
    [
        ("JobState=COMPLETING Reason=JobLaunchFailure Restarts=0 ExitCode=0:9", "SIGKILL"),
        # scancel, to a script that does not ignore it
        ("JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:15", ""),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0 ExitCode=0:1", ""),
        ("JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0", ""),
        ("JobState=COMPLETING Reason=BeginTime Restarts=1 ExitCode=0:9", ""),
    ],
)
def test_slurm_knows_by_what_the_job_script_was_killed(
    told: str, by: str, scontrol_says: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol_says(f"JobId=7 {told} PreemptTime=None")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert scontrol.standing("7").script_killed_by == by


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
def test_a_job_of_which_one_component_is_taken_away_is_preempted(
    state: str, scontrol_says: Callable[[str], None]
) -> None:
    lines = f"JobId=7 JobState={state} PreemptTime=None\nJobId=8 JobState=RUNNING PreemptTime=2026-11-20T20:00:00"
    scontrol_says(lines)
    assert scontrol.standing("7") == scontrol.Standing("RUNNING", preempted=True)


@pytest.mark.parametrize(
    "told, seconds", [("KillWait                = 5 sec", 5.0), ("slurm_load_ctl_conf error", 30.0)]
)
def test_slurm_is_asked_how_long_a_job_lives_after_sigterm(
    told: str, seconds: float, scontrol_says: Callable[[str], None]
) -> None:
    scontrol_says(f"Configuration data\n{told}\nX = 1")
    assert scontrol.kill_wait(1.0) == seconds
