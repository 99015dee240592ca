"""Frames carry trajectories unchanged, and nothing but whole frames is taken."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_gym.protocol import codec
from hpc_gym.protocol.trajectory import Outcome, Trajectory


def arrays(dtype: type[np.generic], size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 250, size).astype(dtype)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    prompt, completion, seed = draw(st.integers(0, 20)), draw(st.integers(0, 20)), draw(st.integers(0, 2**32))
    logprobs = -arrays(np.float32, completion, seed)
    logprobs[::3] = np.nan
    return Trajectory(
        index=draw(st.integers(0, 2**40)),
        outcome=draw(st.sampled_from(Outcome)),
        reason=draw(st.text(max_size=20)),
        prompt_ids=arrays(np.int32, prompt, seed + 1),
        completion_ids=arrays(np.int32, completion, seed + 2),
        policy_mask=arrays(np.uint8, completion, seed + 3) % 2,
        logprobs=logprobs,
        weight_versions=arrays(np.int32, completion, seed + 4) - 1,
        reward=draw(st.floats()),
        turns=draw(st.integers(0, 100)),
        attempts=draw(st.integers(1, 9)),
        seconds=draw(st.floats(0, 1e6)),
        metrics=draw(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3)),
    )


FIELDS = ("index", "outcome", "reason", "turns", "attempts", "seconds", "metrics")
ARRAYS = ("prompt_ids", "completion_ids", "policy_mask", "logprobs", "weight_versions")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(trajectories(), max_size=5))
def test_what_is_decoded_is_what_was_encoded(sent: list[Trajectory]) -> None:
    received = codec.decode(codec.encode(sent))
    assert len(received) == len(sent)
    for a, b in zip(sent, received, strict=True):
        for name in FIELDS:
            assert getattr(a, name) == getattr(b, name)
        assert a.reward == b.reward or (math.isnan(a.reward) and math.isnan(b.reward))
        for name in ARRAYS:
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("value", [1 / 53, 39 / 89, struct.unpack(">d", b"\x3f\xe0\xc1\xc1\xc1\xc1\xc1\xc1")[0]])
def test_a_metric_may_end_in_any_byte(value: float) -> None:
    sent = Trajectory(index=0, outcome=Outcome.OK, metrics={"score": value})
    assert [each.metrics for each in codec.decode(codec.encode([sent]))] == [{"score": value}]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(trajectories(), max_size=3), st.data())
def test_a_frame_that_was_cut_or_changed_is_refused(sent: list[Trajectory], data: st.DataObject) -> None:
    frame = codec.encode(sent)
    with pytest.raises(codec.FrameError):
        codec.decode(frame[: data.draw(st.integers(0, len(frame) - 1))])
    with pytest.raises(codec.FrameError):
        codec.decode(frame + b"\0")
    place, flip = data.draw(st.integers(0, len(frame) - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(frame)
    changed[place] ^= flip
    with pytest.raises(codec.FrameError):
        codec.decode(bytes(changed))


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(codec.FrameError):
        codec.decode(data)
    with pytest.raises(codec.FrameError):
        codec.decode(codec.encode([])[: codec.PREFIX_BYTES - 8] + data)


def test_the_prefix_says_how_much_follows() -> None:
    frame = codec.encode([Trajectory(0, Outcome.OK, prompt_ids=np.arange(7, dtype=np.int32))])
    assert codec.PREFIX_BYTES + codec.frame_bytes(frame[: codec.PREFIX_BYTES]) == len(frame)
    with pytest.raises(codec.FrameError, match="not a frame"):
        codec.frame_bytes(b"HTTP/1.1 500 Internal Server Error")


def test_arrays_are_views_and_not_copies() -> None:
    frame = codec.encode([Trajectory(0, Outcome.OK, prompt_ids=np.arange(7, dtype=np.int32))])
    (received,) = codec.decode(frame)
    assert np.shares_memory(received.prompt_ids, np.frombuffer(frame, np.uint8))
    assert not received.prompt_ids.flags.writeable


def test_a_trajectory_whose_arrays_differ_in_length_is_not_sent() -> None:
    with pytest.raises(ValueError, match="trajectory 3: policy_mask must have 2 entries"):
        codec.encode([Trajectory(3, Outcome.OK, completion_ids=np.zeros(2, np.int32))])
