"""Merges log files in time order: streaming, in constant memory, also while they grow.

Every line begins with a time stamp of fixed length (`hpc_gym.protocol.log_lines`), so lines are compared as bytes and
no date is parsed. A line without a stamp goes where the line before it went. No file is held open: on network file
systems it is the opening that shows what other nodes have written, and a run may have more files than a process may
have descriptors.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hpc_gym.jobs.log_files import LogFile
from hpc_gym.protocol.log_lines import STAMP_LENGTH

_CHUNK = 1 << 17
_LONGEST_LINE = 1 << 20
_POLL_S = 0.2
_CATCHING_UP = 1 << 10
"""Lines in one round that mean that there is more to read at once."""
_LAST = b"\xff"

Batch = tuple[LogFile, list[bytes]]
"""Lines of one file that follow one another in the merged order, stamps included, line ends not."""


@dataclass
class _Tail:
    """One file read forward, in complete lines.

    Invariant: `lines[at:]` are the lines read and not yet given out, and `key` is the stamp of the first of them.
    """

    file: LogFile
    offset: int = 0
    lines: list[bytes] = field(default_factory=list)
    at: int = 0
    key: bytes = b""
    newest: bytes = b""
    partial: bytes = b""
    """A line whose end has not been written yet."""

    def read(self, whole: bool = True) -> bool:
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
            self.lines, self.at = lines, 0
            if lines:
                self.key = max(self.newest, _stamp(lines[0]))
                self.newest = max(self.key, *map(_stamp, lines))
            elif not chunk:
                return False
        return True

    def take(self, bound: bytes) -> list[bytes]:
        """The lines up to and including those of the moment `bound`, as far as they have been read."""
        lines, at = self.lines, self.at
        # The common case first: the whole rest is older than everything else.
        if self.newest <= bound:
            taken, self.at = lines[at:], len(lines)
            return taken
        end = at
        key = self.key
        while key <= bound:
            end += 1
            if end == len(lines):
                break
            key = max(key, _stamp(lines[end]))
        self.at, self.key = end, key
        return lines[at:end]


def _stamp(line: bytes) -> bytes:
    return line[:STAMP_LENGTH] if line[STAMP_LENGTH - 1 : STAMP_LENGTH + 1] == b"Z " else b""


def merge(files: Iterable[LogFile]) -> Iterator[Batch]:
    """The lines of all files as they are now, in time order."""
    yield from _merged([_Tail(file) for file in files], _LAST, whole=False)


def follow(list_files: Callable[[], Iterable[LogFile]], ended: Callable[[], bool]) -> Iterator[Batch]:
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
        for file, lines in _merged(list(tails.values()), bound, whole=not last_round):
            given += len(lines)
            yield file, lines
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


def _merged(tails: list[_Tail], bound: bytes, whole: bool) -> Iterator[Batch]:
    """The lines up to the moment `bound`, in order; reads on in files as they are used up."""
    heap = [(tail.key, order, tail) for order, tail in enumerate(tails) if tail.read(whole)]
    heapq.heapify(heap)
    while heap and heap[0][0] <= bound:
        _, order, tail = heap[0]
        second = min((entry[0] for entry in heap[1:3]), default=_LAST)
        if lines := tail.take(min(second, bound)):
            yield tail.file, lines
        if tail.read(whole):
            heapq.heapreplace(heap, (tail.key, order, tail))
        else:
            heapq.heappop(heap)
