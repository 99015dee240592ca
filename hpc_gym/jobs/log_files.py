"""Which log files a job has, and which of them are wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.protocol.log_lines import parse_log_name


@dataclass(frozen=True)
class LogFile:
    """The output of one process of one attempt."""

    path: str
    attempt: int
    role: str
    node: str
    process: str


@dataclass(frozen=True)
class Selection:
    """Which log files are wanted; None: all. `node` may be the name of a node or its number within its role."""

    role: str | None = None
    node: str | None = None
    process: str | None = None
    attempt: int | None = None

    def wants(self, file: LogFile) -> bool:
        return (
            self.role in (None, file.role)
            and (self.node in (None, file.node) or self.node == file.node.rpartition("-")[2])
            and self.process in (None, file.process)
        )


def attempts(run_dir: Path) -> list[int]:
    """Numbers of the attempts that a run has had, in order."""
    try:
        names = os.listdir(run_dir / "attempts")  # noqa: PTH208 (names only)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


def log_files(run_dir: Path, selection: Selection) -> Iterator[LogFile]:
    """The wanted log files that exist now, attempt by attempt, by name."""
    for attempt in attempts(run_dir):
        if selection.attempt not in (None, attempt):
            continue
        folder = run_dir / "attempts" / str(attempt) / "logs"
        try:
            names = sorted(os.listdir(folder))  # noqa: PTH208 (names only)
        except FileNotFoundError:
            continue
        for name in names:
            if (parts := parse_log_name(name)) is not None:
                file = LogFile(str(folder / name), attempt, *parts)
                if selection.wants(file):
                    yield file


def refuse_unknown(run_dir: Path, selection: Selection) -> None:
    """Raises UserError when a selection cannot match anything of this run, naming what there is."""
    if selection == Selection():
        return
    from hpc_gym.jobs.records import read_plan

    everything = list(log_files(run_dir, Selection()))
    have: dict[str, list[str]] = {
        "role": [file.role for file in everything],
        "node": [file.node for file in everything],
        "process": [file.process for file in everything],
    }
    for node in read_plan(run_dir).nodes:
        have["node"].append(node.name)
        for process in node.processes:
            have["role"].append(process.role)
            have["process"].append(process.name)
    for kind, names in have.items():
        wanted = getattr(selection, kind)
        numbers = [name.rpartition("-")[2] for name in names] if kind == "node" else []
        if wanted is not None and wanted not in names + numbers:
            raise UserError(f"this run has no {kind} '{wanted}'; it has: {', '.join(sorted(set(names))) or 'none'}")
    numbers_of_attempts = attempts(run_dir)
    if selection.attempt is not None and selection.attempt not in numbers_of_attempts:
        shown = ", ".join(map(str, numbers_of_attempts)) or "none yet"
        raise UserError(f"this run has no attempt {selection.attempt}; it has: {shown}")
