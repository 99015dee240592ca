"""What the job script itself wrote: the only word there is of a job that ended before an attempt could begin."""

from __future__ import annotations

from pathlib import Path

from hpc_gym.jobs.records import JobRecord

_LAST_LINES = 3


def script_log(record: JobRecord) -> Path:
    """The file with the output of the job script, and of the task of node rank 0 in a local job."""
    return output(record, "batch.out" if record.kind == "slurm" else "0_log.out")


def output(record: JobRecord, name: str) -> Path:
    """A file of submitit's of that job: of a chain, of the newest link that has one."""
    folder = Path(record.run_dir) / "submitit"
    files = [folder / f"{job_id}_{name}" for job_id in record.job_ids]
    return next((file for file in reversed(files) if file.exists()), files[0])


def without_outcome(record: JobRecord, state: str) -> str:
    """One line for a job that is in a final state and has no outcome: the script's last words."""
    path = script_log(record)
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return f"{state}: the job ended before its script began"
    except OSError:
        lines = []
    # Slurm says the same thing for every step that it starts.
    words = " / ".join(list(dict.fromkeys(line for line in lines if line))[-_LAST_LINES:])
    return f"{state}: the job script ended without an outcome{f'; it said: {words}' if words else ''} (log: {path})"
