"""A bounded memo of pure asynchronous calls; callers that ask at the same time share one call."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Memo(Generic[Value]):
    """Keeps the last `capacity` results that were used. A call that fails is not kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._calls: OrderedDict[Hashable, asyncio.Task[Value]] = OrderedDict()
        self.hits = 0
        self.misses = 0

    async def get(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """The result of `call` for `key`. A caller that is cancelled does not cancel the call the others wait for."""
        task = self._calls.get(key)
        if task is None:
            self.misses += 1
            task = asyncio.ensure_future(call())
            self._calls[key] = task
            task.add_done_callback(lambda done: self._settle(key, done))
            while len(self._calls) > self._capacity:
                self._calls.popitem(last=False)
        else:
            self.hits += 1
            self._calls.move_to_end(key)
        return await asyncio.shield(task)

    def _settle(self, key: Hashable, task: asyncio.Task[Value]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._calls.get(key) is task:
            del self._calls[key]
