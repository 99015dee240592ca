"""NeMo Gym on nodes of its own, as a rollout server sees it: an environment server on each, which takes runs."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from urllib.parse import quote

import aiohttp
import msgspec

from hpc_gym.protocol.messages import Problem
from hpc_gym.rollout import connections
from hpc_gym.rollout.gym import ASK_S, POLL_S, Lost, unless_lost
from hpc_gym.rollout.outcomes import Failed

log = logging.getLogger(__name__)

SILENT_S = 15.0
"""After so long without an answer an environment server is lost: its node may have crashed, which closes nothing."""


class EnvironmentHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What `GET /health` of an environment server says."""

    ready: bool
    """NeMo Gym, and the judge that it asks, are there."""
    nonce: str
    """Differs after a restart."""
    status: str
    gym_ready: int
    gym_total: int
    missing: str
    """What of NeMo Gym is not there; empty when all of it is."""
    judge: str
    """How the judge stands that is asked there; empty where there is none."""
    judged: int
    trouble: str = ""
    """What keeps the judge from answering."""
    hopeless: str = ""
    """See `messages.Health`."""


class _Node:
    """One environment server."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.base = f"http://{endpoint}"
        self.health: EnvironmentHealth | None = None
        self.nonce = ""
        """Of the environment server that was heard last."""
        self.heard = 0.0
        """When it last answered, on the event loop's clock."""
        self.asked = -math.inf
        """When it was asked what it answered last."""
        self.running = 0
        self.lost: Lost | None = None

    @property
    def ready(self) -> bool:
        return self.health is not None and self.health.ready

    def usable(self, after: float = -math.inf) -> bool:
        """NeMo Gym is there, as seen since a moment; that server itself looks every POLL_S. It waits for a judge that
        is started again by itself.
        """
        return self.health is not None and not self.health.missing and self.asked >= after + POLL_S

    @property
    def counted_on(self) -> bool:
        """There is something to lose: it may be given runs, or has some."""
        return self.health is not None or self.lost is not None

    def lose(self, why: str) -> None:
        """Ends the runs that are under way there."""
        self.health = None
        if self.lost is not None:
            self.lost.set_result(f"{self.name} {why}")
            self.lost = None


class EnvironmentNodes:
    """Spreads runs over the environment servers, to the one that has the fewest of ours. One that is gone fails the
    runs that it had, and gets no more until it is back.
    """

    def __init__(self, endpoints: Sequence[str], token: str, first: int = 0) -> None:
        """`first`: the one to begin with, so that several rollout servers do not all begin with the same."""
        nodes = [_Node(f"environment-{number}", endpoint) for number, endpoint in enumerate(endpoints)]
        first %= len(nodes)
        self._nodes = [*nodes[first:], *nodes[:first]]
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    @property
    def ready(self) -> bool:
        """See `Gym`."""
        return all(node.ready for node in self._nodes)

    def usable(self, after: float) -> bool:
        return any(node.usable(after) for node in self._nodes)

    @property
    def total(self) -> int:
        return sum(node.health.gym_total for node in self._nodes if node.health)

    @property
    def answering(self) -> int:
        return sum(node.health.gym_ready for node in self._nodes if node.health)

    @property
    def judged(self) -> int:
        return sum(node.health.judged for node in self._nodes if node.health)

    @property
    def trouble(self) -> str:
        """See `Gym`."""
        return next((node.health.trouble for node in self._nodes if node.health and node.health.trouble), "")

    @property
    def hopeless(self) -> str:
        return next((node.health.hopeless for node in self._nodes if node.health and node.health.hopeless), "")

    def status(self) -> str:
        up = sum(node.health is not None for node in self._nodes)
        of = f"{up}/{len(self._nodes)} environment nodes"
        judges = {node.health.judge for node in self._nodes if node.health and node.health.judge}
        return ", ".join([f"NeMo Gym {self.answering}/{self.total or '?'} servers ready on {of}", *sorted(judges)])

    def missing(self) -> str:
        found = [f"{node.health.missing} on {node.name}" if node.health else node.name
                 for node in self._nodes if not node.usable()]  # fmt: skip
        return ", ".join(sorted(found))

    async def run(self, agent: str, body: bytes) -> bytes:
        """See `Gym`."""
        usable = [node for node in self._nodes if node.usable()]
        if not usable:
            raise Failed(f"environment_server_lost: {self.missing()} does not answer")
        node = min(usable, key=lambda each: each.running)
        if node.lost is None:
            node.lost = asyncio.get_running_loop().create_future()
        node.running += 1
        try:
            return await unless_lost(self._run(node, agent, body), node.lost)
        finally:
            node.running -= 1

    async def watch(self) -> None:
        """See `Gym`."""
        await asyncio.gather(*(self._watch(node) for node in self._nodes))

    async def _watch(self, node: _Node) -> None:
        while True:
            await self._look(node)
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _run(self, node: _Node, agent: str, body: bytes) -> bytes:
        try:
            async with self._http().post(f"{node.base}/run/{quote(agent)}", data=body) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            # Until it has been asked again: the retry must not go where this run was lost, only to be lost once more.
            node.health = None
            raise Failed(f"environment_server_lost: {node.name} broke the connection: {error!r}") from error
        if answer.status != 200:
            raise Failed(_reason(text) or f"agent_error: {node.name} answered {answer.status}")
        return text

    async def _look(self, node: _Node) -> None:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        try:
            timeout = aiohttp.ClientTimeout(total=ASK_S)
            async with self._http().get(f"{node.base}/health", timeout=timeout) as answer:
                health = msgspec.json.decode(await answer.read(), type=EnvironmentHealth)
        except TimeoutError:
            # No answer in time is no loss: a loaded machine, for a while.
            if node.counted_on and loop.time() - node.heard > SILENT_S:
                log.warning("%s is lost: no answer for %.0f s", node.name, loop.time() - node.heard)
                node.lose("no longer answers")
            return
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError) as error:
            if node.counted_on:
                log.warning("%s is lost: %r", node.name, error)
                node.lose("no longer answers")
            return
        if node.nonce not in ("", health.nonce):
            node.lose("was restarted")
        if node.health is None or node.health.status != health.status:
            log.info("%s: %s", node.name, health.status)
        node.health, node.nonce, node.heard, node.asked = health, health.nonce, loop.time(), asked

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = connections.to_nodes(self._token)
        return self._session


def _reason(text: bytes) -> str:
    """The reason of a failure as an environment server writes it."""
    try:
        return msgspec.json.decode(text, type=Problem).error
    except msgspec.MsgspecError:
        return ""
