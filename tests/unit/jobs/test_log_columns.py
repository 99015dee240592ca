from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_gym.jobs import log_columns
from hpc_gym.jobs.log_columns import Lines, gathered
from hpc_gym.jobs.log_moments import FIRST
from hpc_gym.protocol.log_lines import stamp

SOURCE = bytes(range(256)) * 2
NOW = 1_790_000_000.0
STRETCHES = st.lists(st.tuples(st.integers(0, 511), st.sampled_from([0, 1, 127, 128, 129, 256, 400])), max_size=40)


@given(stretches=STRETCHES, batch=st.sampled_from([1, 3, 1 << 13]))
def test_stretches_come_one_after_another_whatever_their_length_and_order(
    stretches: list[tuple[int, int]], batch: int
) -> None:
    wanted = [SOURCE[start : start + length] for start, length in stretches]
    starts = np.array([start for start, _ in stretches], np.int64)
    lengths = np.array([len(each) for each in wanted], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_columns, "_BATCH", batch)
        assert b"".join(gathered([SOURCE[:100], SOURCE[100:]], starts, lengths)) == b"".join(wanted)


def test_columns_say_where_the_lines_are_and_which_have_a_stamp() -> None:
    stamped = b"".join(stamp(NOW + second) + b"line %d\n" % second for second in (1, 3, 2))
    lines = Lines.of(b"first\n" + stamped + b"no stamp\n\n", FIRST)
    assert [lines.buffer[start:end] for start, end in zip(lines.starts, lines.ends, strict=True)] == (
        lines.buffer.splitlines(keepends=True)
    )
    assert lines.stamped.tolist() == [False, True, True, True, False, False]
    first, second, third, fourth, *rest = lines.moments.tolist()
    assert first == FIRST < second < third
    assert [fourth, *rest] == [third] * 3
    assert bytes(lines[1:4].text()) == stamped


@pytest.mark.parametrize("buffer", [b"\n", b"short\n", stamp(0)[:-2] + b"\n", stamp(0)[:-1] + b"\n"])
def test_a_buffer_too_short_for_a_stamp_has_none(buffer: bytes) -> None:
    assert not Lines.of(buffer, FIRST).stamped.any()
