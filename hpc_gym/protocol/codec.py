"""Trajectories as bytes: one frame holds many trajectories as concatenated arrays, and decodes to views of its buffer.

A frame is a fixed prefix (magic, format version, sizes, CRC-32 of what follows), a small msgpack header (what is not an
array, per trajectory), and the arrays: lengths int32[n, 2], then for all trajectories in a row prompt_ids int32,
completion_ids int32, weight_versions int32, logprobs float32, policy_mask uint8. Little-endian, 4-byte aligned.
"""

from __future__ import annotations

import itertools
import struct
import sys
import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_gym.protocol.trajectory import Outcome, Trajectory

_MAGIC = b"HGYM"
_VERSION = 1
_PREFIX = struct.Struct("<4sHHIQI")
"""Magic, version, zero, bytes of the header without its padding, bytes of the arrays, CRC-32 of all that follows."""
PREFIX_BYTES = _PREFIX.size
MAX_FRAME_BYTES = 1 << 32

assert sys.byteorder == "little", "frames are written as the arrays lie in memory"


class FrameError(ValueError):
    """The bytes are no frame, or a frame that was cut or changed on its way."""


class _Facts(msgspec.Struct, array_like=True):
    index: int
    outcome: str
    reason: str
    reward: float
    turns: int
    attempts: int
    seconds: float
    metrics: dict[str, float]


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(list[_Facts])


def encode(trajectories: Sequence[Trajectory]) -> bytes:
    """The frame of these trajectories; of none, the smallest frame (it serves as a sign of life)."""
    header = _header_encoder.encode([_facts(trajectory) for trajectory in trajectories])
    padding = bytes(_padding(len(header)))
    lengths = np.array([(t.prompt_ids.size, t.completion_ids.size) for t in trajectories], np.int32)
    arrays: list[NDArray[np.generic]] = [lengths]
    for name, dtype in _ARRAYS:
        arrays += [np.ascontiguousarray(getattr(t, name), dtype) for t in trajectories]
    body = b"".join(array.data.cast("B") for array in arrays if array.size)
    check = zlib.crc32(body, zlib.crc32(header + padding))
    return _PREFIX.pack(_MAGIC, _VERSION, 0, len(header), len(body), check) + header + padding + body


_ARRAYS = (
    ("prompt_ids", np.int32),
    ("completion_ids", np.int32),
    ("weight_versions", np.int32),
    ("logprobs", np.float32),
    ("policy_mask", np.uint8),
)


def _facts(trajectory: Trajectory) -> _Facts:
    size = trajectory.completion_ids.size
    for name in ("policy_mask", "logprobs", "weight_versions"):
        if getattr(trajectory, name).shape != (size,):
            raise ValueError(f"trajectory {trajectory.index}: {name} must have {size} entries, as completion_ids has")
    return _Facts(
        trajectory.index,
        trajectory.outcome.value,
        trajectory.reason,
        trajectory.reward,
        trajectory.turns,
        trajectory.attempts,
        trajectory.seconds,
        dict(trajectory.metrics),
    )


def frame_bytes(prefix: bytes) -> int:
    """Bytes that follow a prefix of `PREFIX_BYTES` bytes. Raises FrameError for anything that is no prefix of ours."""
    header, body, _ = _sizes(prefix)
    return header + _padding(header) + body


def _padding(header: int) -> int:
    """Bytes between a header of so many bytes and the arrays, which are aligned."""
    return -header % 4


def _sizes(prefix: bytes | memoryview) -> tuple[int, int, int]:
    if len(prefix) < PREFIX_BYTES:
        raise FrameError(f"frame cut short: {len(prefix)} bytes")
    magic, version, zero, header, body, check = _PREFIX.unpack_from(prefix)
    if magic != _MAGIC or zero != 0:
        raise FrameError(f"not a frame of trajectories: it begins with {bytes(prefix[:8])!r}")
    if version != _VERSION:
        raise FrameError(f"frame of format {version}; this hpc-gym reads format {_VERSION}")
    if header + body > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {header + body} bytes: more than {MAX_FRAME_BYTES} are refused")
    return header, body, check


def decode(frame: bytes) -> list[Trajectory]:
    """The trajectories of exactly one frame. Their arrays are read-only views of `frame`, nothing is copied.

    Raises FrameError when the frame is torn, changed, or not ours.
    """
    view = memoryview(frame)
    header_size, body_size, check = _sizes(view)
    begin = PREFIX_BYTES + header_size + _padding(header_size)
    if len(view) != begin + body_size:
        raise FrameError(f"frame of {len(view)} bytes says it has {begin + body_size}")
    if zlib.crc32(view[PREFIX_BYTES:]) != check:
        raise FrameError("frame changed on its way: its checksum does not fit")
    header = view[PREFIX_BYTES : PREFIX_BYTES + header_size]
    try:
        return _unpack(_header_decoder.decode(header), view[begin:])
    except (msgspec.MsgspecError, ValueError) as error:
        raise FrameError(f"frame with contents that do not fit together: {error}") from error


def _unpack(facts: list[_Facts], body: memoryview) -> list[Trajectory]:
    lengths = np.frombuffer(body, np.int32, 2 * len(facts)).reshape(-1, 2)
    if lengths.size and int(lengths.min()) < 0:
        raise ValueError("negative length")
    prompts, completions = lengths.sum(0, dtype=np.int64).tolist() if facts else (0, 0)
    if len(body) != 8 * len(facts) + 4 * prompts + 13 * completions:
        raise ValueError("lengths and size disagree")
    arrays: list[NDArray[np.generic]] = []
    offset = lengths.nbytes
    for (_, dtype), count in zip(_ARRAYS, (prompts, *[completions] * 4), strict=True):
        arrays.append(np.frombuffer(body, dtype, count, offset))
        offset += arrays[-1].nbytes
    prompt_ids, completion_ids, versions, logprobs, mask = arrays
    prompt_ends = itertools.accumulate(lengths[:, 0].tolist())
    ends = itertools.accumulate(lengths[:, 1].tolist())
    found, p0, c0 = [], 0, 0
    for fact, p1, c1 in zip(facts, prompt_ends, ends, strict=True):
        found.append(
            Trajectory(
                index=fact.index,
                outcome=Outcome(fact.outcome),
                reason=fact.reason,
                prompt_ids=prompt_ids[p0:p1],  # type: ignore[arg-type]
                completion_ids=completion_ids[c0:c1],  # type: ignore[arg-type]
                policy_mask=mask[c0:c1],  # type: ignore[arg-type]
                logprobs=logprobs[c0:c1],  # type: ignore[arg-type]
                weight_versions=versions[c0:c1],  # type: ignore[arg-type]
                reward=fact.reward,
                turns=fact.turns,
                attempts=fact.attempts,
                seconds=fact.seconds,
                metrics=fact.metrics,
            )
        )
        p0, c0 = p1, c1
    return found
