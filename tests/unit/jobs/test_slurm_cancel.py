"""By which of Slurm's means a job is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.errors import UserError
from hpc_gym.jobs import slurm
from hpc_gym.jobs.cancellation import cancel
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.state import has_ended, job_state
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


@pytest.fixture
def run(tmp_path: Path) -> JobRecord:
    """A chain of which the secrets are still there."""
    (tmp_path / "run" / "secrets").mkdir(parents=True)
    return JobRecord("7", "slurm", "run", str(tmp_path / "run"), "small", "test", 2, 0.0, chain=("8",))


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Stand-ins for Slurm's commands."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize("state", ["PREEMPTED", "REVOKED", "DEADLINE"])
def test_a_job_that_slurm_took_away_for_good_has_ended(
    state: str, run: JobRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, squeue=f"echo '7|{state}|N/A|None'; echo '8|CANCELLED|N/A|None'")
    assert has_ended(job_state(run))


def test_a_job_that_slurm_has_forgotten_is_over_and_its_secrets_go(
    run: JobRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, squeue="exit 0", sacct="exit 1", scancel="exit 1")
    told = cancel(run)
    assert told.gone
    assert told.sentence.startswith("job 7 has ended already: Slurm no longer knows how;")
    assert not (tmp_path / "run" / "secrets").exists()


def test_a_job_whose_plan_cannot_be_read_is_asked_only_without_a_wait(
    run: JobRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "plan.json").write_text('{"version": 2}')
    asked = tmp_path / "asked"
    programs(tmp_path / "bin", monkeypatch, squeue="echo '7|RUNNING|N/A|None'", scancel=f"touch {asked}")
    with pytest.raises(UserError, match=r"plan\.json: not a plan of this hpc-gym .* --no-wait` asks the job to stop"):
        cancel(run)
    assert not asked.exists()
    assert cancel(run, wait=False).sentence == "job 7 is told to stop"
    assert asked.exists()


def test_a_controller_that_does_not_answer_has_forgotten_nothing(
    run: JobRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, squeue="exit 1", sacct="exit 1", scancel="exit 1")
    with pytest.raises(UserError, match="squeue"):
        cancel(run)
    assert (tmp_path / "run" / "secrets").exists()
