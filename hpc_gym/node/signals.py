"""Signals that a job is stopped with, passed down from process to process without a moment at which one gets lost."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@contextmanager
def forwarded(forward: Any) -> Iterator[None]:
    """Inside, the signals go to `forward(number, frame)`, also those that were blocked when this process was
    started.
    """
    before = {signum: signal.signal(signum, forward) for signum in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def start_blocked(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
    """Popen of a program that begins with these signals blocked and unblocks them once it can handle them.

    Without, one that comes while the program is still being loaded would kill it, and nobody would stop in good order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(*args, **kwargs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
