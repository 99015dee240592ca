"""The report says what a run's files say, with the interval of the gain worked out right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpc_gym.errors import UserError
from hpc_gym.jobs.report import draw_curve, paired_gain, report


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step(number: int, attempt: int = 1, **rewards: float) -> dict[str, Any]:
    named = {f"reward/{name}": reward for name, reward in rewards.items()}
    logp = 1e-6 * number
    return {"step": number, "attempt": attempt, "time": 100.0 + number, "logp_diff": logp, "failed": 1, **named}


def evaluation(when: str, at: int, time: float, **rewards: list[float | None]) -> dict[str, Any]:
    return {"when": when, "step": at, "time": time, "seconds": 10.0, "rewards": rewards}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    steps = [step(number, sums=number / 10, office=0.5) for number in range(1, 11)]
    write_lines(tmp_path / "metrics.jsonl", steps)
    write_lines(
        tmp_path / "evaluations.jsonl",
        [
            evaluation("before", 0, 100.0, sums=[0.0, 0.0, 1.0, None], office=[1.0, 0.0, 1.0, 0.0]),
            evaluation("after", 10, 125.0, sums=[1.0, 0.0, 1.0, 1.0], office=[1.0, 1.0, 0.0, 0.0]),
        ],
    )
    (tmp_path / "job.json").write_text(json.dumps({"submitted": 40.0}))
    return tmp_path


def test_the_interval_of_a_paired_gain() -> None:
    # Differences 1, 0, 0, 1: mean 1/2, sample variance 4 * (1/2)^2 / 3 = 1/3.
    gain = paired_gain([1.0, 0.0, 0.0, 1.0])
    assert gain is not None
    half = 1.6448536 * math.sqrt(1 / 3) / 2
    assert (gain.mean, gain.rows) == (0.5, 4)
    assert gain.low == pytest.approx(0.5 - half, abs=1e-7)
    assert gain.high == pytest.approx(0.5 + half, abs=1e-7)
    assert paired_gain([1.0]) is None


def test_rewards_and_gains_per_environment(run_dir: Path) -> None:
    found = report(run_dir)
    office, sums = found.environments
    assert (office.name, sums.name) == ("office", "sums")
    assert (sums.first_steps, sums.last_steps) == (pytest.approx(0.3), pytest.approx(0.8))
    assert (sums.before, sums.after) == (pytest.approx(1 / 3), 0.75)
    # The row whose rollout failed before has no pair.
    assert sums.gain is not None
    assert sums.gain.rows == 3
    assert sums.gain.mean == pytest.approx(1 / 3)
    assert office.gain is not None
    assert office.gain.mean == 0.0
    assert found.together is not None
    assert found.together.rows == 7
    assert found.together.mean == pytest.approx(1 / 7)
    assert found.largest_logp_difference == pytest.approx(1e-5)
    assert (found.steps, found.failed) == (10, 10)


def test_time_per_stage_adds_up(run_dir: Path) -> None:
    latest = run_dir / "attempts" / "latest"
    latest.mkdir(parents=True)
    write_lines(latest / "events.jsonl", [{"event": "outcome", "time": 130.0}])
    stages = report(run_dir).seconds
    assert stages == {
        "start-up": 50.0,
        "evaluation before": 10.0,
        "training": 10.0,
        "evaluation after": 15.0,
        "export, stop": 5.0,
    }


def test_steps_done_again_after_a_resume_count_once(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "attempt": 1, "rew\n')
        file.write(json.dumps(step(10, attempt=2, sums=0.0, office=0.0)) + "\n")
    sums = report(run_dir).environments[1]
    assert sums.last_steps == pytest.approx((0.6 + 0.7 + 0.8 + 0.9 + 0.0) / 5)


def test_the_curve_is_a_picture(run_dir: Path) -> None:
    picture = draw_curve(run_dir, run_dir / "reward-curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_numbers_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training step"):
        report(tmp_path)
