"""What a job asks of Slurm about itself, from its first node."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

PREEMPTED = "the job was preempted"

_STARTED_TOGETHER_S = 5.0


@dataclass(frozen=True)
class Standing:
    """How Slurm sees the job."""

    state: str
    """RUNNING, PENDING (it is being requeued), CANCELLED, TIMEOUT, ...; "" where Slurm could not be asked."""
    preempted: bool
    """Slurm has begun to take the nodes away for another job."""


def standing(job_id: str) -> Standing:
    """How Slurm sees the job now; of a heterogeneous job, its leader."""
    text = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout.partition("\n")[0]
    fields = dict(field.partition("=")[::2] for field in text.split() if "=" in field)
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    return Standing(fields.get("JobState", ""), preempted)


def has_outlived_its_leader(job_id: str) -> bool:
    """Whether another component of a heterogeneous job still runs since before its leader started.

    When the leader's node fails, Slurm (22.05) requeues the leader alone: its next life would find the others with
    their old steps, and perhaps be on one of their nodes. Components that start together have one start time.
    """
    text = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
    starts = [
        time.mktime(time.strptime(found, "%Y-%m-%dT%H:%M:%S")) for found in re.findall(r"\bStartTime=(\d\S+)", text)
    ]
    return len(starts) > 1 and starts[0] - min(starts) > _STARTED_TOGETHER_S


def requeue(job_id: str, exclude: Sequence[str]) -> str:
    """Asks Slurm to queue the job again, without the hosts in `exclude`; why it refused, or "".

    Slurm takes the list for a job that waits only, so it is set after the requeue. There is time: the job starts again
    after `cred_expire` seconds at the earliest, and this process, when it ignores SIGTERM, lives for KillWait seconds.
    """
    asked = _run(["scontrol", "requeue", job_id])
    if asked.returncode != 0:
        return asked.stderr.strip() or f"scontrol requeue exited with {asked.returncode}"
    deadline = time.monotonic() + 5
    while exclude:
        told = _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}"])
        if told.returncode == 0:
            break
        if time.monotonic() > deadline:
            print(f"the job is queued again, but not without {', '.join(exclude)}: {told.stderr.strip()}", flush=True)
            break
        time.sleep(0.2)
    return ""


def cancel(job_ids: Sequence[str]) -> None:
    """Ends jobs as CANCELLED; those that have ended stay as they are."""
    _run(["scancel", *job_ids])


def excluded(job_id: str) -> list[str]:
    """Hosts that the job was submitted without, or that an earlier attempt excluded."""
    text = _run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
    found = re.findall(r"\bExcNodeList=(\S+)", text)
    return [name for name in found[:1] if name != "(null)"]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
