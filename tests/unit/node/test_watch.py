"""A server that is busy with what it says is alive; one that says nothing and answers nobody hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from hpc_gym.node import watch
from hpc_gym.node.notifications import Notifications
from hpc_gym.node.watch import Watch
from hpc_gym.plan.plan import Probe, Process

ALIVE_S = 1.5


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """How long a server that answers nobody was left alone while it said that it lives, and after that."""
    monkeypatch.setattr(watch, "ANSWER_WITHIN_S", 0.2)
    return asyncio.run(_watched(tmp_path))


async def _watched(folder: Path) -> tuple[float, float]:
    target, ready, frozen = folder / "vllm-0.sock", asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if not frozen.is_set():
                # Longer than other servers are waited for: an engine between two long steps.
                await asyncio.sleep(0.3 if ready.is_set() else 0.0)
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                writer.close()

    def report(event: str, **_: object) -> None:
        if event == "ready":
            ready.set()

    said = Notifications(folder / "vllm-0.notify", lambda field: None)
    probe = Probe("http", target.name, "/is_sleeping")
    spec = Process("vllm-0", "rollout", "service", "base", ("vllm",), ready=probe, alive_within_s=ALIVE_S)
    async with await asyncio.start_unix_server(answer, target):
        watching = asyncio.create_task(Watch(spec, said, folder / "log", target, dict, report).run())
        await ready.wait()
        await asyncio.sleep(2 * ALIVE_S)
        frozen.set()
        began = time.monotonic()
        while time.monotonic() - began < 2 * ALIVE_S and not watching.done():
            said.datagram_received(b"WATCHDOG=1", None)
            await asyncio.sleep(0.1)
        stopped = time.monotonic()
        assert (await watching).startswith("hung: no good answer for")
        return stopped - began, time.monotonic() - stopped


def test_a_server_that_says_it_is_busy_is_waited_for_and_one_that_is_silent_is_not(
    seconds: tuple[float, float],
) -> None:
    busy, silent = seconds
    assert busy >= 2 * ALIVE_S
    assert 0.5 * ALIVE_S <= silent < 10
