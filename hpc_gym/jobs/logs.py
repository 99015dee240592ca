"""The logs of a job as a person reads them: merged in time order, each line with its role, node and process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc_gym.jobs.log_errors import error_blocks
from hpc_gym.jobs.log_files import LogFile, Selection, attempts, log_files
from hpc_gym.jobs.log_merge import Round, follow, merge
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.script_log import script_log
from hpc_gym.protocol.attempt import Failure, Outcome
from hpc_gym.protocol.log_lines import STAMP_LENGTH, stamp

_COLOURS = {"rollout": 36, "train": 32, "judge": 35, "environment": 33}
_TO_MILLISECONDS = 23


class Printer:
    """Turns lines into the bytes to be shown: `ROLE NODE PROCESS TIME TEXT`, the time in UTC to milliseconds.

    Between attempts stands a line that says so.
    """

    def __init__(self, color: bool) -> None:
        self._color = color
        self._attempt: int | None = None
        self._prefixes: dict[str, bytes] = {}
        self._width = 0

    def show(self, file: LogFile, lines: list[bytes], stamped: bool) -> list[bytes]:
        """See `hpc_gym.jobs.log_merge.Show`."""
        prefix = self._prefixes.get(file.path) or self._prefix(file)
        if stamped:
            return [prefix + line[:_TO_MILLISECONDS] + line[STAMP_LENGTH:] for line in lines]
        return [
            prefix + line[:_TO_MILLISECONDS] + line[STAMP_LENGTH:]
            if line[STAMP_LENGTH - 1 : STAMP_LENGTH + 1] == b"Z "
            else prefix + line
            for line in lines
        ]

    def round(self, shown: Round) -> bytes:
        """The lines of a round in time order, as `show` has made them."""
        if len({file.attempt for file, _ in shown.parts}) > 1:
            return b"".join(b"%s%s\n" % (self.heading(file), line) for file, line in shown.in_order())
        lines = [line for _, part in shown.parts for line in part]
        in_order = map(lines.__getitem__, shown.order()) if len(shown.parts) > 1 else lines
        return b"%s%s\n" % (self.heading(shown.parts[0][0]), b"\n".join(in_order))

    def heading(self, file: LogFile) -> bytes:
        """What stands before the next lines where they are of another attempt than those before."""
        if file.attempt == self._attempt:
            return b""
        first, self._attempt = self._attempt is None, file.attempt
        return b"" if first and file.attempt == 1 else b"-- attempt %d --\n" % file.attempt

    def _prefix(self, file: LogFile) -> bytes:
        name = f"{file.role} {file.node} {file.process}"
        self._width = max(self._width, len(name))
        padded = f"{name:<{self._width}} ".encode()
        if self._color:
            padded = b"\x1b[%dm%s\x1b[0m" % (_COLOURS.get(file.role, 37), padded)
        self._prefixes[file.path] = padded
        return padded


def logs(
    run_dir: Path,
    selection: Selection | None = None,
    *,
    ended: Callable[[], bool] | None = None,
    color: bool = False,
) -> Iterator[bytes]:
    """The merged logs in pieces of whole lines. With `ended`, also what is written until it says true."""
    selection = selection or Selection()
    printer = Printer(color)
    if ended is None:
        rounds = merge(log_files(run_dir, selection), printer.show)
    else:
        rounds = follow(lambda: log_files(run_dir, selection), ended, printer.show)
    for each in rounds:
        yield printer.round(each)
    yield from _end(run_dir)


def errors(run_dir: Path, selection: Selection | None = None, color: bool = False) -> Iterator[bytes]:
    """The errors in the logs: per attempt first those of the process that it failed by, then the others in time order.

    What others complain about once the attempt is being stopped is a consequence, and only counted. At the end stands
    the sentence that says how the job ended.
    """
    selection = selection or Selection()
    printer = Printer(color)
    for attempt in attempts(run_dir):
        if selection.attempt not in (None, attempt):
            continue
        files = list(log_files(run_dir, Selection(selection.role, selection.node, selection.process, attempt)))
        outcome = Outcome.read(run_dir / "attempts" / str(attempt))
        cause = outcome.failure if outcome else None
        first = [file for file in files if cause is not None and _is_of(file, cause)]
        others = [file for file in files if file not in first]
        stopping, left_out = _stopping(run_dir, attempt), 0
        for title, group in (("first cause", first), ("others", others)):
            headed = not first
            for block in error_blocks(merge(group)):
                if group is others and block.lines[block.first] > stopping:
                    left_out += 1
                    continue
                if not headed:
                    headed = True
                    yield f"== attempt {attempt}, {title} ==\n".encode()
                lines = printer.show(block.file, block.lines, False)
                yield printer.heading(block.file) + b"\n".join(lines) + b"\n\n"
        if left_out:
            yield f"== attempt {attempt}: {left_out} more came while it was being stopped ==\n".encode()
    yield from _end(run_dir)


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
