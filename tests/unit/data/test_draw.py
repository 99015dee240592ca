"""The draw order: exact shares in every block, a permutation per epoch, and nothing to remember for a resume."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gym.data.draw import LONGEST_BLOCK, Draw, Mixture, integer_shares, permutation

sources = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 23)), min_size=1, max_size=4)


def mixture(parts: list[tuple[int, int]], seed: int) -> Mixture:
    return Mixture([weight for weight, _ in parts], [rows for _, rows in parts], seed)


@settings(deadline=None)
@given(sources, st.integers(0, 5), st.integers(0, 200))
def test_every_block_holds_exactly_the_shares_wherever_it_starts(
    parts: list[tuple[int, int]], seed: int, start: int
) -> None:
    mixed = mixture(parts, seed)
    counts = Counter(mixed.draw(start + i).source for i in range(mixed.block))
    assert [counts[source] for source in range(len(parts))] == list(mixed.shares)


@settings(deadline=None)
@given(sources, st.integers(0, 5))
def test_each_epoch_of_a_source_is_a_permutation_of_its_rows(parts: list[tuple[int, int]], seed: int) -> None:
    mixed = mixture(parts, seed)
    epochs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in range(600):
        draw = mixed.draw(index)
        epochs[draw.source, draw.epoch].append(draw.row)
    for (source, epoch), rows in epochs.items():
        assert len(set(rows)) == len(rows)
        if (source, epoch + 1) in epochs:
            assert sorted(rows) == list(range(parts[source][1]))


@given(sources, st.integers(0, 5), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_a_resume_at_any_draw_goes_on_with_the_same_rows(
    parts: list[tuple[int, int]], seed: int, resumed_at: int
) -> None:
    whole = [mixture(parts, seed).draw(index) for index in range(resumed_at + 40)]
    permutation.cache_clear()
    again = mixture(parts, seed)
    assert [again.draw(index) for index in range(resumed_at, resumed_at + 40)] == whole[resumed_at:]


def test_two_to_one_and_twelve_prompts_are_eight_and_four_in_every_step() -> None:
    mixed = Mixture([2, 1], [3800, 700], seed=1)
    for step in range(50):
        counts = Counter(mixed.draw(step * 12 + i).source for i in range(12))
        assert counts == {0: 8, 1: 4}


def test_sources_are_spread_over_a_block_not_lumped() -> None:
    mixed = Mixture([1, 1], [10, 10], seed=0)
    assert [mixed.draw(index).source for index in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([2, 1], (2, 1)),
        ([2.0, 1.0], (2, 1)),
        ([0.3, 0.7], (3, 7)),
        ([0.1, 0.2], (1, 2)),
        ([4, 2, 6], (2, 1, 3)),
        ([5], (1,)),
        ([0.5, 0.25, 0.25], (2, 1, 1)),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights: list[float], shares: tuple[int, ...]) -> None:
    assert integer_shares(weights) == shares


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_odd_weights_are_rounded_so_that_a_block_stays_short(weights: list[float]) -> None:
    shares = integer_shares(weights)
    assert min(shares) >= 1
    assert sum(shares) <= LONGEST_BLOCK + len(weights)
    for weight, share in zip(weights, shares, strict=True):
        assert abs(share / sum(shares) - weight / sum(weights)) < 2 * len(weights) / LONGEST_BLOCK


def test_the_order_follows_from_the_seed_alone() -> None:
    # Written down once: a change of these numbers would send every resumed run to other rows.
    expected = [2, 4, 7, 5, 0, 6, 3, 1]
    assert permutation(1, 0, 0, 8).tolist() == expected
    assert permutation(1, 0, 1, 8).tolist() != expected
    assert permutation(1, 1, 0, 8).tolist() != expected
    assert permutation(2, 0, 0, 8).tolist() != expected


@pytest.mark.parametrize(("weights", "rows"), [([], []), ([1], [0]), ([0], [5]), ([-1, 2], [5, 5]), ([1], [5, 5])])
def test_a_mixture_of_nothing_is_refused(weights: list[float], rows: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one row and a positive weight"):
        Mixture(weights, rows, 0)


def test_draws_are_counted_from_zero() -> None:
    mixed = Mixture([1], [1], 0)
    assert mixed.draw(5) == Draw(source=0, row=0, epoch=5)
    with pytest.raises(ValueError, match="counted from 0"):
        mixed.draw(-1)
