"""Stops jobs in good order, and says when nothing of them is left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.jobs import local, slurm
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.state import CANCEL_MARK, has_ended, job_state
from hpc_gym.node import attempt as attempts
from hpc_gym.node.tree import Proc
from hpc_gym.plan.plan import Plan

_SLACK_S = 15.0


@dataclass(frozen=True)
class Cancellation:
    """What came of it. `gone`: nothing of the job is left."""

    gone: bool
    sentence: str


def cancel(record: JobRecord, wait: bool = True) -> Cancellation:
    """Asks the job to stop; with `wait`, until it has, and by force when it takes longer than its plan allows."""
    state = job_state(record)
    if has_ended(state):
        left = local.kill(record) if record.kind == "local" else []
        return _told(record, f"has ended already: {state}", left)
    (Path(record.run_dir) / CANCEL_MARK).touch()
    if record.kind == "local":
        local.terminate(record)
    else:
        slurm.cancel(record)
    if not wait:
        return Cancellation(False, f"job {record.job_id} is told to stop")
    begin = time.monotonic()
    if _wait(record, begin + patience(record)):
        left = local.kill(record) if record.kind == "local" else []
        return _told(record, f"has stopped after {time.monotonic() - begin:.1f} s", left)
    if record.kind == "local":
        return _told(record, f"did not stop within {patience(record):g} s and was killed", local.kill(record))
    slurm.cancel(record, kill=True)
    if _wait(record, time.monotonic() + patience(record)):
        return _told(record, f"did not stop by itself within {patience(record):g} s; Slurm ended it", [])
    return Cancellation(False, f"job {record.job_id} is still {job_state(record)}: see `squeue -j {record.job_id}`")


def patience(record: JobRecord) -> float:
    """Seconds within which an orderly stop must be over."""
    supervision = Plan.read(record.run_dir).supervision
    return supervision.stop_within_s + supervision.checkpoint_grace_s + _SLACK_S


def _wait(record: JobRecord, deadline: float) -> bool:
    pause = 0.1 if record.kind == "local" else 1.0
    while not has_ended(job_state(record)):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _told(record: JobRecord, what: str, left: list[Proc]) -> Cancellation:
    # Of a job that was still queued, or was killed in its first moments, nobody else does it.
    attempts.end(Path(record.run_dir))
    if left:
        pids = ", ".join(str(proc.pid) for proc in left)
        return Cancellation(False, f"job {record.job_id} {what}, but processes of it do not die: {pids}")
    where = "on this machine" if record.kind == "local" else "on its nodes"
    return Cancellation(True, f"job {record.job_id} {what}; nothing of it is left {where}")
