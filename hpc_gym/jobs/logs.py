"""The logs of a job as a person reads them: merged in time order, each line with its role, node and process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpc_gym.jobs.log_columns import gathered
from hpc_gym.jobs.log_errors import Block, error_blocks
from hpc_gym.jobs.log_files import LogFile, Selection, attempts, log_files
from hpc_gym.jobs.log_merge import Round, follow, merge
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.script_log import script_log
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.log_lines import STAMP_LENGTH, has_stamp, stamp

_COLOURS = {"rollout": 36, "train": 32, "judge": 35, "environment": 33}
_TO_MILLISECONDS = 23


class Printer:
    """Turns lines into the bytes to be shown: `ROLE NODE PROCESS TIME TEXT`, the time in UTC to milliseconds.

    Between attempts stands how the one ended, and that another begins.
    """

    def __init__(self, color: bool, ends: Callable[[int], Outcome | None] = lambda _: None) -> None:
        """`ends`: how an attempt ended."""
        self._color = color
        self._ends = ends
        self._attempt: int | None = None
        self._prefixes: dict[str, bytes] = {}
        self._width = 0

    def round(self, shown: Round) -> Iterator[bytes]:
        """The lines of a round, with headings where another attempt begins."""
        attempts_of = np.array([file.attempt for file in shown.files])[shown.whose]
        cuts = [0, *(np.flatnonzero(np.diff(attempts_of)) + 1).tolist(), len(shown)]
        for begin, end in pairwise(cuts):
            yield self.heading(shown.files[shown.whose[begin]])
            yield from self._text(shown[begin:end])

    def line(self, file: LogFile, line: bytes) -> bytes:
        """One line as it stands in its file, as it is shown."""
        if has_stamp(line):
            line = line[:_TO_MILLISECONDS] + line[STAMP_LENGTH:]
        return self._prefix(file) + line

    def _text(self, shown: Round) -> Iterator[bytes]:
        """The lines: of each its prefix, its time down to milliseconds, and what comes after the time."""
        prefixes = [self._prefix(file) for file in shown.files]
        lengths = np.array([len(prefix) for prefix in prefixes])
        offsets = sum(map(len, shown.texts)) + np.cumsum(lengths) - lengths
        time_ends = shown.starts + np.where(shown.stamped, _TO_MILLISECONDS, 0)
        after_time = shown.starts + np.where(shown.stamped, STAMP_LENGTH, 0)
        starts = np.stack((offsets[shown.whose], shown.starts, after_time), axis=1)
        sizes = np.stack((lengths[shown.whose], time_ends - shown.starts, shown.ends - after_time), axis=1)
        return gathered((*shown.texts, *prefixes), starts.ravel(), sizes.ravel())

    def heading(self, file: LogFile) -> bytes:
        """What stands before the next lines where they are of another attempt than those before."""
        if file.attempt == self._attempt:
            return b""
        before, self._attempt = self._attempt, file.attempt
        if before is None and file.attempt == 1:
            return b""
        end = self._ends(before) if before is not None else None
        ended = f"-- attempt {before} ended: {end.sentence()} --\n" if end else ""
        return f"{ended}-- attempt {file.attempt} --\n".encode()

    def expect(self, files: Iterable[LogFile]) -> None:
        """Makes room for the names of these files, so that their lines stand one below the other."""
        for file in files:
            self._width = max(self._width, len(_name(file)))

    def _prefix(self, file: LogFile) -> bytes:
        if (prefix := self._prefixes.get(file.path)) is None:
            self.expect([file])
            prefix = f"{_name(file):<{self._width}} ".encode()
            if self._color:
                prefix = b"\x1b[%dm%s\x1b[0m" % (_COLOURS.get(file.role, 37), prefix)
            self._prefixes[file.path] = prefix
        return prefix


def _name(file: LogFile) -> str:
    return f"{file.role} {file.node} {file.process}"


def logs(
    run_dir: Path,
    selection: Selection | None = None,
    *,
    ended: Callable[[], bool] | None = None,
    color: bool = False,
) -> Iterator[bytes]:
    """The merged logs in pieces of whole lines. With `ended`, also what is written until it says true."""
    selection = selection or Selection()
    printer = Printer(color, lambda attempt: Outcome.read(run_dir / "attempts" / str(attempt)))
    printer.expect(log_files(run_dir, selection))
    if ended is None:
        rounds = merge(log_files(run_dir, selection))
    else:
        rounds = follow(lambda: log_files(run_dir, selection), ended)
    for each in rounds:
        yield from printer.round(each)
    yield from _end(run_dir)


def errors(run_dir: Path, selection: Selection | None = None, color: bool = False) -> Iterator[bytes]:
    """The errors in the logs: per attempt first those of the process that it failed by, then the others in time order.

    What others complain about once the attempt is being stopped is a consequence, and only counted. At the end stands
    the sentence that says how the job ended.
    """
    selection = selection or Selection()
    printer = Printer(color)
    printer.expect(log_files(run_dir, selection))
    for attempt in attempts(run_dir):
        if selection.attempt in (None, attempt):
            yield from _errors_of(run_dir, replace(selection, attempt=attempt), printer)
    yield from _end(run_dir)


def _errors_of(run_dir: Path, selection: Selection, printer: Printer) -> Iterator[bytes]:
    """The errors of the one attempt that is selected."""
    attempt, files = selection.attempt or 0, list(log_files(run_dir, selection))
    outcome = Outcome.read(run_dir / "attempts" / str(attempt))
    cause = outcome.failure if outcome else None
    first = [file for file in files if cause is not None and _is_of(file, cause)]
    others = [file for file in files if file not in first]

    def shown(block: Block) -> bytes:
        lines = [printer.line(block.file, line) for line in block.lines]
        return printer.heading(block.file) + b"\n".join(lines) + b"\n\n"

    heading = f"== attempt {attempt}, first cause ==\n"
    for block in error_blocks(merge(first)):
        yield heading.encode() + shown(block)
        heading = ""
    if cause is not None and heading:
        # Killed, or lost with its node: it had no time to say anything.
        yield f"== attempt {attempt}, first cause: {cause.sentence()} ==\n\n".encode()
    heading = f"== attempt {attempt}, others ==\n" if cause is not None else ""
    stopping, left_out = _stopping(run_dir, attempt), 0
    for block in error_blocks(merge(others)):
        if block.lines[block.first] > stopping:
            left_out += 1
            continue
        yield heading.encode() + shown(block)
        heading = ""
    if left_out:
        yield f"== attempt {attempt}: {left_out} more came while it was being stopped ==\n".encode()


def _end(run_dir: Path) -> Iterator[bytes]:
    """How the last attempt ended; where none has said so, what the job script wrote."""
    if (line := last_line(run_dir)) is not None:
        yield line.encode() + b"\n"
        return
    try:
        text = script_log(JobRecord.read(run_dir)).read_bytes()
    except (OSError, ValueError):
        return
    yield b"".join(b"job script: " + each + b"\n" for each in text.splitlines() if each.strip())


def _stopping(run_dir: Path, attempt: int) -> bytes:
    """The stamp of the moment at which an attempt began to be stopped; one after all others where it never was."""
    try:
        with (run_dir / "attempts" / str(attempt) / "events.jsonl").open("rb") as file:
            for line in file:
                if b'"stopping"' in line and (event := json.loads(line)).get("event") == "stopping":
                    return stamp(float(event["time"]))
    except (OSError, ValueError, KeyError):
        pass
    return b"\xff"


def _is_of(file: LogFile, failure: Failure) -> bool:
    return (file.role, file.node, file.process) == (failure.role, failure.node, failure.process)


def last_line(run_dir: Path) -> str | None:
    """The sentence that says how the last attempt ended; None while it has not."""
    outcome = Outcome.read(run_dir / "attempts" / "latest")
    return outcome.sentence() if outcome else None
