"""The order in which a run draws rows from its sources: a pure function of the seed and the index of the draw.

There is no state to save: a run that resumes at draw i goes on with exactly the rows it would have drawn, and
looking ahead is asking for a later index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

LONGEST_BLOCK = 10_000
"""Draws after which the pattern of sources repeats, at most; weights that would need more are rounded to shares of
this.
"""


@dataclass(frozen=True)
class Draw:
    """Row `row` of source `source`, drawn in that source's walk number `epoch`, all from 0."""

    source: int
    row: int
    epoch: int


class Mixture:
    """A weighted mixture of sources.

    Invariants: any `block` consecutive draws hold exactly `shares[s]` of source s, wherever they start; the draws of a
    source walk through all its rows in one permutation per epoch, so none comes twice before all have come once. A
    step of a multiple of `block` prompts therefore always has the same make-up.
    """

    def __init__(self, weights: Sequence[float], rows: Sequence[int], seed: int) -> None:
        """Source s has `rows[s]` rows and weight `weights[s]`, relative to the others.

        Raises ValueError when there is no source, or one is empty or has no positive weight.
        """
        if not weights or len(weights) != len(rows) or min(rows) < 1 or min(weights) <= 0:
            raise ValueError("a mixture needs sources with at least one row and a positive weight each")
        self.shares = integer_shares(weights)
        self.block = sum(self.shares)
        self._rows = tuple(rows)
        self._seed = seed
        self._pattern, self._before = _pattern(self.shares)

    def draw(self, index: int) -> Draw:
        """The draw with that index, from 0."""
        if index < 0:
            raise ValueError(f"draws are counted from 0, not {index}")
        blocks, position = divmod(index, self.block)
        source = int(self._pattern[position])
        nth = blocks * self.shares[source] + int(self._before[position])
        epoch, place = divmod(nth, self._rows[source])
        order = permutation(self._seed, source, epoch, self._rows[source])
        return Draw(source=source, row=int(order[place]), epoch=epoch)


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers in the same proportion (`LONGEST_BLOCK` in all, at most, else
    rounded).
    """
    # Through the decimal text: 0.1 is one tenth, not the binary fraction next to it.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > LONGEST_BLOCK:
        total = sum(exact)
        shares = [max(1, round(weight / total * LONGEST_BLOCK)) for weight in exact]
        divisor = math.gcd(*shares)
        shares = [share // divisor for share in shares]
    return tuple(shares)


@functools.lru_cache(maxsize=64)
def permutation(seed: int, source: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order of a source's rows in one epoch.

    numpy promises the raw stream of a bit generator for all versions, but not what `Generator.permutation` makes of it
    (NEP 19): so the rows are sorted by their raw numbers, and a run resumes alike under another numpy.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, source, epoch])).random_raw(rows)
    order: NDArray[np.int64] = np.argsort(stream, kind="stable")
    order.setflags(write=False)
    return order


def _pattern(shares: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per draw of a block: its source, and how many draws of that source came before it in the block.

    The j-th of n draws of a source wants to stand at (j + 1/2) / n of the block: sources are spread evenly.
    """
    places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
    sources = np.concatenate([np.full(share, source) for source, share in enumerate(shares)])
    counts = np.concatenate([np.arange(share) for share in shares])
    order = np.argsort(places, kind="stable")
    return sources[order], counts[order]
