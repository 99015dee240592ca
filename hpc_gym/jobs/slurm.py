"""Jobs on Slurm: `sbatch` of the run directory's `job.sh`, and the states of jobs by `squeue`, then `sacct`.

Whatever asks Slurm goes through `ask`, so that its absence or an answer of "no" becomes one readable sentence.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs.records import JobRecord

_LONG_STATES = {"COMPLETING": "RUNNING", "CONFIGURING": "PENDING", "REQUEUE_HOLD": "PENDING", "SUSPENDED": "RUNNING"}


def submit(run_dir: Path, after: str | None = None) -> str:
    """Hands `job.sh` to sbatch and returns the job id (of the leader, for a heterogeneous job).

    `after`: the job that it goes on with; it starts when that one has not ended well, and vanishes when it has.
    """
    # SBATCH_PARTITION and the like win over the script's directives: what is submitted is the script.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    options = [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    answer = ask(["sbatch", "--parsable", *options, str(run_dir / "job.sh")], environment)
    job_id = answer.strip().splitlines()[-1].split(";")[0]
    if not job_id.isdigit():
        raise UserError(f"sbatch answered {answer.strip()!r} instead of a job id")
    return job_id


def state(record: JobRecord) -> str:
    """State of the job in Slurm's words; UNKNOWN when neither the queue nor the accounting knows it."""
    return states_of([record])[record.run_dir]


def states_of(records: Sequence[JobRecord]) -> dict[str, str]:
    """State of each job by run directory; of a chain, that of the link that lives, or of the last that ran."""
    found = states([job_id for record in records for job_id in record.job_ids]) if records else {}
    return {
        record.run_dir: _of_chain([found[job_id] for job_id in record.job_ids if job_id in found]) for record in records
    }


def _of_chain(links: list[str]) -> str:
    live = [state for state in links if state in ("RUNNING", "PENDING", "REQUEUED")]
    # A link that was not needed any more is CANCELLED, without having run.
    ran = [state for state in links if state != "CANCELLED"]
    return (sorted(live, key="RUNNING".__ne__) or ran[-1:] or links or ["UNKNOWN"])[0]


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """States of several jobs, asked for at once; those that neither the queue nor the accounting knows are left out."""
    found = _components(["squeue", "--noheader", "--states=all", "--format=%i|%T"], job_ids)
    if missing := [job_id for job_id in job_ids if job_id not in found]:
        sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
        found |= _components(sacct, missing)
    return {job_id: _joined(states) for job_id, states in found.items()}


def why_waiting(record: JobRecord) -> str:
    """Why a job waits and when it is expected to start, in Slurm's words; "" where it cannot tell."""
    try:
        listed = ask(
            ["squeue", "--noheader", "--states=PENDING", "--format=%r|%S", f"--jobs={','.join(record.job_ids)}"]
        )
    except UserError:
        return ""
    reason, _, start = (listed.splitlines() or [""])[0].partition("|")
    expected = f", expected start {start.replace('T', ' ')}" if start not in ("", "N/A") else ""
    return f"{reason}{expected}" if reason not in ("", "None") else expected.removeprefix(", ")


def cancel(record: JobRecord, kill: bool = False) -> None:
    """Asks the job to stop: a running one by a signal to its batch script, so that it ends in good order however short
    KillWait is; one that waits, or any with `kill`, through Slurm.
    """
    if kill:
        cancel_jobs(record.job_ids)
        return
    # scancel fails for a job that has ended, which is all that is wanted.
    for options in (["--state=PENDING"], ["--state=RUNNING", "--batch", "--signal=INT"]):
        with contextlib.suppress(UserError):
            ask(["scancel", *options, *record.job_ids])


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Ends jobs at once."""
    ask(["scancel", *job_ids])


def _components(command: list[str], job_ids: Sequence[str]) -> dict[str, list[str]]:
    """States of the components of each job, from lines of `ID|STATE`; a heterogeneous job's parts are 12+0, 12+1."""
    try:
        rows = ask([*command, f"--jobs={','.join(job_ids)}"]).splitlines()
    except UserError:
        return {}
    found: dict[str, list[str]] = {}
    for row in rows:
        name, _, state = row.partition("|")
        job_id = name.partition("+")[0]
        # sacct says "CANCELLED by 1000".
        if job_id in job_ids and (words := state.split()):
            found.setdefault(job_id, []).append(_LONG_STATES.get(words[0], words[0]))
    return found


def _joined(states: list[str]) -> str:
    """One state for all components: one that lives wins, then one that went wrong."""
    for wanted in ("RUNNING", "PENDING", "REQUEUED"):
        if wanted in states:
            return wanted
    wrong = [state for state in states if state != "COMPLETED"]
    return (wrong or states or ["UNKNOWN"])[0]


def ask(command: list[str], environment: Mapping[str, str] | None = None, errors: bool = False) -> str:
    """Output of one of Slurm's commands; with `errors`, also what it says on stderr.

    Raises UserError when there is no such command, when it fails, or when it gives no answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    except FileNotFoundError:
        raise UserError(f"'{command[0]}' is not on PATH: go to a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{command[0]}' gave no answer within 60 s: is the Slurm controller up?") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout + done.stderr if errors else done.stdout
