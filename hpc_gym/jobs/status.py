"""Where a job stands, in stages, derived from the files of its run directory alone.

A `StatusReader` reads on in those files, so that a live view costs no more after a day than at the start. A line that
is just being written is left for the next time, and whatever is no JSON is passed over.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hpc_gym.jobs.progress import AttemptProgress
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.script_log import without_outcome
from hpc_gym.jobs.slurm import why_waiting
from hpc_gym.jobs.stages import Stage, stages_of
from hpc_gym.jobs.state import has_ended, job_state
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Outcome

_RECENT_STEPS = 20


@dataclass(frozen=True)
class Status:
    """Where a job stands. Times are seconds since the epoch, durations seconds; None: not known (yet)."""

    job_id: str
    name: str
    run_dir: str
    state: str
    attempt: int
    """0 before the first."""
    submitted: float
    seconds: float
    """Since the submit, to now or to the job's end."""
    stages: tuple[Stage, ...]
    step: int
    max_steps: int
    reward: float | None
    """Mean over the last step's rollouts."""
    rewards: Mapping[str, float]
    """The same per environment."""
    evaluations: Mapping[str, Mapping[str, float]]
    """Mean reward per environment, by when it was evaluated: `before`, `step 20`, `after`."""
    tokens_per_s: float | None
    """Generated tokens per second of training, over the last steps."""
    failed_share: float | None
    """Share of the last steps' rollouts that failed."""
    waiting_share: float | None
    """Share of the last steps' time in which the trainer waited for rollouts."""
    time_left_s: float | None
    """For the remaining steps, at the pace of the last ones."""
    checkpoint: int | None
    """Step of the newest checkpoint."""
    notes: tuple[str, ...]
    """What a person should know: restarts, hung processes, lost nodes; the latest last."""
    outcome: str | None
    """How the last attempt, or the job without one, ended: one sentence with the first cause. None while it runs."""


@dataclass
class _JsonLines:
    """A growing file of JSON objects, one a line, read on from where the last reading ended."""

    path: Path
    offset: int = 0

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = file.read()
        except OSError:
            return
        end = text.rfind(b"\n") + 1
        self.offset += end
        for line in text[:end].splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                # Cut off by the end of an earlier attempt.
                continue
            if isinstance(record, dict):
                yield record


@dataclass
class StatusReader:
    """Reads the status of one job again and again."""

    record: JobRecord
    steps: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS + 1))
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run_dir = Path(self.record.run_dir)
        self._plan = Plan.read(self._run_dir)
        self._metrics = _JsonLines(self._run_dir / "metrics.jsonl")
        self._evaluations = _JsonLines(self._run_dir / "evaluations.jsonl")
        self._events = _JsonLines(self._run_dir)
        self._progress = AttemptProgress(0)

    def read(self, state: str | None = None) -> Status:
        """The status at this moment; `state` where the caller knows it already."""
        state = state or job_state(self.record)
        self._read_events()
        self.steps.extend(self._metrics.new())
        self.evaluations.extend(self._evaluations.new())
        progress, record = self._progress, self.record
        outcome = Outcome.read(self._run_dir / "attempts" / str(progress.attempt)) if progress.attempt else None
        ended_without = without_outcome(record, state) if has_ended(state) and state != "COMPLETED" else None
        now = self._last_moment() if has_ended(state) else time.time()
        last: dict[str, Any] = self.steps[-1] if self.steps else {}
        max_steps = int(self._plan.training.grpo.get("max_steps", 0))
        pace = self._pace()
        return Status(
            job_id=record.job_id,
            name=record.name,
            run_dir=record.run_dir,
            state=state,
            attempt=progress.attempt,
            submitted=record.submitted,
            seconds=max(0.0, now - record.submitted),
            stages=self._stages(state, now),
            step=int(last.get("step", 0)),
            max_steps=max_steps,
            reward=_number(last.get("reward")),
            rewards=_rewards(last),
            evaluations={_when(each): _means(each) for each in self.evaluations},
            tokens_per_s=pace.tokens_per_s,
            failed_share=pace.failed_share,
            waiting_share=pace.waiting_share,
            time_left_s=None
            if pace.step_s is None or has_ended(state)
            else pace.step_s * (max_steps - int(last.get("step", 0))),
            checkpoint=_newest_checkpoint(self._run_dir),
            notes=tuple(progress.notes),
            outcome=outcome.sentence() if outcome else ended_without,
        )

    def _stages(self, state: str, now: float) -> tuple[Stage, ...]:
        stages = stages_of(self._plan, self.record, self._progress, self._steps_told(), self.evaluations, state, now)
        if state != "PENDING" or self.record.kind != "slurm":
            return stages
        # Before its first attempt, or between two of them.
        detail = ", ".join(filter(None, ["again" if self._progress.attempt else "", why_waiting(self.record)]))
        return (replace(stages[0], state="running", detail=detail), *stages[1:])

    def _read_events(self) -> None:
        latest = self._run_dir / "attempts" / "latest"
        try:
            attempt = int(latest.readlink().name)
        except (OSError, ValueError):
            return
        if attempt != self._progress.attempt:
            self._progress = AttemptProgress(attempt)
            self._events = _JsonLines(self._run_dir / "attempts" / str(attempt) / "events.jsonl")
        for event in self._events.new():
            self._progress.take(event)

    def _steps_told(self) -> dict[str, Any]:
        return self.steps[-1] if self.steps else {}

    def _last_moment(self) -> float:
        told = [each["time"] for each in (*list(self.steps)[-1:], *self.evaluations[-1:]) if "time" in each]
        outcome = self._run_dir / "attempts" / str(self._progress.attempt) / "outcome.json"
        if not self._progress.last and outcome.exists():
            told.append(outcome.stat().st_mtime)
        return float(max([self.record.submitted, self._progress.last, *told]))

    def _pace(self) -> _Pace:
        """Over the last steps of the last attempt that trained."""
        attempt = self.steps[-1].get("attempt") if self.steps else None
        steps = [step for step in self.steps if step.get("attempt") == attempt]
        seconds = [b["time"] - a["time"] for a, b in pairwise(steps)]
        seconds = seconds or [step["step_seconds"] for step in steps if "step_seconds" in step]
        recent = steps[1:] or steps
        total = sum(seconds)
        if total <= 0:
            return _Pace()
        rollouts = sum(step.get("rollouts", 0) for step in recent)
        return _Pace(
            step_s=statistics.median(seconds),
            tokens_per_s=sum(step.get("tokens", 0) for step in recent) / total,
            failed_share=sum(step.get("failed", 0) for step in recent) / rollouts if rollouts else None,
            waiting_share=min(1.0, sum(step.get("rollout_seconds", 0) for step in recent) / total),
        )


@dataclass(frozen=True)
class _Pace:
    step_s: float | None = None
    tokens_per_s: float | None = None
    failed_share: float | None = None
    waiting_share: float | None = None


def read_status(record: JobRecord, state: str | None = None) -> Status:
    """Where the job of `record` stands now."""
    return StatusReader(record).read(state)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _rewards(step: Mapping[str, Any]) -> dict[str, float]:
    prefix = "reward/"
    return {key.removeprefix(prefix): float(step[key]) for key in sorted(step) if key.startswith(prefix)}


def _when(evaluation: Mapping[str, Any]) -> str:
    when = str(evaluation.get("when", ""))
    return f"step {evaluation.get('step')}" if when == "step" else when


def _means(evaluation: Mapping[str, Any]) -> dict[str, float]:
    means = {}
    for environment, rewards in evaluation.get("rewards", {}).items():
        known = [reward for reward in rewards if reward is not None]
        if known:
            means[environment] = sum(known) / len(known)
    return means


def _newest_checkpoint(run_dir: Path) -> int | None:
    try:
        names = [entry.name for entry in (run_dir / "checkpoints").iterdir()]
    except OSError:
        return None
    steps = [int(name.rpartition("-")[2]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit()]
    return max(steps, default=None)
