"""Which jobs exist: one small file `job.json` per run directory, and the folders where run directories are.

No daemon and no database: `hpc-gym list` reads one small file per run. A JOB is named by its job id, its run name, its
run directory, or `latest`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpc_gym.errors import UserError

if TYPE_CHECKING:
    from hpc_gym.plan.plan import Plan

RECORD = "job.json"


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that is told apart from any other that ever has its id, also after a reboot and on another host."""

    host: str
    boot: str
    """Identity of this life of the host's kernel."""
    pid: int
    started: int
    """Start time in clock ticks since boot (field 22 of /proc/PID/stat)."""


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job when it has been submitted; written once, never changed."""

    job_id: str
    kind: Literal["local", "slurm"]
    name: str
    run_dir: str
    experiment: str
    cluster: str
    nodes: int
    submitted: float
    """Seconds since the epoch."""
    process: ProcessIdentity | None = None
    """The process of a local job's script."""
    chain: tuple[str, ...] = ()
    """Ids of the Slurm jobs that wait to go on where `job_id` stops, in order."""

    @property
    def job_ids(self) -> tuple[str, ...]:
        return (self.job_id, *self.chain)

    def write(self) -> None:
        """Writes `job.json` so that a reader sees all of it or nothing."""
        path = Path(self.run_dir) / RECORD
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.rename(path)

    @classmethod
    def read(cls, run_dir: str | Path) -> JobRecord:
        """The record of a run directory, which may have been moved or copied since.

        Raises FileNotFoundError when it holds none, ValueError when the file is not one.
        """
        return cls._parse((Path(run_dir) / RECORD).read_bytes(), str(Path(run_dir).resolve()))

    @classmethod
    def _parse(cls, text: bytes, run_dir: str) -> JobRecord:
        try:
            data = json.loads(text)
            process = data.pop("process")
            data["chain"] = tuple(data.get("chain", ()))
            data["submitted"], data["nodes"] = float(data["submitted"]), int(data["nodes"])
            data["name"], data["job_id"], data["run_dir"] = str(data["name"]), str(data["job_id"]), run_dir
            return cls(**data, process=ProcessIdentity(**process) if process else None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = "it is not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
            raise ValueError(f"{run_dir}/{RECORD} is no job record of this hpc-gym: {what}") from None

    @classmethod
    def of_entry(cls, entry: os.DirEntry[str]) -> JobRecord:
        """As `read`, of a folder that has been listed by its real path: no path is resolved where no link is."""
        run_dir = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        with open(f"{run_dir}/{RECORD}", "rb") as file:  # noqa: PTH123 (a thousand times)
            return cls._parse(file.read(), run_dir)


def read_plan(run_dir: str | Path) -> Plan:
    """The Plan of a run directory. Raises UserError when there is none, or when it is none of this hpc-gym."""
    # Late: whoever lists a thousand runs wants no Plan.
    from hpc_gym.plan.plan import Plan

    try:
        return Plan.read(run_dir)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"not a plan of this hpc-gym ({error})"
        raise UserError(f"{run_dir} is no whole run directory any more: plan.json: {what}") from None


def runs_folders() -> list[Path]:
    """The folders that hold run directories: of `HPC_GYM_RUNS` (separated by `:`), `runs` here, and every one that a
    job of this user was ever submitted to.
    """
    folders = near_folders()
    with contextlib.suppress(OSError):
        folders += [Path(line) for line in _registry().read_text().splitlines() if line]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def near_folders() -> list[Path]:
    """The folders that somebody here means first: of `HPC_GYM_RUNS`, and `runs`; whether or not they exist."""
    return [*(Path(part) for part in os.environ.get("HPC_GYM_RUNS", "").split(os.pathsep) if part), Path("runs")]


def remember_runs_folder(folder: Path) -> None:
    """Notes a folder of run directories for later commands, whatever directory they are called from."""
    registry = _registry()
    with contextlib.suppress(OSError):
        known = registry.read_text().splitlines() if registry.exists() else []
        if str(folder.resolve()) in known:
            return
        registry.parent.mkdir(parents=True, exist_ok=True)
        with registry.open("a") as file:
            file.write(f"{folder.resolve()}\n")


def _registry() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "hpc-gym" / "runs"


@dataclass(frozen=True)
class Runs:
    """What lies in the folders of run directories."""

    records: tuple[JobRecord, ...]
    """Newest first."""
    unreadable: tuple[str, ...]
    """A sentence for each folder that has a `job.json` which cannot be read. Folders without one are none of ours."""


def look(folders: Iterable[Path] | None = None) -> Runs:
    """All runs there are, in `folders` or in those that are known."""
    records, unreadable = [], []
    for folder in runs_folders() if folders is None else folders:
        with contextlib.suppress(OSError), os.scandir(folder.resolve()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    records.append(JobRecord.of_entry(entry))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    unreadable.append(f"{entry.path}/{RECORD}: {error.strerror}")
                except ValueError as error:
                    unreadable.append(str(error))
    newest_first = sorted(records, key=lambda record: record.submitted, reverse=True)
    return Runs(tuple({record.run_dir: record for record in newest_first}.values()), tuple(sorted(unreadable)))


def all_records(folders: Iterable[Path] | None = None) -> list[JobRecord]:
    """The records of all runs, newest first."""
    return list(look(folders).records)


def find(job: str = "latest", *, only: bool = False) -> JobRecord:
    """The record of the job that `job` names. Raises UserError, with the nearest names, when there is none.

    A run here comes before one of the same name elsewhere, and the newest before others. With `only`, for what cannot
    be undone, a name that several have is refused.
    """
    if os.sep in job or job in (".", ".."):
        try:
            return JobRecord.read(job)
        except OSError:
            raise UserError(f"'{job}' is no run directory: it has no {RECORD}. See `hpc-gym list`.") from None
        except ValueError as error:
            raise UserError(str(error)) from None
    records = all_records()
    # squeue shows the components of a heterogeneous job as 12+0, 12+1.
    job_id = job.partition("+")[0]
    for record in records:
        if job == "latest" or job_id in record.job_ids:
            return record
    if named := [record for record in records if record.name == job]:
        return _meant(named, only)
    with contextlib.suppress(OSError, ValueError):
        return JobRecord.read(job)
    raise UserError(_unknown(job, records))


def _meant(named: list[JobRecord], only: bool) -> JobRecord:
    """Which of the runs of one name, newest first."""
    if len(named) > 1:
        near = {record.run_dir for record in all_records(near_folders())}
        named = [record for record in named if record.run_dir in near] or named
    if only and len(named) > 1:
        folders = "\n".join(f"  {record.run_dir}" for record in named)
        raise UserError(f"several runs are called '{named[0].name}'; say which by its run directory:\n{folders}")
    return named[0]


def _unknown(job: str, records: list[JobRecord]) -> str:
    searched = ", ".join(str(folder) for folder in runs_folders()) or "no folder: none has run directories yet"
    if not records:
        return f"there is no job '{job}': no run was found (searched: {searched}). `hpc-gym submit` makes one."
    names = [record.name for record in records] + [record.job_id for record in records]
    near = difflib.get_close_matches(job, names, n=3) or [records[0].name]
    return (
        f"there is no job '{job}'. Nearest: {', '.join(near)}. "
        "JOB is a job id, a run name, a run directory or 'latest'; "
        f"`hpc-gym list` shows all (searched: {searched})."
    )
