"""Jobs on Slurm: `sbatch` of the run directory's `job.sh`, and the states of jobs by `squeue`, then `sacct`.

Whatever asks Slurm goes through `_ask`, so that its absence or an answer of "no" becomes one readable sentence.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs.records import JobRecord

_LONG_STATES = {"COMPLETING": "RUNNING", "CONFIGURING": "PENDING", "REQUEUE_HOLD": "PENDING", "SUSPENDED": "RUNNING"}


def submit(run_dir: Path) -> str:
    """Hands `job.sh` to sbatch and returns the job id (of the leader, for a heterogeneous job)."""
    answer = _ask(["sbatch", "--parsable", str(run_dir / "job.sh")])
    job_id = answer.strip().splitlines()[-1].split(";")[0]
    if not job_id.isdigit():
        raise UserError(f"sbatch answered {answer.strip()!r} instead of a job id")
    return job_id


def state(record: JobRecord) -> str:
    """State of the job in Slurm's words; UNKNOWN when neither the queue nor the accounting knows it."""
    try:
        queued = _ask(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={record.job_id}"])
        states = queued.split() or _accounted(record.job_id)
    except UserError:
        states = _accounted(record.job_id)
    return _joined([_LONG_STATES.get(each, each) for each in states])


def cancel(record: JobRecord, kill: bool = False) -> bool:
    """Asks Slurm to stop the job: first the supervisors alone, in good order; with `kill`, at once."""
    # SIGTERM to the steps only: the batch script must live to see its srun end.
    _ask(["scancel", record.job_id] if kill else ["scancel", "--signal=TERM", record.job_id])
    return True


def _accounted(job_id: str) -> list[str]:
    """States of the job's components by the accounting, which calls the parts of a heterogeneous job 12+0, 12+1."""
    try:
        rows = _ask(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={job_id}"])
    except UserError:
        return []
    states = []
    for row in rows.splitlines():
        name, _, state = row.partition("|")
        if re.fullmatch(rf"{job_id}(\+\d+)?", name):
            states.append(state.split()[0])
    return states


def _joined(states: list[str]) -> str:
    """One state for all components: one that lives wins, then one that went wrong."""
    for wanted in ("RUNNING", "PENDING", "REQUEUED"):
        if wanted in states:
            return wanted
    wrong = [state for state in states if state != "COMPLETED"]
    return (wrong or states or ["UNKNOWN"])[0]


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError(f"'{command[0]}' is not on PATH: go to a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{command[0]}' gave no answer within 60 s: is the Slurm controller up?") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
