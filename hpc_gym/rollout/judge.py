"""The way to the judge, a frozen model that verifies: NeMo Gym's model server for it asks here, on the loopback
listener, and the request goes on to the judge's vLLM of this node, or to an address outside with its key.

NeMo Gym's servers get their configuration on command lines, which everybody on the node can read: no key could be a
secret there. So the kernel is asked instead who is at the other end of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hpc_gym.plan.plan import Judge

log = logging.getLogger(__name__)

POLL_S = 0.5
ASK_S = 5.0
KEEP_ALIVE_S = 3.0
"""uvicorn, under vLLM, closes idle connections after 5 s: let go of them before that."""
_TABLE = Path("/proc/net/tcp")


def peer_uid(client_port: int, server_port: int, table: str) -> int | None:
    """The user who owns the client's end of a connection on 127.0.0.1, as `/proc/net/tcp` says; None: there is no such
    connection.
    """
    loopback = "0100007F" if sys.byteorder == "little" else "7F000001"
    ends = f" {loopback}:{client_port:04X} {loopback}:{server_port:04X} 01 "
    for line in table.splitlines():
        if ends in line:
            return int(line.split()[7])
    return None


class JudgeEndpoint:
    """Serves `chat/completions`, `completions`, `responses` and `models` as the judge does. `answered` counts its
    answers, `up` says whether it is there; an address outside is taken to be.
    """

    def __init__(self, judge: Judge, private_dir: str, secrets: Mapping[str, str]) -> None:
        self.up = judge.url is not None
        self.answered = 0
        self._timeout_s = judge.timeout_s
        self._socket = None if judge.url else f"{private_dir}/judge.sock"
        self._base = judge.url or "http://judge/v1"
        self._headers = {"Content-Type": "application/json"}
        if judge.api_key_env:
            if judge.api_key_env not in secrets:
                raise ValueError(f"judge.api_key_env: {judge.api_key_env} was not set when the job was submitted")
            self._headers["Authorization"] = f"Bearer {secrets[judge.api_key_env]}"
        self._session: aiohttp.ClientSession | None = None

    def routes(self, prefix: str) -> list[Route]:
        """The routes below `prefix` on the loopback listener."""
        methods = {"chat/completions": "POST", "completions": "POST", "responses": "POST", "models": "GET"}
        return [Route(f"{prefix}/{path}", self._asked(path), methods=[methods[path]]) for path in methods]

    async def watch(self) -> None:
        """Looks whether the judge's vLLM is there, for ever."""
        while True:
            if self._socket is not None:
                up = await self._healthy()
                if up != self.up:
                    log.log(logging.INFO if up else logging.WARNING, "the judge %s", "is ready" if up else "is lost")
                self.up = up
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _healthy(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        try:
            async with self._client().get("http://judge/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _asked(self, path: str) -> Callable[[Request], Awaitable[Response]]:
        async def asked(request: Request) -> Response:
            return await self._forward(path, request)

        return asked

    async def _forward(self, path: str, request: Request) -> Response:
        """Statuses of the judge go back as they are. NeMo Gym asks again after 503 (nemo-gym 0.4.0,
        `openai_utils.py`), which is right while a judge restarts, and not after 424.
        """
        server = request.scope["server"][1]
        client = request.client
        table = await asyncio.to_thread(_TABLE.read_text)
        if client is None or peer_uid(client.port, server, table) != os.getuid():
            return _problem(403, "the judge answers the user of this job only")
        data = await request.body() or None
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._client().request(
                request.method, f"{self._base}/{path}", data=data, timeout=timeout, allow_redirects=False
            ) as answer:
                body = await answer.read()
        except TimeoutError:
            return _problem(424, f"the judge did not answer within {self._timeout_s:.0f} s")
        except (aiohttp.ClientError, OSError) as error:
            log.warning("the judge could not be asked: %s", type(error).__name__)
            return _problem(503, "the judge could not be asked; it may be starting")
        if answer.status == 200:
            self.answered += 1
        elif answer.status in (401, 403):
            # Without its words: they may quote the key.
            log.warning("the judge refused the key, with %d", answer.status)
            return _problem(answer.status, "the judge refused the key (judge.api_key_env)")
        else:
            log.warning("the judge answered %s with %d: %s", path, answer.status, body[:300].decode(errors="replace"))
        return Response(body, answer.status, media_type=answer.content_type)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
            if self._socket is not None:
                connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=KEEP_ALIVE_S)
            # An address outside may only be reached through the site's proxy.
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._socket is None,
            )
        return self._session


def _problem(status: int, text: str) -> Response:
    error = {"error": {"message": text, "type": "judge_error", "code": status}}
    return Response(msgspec.json.encode(error), status, media_type="application/json")
