"""SIGUSR2 interrupts only what may be interrupted, once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from hpc_gym.training.stopping import StopRequested, StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = signal.getsignal(signal.SIGUSR2)
    yield StopSignal()
    signal.signal(signal.SIGUSR2, before)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


def test_it_is_only_noted_in_the_middle_of_a_step(stop: StopSignal) -> None:
    ask()
    assert stop.requested


def test_it_ends_a_wait_at_once(stop: StopSignal) -> None:
    timer = threading.Timer(0.1, ask)
    timer.start()
    began = time.monotonic()
    with pytest.raises(StopRequested), stop.interruptible():
        threading.Event().wait(10)
    timer.join()
    assert time.monotonic() - began < 2


def test_a_second_signal_does_not_interrupt_the_clean_up(stop: StopSignal) -> None:
    cleaned = False
    with pytest.raises(StopRequested), stop.interruptible():
        try:
            ask()
        finally:
            ask()
            cleaned = True
    assert cleaned


def test_once_asked_nothing_long_is_begun(stop: StopSignal) -> None:
    ask()
    with pytest.raises(StopRequested), stop.interruptible():
        pytest.fail("was begun")
