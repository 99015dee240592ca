"""NeMo Gym on this node: which of its servers answer, and what their agents make of a row."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any, Protocol

import aiohttp
import msgspec

from hpc_gym.rollout import connections
from hpc_gym.rollout.outcomes import Failed

log = logging.getLogger(__name__)

POLL_S = 0.5
ASK_S = 5.0


class _Instance(msgspec.Struct):
    process_name: str
    url: str | None = None


class Gym(Protocol):
    """Where the environments are: NeMo Gym on this node, or on nodes of its own."""

    @property
    def ready(self) -> bool:
        """All of it is there."""

    def usable(self, after: float) -> bool:
        """Whether enough of it is there for rollouts to run, as seen since a moment on the event loop's clock."""

    @property
    def total(self) -> int:
        """Servers of NeMo Gym that are known; 0 while no head server answers."""

    @property
    def answering(self) -> int:
        """How many of them answer."""

    @property
    def judged(self) -> int:
        """Answers of a judge that is asked there, not here."""

    @property
    def trouble(self) -> str:
        """What keeps that judge from answering, as a sentence; empty where nothing does."""

    @property
    def hopeless(self) -> str:
        """Why it is of no use to wait for that judge."""

    def status(self) -> str:
        """How it stands, for people."""

    def missing(self) -> str:
        """What is not there, for people."""

    async def run(self, agent: str, body: bytes) -> bytes:
        """What the agent answers to `/run` (JSON). Cancelling the call drops the run. Raises Failed."""

    async def watch(self) -> None:
        """Looks whether it is there, for ever."""

    async def close(self) -> None:
        """Closes the connections."""


Lost = asyncio.Future[str]
"""Done, with the reason, when what a run depends on is gone."""


async def unless_lost(work: Coroutine[Any, Any, bytes], lost: Lost) -> bytes:
    """The result of `work`. Raises Failed, and cancels it, when `lost` comes true first."""
    working = asyncio.ensure_future(work)
    try:
        either: set[asyncio.Future[Any]] = {working, lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Failed(f"environment_server_lost: {lost.result()}")
        return working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


class NemoGym:
    """Asks the head server which servers there are, and each server whether it is there.

    The head lists its servers before they are up (nemo-gym 0.4.0), so each is asked. When servers that were there
    refuse connections, the runs under way end: NeMo Gym itself notices within a minute, and lets them hang until then.
    """

    judged, trouble, hopeless = 0, "", ""

    def __init__(self, head_port: int) -> None:
        self._head = f"http://127.0.0.1:{head_port}"
        self._urls: dict[str, str] = {}
        self._up: set[str] = set()
        self._looked = -math.inf
        """When the newest look began that has ended."""
        self._lost: Lost | None = None
        self._session: aiohttp.ClientSession | None = None

    async def run(self, agent: str, body: bytes) -> bytes:
        """See `Gym`."""
        if not self.ready:
            raise Failed(f"environment_server_lost: {self.missing()} does not answer")
        if agent not in self._urls:
            raise Failed(f"unknown_agent: NeMo Gym has no agent '{agent}'")
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return await unless_lost(self._run(self._urls[agent], body), self._lost)

    async def _run(self, url: str, body: bytes) -> bytes:
        try:
            async with self._http().post(f"{url}/run", data=body) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise Failed(f"agent_unreachable: {error!r}") from error
        if answer.status != 200:
            code = "agent_error" if answer.status >= 500 else "row_refused"
            raise Failed(f"{code}: the agent answered {answer.status}: {text[:300].decode(errors='replace')}")
        return text

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = connections.to_nemo_gym()
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def total(self) -> int:
        """Servers of NeMo Gym, 0 while its head does not answer."""
        return len(self._urls)

    @property
    def answering(self) -> int:
        return len(self._up)

    @property
    def ready(self) -> bool:
        """Every server answers."""
        return bool(self._urls) and len(self._up) == len(self._urls)

    def usable(self, after: float) -> bool:
        return self.ready and self._looked >= after

    def status(self) -> str:
        return f"NeMo Gym {self.answering}/{self.total or '?'} servers ready"

    def missing(self) -> str:
        """Names of the servers that do not answer."""
        return f"{', '.join(sorted(self._urls.keys() - self._up)) or 'its head server'} of NeMo Gym"

    async def watch(self) -> None:
        """Looks for ever."""
        while True:
            await self._look()
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        began = asyncio.get_running_loop().time()
        urls = await self._instances()
        answers = await asyncio.gather(*(self._answers(url) for url in urls.values()))
        up = {name for name, answer in zip(urls, answers, strict=True) if answer}
        # No answer in time is no loss: a loaded machine. A refused connection is.
        up |= {name for name, answer in zip(urls, answers, strict=True) if answer is None and name in self._up}
        lost = sorted(name for name in self._up if name not in up or urls[name] != self._urls[name])
        if up != self._up:
            log.info("NeMo Gym: %d/%d servers answer", len(up), len(urls))
        self._urls, self._up, self._looked = urls, up, began
        if lost:
            log.warning("NeMo Gym lost %s", ", ".join(lost))
            if self._lost is not None:
                self._lost.set_result(f"{', '.join(lost)} of NeMo Gym no longer answers")
                self._lost = None

    async def _instances(self) -> dict[str, str]:
        """Names and addresses; the last known ones while the head is too busy to answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=ASK_S)
            async with self._http().get(f"{self._head}/server_instances", timeout=timeout) as answer:
                found = msgspec.json.decode(await answer.read(), type=list[_Instance])
        except TimeoutError:
            return self._urls
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError):
            return {}
        return {instance.process_name: instance.url for instance in found if instance.url}

    async def _answers(self, url: str) -> bool | None:
        """Whether it does; None when it did not in time."""
        try:
            async with self._http().get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as answer:
                await answer.read()
                return answer.status == 200
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError):
            return False
