"""Ports and addresses of a node: what it reserves and publishes, and what it learns of the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Mapping

from hpc_gym.node.context import NodeContext
from hpc_gym.node.placeholders import Values, declared_endpoints
from hpc_gym.node.ports import Ports, listening


class Endpoints:
    """Call `open` first; then `values` fills this node's placeholders."""

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._declared = declared_endpoints(context.plan)
        self._ports = Ports()
        self._sockets: dict[str, socket.socket] = {}
        self._published: dict[str, str] = {}
        self._known: dict[str, str] = {}
        self._learned = asyncio.Event()
        self.names = tuple(self._declared)
        self._numbers: dict[str, int] = {}
        self._fds: dict[str, int] = {}
        self.values = Values(context.plain_values(), self._numbers, self._fds, self._address_of, self.names)

    def open(self) -> dict[str, str]:
        """Reserves ports and opens sockets; returns what to publish, `name: "host:port"`. Raises OSError without free
        ports.
        """
        address = self._context.address
        for process in self._context.node.processes:
            for name in process.ports:
                name, _, count = name.partition("*")
                self._numbers[name] = self._ports.block(int(count)) if count else self._ports.single()
                if not count:
                    self._published[name] = f"{address}:{self._numbers[name]}"
            for name in process.listen:
                self._sockets[name] = listening(address)
                self._published[name] = f"{address}:{self._sockets[name].getsockname()[1]}"
        self._fds.update({name: opened.fileno() for name, opened in self._sockets.items()})
        return self._published

    def learn(self, registry: Mapping[str, Mapping[str, str]]) -> None:
        """Takes what the coordinator knows: endpoints of each rank."""
        for name, rank in self._declared.items():
            if (found := registry.get(str(rank), {}).get(name)) is not None:
                self._known[name] = found
        self._learned.set()

    async def known(self, names: Collection[str]) -> None:
        """Returns when the addresses of all `names` are known."""
        while any(name not in self._published and name not in self._known for name in names):
            self._learned.clear()
            await self._learned.wait()

    def close(self) -> None:
        self._ports.release()
        for opened in self._sockets.values():
            opened.close()

    def _address_of(self, name: str) -> str:
        # Where several nodes publish a name (each its own policy endpoint), a node means its own.
        return self._published.get(name) or self._known[name]
