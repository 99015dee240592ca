"""The way to the judge, a frozen model that verifies: NeMo Gym's model server for it asks here, on the loopback
listener, and the request goes on to the judge's vLLM of this node, to other nodes with the job's token, or to an
address outside with its key.

NeMo Gym's servers get their configuration on command lines, which everybody on the node can read: no key could be a
secret there. So the kernel is asked instead who is at the other end of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hpc_gym.plan.plan import Judge
from hpc_gym.rollout import connections
from hpc_gym.rollout import judge_answers as answers
from hpc_gym.rollout.serving import GONE, openai_error, until_gone

log = logging.getLogger(__name__)

POLL_S = 0.5
POLL_OUTSIDE_S = 5.0
ASK_S = 5.0
ASK_OUTSIDE_S = 60.0
"""An answer, not only a sign of life, of a server that others use too."""
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


@dataclass(eq=False)
class _Server:
    """Something that answers as the judge."""

    name: str
    base: str
    health: str
    """What to ask whether it is there."""
    session: aiohttp.ClientSession
    outside: bool = False
    """It is asked a question, and once it has answered no more than it must be: others run it, for money perhaps."""
    up: bool = False
    asked: int = 0
    """Requests under way."""


class JudgeEndpoint:
    """Serves `chat/completions`, `completions`, `responses` and `models` as the judge does. `answered` counts its
    answers, `up` says whether one is there, `trouble` what went wrong since it answered last: empty, or a sentence.
    `hopeless` says why waiting for an address outside is of no use, once it is not.
    """

    def __init__(
        self, judge: Judge, private_dir: str, secrets: Mapping[str, str], nodes: Sequence[str] = (), token: str = ""
    ) -> None:
        """`nodes`: endpoints that serve `public_routes` for `token`, in the place of a vLLM on this node.

        Raises ValueError when the key of an address outside is not among the secrets.
        """
        if judge.api_key_env and judge.api_key_env not in secrets:
            raise ValueError(f"judge.api_key_env: {judge.api_key_env} was not set when the job was submitted")
        self.answered = 0
        self.trouble = ""
        self.hopeless = ""
        self._judge = judge
        self._key = secrets[judge.api_key_env] if judge.api_key_env else ""
        self._socket = f"{private_dir}/judge.sock"
        self._nodes, self._token = nodes, token
        self._made: list[_Server] = []

    @property
    def up(self) -> bool:
        return any(server.up for server in self._made)

    def status(self) -> str:
        """How it stands, for people."""
        if len(self._nodes) > 1 and (up := sum(server.up for server in self._made)):
            return f"judge {up}/{len(self._nodes)} ready"
        if self.up:
            return "judge ready"
        return self.trouble if self._judge.url and self.trouble else "judge loading"

    def routes(self, prefix: str) -> list[Route]:
        """The routes below `prefix` on a loopback listener."""
        return self._routes(prefix, self._from_this_user)

    def public_routes(self) -> list[Route]:
        """The routes for other nodes, on a listener that asks for the token."""
        return [Route("/judge/health", self._health, methods=["GET"]), *self._routes("/judge/v1", self._forward)]

    def _routes(self, prefix: str, ask: Callable[[str, Request], Awaitable[Response]]) -> list[Route]:
        def asked(path: str) -> Callable[[Request], Awaitable[Response]]:
            async def answer(request: Request) -> Response:
                return await ask(path, request)

            return answer

        methods = {"chat/completions": "POST", "completions": "POST", "responses": "POST", "models": "GET"}
        return [Route(f"{prefix}/{path}", asked(path), methods=[method]) for path, method in methods.items()]

    async def watch(self) -> None:
        """Looks whether the judge is there, for ever."""
        await asyncio.gather(*(self._watch(server) for server in self._servers()))

    async def close(self) -> None:
        log.info("the judge has answered %d questions", self.answered)
        for server in self._made:
            await server.session.close()

    async def _watch(self, server: _Server) -> None:
        while not server.outside:
            await self._look(server)
            await asyncio.sleep(POLL_S)
        loop = asyncio.get_running_loop()
        seen = loop.time()
        while True:
            if not server.up:
                why, permanent = await self._question(server)
                if why and loop.time() - seen > self._judge.timeout_s:
                    # So long no rollout waits for it.
                    why, permanent = f"{why}, for {loop.time() - seen:.0f} s", True
                self.hopeless = why if permanent else ""
            if server.up:
                seen = loop.time()
            await asyncio.sleep(POLL_OUTSIDE_S)

    async def _question(self, server: _Server) -> tuple[str, bool]:
        """Asks an address outside for one token: only an answer shows that address, key and model are right. Why there
        is none, empty where there is one, and whether that is for good.
        """
        model = self._judge.model_name
        asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        permanent = False
        try:
            async with server.session.post(
                f"{server.base}/chat/completions",
                data=msgspec.json.encode(asked),
                timeout=aiohttp.ClientTimeout(total=ASK_OUTSIDE_S),
                allow_redirects=False,
            ) as answer:
                status, body = answer.status, await answer.read()
            why = answers.refusal(self._judge, server.name, "chat/completions", status, body)
            permanent = answers.is_permanent(status)
            if status in answers.THERE:
                log.info("%s", why)
                why = ""
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            why = f"{server.name} (judge.url) cannot be asked: {answers.why(error)}"
        if bool(why) == server.up or (why and why != self.trouble):
            log.log(logging.WARNING if why else logging.INFO, "%s", why or f"{server.name} is ready")
        self.trouble = why
        server.up = not why
        return why, permanent

    async def _look(self, server: _Server) -> None:
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        try:
            async with server.session.get(server.health, timeout=timeout, allow_redirects=False) as answer:
                up, why = answer.status == 200, f"{server.name} answers with {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            up, why = False, f"{server.name} cannot be reached: {answers.why(error)}"
        if up != server.up:
            log.log(logging.INFO if up else logging.WARNING, "%s", f"{server.name} is ready" if up else why)
        server.up = up

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self.up else 503)

    async def _from_this_user(self, path: str, request: Request) -> Response:
        server = request.scope["server"][1]
        client = request.client
        table = await asyncio.to_thread(_TABLE.read_text)
        if client is None or peer_uid(client.port, server, table) != os.getuid():
            return openai_error(403, "the judge answers the user of this job only", "judge_error")
        return await self._forward(path, request)

    async def _forward(self, path: str, request: Request) -> Response:
        """NeMo Gym (0.4.0, `openai_utils.py`) asks again after 429 and 5xx, which go back as they are: right while a
        judge restarts. A 400 it takes for a verdict (`vllm_model/app.py`: too long a question gets an empty answer,
        which verifiers read as "different"), so what the judge cannot judge goes back as 424 and fails the rollout.
        """
        data = await request.body() or None
        try:
            return await until_gone(request, self._answer(path, request.method, data))
        except ClientDisconnect:
            return GONE

    async def _answer(self, path: str, method: str, data: bytes | None) -> Response:
        deadline = asyncio.get_running_loop().time() + self._judge.timeout_s
        for server in self._in_order():
            left = max(0.001, deadline - asyncio.get_running_loop().time())
            server.asked += 1
            try:
                async with server.session.request(
                    method,
                    f"{server.base}/{path}",
                    data=data,
                    timeout=aiohttp.ClientTimeout(total=left),
                    allow_redirects=False,
                ) as answer:
                    body = await answer.read()
            except TimeoutError:
                return self._troubled(424, f"{server.name} did not answer within {self._judge.timeout_s:.0f} s")
            except (aiohttp.ClientError, OSError) as error:
                # The same question to another is the same question: nothing was changed by asking.
                key = " (judge.url)" if server.outside else ""
                self._troubled(503, f"{server.name}{key} could not be asked: {answers.why(error)}")
                server.up = False
                continue
            finally:
                server.asked -= 1
            server.up = True
            return self._passed_on(server, path, answer.status, answer.content_type, body)
        return openai_error(503, "the judge could not be asked; it may be starting", "judge_error")

    def _troubled(self, status: int, text: str) -> Response:
        # Once: while a judge restarts, NeMo Gym repeats every question twice a second.
        if text != self.trouble:
            log.warning("%s", text)
        self.trouble = text
        return openai_error(status, text, "judge_error")

    def _passed_on(self, server: _Server, path: str, status: int, content_type: str, body: bytes) -> Response:
        if refusal := answers.refusal(self._judge, server.name, path, status, body):
            passed = answers.passed_on(status)
            # The words of who refuses a key may quote it.
            if status != passed or status in answers.KEY_REFUSED:
                return self._troubled(passed, refusal)
            self._troubled(status, refusal)
        else:
            self.answered += 1
            self.trouble = self.hopeless = ""
        return Response(body, status, media_type=content_type)

    def _in_order(self) -> Iterable[_Server]:
        """Those that are there, the one with the least to do first; all of them where none is known to be."""
        servers = self._servers()
        return sorted([server for server in servers if server.up] or servers, key=lambda server: server.asked)

    def _servers(self) -> list[_Server]:
        # Made late: connections belong to a running loop.
        if not self._made:
            self._made = [*self._make()]
        return self._made

    def _make(self) -> Iterable[_Server]:
        if self._judge.url is not None:
            name = f"the judge at {urlsplit(self._judge.url).hostname}"
            yield _Server(name, self._judge.url, "", connections.to_outside(self._key), outside=True)
            return
        for node in self._nodes:
            session = connections.to_nodes(self._token)
            yield _Server(f"the judge at {node}", f"http://{node}/judge/v1", f"http://{node}/judge/health", session)
        if not self._nodes:
            session = connections.over_socket(self._socket)
            yield _Server("the judge", "http://judge/v1", "http://judge/health", session)
