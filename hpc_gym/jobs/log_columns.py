"""Log lines as columns: one buffer, and arrays that say where in it each line is and when it was written.

A Python object for each line would take most of the time of a merge: so lines are found, put in order and copied many
at once, by numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_gym.jobs.log_moments import Moments, moments

Positions = NDArray[np.int64]

_PIECE = 128
"""Bytes copied at once. Of a longer stretch several pieces are copied."""
_BATCH = 1 << 12
"""Stretches that are copied into one buffer."""


@dataclass(frozen=True)
class Lines:
    """Lines that follow one another in a buffer; the columns have one entry a line."""

    buffer: bytes
    starts: Positions
    ends: Positions
    """Line ends included."""
    moments: Moments
    """See `hpc_gym.jobs.log_moments`. In order."""
    stamped: NDArray[np.bool_]
    """Whether a line has a time stamp."""

    @classmethod
    def of(cls, buffer: bytes, since: int) -> Lines:
        """The lines of `buffer`, which ends with a line end; `since` is the moment of the line before them."""
        ends = np.flatnonzero(np.frombuffer(buffer, np.uint8) == ord("\n")) + 1
        starts = np.concatenate(([0], ends[:-1]))
        return cls(buffer, starts, ends, *moments(buffer, starts, ends, since))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: slice) -> Lines:
        return Lines(self.buffer, self.starts[which], self.ends[which], self.moments[which], self.stamped[which])

    def text(self) -> memoryview:
        """The lines as they stand in the buffer, without what is around them."""
        return memoryview(self.buffer)[self.starts[0] : self.ends[-1]]


def gathered(sources: Iterable[bytes | memoryview], starts: Positions, lengths: Positions) -> Iterator[bytes]:
    """The stretches `source[start : start + length]`, one after another, of the `sources` put together.

    They come in some buffers: small ones stay in the processor's cache, and their memory is used again.
    """
    source = _pieces(np.frombuffer(b"".join((*sources, bytes(_PIECE))), np.uint8))
    for first in range(0, len(starts), _BATCH):
        yield _copied(source, starts[first : first + _BATCH], lengths[first : first + _BATCH])


def _copied(source: NDArray[np.void], starts: Positions, lengths: Positions) -> bytes:
    """The stretches one after another, copied in pieces of one size, which numpy does in a few nanoseconds each.

    What the piece of a short stretch brings too much is written over by the next stretch, as numpy assigns in the order
    of the indices.
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    target = np.empty(int(ends[-1]) + _PIECE, np.uint8)
    written = _pieces(target)
    written[begins] = source[starts]
    # The rest of the long ones: their last piece ends where they end, so that it brings nothing too much.
    done, rest = _PIECE, np.flatnonzero(lengths > _PIECE)
    while len(rest):
        on = np.minimum(done, lengths[rest] - _PIECE)
        written[begins[rest] + on] = source[starts[rest] + on]
        done += _PIECE
        rest = rest[lengths[rest] > done]
    return target[:-_PIECE].tobytes()


def _pieces(buffer: NDArray[np.uint8]) -> NDArray[np.void]:
    """At every byte of `buffer` the next ones, without the last `_PIECE` bytes themselves."""
    return np.ndarray((len(buffer) - _PIECE + 1,), f"V{_PIECE}", buffer, strides=(1,))
