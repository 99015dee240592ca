"""Whether the nodes of a job reach one another on the chosen interface, asked while their programs load.

A node connects to those that are 1, 2, 4, ... ranks after it: with n nodes that is log2 n connections each, every node
is tried by as many others, and who cannot be reached, or cannot reach others, stands out. Both ends show that they know
the token, so no stranger at the same address passes for a node of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc_gym.node.channel import Refused, accept, connect
from hpc_gym.node.context import NodeContext, host_name
from hpc_gym.node.ports import listening

ADDRESS, HOST = "reach", "hostname"
"""What a node publishes beside its endpoints."""
_GIVEN_UP_AFTER_S = 12.0
_AGAIN_S = 0.5


def neighbours(rank: int, nodes: int) -> list[int]:
    """The ranks that a node tries to reach."""
    offsets = [1 << power for power in range(nodes.bit_length()) if 1 << power < nodes]
    return [(rank + offset) % nodes for offset in offsets]


def culprit(broken: Sequence[tuple[int, int]]) -> int:
    """The rank that most of the broken connections (from, to) have in common; in doubt, one that was not reached."""
    ends = Counter(rank for pair in broken for rank in pair)
    targets = {target for _, target in broken}
    return max(sorted(ends), key=lambda rank: (ends[rank], rank in targets))


class Reach:
    """Call `open` first, `learn` with every registry, and run `check` once; `close` at the end."""

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._listener: socket.socket | None = None
        self._known: dict[int, Mapping[str, str]] = {}
        self._came: set[int] = set()
        self._changed = asyncio.Event()
        self._seen: set[str] = set()

    def open(self) -> dict[str, str]:
        """What to publish beside the endpoints; nothing on one machine. Raises OSError without a free port."""
        if self._context.plan.launch.kind == "local":
            return {}
        self._listener = listening(self._context.address)
        address = f"{self._context.address}:{self._listener.getsockname()[1]}"
        return {ADDRESS: address, HOST: host_name()}

    def learn(self, registry: Mapping[str, Mapping[str, str]]) -> None:
        """Takes what the coordinator knows, by rank."""
        self._known |= {int(rank): found for rank, found in registry.items() if ADDRESS in found}
        self._changed.set()

    async def check(self, broken: Callable[[int, str], None], done: Callable[[dict[str, Any]], None]) -> None:
        """Tries its neighbours, and serves those whose neighbour it is until each has come.

        `broken(rank, cause)` is called for each that cannot be reached; `done` with what is worth keeping: seconds
        from when all were known, who was reached, and whose names do not resolve here, which need be no fault, for
        addresses are all that a job uses.
        """
        own, nodes = self._context.node.rank, len(self._context.plan.nodes)
        async with await asyncio.start_server(self._serve, sock=self._listener):
            ranks = neighbours(own, nodes)
            await self._until(lambda: all(rank in self._known for rank in ranks))
            began = time.monotonic()
            causes = await asyncio.gather(*(self._try(rank) for rank in ranks))
            for rank, cause in zip(ranks, causes, strict=True):
                if cause:
                    broken(rank, cause)
            hosts = [self._known[rank].get(HOST, "") for rank in ranks]
            resolved = await asyncio.gather(*(_resolves(host) for host in hosts))
            done(
                {
                    "seconds": round(time.monotonic() - began, 3),
                    "reached": [host for host, cause in zip(hosts, causes, strict=True) if not cause],
                    "unresolved": [host for host, found in zip(hosts, resolved, strict=True) if not found],
                }
            )
            expected = {rank for rank in range(nodes) if own in neighbours(rank, nodes)}
            await self._until(lambda: expected <= self._came)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            if (accepted := await accept(reader, writer, self._context.secrets.token, self._seen)) is not None:
                channel, hello = accepted
                await channel.close()
                self._came.add(int(hello["rank"]))
                self._changed.set()
        writer.close()

    async def _try(self, rank: int) -> str:
        """Why a node cannot be reached; "" when it can."""
        host, _, port = self._known[rank][ADDRESS].rpartition(":")
        deadline, cause = time.monotonic() + _GIVEN_UP_AFTER_S, ""
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(max(1.0, deadline - time.monotonic())):
                    own = {"rank": self._context.node.rank}
                    await (await connect(host, int(port), self._context.secrets.token, own)).close()
                return ""
            except TimeoutError:
                cause = "no answer"
            except (OSError, Refused) as error:
                cause = getattr(error, "strerror", None) or str(error)
                await asyncio.sleep(_AGAIN_S)
        name = self._known[rank].get(HOST, "")
        return f"{host_name()} does not reach {name} at {host} on {self._context.interface}: {cause}"


async def _resolves(host: str) -> bool:
    try:
        async with asyncio.timeout(3):
            await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        return False
    return True
