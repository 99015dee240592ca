"""Merges log files in time order: streaming, in constant memory, also while they grow.

Every line begins with a time stamp of fixed length (`hpc_gym.protocol.log_lines`). A line without a stamp goes where
the line before it went. No file is held open: on network file systems it is the opening that shows what other nodes
have written, and a run may have more files than a process may have descriptors.

The merge goes in rounds: what all files have up to the moment at which the first of them has to be read on is put in
order at once, as columns (`hpc_gym.jobs.log_columns`): nothing is done line by line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from hpc_gym.jobs.log_columns import Lines, Positions, gathered
from hpc_gym.jobs.log_files import LogFile
from hpc_gym.jobs.log_moments import FIRST, LAST

_CHUNK = 1 << 17
_ALL_CHUNKS = 1 << 23
"""Bytes read ahead of all files together: of many files less of each."""
_LEAST_CHUNK = 1 << 12
_LONGEST_LINE = 1 << 20
_POLL_S = 0.2
_CATCHING_UP = 1 << 10
"""Lines in one round that mean that there is more to read at once."""


@dataclass(frozen=True)
class Round:
    """Lines of several files in time order, none of them earlier than those of the round before.

    The columns have one entry a line; positions are those in all `texts` put together.
    """

    texts: list[memoryview]
    files: list[LogFile]
    whose: Positions
    """The index of its file."""
    starts: Positions
    ends: Positions
    """Line ends included."""
    stamped: NDArray[np.bool_]

    @classmethod
    def of(cls, parts: list[tuple[LogFile, Lines]]) -> Round:
        """Puts lines of several files in order; lines of one moment stay in the order of the parts."""
        texts = [lines.text() for _, lines in parts]
        begins = [0, *accumulate(map(len, texts))]
        moved = [(lines, begin - lines.starts[0]) for (_, lines), begin in zip(parts, begins, strict=False)]
        order = np.argsort(np.concatenate([lines.moments for _, lines in parts]), kind="stable")
        return cls(
            texts,
            [file for file, _ in parts],
            np.repeat(np.arange(len(parts)), [len(lines) for _, lines in parts])[order],
            np.concatenate([lines.starts + by for lines, by in moved])[order],
            np.concatenate([lines.ends + by for lines, by in moved])[order],
            np.concatenate([lines.stamped for _, lines in parts])[order],
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: slice) -> Round:
        whose, starts, ends = self.whose[which], self.starts[which], self.ends[which]
        return Round(self.texts, self.files, whose, starts, ends, self.stamped[which])

    def __iter__(self) -> Iterator[tuple[LogFile, bytes]]:
        """The lines one by one, without line ends, each with its file."""
        lines = b"".join(gathered(self.texts, self.starts, self.ends - self.starts)).split(b"\n")
        yield from zip(map(self.files.__getitem__, self.whose.tolist()), lines, strict=False)


@dataclass
class _Tail:
    """One file read forward, in complete lines."""

    file: LogFile
    offset: int = 0
    parts: list[Lines] = field(default_factory=list)
    """Lines that have been read and not yet given out, as they were read; none of them is empty."""
    newest: int = FIRST
    """The moment of the last line read."""
    partial: bytes = b""
    """A line whose end has not been written yet."""
    at_end: bool = False
    """Whether the last reading came to the end of the file: nothing of it is owed."""
    enough: int = 0
    """Half of the lines that the last reading gave. With fewer left the next one is due: were it due only with none
    left, the files would come due one after the other, and a round would be a small part of what has been read."""

    def read(self, chunk: int, whole: bool) -> bool:
        """Reads on, `chunk` bytes at once, when little is left to give out.

        `whole`: a last line without line end waits for it. Returns whether there is something to give out.
        """
        while not self.at_end and sum(map(len, self.parts)) <= self.enough:
            self._read_chunk(chunk, whole)
        return bool(self.parts)

    def _read_chunk(self, size: int, whole: bool) -> None:
        try:
            with open(self.file.path, "rb", buffering=0) as file:  # noqa: PTH123 (several times a second)
                file.seek(self.offset)
                chunk = file.read(size)
        except FileNotFoundError:
            chunk = b""
        self.offset += len(chunk)
        end = chunk.rfind(b"\n") + 1
        if end:
            body, self.partial = b"".join((self.partial, memoryview(chunk)[:end])), chunk[end:]
        else:
            body, self.partial = b"", self.partial + chunk
        if self.partial and (len(self.partial) > _LONGEST_LINE or (not chunk and not whole)):
            body, self.partial = body + self.partial + b"\n", b""
        self.at_end = len(chunk) < size and (whole or not self.partial)
        if body:
            new = Lines.of(body, self.newest)
            self.newest, self.enough = int(new.moments[-1]), len(new) // 2
            self.parts.append(new)

    def take(self, bound: int) -> list[Lines]:
        """The lines up to and including the moment `bound`, as far as they have been read."""
        ends = [int(part.moments.searchsorted(bound, side="right")) for part in self.parts]
        taken = [part[:end] for part, end in zip(self.parts, ends, strict=True) if end]
        self.parts = [part[end:] for part, end in zip(self.parts, ends, strict=True) if end < len(part)]
        return taken


def merge(files: Iterable[LogFile]) -> Iterator[Round]:
    """The lines of all files as they are now, in time order."""
    yield from _rounds([_Tail(file) for file in files], LAST, whole=False)


class Follower:
    """Reads on in all log files of a job, and in those that come.

    A line is given out one `poll` after the newest line that had been seen when it came, so that lines of several files
    that were written at one moment are put in order.
    """

    def __init__(self, list_files: Callable[[], Iterable[LogFile]]) -> None:
        self._list_files = list_files
        self._tails: dict[str, _Tail] = {}
        self._finished: set[str] = set()
        self._watermark = FIRST
        self.idle = False
        """Whether the last poll gave nothing, and nothing is held back."""

    def poll(self, last: bool = False) -> Iterator[Round]:
        """The rounds that can be given out now. `last`: nothing more will be written, so all there is."""
        for file in self._list_files():
            if file.path not in self._finished:
                self._tails.setdefault(file.path, _Tail(file))
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


def follow(list_files: Callable[[], Iterable[LogFile]], ended: Callable[[], bool]) -> Iterator[Round]:
    """The lines of all files in time order, and what is written to them or to new files, until `ended()`."""
    follower = Follower(list_files)
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
        chunk = min(_CHUNK, max(_LEAST_CHUNK, _ALL_CHUNKS // max(1, len(tails))))
        tails = [tail for tail in tails if tail.read(chunk, whole)]
        # What has not been read of a file is no earlier than the newest line that has.
        unread = (tail.newest for tail in tails if not tail.at_end)
        bound = min(limit, min(unread, default=LAST))
        parts = [(tail.file, lines) for tail in tails for lines in tail.take(bound)]
        if not parts:
            return
        yield Round.of(parts)
