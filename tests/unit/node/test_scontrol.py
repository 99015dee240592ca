"""What Slurm says of a job is read as what it means for it, in the forms in which Slurm 22.05 to 24.11 say it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from hpc_gym.node import scontrol

Answers = Callable[[dict[str, str]], list[list[str]]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Lets Slurm's commands answer by the beginning of their words; returns what was asked."""

    def set_answers(said: dict[str, str]) -> list[list[str]]:
        asked: list[list[str]] = []

        def once(command: list[str]) -> subprocess.CompletedProcess[str]:
            words = [word for word in command if word not in ("env", "-u", "SLURM_JOB_ID", "SLURM_JOBID", "--oneliner")]
            asked.append(words)
            text = next((text for start, text in said.items() if " ".join(words).startswith(start)), "")
            return subprocess.CompletedProcess(command, 0, text, "")

        monkeypatch.setattr(scontrol, "_once", once)
        return asked

    return set_answers


@pytest.mark.parametrize(
    ("told", "state", "preempted"),
    [
        ("JobState=RUNNING Reason=None Restarts=0 PreemptTime=None", "RUNNING", False),
        ("JobState=SIGNALING Reason=None Restarts=0 PreemptTime=2026-11-20T10:00:00", "RUNNING", True),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", "TIMEOUT", False),
        ("JobState=COMPLETING Reason=NodeDown Restarts=0", "NODE_FAIL", False),
        ("JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2026-11-20T10:00:00", "PREEMPTED", True),
        ("JobState=COMPLETING Reason=None Restarts=0 PreemptTime=None", "COMPLETING", False),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=1", "PENDING", False),
        ("JobState=CANCELLED Reason=None Restarts=0", "CANCELLED", False),
    ],
)
def test_what_a_job_is_about_to_be(answers: Answers, told: str, state: str, preempted: bool) -> None:
    answers({"scontrol show job 7": f"JobId=7 {told} ExitCode=0:0\n"})
    found = scontrol.standing("7")
    assert (found.state, found.preempted) == (state, preempted)


def test_an_answer_without_a_word_is_none(answers: Answers) -> None:
    """Its exit code may have been taken by whoever reaps orphans in this process."""
    asked = answers({})
    assert scontrol.standing("7", within_s=0.0).state == ""
    assert asked == [["scontrol", "show", "job", "7"]]


def test_a_job_that_slurm_queued_again_is_not_queued_again_once_more(answers: Answers) -> None:
    asked = answers({"scontrol show job": "JobId=7 JobState=RUNNING Restarts=1\n"})
    assert scontrol.requeue("7") == ""
    assert not [words for words in asked if "requeue" in words]


def test_each_component_is_left_out_of_its_own_nodes(answers: Answers) -> None:
    asked = answers(
        {
            "scontrol show job": "JobId=7 HetJobOffset=0 Partition=gpu ExcNodeList=gpu9\n"
            "JobId=8 HetJobOffset=1 Partition=cpu ExcNodeList=(null)\n",
            "sinfo -hN -o %N -p gpu": "gpu1\ngpu2\ngpu3\ngpu9\n",
            "sinfo -hN -o %N -p cpu": "cpu1\n",
            "scontrol show hostnames gpu9,gpu2": "gpu9\ngpu2\n",
            "scontrol show hostnames gpu2": "gpu2\n",
        }
    )
    scontrol.leave_out("7", ["gpu2"], [2, 1])
    assert [words[2:] for words in asked if words[1] == "update"] == [
        ["JobId=7+0", "ExcNodeList=gpu9,gpu2"],
        ["JobId=7+1", "ExcNodeList=gpu2"],
    ]


def test_a_node_without_which_too_few_are_left_stays(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    asked = answers(
        {
            "scontrol show job": "JobId=7 Partition=gpu ExcNodeList=(null)\n",
            "sinfo": "gpu1\ngpu2\n",
            "scontrol show hostnames": "gpu2\n",
        }
    )
    scontrol.leave_out("7", ["gpu2"], [2])
    assert not [words for words in asked if words[1] == "update"]
    assert "job 7 may run on gpu2 again: gpu has too few other nodes" in capsys.readouterr().out
