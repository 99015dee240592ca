"""Stopping at a checkpoint: on SIGUSR2 a run drops its rollouts in flight, saves, and exits with code 85.

The supervisor of every training node sends the signal to its ranks (a time limit is near, the job was preempted). The
ranks get it at different moments, so nothing happens before they agree: after a batch of rollouts, and at the end of a
step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):
    """The run is to stop at a checkpoint."""


class StopSignal:
    """Whether this rank was asked to stop. Installs the handler; make it in the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False
        signal.signal(signal.SIGUSR2, self._handle)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In here the signal raises StopRequested at once; elsewhere it is only noted.

        Not to be used around anything that all ranks must do together.
        """
        if self.requested:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False  # a second signal must not interrupt what cleans up after the first
            raise StopRequested
