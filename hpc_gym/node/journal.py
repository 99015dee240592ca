"""Appends to the event log from a thread of its own: a file system that hangs must not hold up a heartbeat."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections import deque
from pathlib import Path

from hpc_gym.protocol.events import Event
from hpc_gym.protocol.files import append_whole

_KEPT = 10_000
"""Events that wait for a file system that is full."""


class Journal:
    """The one writer of `events.jsonl`. Only whole lines get into the file; what finds no room is tried again with the
    next event, and at the end.
    """

    def __init__(self, path: Path) -> None:
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._path = path
        self._unwritten: deque[bytes] = deque(maxlen=_KEPT)
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
        event: Event | None = {}
        while event is not None:
            event = self._queue.get()
            if event is not None:
                self._unwritten.append(json.dumps(event).encode() + b"\n")
            try:
                self._append()
            except OSError as error:
                if not complained:
                    print(f"events wait: {self._path}: {error.strerror}", file=sys.stderr, flush=True)
                complained = True

    def _append(self) -> None:
        lines = b"".join(self._unwritten)
        if lines:
            append_whole(self._path, lines)
            self._unwritten.clear()
