"""Signs of life while the main thread waits for something that has deadlines of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpc_gym.protocol.notify import notify


@contextmanager
def saying_alive(every_s: float = 2.0) -> Iterator[None]:
    """Says `WATCHDOG=1` again and again in here. Only for waits that end by themselves: anything else would hide a
    hang.
    """
    done = threading.Event()

    def say() -> None:
        while not done.wait(every_s):
            notify(WATCHDOG=1)

    thread = threading.Thread(target=say, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
