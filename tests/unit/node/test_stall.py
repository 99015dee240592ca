from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hpc_gym.node.stall import StepWatch
from hpc_gym.plan.plan import Supervision

SUPERVISION = Supervision(stall_factor=5.0, stall_at_least_s=0.1)


def write(path: Path, times: list[float], attempt: int = 1, max_steps: int = 9, torn: bool = False) -> None:
    rows = [{"attempt": attempt, "step": step, "max_steps": max_steps, "time": at} for step, at in enumerate(times, 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + ('{"attempt": 1, "st' if torn else ""))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_silence_of_several_medians_is_a_stall(metrics: Path) -> None:
    write(metrics, [10.0, 10.1, 10.2, 10.3], torn=True)
    watch = StepWatch(metrics, 1, SUPERVISION)
    assert watch.silence() == ""
    time.sleep(0.6)
    assert "median of a step: 0.1 s" in watch.silence()
    write(metrics, [10.0, 10.1, 10.2, 10.3, 10.4])
    assert watch.silence() == ""


def test_it_is_not_sooner_than_the_least_time(metrics: Path) -> None:
    write(metrics, [10.0, 10.0, 10.0, 10.0])
    watch = StepWatch(metrics, 1, Supervision(stall_factor=5.0, stall_at_least_s=60.0))
    watch.silence()
    time.sleep(0.1)
    assert watch.silence() == ""


@pytest.mark.parametrize(
    "times, attempt, max_steps",
    [([10.0, 10.1, 10.2, 10.3], 2, 9), ([10.0, 10.1, 10.2, 10.3], 1, 4), ([], 1, 9)],
    ids=["another attempt", "after the last step", "nothing yet"],
)
def test_what_is_no_stall(metrics: Path, times: list[float], attempt: int, max_steps: int) -> None:
    write(metrics, times, attempt, max_steps)
    watch = StepWatch(metrics, 1, SUPERVISION)
    watch.silence()
    time.sleep(0.6)
    assert watch.silence() == ""


def test_where_it_is_not_wanted_nothing_is_a_stall(metrics: Path) -> None:
    write(metrics, [10.0, 10.1, 10.2, 10.3])
    watch = StepWatch(metrics, 1, Supervision(stall_factor=0.0, stall_at_least_s=0.1))
    watch.silence()
    time.sleep(0.6)
    assert watch.silence() == ""


def test_a_rollout_that_comes_back_is_no_silence(metrics: Path) -> None:
    write(metrics, [10.0, 10.1, 10.2, 10.3])
    watch = StepWatch(metrics, 1, SUPERVISION)
    for _ in range(4):
        watch.silence()
        time.sleep(0.3)
        watch.rollout_came_back()
        assert watch.silence() == ""
    time.sleep(0.6)
    assert watch.silence()


def test_rollouts_that_do_not_come_back_are_a_stall_before_the_first_step(metrics: Path) -> None:
    watch = StepWatch(metrics, 1, SUPERVISION)
    assert watch.silence() == ""
    watch.rollout_came_back()
    assert watch.silence() == ""
    time.sleep(0.2)
    assert watch.silence().startswith("no training step and no rollout for 0 s, 0 s are allowed")
