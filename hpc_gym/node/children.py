"""Waits for the children of this process; it also gets orphans, so nobody else may wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator


class Children:
    """`reap` is to be called on every SIGCHLD."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[tuple[int, float]]] = {}
        self._starting = 0

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """In here no child is waited for: one that ends at once must not be forgotten before `expect`."""
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1
            self.reap()

    def expect(self, pid: int) -> asyncio.Future[tuple[int, float]]:
        """Resolves with (wait status, CPU seconds of it and its waited-for children) when the child `pid` has ended."""
        self._waiting[pid] = asyncio.get_running_loop().create_future()
        return self._waiting[pid]

    def reap(self) -> None:
        if self._starting:
            return
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    return
                waiting = self._waiting.pop(pid, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result((status, usage.ru_utime + usage.ru_stime))
