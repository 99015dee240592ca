"""Where a job stands, in stages, derived from the files of its run directory alone.

A `StatusReader` reads on in those files, so that a live view costs no more after a day than at the start.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_gym.jobs.earlier import AttemptEnd, EarlierAttempts
from hpc_gym.jobs.json_lines import JsonLines
from hpc_gym.jobs.progress import AttemptProgress, thinned_out
from hpc_gym.jobs.records import JobRecord, read_plan
from hpc_gym.jobs.script_log import without_outcome
from hpc_gym.jobs.slurm import Standing
from hpc_gym.jobs.stages import Moment, Stage, stages_of
from hpc_gym.jobs.state import has_ended, last_attempt
from hpc_gym.jobs.state import standing as state_of
from hpc_gym.jobs.steps import StepHistory, rewards
from hpc_gym.protocol.attempt import Outcome
from hpc_gym.protocol.files import json_objects


@dataclass(frozen=True)
class Status:
    """Where a job stands. Times are seconds since the epoch, durations seconds; None: not known (yet)."""

    job_id: str
    name: str
    run_dir: str
    state: str
    waiting: str
    """While it waits in the queue: why, and when it is expected to start; else ""."""
    attempt: int
    """0 before the first of this job."""
    attempt_began: float | None
    """None before the first, and where nothing tells."""
    attempt_job_id: str
    """Of the job that the attempt is of: in a chain, of the link that goes on. "" before the first attempt."""
    earlier_attempts: tuple[AttemptEnd, ...]
    """How those before it ended, also those of the jobs that this one resumes."""
    resumed_from: int | None
    """Step at which the attempt went on; None where it began at the beginning, or has not made a step yet."""
    submitted: float
    seconds: float
    """Since the submit, to now or to the job's end."""
    stages: tuple[Stage, ...]
    hosts: Mapping[str, str]
    """Host name of each node of the attempt that has joined."""
    step: int
    max_steps: int
    reward: float | None
    """Mean over the last step's rollouts."""
    rewards: Mapping[str, float]
    """The same per environment."""
    curves: Mapping[str, tuple[float, ...]]
    """Reward per environment over the whole training so far, in up to 60 equal parts."""
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
    """Step of the newest checkpoint that is whole."""
    checkpoint_age_s: float | None
    """Since it was finished, to now or to the job's end."""
    notes: tuple[str, ...]
    """What a person should know: restarts, hung processes, lost nodes; the latest last."""
    stopping: str
    """Why the attempt is being stopped, or was; "" while it is not."""
    outcome: str | None
    """How the last attempt, or the job without one, ended: one sentence with the first cause. None while it runs."""


@dataclass
class StatusReader:
    """Reads the status of one job again and again. Raises UserError when its run directory is not whole."""

    record: JobRecord
    steps: StepHistory = field(default_factory=StepHistory)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run_dir = Path(self.record.run_dir)
        self._plan = read_plan(self._run_dir)
        self._metrics = JsonLines(self._run_dir / "metrics.jsonl")
        self._evaluations = JsonLines(self._run_dir / "evaluations.jsonl")
        self._events = JsonLines(self._run_dir)
        self._progress = AttemptProgress(0)
        self._earlier = EarlierAttempts(self._run_dir / "attempts")

    def read(self, standing: Standing | None = None) -> Status:
        """The status at this moment; `standing` where the caller knows it already."""
        standing = standing or state_of(self.record)
        self._read_events()
        for line in self._metrics.new():
            self.steps.take(line)
        self.evaluations.extend(self._evaluations.new())
        progress, record, state = self._progress, self.record, standing.state
        outcome = Outcome.read(self._run_dir / "attempts" / str(progress.attempt)) if progress.attempt else None
        now = self._last_moment() if has_ended(state) else time.time()
        last, pace = self.steps.last, self.steps.pace()
        step, max_steps = int(last.get("step", 0)), int(self._plan.training.grpo.get("max_steps", 0))
        going_on = pace.step_s is not None and not has_ended(state)
        checkpoint, saved = _newest_checkpoint(self._run_dir)
        earlier = self._earlier.before(progress.attempt) if progress.attempt else self._earlier.all()
        return Status(
            job_id=record.job_id,
            name=record.name,
            run_dir=record.run_dir,
            state=state,
            waiting=standing.waiting,
            attempt=progress.attempt,
            attempt_began=progress.began if progress.began is not None else min(progress.joined.values(), default=None),
            attempt_job_id=progress.job_id,
            earlier_attempts=earlier,
            resumed_from=self._resumed_from(),
            submitted=record.submitted,
            seconds=max(0.0, now - record.submitted),
            stages=stages_of(
                self._plan,
                record,
                Moment(progress, last, self.evaluations, standing, self._queued_since(standing, earlier), now),
            ),
            hosts=dict(progress.hosts),
            step=step,
            max_steps=max_steps,
            reward=_number(last.get("reward")),
            rewards=rewards(last),
            curves=self.steps.curves(),
            evaluations={_when(each): _means(each) for each in self.evaluations},
            tokens_per_s=pace.tokens_per_s,
            failed_share=pace.failed_share,
            waiting_share=pace.waiting_share,
            time_left_s=pace.step_s * (max_steps - step) if going_on and pace.step_s is not None else None,
            checkpoint=checkpoint,
            checkpoint_age_s=None if saved is None else max(0.0, now - saved),
            notes=tuple(progress.notes),
            stopping=progress.stopping,
            outcome=_ended(record, state, outcome),
        )

    def _queued_since(self, standing: Standing, earlier: Sequence[AttemptEnd]) -> float | None:
        if standing.state == "PENDING" and self._progress.attempt:
            return self._progress.last or None
        if self._progress.attempt <= 1:
            return self.record.submitted
        # The first attempt of a job that resumes others waited since the submit, not since their end.
        return None if not earlier or earlier[-1].ended is None else max(self.record.submitted, earlier[-1].ended)

    def _resumed_from(self) -> int | None:
        first, _ = self.steps.spans.get(self._progress.attempt, (0, 0))
        return first - 1 if first > 1 else None

    def _read_events(self) -> None:
        attempt = last_attempt(self._run_dir)
        if not attempt:
            return
        if attempt != self._progress.attempt:
            self._progress = AttemptProgress(attempt)
            self._events = JsonLines(self._run_dir / "attempts" / str(attempt) / "events.jsonl")
        for event in json_objects(thinned_out(self._events.lines())):
            self._progress.take(event)

    def _last_moment(self) -> float:
        told = [each["time"] for each in (self.steps.last, *self.evaluations[-1:]) if "time" in each]
        outcome = self._run_dir / "attempts" / str(self._progress.attempt) / "outcome.json"
        if not self._progress.last and outcome.exists():
            told.append(outcome.stat().st_mtime)
        return float(max([self.record.submitted, self._progress.last, *told]))


def read_status(record: JobRecord, standing: Standing | None = None) -> Status:
    """Where the job of `record` stands now."""
    return StatusReader(record).read(standing)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _ended(record: JobRecord, state: str, outcome: Outcome | None) -> str | None:
    """How the last attempt, or the job without one, ended; None while it runs."""
    if outcome is None:
        return without_outcome(record, state) if has_ended(state) and state != "COMPLETED" else None
    if outcome.kind == "requeue" and has_ended(state):
        # Cancelled while it was queued again, or refused by Slurm: no attempt is left to say so.
        return outcome.sentence().replace("TO BE REQUEUED", f"{state}, though it was to be requeued", 1)
    return outcome.sentence()


def _when(evaluation: Mapping[str, Any]) -> str:
    when = str(evaluation.get("when", ""))
    return f"step {evaluation.get('step')}" if when == "step" else when


def _means(evaluation: Mapping[str, Any]) -> dict[str, float]:
    means = {}
    for environment, each in evaluation.get("rewards", {}).items():
        known = [reward for reward in each if reward is not None]
        if known:
            means[environment] = sum(known) / len(known)
    return means


def _newest_checkpoint(run_dir: Path) -> tuple[int | None, float | None]:
    """(its step, when it was finished) of the newest checkpoint that is whole."""
    found = []
    for marker in (run_dir / "checkpoints").glob("checkpoint-*/complete.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append((int(marker.parent.name.rpartition("-")[2]), marker.stat().st_mtime))
    return max(found, default=(None, None))
