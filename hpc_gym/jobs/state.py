"""In which state a job is, from its files and, where they cannot tell, from its process or from Slurm.

States are Slurm's words, as in submitit: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ... and UNKNOWN.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from hpc_gym.jobs import local, slurm
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.slurm import Standing
from hpc_gym.protocol.attempt import Outcome

CANCEL_MARK = "cancelled"
"""File in the run directory: somebody asked for the job's end."""

_OF_OUTCOME = {"completed": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}
_ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
    # A preempted job that is requeued waits again at once; the link of a chain, which is not, stays so.
    | {"PREEMPTED", "REVOKED"}
)


def has_ended(state: str) -> bool:
    """Whether nothing more will come of a job in that state."""
    return state in _ENDED


def is_over(record: JobRecord, state: str) -> bool:
    """As `has_ended`, and of a job that ended hard and that Slurm has forgotten, where there is no accounting.

    Raises UserError when the controller does not answer, for that is no sign of an end.
    """
    return has_ended(state) or (record.kind == "slurm" and state == "UNKNOWN" and not slurm.is_in_queue(record))


def last_outcome(run_dir: str | Path) -> Outcome | None:
    """How the last attempt ended; None while it runs, or where it was not able to say."""
    return Outcome.read(Path(run_dir) / "attempts" / "latest")


def last_attempt(run_dir: str | Path) -> int:
    """Number of the last attempt; 0 before the first."""
    try:
        return int((Path(run_dir) / "attempts" / "latest").readlink().name)
    except (OSError, ValueError):
        return 0


def job_state(record: JobRecord) -> str:
    """State of the job at this moment; right from any process on the host of a local job."""
    return standing(record).state


def standing(record: JobRecord) -> Standing:
    """State of the job at this moment and, while it waits in a queue, why."""
    return Standing(_local(record)) if record.kind == "local" else _slurm(record, slurm.standing(record))


def standings(records: Iterable[JobRecord]) -> dict[str, Standing]:
    """Where each job stands, by run directory. Slurm is asked once for all of its jobs that have no outcome yet."""
    found, ask = {}, []
    for record in records:
        if record.kind == "local":
            found[record.run_dir] = Standing(_local(record))
        elif (outcome := last_outcome(record.run_dir)) is not None and outcome.kind in _OF_OUTCOME:
            found[record.run_dir] = Standing(_OF_OUTCOME[outcome.kind])
        else:
            ask.append(record)
    asked = slurm.standings(ask)
    return found | {record.run_dir: _slurm(record, asked[record.run_dir]) for record in ask}


def _local(record: JobRecord) -> str:
    alive = local.is_alive(record.process) if record.process else False
    if alive:
        return "RUNNING"
    outcome = last_outcome(record.run_dir)
    if outcome is not None and outcome.kind in _OF_OUTCOME:
        return _OF_OUTCOME[outcome.kind]
    if alive is None:
        return "UNKNOWN"
    return "CANCELLED" if (Path(record.run_dir) / CANCEL_MARK).exists() else "FAILED"


def _slurm(record: JobRecord, told: Standing) -> Standing:
    if told.state != "UNKNOWN":
        return told
    # The queue has forgotten it and the accounting lags or is missing: the job's own word counts.
    if (outcome := last_outcome(record.run_dir)) is not None and outcome.kind in _OF_OUTCOME:
        return Standing(_OF_OUTCOME[outcome.kind])
    return told


class JobWatch:
    """The state of one job, asked again and again: files and processes at every call, Slurm every few seconds."""

    def __init__(self, record: JobRecord, every_s: float = 5.0) -> None:
        self._record = record
        self._every_s = 0.0 if record.kind == "local" else every_s
        self._asked = float("-inf")
        self._standing = Standing("UNKNOWN")

    def state(self, force: bool = False) -> str:
        return self.standing(force).state

    def standing(self, force: bool = False) -> Standing:
        now = time.monotonic()
        if not has_ended(self._standing.state) and (force or now - self._asked >= self._every_s):
            self._standing, self._asked = standing(self._record), now
        return self._standing

    def ended(self) -> bool:
        return has_ended(self.state())
