from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_gym.jobs import log_columns
from hpc_gym.jobs.log_columns import NONE, Lines, gathered
from hpc_gym.jobs.log_moments import FIRST
from hpc_gym.protocol.log_lines import stamp

SOURCE = bytes(range(256))
STRETCHES = st.lists(st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 63, 64, 65, 128, 200])), max_size=40)


@given(stretches=STRETCHES, batch=st.sampled_from([1, 3, 1 << 13]))
def test_stretches_come_one_after_another_whatever_their_length_and_order(
    stretches: list[tuple[int, int]], batch: int
) -> None:
    wanted = [SOURCE[start : start + length] for start, length in stretches]
    starts = np.array([start for start, _ in stretches], np.int64)
    lengths = np.array([len(each) for each in wanted], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_columns, "_BATCH", batch)
        assert gathered([SOURCE[:100], SOURCE[100:]], starts, lengths) == b"".join(wanted)


def test_joined_lines_are_those_of_the_parts_without_what_was_left_out_of_them() -> None:
    first = Lines.of(b"".join(stamp(second) + b"a%d\n" % second for second in range(4)), FIRST)
    second = Lines.of(b"no stamp\n" + stamp(9) + b"b\n", int(first.moments[-1]))
    both = Lines.joined([first[1:3], NONE, second])
    texts = [both.text[start:end] for start, end in zip(both.starts, both.ends, strict=True)]
    assert texts == [stamp(1) + b"a1\n", stamp(2) + b"a2\n", b"no stamp\n", stamp(9) + b"b\n"]
    assert both.stamped.tolist() == [True, True, False, True]
    assert both.moments[2] == first.moments[3]
    assert len(both.text) == sum(map(len, texts))
