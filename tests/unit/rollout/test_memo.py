"""A memo asks once, also when many ask at the same time, and forgets failures and what was not used for long."""

from __future__ import annotations

import asyncio

import pytest

from hpc_gym.rollout.memo import Memo


class Source:
    def __init__(self) -> None:
        self.asked = 0

    async def answer(self) -> int:
        self.asked += 1
        await asyncio.sleep(0.01)
        return self.asked

    async def fail(self) -> int:
        self.asked += 1
        raise ValueError("no")


async def test_those_who_ask_together_share_one_call() -> None:
    memo, source = Memo[int](10), Source()
    assert await asyncio.gather(*(memo.get("key", source.answer) for _ in range(8))) == [1] * 8
    assert (memo.hits, memo.misses) == (7, 1)


async def test_who_gives_up_leaves_the_others_their_answer() -> None:
    memo, source = Memo[int](10), Source()
    first, second = (asyncio.ensure_future(memo.get("key", source.answer)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == 1


async def test_failures_are_not_kept() -> None:
    memo, source = Memo[int](10), Source()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await memo.get("key", source.fail)
    assert await memo.get("key", source.answer) == 3


async def test_what_was_not_used_for_longest_goes_first() -> None:
    memo, source = Memo[int](2), Source()
    for key in ("a", "b", "a", "c"):
        await memo.get(key, source.answer)
    assert await memo.get("a", source.answer) == 1
    assert await memo.get("b", source.answer) == 4
