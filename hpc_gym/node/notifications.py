"""Receives what a process says on its `NOTIFY_SOCKET` (names: `hpc_gym.protocol.notify`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Said:
    """What one life of a process has said so far. Moments are of `time.monotonic`."""

    ready: bool = False
    status: str = ""
    last_watchdog: float = 0.0
    saving: bool = False
    failure: str = ""
    failed_at: float = 0.0


class Notifications(asyncio.DatagramProtocol):
    """One socket per process: who speaks is known by the socket, which lies in the node's private directory."""

    def __init__(self, path: Path, changed: Callable[[str], None]) -> None:
        """`changed` is called with the name of the field after every change but the watchdog's."""
        self.path = path
        self.said = Said()
        self._changed = changed
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self) -> None:
        """Starts to listen, for a new life of the process."""
        self.said = Said()
        if self._transport is not None:
            return
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        channel.bind(os.fspath(self.path))
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=channel)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def datagram_received(self, data: bytes, addr: object) -> None:
        for line in data.decode(errors="replace").splitlines():
            name, _, value = line.partition("=")
            self._take(name, value)

    def _take(self, name: str, value: str) -> None:
        said = self.said
        if name == "WATCHDOG":
            said.last_watchdog = time.monotonic()
        elif name == "READY" and value == "1" and not said.ready:
            said.ready = True
            self._changed("ready")
        elif name == "STATUS" and value != said.status:
            said.status = value
            self._changed("status")
        elif name == "X_SAVING" and said.saving != (value == "1"):
            said.saving = value == "1"
            self._changed("saving")
        elif name == "X_FAILURE" and value and not said.failure:
            said.failure, said.failed_at = value, time.monotonic()
            self._changed("failure")
