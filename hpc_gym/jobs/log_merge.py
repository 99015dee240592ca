"""Merges log files in time order: streaming, in constant memory, also while they grow.

Every line begins with a time stamp of fixed length (`hpc_gym.protocol.log_lines`). A line without a stamp goes where
the line before it went. No file is held open: on network file systems it is the opening that shows what other nodes
have written, and a run may have more files than a process may have descriptors.

The merge goes in rounds: what all files have up to the moment at which the first of them has to be read on is sorted at
once, by moments that are numbers in an array (`hpc_gym.jobs.log_moments`): nothing is done line by line but to cut it
out and to put its prefix before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from hpc_gym.jobs.log_files import LogFile
from hpc_gym.jobs.log_moments import FIRST, LAST, Moments, moments

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20
_POLL_S = 0.2
_CATCHING_UP = 1 << 10
"""Lines in one round that mean that there is more to read at once."""

Lines = tuple[LogFile, list[bytes]]
"""Lines of one file that follow one another, line ends not included."""

Show = Callable[[LogFile, list[bytes], bool], list[bytes]]
"""Makes of lines of a file those that are given out, one for one. The last argument: whether it is known that each has
a stamp. It is called when they are read: later they would have to be brought back into the processor's cache."""


@dataclass(frozen=True)
class Round:
    """Lines of several files, none of them earlier than what came in the round before."""

    parts: list[Lines]
    keys: list[Moments]
    """The moments of the lines of each part."""

    def __len__(self) -> int:
        return sum(map(len, self.keys))

    def order(self) -> list[int]:
        """The lines by time: their positions in the parts one after another."""
        positions: list[int] = np.argsort(np.concatenate(self.keys), kind="stable").tolist()
        return positions

    def in_order(self) -> Iterator[tuple[LogFile, bytes]]:
        """The lines by time, each with its file."""
        flat = [(file, line) for file, lines in self.parts for line in lines]
        yield from (flat[position] for position in self.order()) if len(self.parts) > 1 else flat


@dataclass
class _Tail:
    """One file read forward, in complete lines.

    Invariant: `lines[at:]` are the lines read and not yet given out; `keys` are the moments of all `lines`, in order.
    """

    file: LogFile
    show: Show
    offset: int = 0
    lines: list[bytes] = field(default_factory=list)
    keys: Moments = field(default_factory=lambda: np.empty(0, np.int64))
    at: int = 0
    newest: int = FIRST
    partial: bytes = b""
    """A line whose end has not been written yet."""
    at_end: bool = False
    """Whether the last reading came to the end of the file: nothing of it is owed."""
    enough: int = 0
    """Half of the lines that the last reading gave. With fewer left the next one is due: were it due only with none
    left, the files would come due one after the other, and a round would be a small part of what has been read."""

    def read(self, whole: bool) -> bool:
        """Reads on when little is left to give out. `whole`: a last line without line end waits for it.

        Returns whether there is something to give out.
        """
        while not self.at_end and len(self.lines) - self.at <= self.enough:
            self._read_chunk(whole)
        return self.at < len(self.lines)

    def _read_chunk(self, whole: bool) -> None:
        try:
            with open(self.file.path, "rb", buffering=0) as file:  # noqa: PTH123 (several times a second)
                file.seek(self.offset)
                chunk = file.read(_CHUNK)
        except FileNotFoundError:
            chunk = b""
        self.offset += len(chunk)
        body = self.partial + chunk
        end = body.rfind(b"\n") + 1
        body, self.partial = body[:end], body[end:]
        if self.partial and (len(self.partial) > _LONGEST_LINE or (not chunk and not whole)):
            body, self.partial = body + self.partial + b"\n", b""
        self.at_end = len(chunk) < _CHUNK and (whole or not self.partial)
        if body:
            self._append(body)

    def _append(self, body: bytes) -> None:
        lines = body.split(b"\n")
        lines.pop()
        keys, stamped = moments(body, self.newest)
        lines = self.show(self.file, lines, stamped)
        self.newest, self.enough = int(keys[-1]), len(lines) // 2
        self.lines = self.lines[self.at :] + lines
        self.keys = np.concatenate((self.keys[self.at :], keys))
        self.at = 0

    def take(self, bound: int) -> tuple[list[bytes], Moments]:
        """(lines, keys) up to and including the moment `bound`, as far as they have been read."""
        start, end = self.at, int(self.keys.searchsorted(bound, side="right"))
        self.at = max(start, end)
        return self.lines[start : self.at], self.keys[start : self.at]


def as_they_are(file: LogFile, lines: list[bytes], stamped: bool) -> list[bytes]:
    """Shows lines with their stamps, and nothing else."""
    return lines


def merge(files: Iterable[LogFile], show: Show = as_they_are) -> Iterator[Round]:
    """The lines of all files as they are now, in time order."""
    yield from _rounds([_Tail(file, show) for file in files], LAST, whole=False)


class Follower:
    """Reads on in all log files of a job, and in those that come.

    A line is given out one `poll` after the newest line that had been seen when it came, so that lines of several files
    that were written at one moment are put in order.
    """

    def __init__(self, list_files: Callable[[], Iterable[LogFile]], show: Show = as_they_are) -> None:
        self._list_files = list_files
        self._show = show
        self._tails: dict[str, _Tail] = {}
        self._finished: set[str] = set()
        self._watermark = FIRST
        self.idle = False
        """Whether the last poll gave nothing, and nothing is held back."""

    def poll(self, last: bool = False) -> Iterator[Round]:
        """The rounds that can be given out now. `last`: nothing more will be written, so all there is."""
        for file in self._list_files():
            if file.path not in self._finished:
                self._tails.setdefault(file.path, _Tail(file, self._show))
        bound, given = LAST if last else self._watermark, 0
        for each in _rounds(list(self._tails.values()), bound, whole=not last):
            given += len(each)
            yield each
        self._watermark = max((tail.newest for tail in self._tails.values()), default=FIRST)
        self.idle = given == 0 and self._watermark == bound
        if self.idle:
            self._forget_past_attempts()

    def _forget_past_attempts(self) -> None:
        """Lets go of the files of all attempts but the last, which grow no more."""
        newest = max((tail.file.attempt for tail in self._tails.values()), default=0)
        past = {path for path, tail in self._tails.items() if tail.file.attempt < newest and not tail.partial}
        for path in past:
            del self._tails[path]
        self._finished |= past


def follow(
    list_files: Callable[[], Iterable[LogFile]], ended: Callable[[], bool], show: Show = as_they_are
) -> Iterator[Round]:
    """The lines of all files in time order, and what is written to them or to new files, until `ended()`."""
    follower = Follower(list_files, show)
    while True:
        given = 0
        for each in follower.poll():
            given += len(each)
            yield each
        if follower.idle and ended():
            yield from follower.poll(last=True)
            return
        if given < _CATCHING_UP:
            time.sleep(_POLL_S)


def _rounds(tails: list[_Tail], limit: int, whole: bool) -> Iterator[Round]:
    """The lines up to the moment `limit`; reads on in files as they are used up."""
    for tail in tails:
        tail.at_end = False
    while True:
        tails = [tail for tail in tails if tail.read(whole)]
        # What has not been read of a file is no earlier than the newest line that has.
        unread = (tail.newest for tail in tails if not tail.at_end)
        bound = min(limit, min(unread, default=LAST))
        parts: list[Lines] = []
        keys: list[Moments] = []
        for tail in tails:
            lines, their_keys = tail.take(bound)
            if lines:
                parts.append((tail.file, lines))
                keys.append(their_keys)
        if not parts:
            return
        yield Round(parts, keys)
