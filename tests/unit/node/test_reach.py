"""Which nodes try one another, and who is at fault where one does not get through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_gym.node.reach import culprit, neighbours


@given(st.integers(1, 200))
def test_every_node_is_tried_by_as_many_as_it_tries(nodes: int) -> None:
    tried = [neighbours(rank, nodes) for rank in range(nodes)]
    assert all(rank not in each and len(set(each)) == len(each) for rank, each in enumerate(tried))
    assert {sum(rank in each for each in tried) for rank in range(nodes)} == {len(tried[0])}
    assert len(tried[0]) == (nodes - 1).bit_length()


@pytest.mark.parametrize("bad", range(5))
def test_the_node_that_nobody_reaches_or_that_reaches_nobody_is_found(bad: int) -> None:
    pairs = [(rank, target) for rank in range(5) for target in neighbours(rank, 5)]
    assert culprit([pair for pair in pairs if pair[1] == bad]) == bad
    assert culprit([pair for pair in pairs if pair[0] == bad]) == bad
    assert culprit([pair for pair in pairs if bad in pair]) == bad


def test_of_two_the_one_that_was_not_reached_is_left_out() -> None:
    assert culprit([(0, 1)]) == 1
    assert culprit([(1, 0)]) == 0
