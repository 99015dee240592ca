"""Jobs on Slurm: `sbatch` of the run directory's `job.sh`, and the states of jobs by `squeue`, then `sacct`.

Whatever asks Slurm goes through `ask`, so that its absence or an answer of "no" becomes one readable sentence.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs.records import JobRecord
from hpc_gym.protocol.attempt import Outcome

_MAY_TAKE_S = 60.0
"""How long one of Slurm's commands is waited for."""
_ACCOUNTING_MAY_TAKE_S = 5.0
"""The same for sacct, which only adds what squeue has forgotten, and hangs when its database is away."""
_FIRST_EVENTS = 1 << 16
_WHICH_SLURM = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT")
"""Variables that no allocation sets: which Slurm is spoken to, by every command alike, and as whom."""
_LIVING = ("RUNNING", "PENDING", "REQUEUED")
_REASONS = {
    "BeginTime": "Slurm holds a requeued job back for a while, or it asked for a later start",
    "Dependency": "another job comes first",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "held until `scontrol release JOBID`",
    "PartitionNodeLimit": "more nodes than the partition gives a job, or than are up",
    "PartitionTimeLimit": "a longer time limit than the partition allows",
    "Priority": "jobs of a higher priority come first",
    "ReqNodeNotAvail": "nodes it asked for are down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Resources": "for nodes to become free",
}
"""Slurm's commonest reasons for letting a job wait, for people who do not know them by heart."""
_LONG_STATES = {"COMPLETING": "RUNNING", "CONFIGURING": "PENDING", "REQUEUE_HOLD": "PENDING", "SUSPENDED": "RUNNING"}


def submit(run_dir: Path, after: str | None = None) -> str:
    """Hands `job.sh` to sbatch and returns the job id (of the leader, for a heterogeneous job).

    `after`: the job that it goes on with; it starts when that one has not ended well, and vanishes when it has.
    """
    options = [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    answer = sbatch("--parsable", *options, str(run_dir / "job.sh"))
    job_id = answer.strip().splitlines()[-1].split(";")[0]
    if not job_id.isdigit():
        raise UserError(f"sbatch answered {answer.strip()!r} instead of a job id")
    return job_id


def sbatch(*arguments: str, errors: bool = False) -> str:
    """What sbatch answers, asked so that the script alone says what the job is; as `ask`.

    SBATCH_PARTITION and the like win over a script's directives. The variables of the allocation that somebody submits
    from (salloc, a notebook) reach the new job whatever --export says: its srun fails by a SLURM_MEM_PER_CPU beside its
    own SLURM_MEM_PER_NODE.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _WHICH_SLURM or not name.startswith(("SBATCH_", "SLURM_", "SLURMD_", "SRUN_"))
    }
    return ask(["sbatch", *arguments], environment, errors)


@dataclass(frozen=True)
class Standing:
    """A job's state in Slurm's words and, while it waits, why and until when, as a person reads it."""

    state: str
    waiting: str = ""


def standing(record: JobRecord) -> Standing:
    """Where a job stands; UNKNOWN when neither the queue nor the accounting knows it."""
    return standings([record])[record.run_dir]


def standings(records: Sequence[JobRecord]) -> dict[str, Standing]:
    """Where each job stands, by run directory, asked for at once; of a chain, the link that lives, or the last that
    ran.
    """
    found = _of_jobs([job_id for record in records for job_id in record.job_ids]) if records else {}
    return {
        record.run_dir: _of_chain([found[job_id] for job_id in record.job_ids if job_id in found]) for record in records
    }


def is_in_queue(record: JobRecord) -> bool:
    """Whether the job, or a link of its chain, waits or runs. Raises UserError when the controller does not answer."""
    # Not by --jobs: of a job that it has forgotten squeue says the same as when it has lost its way.
    listed = ask(["squeue", "--all", "--noheader", "--format=%i"]).split()
    return not {name.partition("+")[0] for name in listed}.isdisjoint(record.job_ids)


def _of_chain(links: list[Standing]) -> Standing:
    live = [each for each in links if each.state in _LIVING]
    # A link that was not needed any more is CANCELLED, without having run.
    ran = [each for each in links if each.state != "CANCELLED"]
    return (sorted(live, key=lambda each: each.state != "RUNNING") or ran[-1:] or links or [Standing("UNKNOWN")])[0]


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """States of several jobs, asked for at once; those that neither the queue nor the accounting knows are left out."""
    return {job_id: found.state for job_id, found in _of_jobs(job_ids).items()}


def _of_jobs(job_ids: Sequence[str]) -> dict[str, Standing]:
    found = _components(["squeue", "--noheader", "--states=all", "--format=%i|%T|%S|%r"], set(job_ids))
    if missing := {job_id for job_id in job_ids if job_id not in found}:
        sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
        found |= _components(sacct, missing, _ACCOUNTING_MAY_TAKE_S)
    return {job_id: _joined(parts) for job_id, parts in found.items()}


def _waiting(start: str, reason: str) -> str:
    """Why a job waits and when it is expected to start, from Slurm's words; "" where they do not tell."""
    told = "" if reason in ("", "None") else reason
    if told and (meaning := _REASONS.get(told.partition(",")[0])):
        told = f"{told} ({meaning})"
    expected = f"expected start {start.replace('T', ' ')}" if start not in ("", "N/A") else ""
    return ", ".join(filter(None, (told, expected)))


def cancel(record: JobRecord, kill: bool = False) -> None:
    """Asks the job to stop: a running one by a signal to its batch script, so that it ends in good order however short
    KillWait is; one that waits or has only begun, or any with `kill`, through Slurm.
    """
    if kill:
        cancel_jobs(record.job_ids)
        return
    in_good_order = ["--batch", "--signal=INT"] if _has_a_coordinator(record) else []
    # scancel fails for a job that has ended, which is all that is wanted.
    for options in (["--state=PENDING"], ["--state=RUNNING", *in_good_order]):
        with contextlib.suppress(UserError):
            ask(["scancel", *options, *record.job_ids])


def _has_a_coordinator(record: JobRecord) -> bool:
    """Whether somebody is there to take a signal to the job script, which would kill a script that has only begun."""
    latest = Path(record.run_dir) / "attempts" / "latest"
    try:
        with (latest / "events.jsonl").open("rb") as file:
            joined = b'"event": "joined"' in file.read(_FIRST_EVENTS)
    except OSError:
        return False
    outcome = Outcome.read(latest)
    return joined and (outcome is None or outcome.kind != "requeue")


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Ends jobs at once."""
    ask(["scancel", *job_ids])


def _components(
    command: list[str], job_ids: Collection[str], within_s: float = _MAY_TAKE_S
) -> dict[str, list[Standing]]:
    """The components of each job, from lines of `ID|STATE` or `ID|STATE|START|REASON`; a heterogeneous job's parts are
    12+0, 12+1.
    """
    try:
        rows = ask([*command, f"--jobs={','.join(sorted(job_ids))}"], within_s=within_s).splitlines()
    except UserError:
        return {}
    found: dict[str, list[Standing]] = {}
    for row in rows:
        name, state, start, reason = [*row.split("|", 3), "", ""][:4]
        job_id = name.partition("+")[0]
        # sacct says "CANCELLED by 1000".
        if job_id in job_ids and (words := state.split()):
            word = _LONG_STATES.get(words[0], words[0])
            waiting = _waiting(start, reason) if word == "PENDING" else ""
            found.setdefault(job_id, []).append(Standing(word, waiting))
    return found


def _joined(parts: list[Standing]) -> Standing:
    """One for all components: one that lives wins, then one that went wrong."""
    for wanted in _LIVING:
        if those := [each for each in parts if each.state == wanted]:
            return next((each for each in those if each.waiting), those[0])
    wrong = [each for each in parts if each.state != "COMPLETED"]
    return (wrong or parts or [Standing("UNKNOWN")])[0]


def ask(
    command: list[str],
    environment: Mapping[str, str] | None = None,
    errors: bool = False,
    within_s: float = _MAY_TAKE_S,
) -> str:
    """Output of one of Slurm's commands; with `errors`, also what it says on stderr.

    Raises UserError when there is no such command, when it fails, or when it gives no answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False, env=environment)
    except FileNotFoundError:
        raise UserError(f"'{command[0]}' is not on PATH: go to a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{command[0]}' gave no answer within {within_s:g} s: is the Slurm controller up?") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout + done.stderr if errors else done.stdout
