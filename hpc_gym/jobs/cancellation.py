"""Stops jobs in good order, and says when nothing of them is left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs import local, slurm
from hpc_gym.jobs.records import JobRecord, read_plan
from hpc_gym.jobs.state import CANCEL_MARK, is_over, job_state
from hpc_gym.node import attempt as attempts
from hpc_gym.node.tree import Proc

_SLACK_S = 15.0


@dataclass(frozen=True)
class Cancellation:
    """What came of it. `gone`: nothing of the job is left."""

    gone: bool
    sentence: str


def cancel(record: JobRecord, wait: bool = True) -> Cancellation:
    """Asks the job to stop; with `wait`, until it has, and by force when it takes longer than its plan allows.

    Raises UserError, and asks nothing, where a plan that cannot be read does not say what it allows.
    """
    state = job_state(record)
    if is_over(record, state):
        left = local.kill(record) if record.kind == "local" else []
        how = "Slurm no longer knows how" if state == "UNKNOWN" else state
        return _told(record, f"has ended already: {how}", left)
    # Asked before anything is: a job whose Plan cannot be read must not be killed while it writes a checkpoint.
    within_s = patience(record) if wait else 0.0
    (Path(record.run_dir) / CANCEL_MARK).touch()
    if record.kind == "local":
        local.terminate(record)
    else:
        slurm.cancel(record)
    if not wait:
        return Cancellation(False, f"job {record.job_id} is told to stop")
    begin = time.monotonic()
    if _wait(record, begin + within_s):
        left = local.kill(record) if record.kind == "local" else []
        return _told(record, f"has stopped after {time.monotonic() - begin:.1f} s", left)
    if record.kind == "local":
        return _told(record, f"did not stop within {within_s:g} s and was killed", local.kill(record))
    slurm.cancel(record, kill=True)
    if _wait(record, time.monotonic() + within_s):
        return _told(record, f"did not stop by itself within {within_s:g} s; Slurm ended it", [])
    return Cancellation(False, f"job {record.job_id} is still {job_state(record)}: see `squeue -j {record.job_id}`")


def patience(record: JobRecord) -> float:
    """Seconds within which an orderly stop must be over."""
    try:
        supervision = read_plan(record.run_dir).supervision
    except UserError as error:
        raise UserError(
            f"{error}. `hpc-gym cancel {record.name} --no-wait` asks the job to stop all the same."
        ) from None
    return supervision.stop_within_s + supervision.checkpoint_grace_s + _SLACK_S


def _wait(record: JobRecord, deadline: float) -> bool:
    pause = 0.1 if record.kind == "local" else 1.0
    while not _is_over(record):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _is_over(record: JobRecord) -> bool:
    try:
        return is_over(record, job_state(record))
    except UserError:
        # A controller that is silent for a moment may answer at the next look.
        return False


def _told(record: JobRecord, what: str, left: list[Proc]) -> Cancellation:
    # Of a job that was still queued, or was killed in its first moments, nobody else does it.
    attempts.end(Path(record.run_dir))
    if left:
        pids = ", ".join(str(proc.pid) for proc in left)
        return Cancellation(False, f"job {record.job_id} {what}, but processes of it do not die: {pids}")
    where = "on this machine" if record.kind == "local" else "on its nodes"
    return Cancellation(True, f"job {record.job_id} {what}; nothing of it is left {where}")
