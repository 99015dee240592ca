"""Applications served for real on a thread, each on a port or socket of its own that outlives a stop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvicorn

from hpc_gym.rollout.serving import listener


class Served:
    """One event loop on a thread, and what is served on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._listeners: dict[str, tuple[uvicorn.Server, Any]] = {}
        self._watches: list[Any] = []

    def start(self, app: Any, path: Path | None = None, port: int = 0) -> str:
        """Serves `app` and returns its `host:port`, or the path of its Unix socket."""
        if path is None:
            bound = socket.create_server(("127.0.0.1", port))
            name = f"127.0.0.1:{bound.getsockname()[1]}"
        else:
            bound, name = socket.socket(socket.AF_UNIX), str(path)
            bound.bind(name)
            bound.listen()
        started = listener(app)
        self._listeners[name] = (started, asyncio.run_coroutine_threadsafe(started.serve([bound]), self.loop))
        return name

    def end(self, name: str) -> None:
        """Stops what is served there: connections are closed, new ones refused."""
        started, future = self._listeners.pop(name)
        started.should_exit = True
        future.result(10)

    def watch(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something until all is stopped."""
        self._watches.append(asyncio.run_coroutine_threadsafe(work, self.loop))

    def do(self, coroutine: Coroutine[Any, Any, Any], within_s: float = 20) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(within_s)

    def until(self, condition: Callable[[], bool], within_s: float = 10) -> None:
        """Waits until `condition()`, which is asked on the loop, holds."""
        end = time.monotonic() + within_s
        while not self.ask(condition):
            assert time.monotonic() < end, f"not within {within_s} s"
            time.sleep(0.01)

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a question that is asked on the loop."""

        async def asked() -> Any:
            return question()

        return self.do(asked())

    def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        for started, _ in self._listeners.values():
            started.should_exit = True
        for name in list(self._listeners):
            self.end(name)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
