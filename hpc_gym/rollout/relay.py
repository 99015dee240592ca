"""The policy as NeMo Gym on an environment node asks it: a chat goes on to the rollout server that its rollout belongs
to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import aiohttp
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hpc_gym.rollout import connections
from hpc_gym.rollout.policy import TAG, models_route
from hpc_gym.rollout.serving import GONE, openai_error, until_gone

log = logging.getLogger(__name__)


class _Tagged(msgspec.Struct):
    """All that is read of a chat; the rest, most of it the conversation, is skipped."""

    tag: str = msgspec.field(default="", name=TAG)


class PolicyRelay:
    """Passes chats on with the job's token. A rollout's tag begins with the address of its rollout server, so nothing
    has to be remembered here; it counts only where it is one of `servers`, or whoever writes a tag could have the
    token sent anywhere.
    """

    def __init__(self, servers: Sequence[str], token: str, model_name: str, timeout_s: float) -> None:
        """`timeout_s`: how long the longest rollout may take, and so a turn of it."""
        self._servers = frozenset(servers)
        self._token = token
        self._model_name = model_name
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        self._session: aiohttp.ClientSession | None = None

    def routes(self) -> list[Route]:
        """The routes of the loopback listener that NeMo Gym asks."""
        chat = Route("/v1/chat/completions", self._chat_completions, methods=["POST"])
        return [chat, models_route(self._model_name)]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _chat_completions(self, request: Request) -> Response:
        data = await request.body()
        try:
            tag = msgspec.json.decode(data, type=_Tagged).tag
        except msgspec.MsgspecError as error:
            return openai_error(400, f"the request is no chat: {error}")
        server = tag.rpartition("/")[0]
        if server not in self._servers:
            return openai_error(403, f"the request's '{TAG}' is no rollout of this job")
        try:
            return await until_gone(request, self._forward(server, data))
        except ClientDisconnect:
            return GONE

    async def _forward(self, server: str, data: bytes) -> Response:
        """Statuses go back as they are, for the policy endpoint chooses them. What fails here is answered with 424,
        which NeMo Gym does not retry: the rollout server that is gone has dropped the rollout.
        """
        url = f"http://{server}/v1/chat/completions"
        try:
            async with self._client().post(url, data=data, timeout=self._timeout) as answer:
                return Response(await answer.read(), answer.status, media_type=answer.content_type)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("the rollout server at %s could not be asked: %r", server, error)
            return openai_error(424, f"the rollout server of this rollout could not be asked: {type(error).__name__}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = connections.to_nodes(self._token)
        return self._session
