"""Cuts the optimizer parts that some number of ranks wrote anew, for another number. Imports torch, not DeepSpeed.

ZeRO keeps the fp32 weights and the optimizer's state as flat tensors, each rank a part of them. How parameters lie in
these depends on the number of ranks, so both cuts are described by *pieces*, and elements are found by the name of
their parameter. A rank reads only what becomes its own: the files are mapped, not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from hpc_gym.training.checkpoints import CheckpointError

FP32 = "fp32"
"""The key of the weights themselves, beside the keys of the optimizer's state (`exp_avg`, ...)."""


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a parameter, which lie from `at` on in a flat tensor."""

    name: str
    start: int
    stop: int
    at: int


def cut_flat(numels: Sequence[tuple[str, int]], padding: Sequence[int], size: int, rank: int) -> list[Piece]:
    """ZeRO 1 and 2: the parameters one after another, each followed by its padding, cut into parts of `size`."""
    pieces, offset = [], 0
    begin, end = rank * size, (rank + 1) * size
    for (name, numel), padded in zip(numels, padding, strict=True):
        start, stop = max(begin, offset), min(end, offset + numel)
        if start < stop:
            pieces.append(Piece(name, start - offset, stop - offset, start - begin))
        offset += numel + padded
    return pieces


def cut_each(numels: Sequence[tuple[str, int]], count: int, rank: int) -> list[Piece]:
    """ZeRO 3: every parameter by itself is cut into `count` parts of one size, the last ones padded."""
    pieces, at = [], 0
    for name, numel in numels:
        size = -(-numel // count)
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        if start < stop:
            pieces.append(Piece(name, start, stop, at))
        at += size
    return pieces


@dataclass(frozen=True)
class Part:
    """What one rank wrote: of every flat group the fp32 weights and the optimizer's state."""

    fp32: Sequence[torch.Tensor]
    state: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Place:
    """A piece in the file of a rank."""

    rank: int
    group: int
    piece: Piece


class SavedParts:
    """The parts of all ranks of a checkpoint. `read` gives that of a rank; `cuts[rank][group]` says what is in it."""

    def __init__(self, read: Callable[[int], Part], cuts: Sequence[Sequence[Sequence[Piece]]]) -> None:
        self._read = cache(read)
        self._places: dict[str, list[_Place]] = {}
        for rank, groups in enumerate(cuts):
            for group, pieces in enumerate(groups):
                for piece in pieces:
                    self._places.setdefault(piece.name, []).append(_Place(rank, group, piece))

    def group(self, names: Sequence[str], pieces: Sequence[Piece], size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """A flat group of `size` elements as it would have been saved: its fp32 weights and its optimizer state.

        `names`: all parameters of the group, `pieces` those of this rank; what is between them is padding, zero.
        Raises CheckpointError for a parameter that was not saved and for a state that cannot be cut.
        """
        if unknown := [name for name in names if name not in self._places]:
            raise CheckpointError(f"the checkpoint has no optimizer state of {unknown[0]}: it is of another model")
        template = self._values(self._places[names[0]][0])
        flat = {
            key: torch.zeros(size, dtype=value.dtype)
            for key, value in template.items()
            if isinstance(value, torch.Tensor) and value.dim()
        }
        single = {key: value for key, value in template.items() if key not in flat}
        for piece in pieces:
            copied = sum(self._copy(place, piece, flat, single) for place in self._places[piece.name])
            if copied != piece.stop - piece.start:
                raise CheckpointError(
                    f"the checkpoint has {copied} of {piece.stop - piece.start} elements of {piece.name}: it is of "
                    "another model"
                )
        return flat.pop(FP32), {**flat, **single}

    def _copy(self, place: _Place, piece: Piece, flat: Mapping[str, torch.Tensor], single: Mapping[str, Any]) -> int:
        """Copies what both have in common, and returns how many elements that is."""
        start, stop = max(place.piece.start, piece.start), min(place.piece.stop, piece.stop)
        if start >= stop:
            return 0
        values = self._values(place)
        if values.keys() != flat.keys() | single.keys() or any(values[key] != single[key] for key in single):
            raise CheckpointError(f"the optimizer's state of {piece.name} is not the same on all ranks that saved it")
        source, target = place.piece.at + start - place.piece.start, piece.at + start - piece.start
        for key, tensor in flat.items():
            tensor[target : target + stop - start] = values[key][source : source + stop - start]
        return stop - start

    def _values(self, place: _Place) -> dict[str, Any]:
        part = self._read(place.rank)
        weights = part.fp32[place.group]
        for key, value in part.state[place.group].items():
            # ZeRO 1 and 2 save the weights without the padding at the end, but the state with it.
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() < weights.numel():
                raise CheckpointError(
                    f"the optimizer's '{key}' has {value.numel()} elements for {weights.numel()} weights, so it cannot "
                    "be divided among another number of training ranks: resume with as many as wrote it"
                )
        return {FP32: weights, **part.state[place.group]}
