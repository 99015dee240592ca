"""Merges log files in time order: streaming, in constant memory, also while they grow.

Every line begins with a time stamp of fixed length (`hpc_gym.protocol.log_lines`), so lines are compared as bytes and
no date is parsed. A line without a stamp goes where the line before it went. No file is held open: on network file
systems it is the opening that shows what other nodes have written, and a run may have more files than a process may
have descriptors.

The merge goes in rounds: what all files have up to the moment at which the first of them has to be read on is sorted at
once. Python's sort merges such runs in C, several times as fast as a heap that is asked line by line.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from hpc_gym.jobs.log_files import LogFile
from hpc_gym.protocol.log_lines import STAMP_LENGTH

_CHUNK = 1 << 17
_LONGEST_LINE = 1 << 20
_POLL_S = 0.2
_CATCHING_UP = 1 << 10
"""Lines in one round that mean that there is more to read at once."""
_LAST = b"\xff"

Lines = tuple[LogFile, list[bytes]]
"""Lines of one file that follow one another, stamps included, line ends not."""


@dataclass(frozen=True)
class Round:
    """Lines of several files, none of them earlier than what came in the round before."""

    parts: list[Lines]
    keys: list[bytes]
    """The moment of every line, in the order of the parts."""

    def order(self) -> list[int]:
        """The lines by time: their positions in the parts one after another."""
        return sorted(range(len(self.keys)), key=self.keys.__getitem__)

    def in_order(self) -> Iterator[tuple[LogFile, bytes]]:
        """The lines by time, each with its file."""
        if len(self.parts) == 1:
            file, lines = self.parts[0]
            yield from ((file, line) for line in lines)
            return
        flat = [(file, line) for file, lines in self.parts for line in lines]
        yield from (flat[position] for position in self.order())


@dataclass
class _Tail:
    """One file read forward, in complete lines.

    Invariant: `lines[at:]` are the lines read and not yet given out; `keys` are the moments of all `lines`, in order, a
    clock that steps back being held.
    """

    file: LogFile
    offset: int = 0
    lines: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    at: int = 0
    newest: bytes = b""
    partial: bytes = b""
    """A line whose end has not been written yet."""
    at_end: bool = False
    """Whether the last reading came to the end of the file: nothing of it is owed."""

    def read(self, whole: bool) -> bool:
        """Reads on when nothing is left to give out. `whole`: a last line without line end waits for it.

        Returns whether there is something to give out.
        """
        while self.at >= len(self.lines):
            try:
                with open(self.file.path, "rb", buffering=0) as file:  # noqa: PTH123 (several times a second)
                    file.seek(self.offset)
                    chunk = file.read(_CHUNK)
            except FileNotFoundError:
                chunk = b""
            self.offset += len(chunk)
            lines = (self.partial + chunk).split(b"\n")
            self.partial = lines.pop()
            if self.partial and (len(self.partial) > _LONGEST_LINE or (not chunk and not whole)):
                lines.append(self.partial)
                self.partial = b""
            self.at_end = len(chunk) < _CHUNK and (whole or not self.partial)
            self.lines, self.at = lines, 0
            self.keys = list(accumulate(map(_stamp, lines), max, initial=self.newest))[1:]
            if lines:
                self.newest = self.keys[-1]
            elif not chunk:
                return False
        return True

    def take(self, bound: bytes) -> tuple[list[bytes], list[bytes]]:
        """(lines, keys) up to and including the moment `bound`, as far as they have been read."""
        start, end = self.at, bisect.bisect_right(self.keys, bound, lo=self.at)
        self.at = end
        return self.lines[start:end], self.keys[start:end]


def _stamp(line: bytes) -> bytes:
    return line[:STAMP_LENGTH] if line[STAMP_LENGTH - 1 : STAMP_LENGTH + 1] == b"Z " else b""


def merge(files: Iterable[LogFile]) -> Iterator[Round]:
    """The lines of all files as they are now, in time order."""
    yield from _rounds([_Tail(file) for file in files], _LAST, whole=False)


def follow(list_files: Callable[[], Iterable[LogFile]], ended: Callable[[], bool]) -> Iterator[Round]:
    """The lines of all files in time order, and what is written to them or to new files, until `ended()`.

    A line is given out one poll after the newest line that had been seen when it came, so that lines of several files
    that were written at one moment are put in order.
    """
    tails: dict[str, _Tail] = {}
    finished: set[str] = set()
    watermark = b""
    last_round = False
    while True:
        for file in list_files():
            if file.path not in finished:
                tails.setdefault(file.path, _Tail(file))
        bound = _LAST if last_round else watermark
        given = 0
        for each in _rounds(list(tails.values()), bound, whole=not last_round):
            given += len(each.keys)
            yield each
        if last_round:
            return
        watermark = max((tail.newest for tail in tails.values()), default=b"")
        if given == 0 and watermark == bound:
            last_round = ended()
            finished |= _forget_past_attempts(tails)
        if given < _CATCHING_UP and not last_round:
            time.sleep(_POLL_S)


def _forget_past_attempts(tails: dict[str, _Tail]) -> set[str]:
    """Takes out the files of all attempts but the last, which grow no more; returns their paths."""
    newest = max((tail.file.attempt for tail in tails.values()), default=0)
    past = {path for path, tail in tails.items() if tail.file.attempt < newest and not tail.partial}
    for path in past:
        del tails[path]
    return past


def _rounds(tails: list[_Tail], limit: bytes, whole: bool) -> Iterator[Round]:
    """The lines up to the moment `limit`; reads on in files as they are used up."""
    while True:
        tails = [tail for tail in tails if tail.read(whole)]
        # What has not been read of a file is no earlier than the newest line that has.
        unread = (tail.newest for tail in tails if not tail.at_end)
        bound = min(unread, default=_LAST)
        parts: list[Lines] = []
        keys: list[bytes] = []
        for tail in tails:
            lines, moments = tail.take(min(bound, limit))
            if lines:
                parts.append((tail.file, lines))
                keys += moments
        if not parts:
            return
        yield Round(parts, keys)
