"""NeMo Gym on this node: which of its servers answer, and where each environment's agent is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp
import msgspec

from hpc_gym.rollout.vllm import KEEP_ALIVE_S

log = logging.getLogger(__name__)

POLL_S = 0.5
ASK_S = 5.0


class _Instance(msgspec.Struct):
    process_name: str
    url: str | None = None


class NemoGym:
    """Asks the head server which servers there are, and each server whether it is there.

    The head lists its servers before they are up (nemo-gym 0.4.0), so each is asked. `on_lost` is called with the
    names of servers that were there and now refuse connections: NeMo Gym itself notices within a minute, and lets
    rollouts hang until then.
    """

    def __init__(self, head_port: int, on_lost: Callable[[list[str]], None]) -> None:
        self._head = f"http://127.0.0.1:{head_port}"
        self._on_lost = on_lost
        self._urls: dict[str, str] = {}
        self._up: set[str] = set()
        self.session: aiohttp.ClientSession | None = None

    def http(self) -> aiohttp.ClientSession:
        """The connections to NeMo Gym's servers: without cookies, a session must not leak into another rollout, and
        without a cap.
        """
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self.session

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()

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

    def agent(self, name: str) -> str | None:
        """The address of that agent; None while NeMo Gym is not ready, or when there is no such agent."""
        return self._urls.get(name) if self.ready else None

    def missing(self) -> list[str]:
        """Names of the servers that do not answer."""
        return sorted(self._urls.keys() - self._up)

    async def watch(self) -> None:
        """Looks for ever."""
        while True:
            await self._look()
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        urls = await self._instances()
        answers = await asyncio.gather(*(self._answers(url) for url in urls.values()))
        up = {name for name, answer in zip(urls, answers, strict=True) if answer}
        # No answer in time is no loss: a loaded machine. A refused connection is.
        up |= {name for name, answer in zip(urls, answers, strict=True) if answer is None and name in self._up}
        lost = sorted(name for name in self._up if name not in up or urls[name] != self._urls[name])
        if up != self._up:
            log.info("NeMo Gym: %d/%d servers answer", len(up), len(urls))
        self._urls, self._up = urls, up
        if lost:
            log.warning("NeMo Gym lost %s", ", ".join(lost))
            self._on_lost(lost)

    async def _instances(self) -> dict[str, str]:
        """Names and addresses; the last known ones while the head is too busy to answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=ASK_S)
            async with self.http().get(f"{self._head}/server_instances", timeout=timeout) as answer:
                found = msgspec.json.decode(await answer.read(), type=list[_Instance])
        except TimeoutError:
            return self._urls
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError):
            return {}
        return {instance.process_name: instance.url for instance in found if instance.url}

    async def _answers(self, url: str) -> bool | None:
        """Whether it does; None when it did not in time."""
        try:
            async with self.http().get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as answer:
                await answer.read()
                return answer.status == 200
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError):
            return False
