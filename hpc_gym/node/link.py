"""A supervisor's side of its connection to the coordinator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hpc_gym.node.channel import Channel, Message, connect
from hpc_gym.plan.plan import Supervision

_FIRST_CONTACT_WITHIN_S = 60.0
_KEPT = frozenset({"endpoints", "saving", "ended", "failed", "complained", "unfit", "released"})
"""What a coordinator must know. Of a connection that breaks nobody can tell what still got through."""


class Link:
    """Keeps one connection to the coordinator; messages sent before it stands are kept for it.

    `run` ends when the coordinator is gone: its port refuses connections, or it has been silent for `node_silent_s`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        hello: Message,
        supervision: Supervision,
        take: Callable[[Message], None],
    ) -> None:
        """`take` is called with every message of the coordinator but heartbeats and what asks for one."""
        self._address = (host, port)
        self._token = token
        self._hello = hello
        self._supervision = supervision
        self._take = take
        self._channel: Channel | None = None
        self._waiting: list[Message] = []
        self._kept: dict[tuple[str, str], Message] = {}
        """The last message of each of these types, by process: said again on every new connection."""
        self._last_heard = 0.0

    @property
    def stands(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._channel is not None

    def send(self, message: Message) -> None:
        if message["type"] in _KEPT:
            self._kept[message["type"], str(message.get("process", ""))] = message
        if self._channel is None:
            self._waiting.append(message)
        else:
            self._channel.send(message)

    async def run(self) -> str:
        """Returns why the coordinator counts as gone. Raises Refused when it does not know our token."""
        self._last_heard = time.monotonic() + _FIRST_CONTACT_WITHIN_S - self._supervision.node_silent_s
        met = False
        while True:
            try:
                channel = await connect(*self._address, self._token, self._hello)
            except ConnectionRefusedError:
                if met:
                    return "the coordinator has ended without a word"
            except (OSError, TimeoutError):
                pass
            else:
                met = True
                await self._talk(channel)
            if time.monotonic() - self._last_heard > self._supervision.node_silent_s:
                silent = time.monotonic() - self._last_heard
                return (
                    f"no word from the coordinator for {silent:.0f} s" if met else "the coordinator cannot be reached"
                )
            await asyncio.sleep(0.1)

    async def _talk(self, channel: Channel) -> None:
        self._last_heard = time.monotonic()
        for message in (*(kept for kept in self._kept.values() if kept not in self._waiting), *self._waiting):
            channel.send(message)
        self._waiting.clear()
        self._channel = channel
        beats = asyncio.create_task(self._beat(channel), name="heartbeat")
        try:
            while (heard := await channel.receive()) is not None:
                self._last_heard = time.monotonic()
                if heard.get("type") == "ask":
                    channel.send({"type": "heartbeat"})
                elif heard.get("type") != "heartbeat":
                    self._take(heard)
        finally:
            self._channel = None
            beats.cancel()
            channel.abort()

    async def _beat(self, channel: Channel) -> None:
        every, silent = self._supervision.heartbeat_s, self._supervision.node_silent_s
        while True:
            channel.send({"type": "heartbeat"})
            before = time.monotonic()
            await asyncio.sleep(every)
            if time.monotonic() - before > every + 1.0:
                # This process itself was held up, not the coordinator.
                self._last_heard = time.monotonic()
            elif time.monotonic() - self._last_heard > silent:
                channel.abort()
