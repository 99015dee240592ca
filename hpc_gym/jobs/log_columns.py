"""Log lines as columns: one buffer, and arrays that say where in it each line is and when it was written.

A Python object for each line would take most of the time of a merge: so lines are found, put in order and copied many
at once, by numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_gym.jobs.log_moments import Moments, moments

Positions = NDArray[np.int64]

_PIECE = 64
"""Bytes copied at once. Of a longer stretch several pieces are copied."""
_BATCH = 1 << 13
"""Pieces gathered before they are written: as many as stay in the processor's cache."""


@dataclass(frozen=True)
class Lines:
    """Lines in one buffer; the columns have one entry a line. Not every line of the buffer need be among them."""

    text: bytes
    starts: Positions
    ends: Positions
    """Line ends included."""
    moments: Moments
    """See `hpc_gym.jobs.log_moments`."""
    stamped: NDArray[np.bool_]
    """Whether a line has a time stamp."""

    @classmethod
    def of(cls, text: bytes, since: int) -> Lines:
        """The lines of `text`, which ends with a line end; `since` is the moment of the line before them."""
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
        starts = np.concatenate(([0], ends[:-1]))
        return cls(text, starts, ends, *moments(text, starts, ends, since))

    @classmethod
    def joined(cls, parts: Sequence[Lines]) -> Lines:
        """The lines of all parts, one part after the other. The lines of each part follow one another in its buffer."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return NONE
        texts = [memoryview(part.text)[part.starts[0] : part.ends[-1]] for part in parts]
        offsets = np.cumsum([0, *map(len, texts)])
        moved = [offset - part.starts[0] for offset, part in zip(offsets, parts, strict=False)]
        return cls(
            b"".join(texts),
            np.concatenate([part.starts + by for part, by in zip(parts, moved, strict=True)]),
            np.concatenate([part.ends + by for part, by in zip(parts, moved, strict=True)]),
            np.concatenate([part.moments for part in parts]),
            np.concatenate([part.stamped for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: slice | Positions) -> Lines:
        """Some of the lines, or all in another order; the buffer stays the same."""
        return Lines(self.text, self.starts[which], self.ends[which], self.moments[which], self.stamped[which])


_EMPTY = np.empty(0, np.int64)
NONE = Lines(b"", _EMPTY, _EMPTY, _EMPTY, np.empty(0, np.bool_))


def gathered(sources: Iterable[bytes], starts: Positions, lengths: Positions) -> bytes:
    """The stretches `source[start : start + length]`, one after another, of the `sources` put together.

    All are copied in pieces of one size, which numpy does in a few nanoseconds each. What the last piece of a stretch
    brings too much is written over by the next stretch, as numpy assigns in the order of the indices.
    """
    size, targets = int(lengths.sum()), np.cumsum(lengths) - lengths
    pieces = -(-lengths // _PIECE)
    if pieces.max(initial=0) > 1:
        firsts = np.repeat(np.cumsum(pieces) - pieces, pieces)
        into = (np.arange(len(firsts)) - firsts) * _PIECE
        starts, targets = np.repeat(starts, pieces) + into, np.repeat(targets, pieces) + into
    target = np.empty(size + _PIECE, np.uint8)
    read, written = _pieces(np.frombuffer(b"".join((*sources, bytes(_PIECE))), np.uint8)), _pieces(target)
    for first in range(0, len(starts), _BATCH):
        batch = slice(first, first + _BATCH)
        written[targets[batch]] = read[starts[batch]]
    return target[:size].tobytes()


def _pieces(buffer: NDArray[np.uint8]) -> NDArray[np.void]:
    """At every byte of `buffer` the next ones, without the last `_PIECE` bytes themselves."""
    return np.ndarray((len(buffer) - _PIECE + 1,), f"V{_PIECE}", buffer, strides=(1,))
