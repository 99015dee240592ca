"""By which of Slurm's means a job is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.jobs import slurm
from hpc_gym.jobs.records import JobRecord
from hpc_gym.protocol.attempt import Outcome

JOINED = '{"event": "began"}\n{"node": "rollout-0", "event": "joined"}\n'


@pytest.mark.parametrize(
    "events, outcome, in_good_order",
    [
        (JOINED, None, True),
        (JOINED, Outcome("completed"), True),
        ('{"event": "began"}\n', None, False),  # a signal would kill a script that has only begun
        (JOINED, Outcome("requeue", "a node was lost"), False),  # the next attempt has not begun yet
        ("", None, False),
    ],
)
def test_a_running_job_hears_of_it_through_its_script_once_somebody_listens(
    events: str, outcome: Outcome | None, in_good_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"
    program = tmp_path / "bin" / "scancel"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    attempt = tmp_path / "run" / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt.parent / "latest").symlink_to("1")
    if events:
        (attempt / "events.jsonl").write_text(events)
    if outcome is not None:
        outcome.write(tmp_path / "run", attempt)
    slurm.cancel(JobRecord("7", "slurm", "run", str(tmp_path / "run"), "small", "test", 2, 0.0))
    running = "--state=RUNNING --batch --signal=INT 7" if in_good_order else "--state=RUNNING 7"
    assert said.read_text().splitlines() == ["--state=PENDING 7", running]
