"""Appends to the event log from a thread of its own: a file system that hangs must not hold up a heartbeat."""

from __future__ import annotations

import json
import queue
import sys
import threading
from pathlib import Path

from hpc_gym.protocol.events import Event


class Journal:
    """The one writer of `events.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._path = path
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        self._queue.put(event)

    def close(self, within_s: float = 2.0) -> None:
        """Writes what is queued, as long as that takes no longer than `within_s`."""
        self._queue.put(None)
        self._thread.join(within_s)

    def _run(self) -> None:
        complained = False
        while (event := self._queue.get()) is not None:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:
                if not complained:
                    print(f"events are lost: {self._path}: {error.strerror}", file=sys.stderr, flush=True)
                complained = True
