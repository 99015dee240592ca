"""One vLLM replica, spoken to over its Unix socket: stock `vllm serve --enable-scale-out` in dev mode (0.32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec

from hpc_gym.rollout import connections

Answer = TypeVar("Answer")


class VllmError(Exception):
    """vLLM answered with an error: `status` and its own words."""

    def __init__(self, replica: str, path: str, status: int, text: str) -> None:
        super().__init__(f"{replica} answered {path} with {status}: {text}")
        self.status = status
        self.text = text


class VllmUnreachable(Exception):
    """vLLM could not be asked, or did not answer."""


class Rendered(msgspec.Struct):
    """A GenerateRequest of vLLM: the ids of a conversation, and how to sample what follows."""

    token_ids: list[int]
    sampling_params: dict[str, Any]
    model: str | None = None
    features: dict[str, Any] | None = None
    """Multi-modal inputs."""
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0


class TokenLogprob(msgspec.Struct):
    """Natural log, of the distribution that was sampled from (`--logprobs-mode processed_logprobs`)."""

    logprob: float


class Logprobs(msgspec.Struct):
    content: list[TokenLogprob] | None = None


class WeightSpan(msgspec.Struct):
    """Output tokens `[start, end)` were sampled by weights labelled `version`."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[WeightSpan] | None = None


class Generated(msgspec.Struct):
    choices: list[Choice]


class Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class DerenderedChoice(msgspec.Struct):
    message: Message


class Derendered(msgspec.Struct):
    choices: list[DerenderedChoice]


class _WeightInfo(msgspec.Struct):
    weight_version: str


class _WorldSize(msgspec.Struct):
    world_size: int


class Vllm:
    """Calls to one replica. Every method raises VllmError or VllmUnreachable."""

    def __init__(self, name: str, socket_path: str) -> None:
        self.name = name
        self.socket_path = socket_path
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def render(self, chat: bytes, timeout_s: float) -> Rendered:
        """The ids of a chat request (JSON), by the chat template, and its sampling parameters."""
        return await self._ask("/v1/chat/completions/render", chat, Rendered, timeout_s)

    async def generate(self, request: bytes, timeout_s: float) -> Generated:
        """Continues the ids of a GenerateRequest (JSON). Cancelling the call stops the generation in vLLM."""
        return await self._ask("/inference/v1/generate", request, Generated, timeout_s)

    async def derender(self, request: bytes, timeout_s: float) -> Derendered:
        """Generated ids as an assistant message: text, reasoning and tool calls, by vLLM's own parsers."""
        return await self._ask("/v1/chat/completions/derender", request, Derendered, timeout_s)

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it serves."""
        try:
            await self.request("GET", "/health", None, timeout_s)
        except (VllmError, VllmUnreachable):
            return False
        return True

    async def weight_label(self, timeout_s: float) -> str:
        """The label of the weights it has; `default` where it was never given any."""
        body = await self.request("GET", "/weight_info", None, timeout_s)
        return msgspec.json.decode(body, type=_WeightInfo).weight_version

    async def world_size(self, timeout_s: float) -> int:
        """The number of its workers."""
        body = await self.request("GET", "/get_world_size", None, timeout_s)
        return msgspec.json.decode(body, type=_WorldSize).world_size

    async def _ask(self, path: str, data: bytes, kind: type[Answer], timeout_s: float) -> Answer:
        try:
            body = await self.request("POST", path, data, timeout_s)
        except VllmUnreachable as error:
            if not isinstance(error.__cause__, aiohttp.ServerDisconnectedError):
                raise
            # An idle connection that vLLM closed at this very moment; these calls change nothing, so ask again.
            body = await self.request("POST", path, data, timeout_s)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise VllmUnreachable(f"{self.name} answered {path} with something else than expected: {error}") from error

    async def request(self, method: str, path: str, data: bytes | None, timeout_s: float) -> bytes:
        """The body of the answer, which has status 200."""
        if self._session is None:
            self._session = connections.over_socket(self.socket_path)
        timeout = aiohttp.ClientTimeout(total=max(0.001, timeout_s))
        try:
            async with self._session.request(method, f"http://vllm{path}", data=data, timeout=timeout) as answer:
                body = await answer.read()
        except TimeoutError as error:
            raise VllmUnreachable(f"{self.name} did not answer {path} within {timeout_s:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise VllmUnreachable(f"{self.name} could not be asked for {path}: {error!r}") from error
        if answer.status != 200:
            raise VllmError(self.name, path, answer.status, _words(body))
        return body


def unconstrained(sampling: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters without a grammar that nobody asked for.

    vLLM 0.32 holds tool calls to a grammar where `parallel_tool_calls` is false or a tool is `strict`, though the model
    is free to call none (`parser/abstract_parser.py`, `_apply_structural_tag`). The tokens that a grammar rules out
    have probability zero in vLLM and not in the trainer: training would be on another distribution than was sampled.
    """
    chosen = request.get("tool_choice") or "auto"
    form = request.get("response_format") or {}
    asked = chosen not in ("auto", "none") or request.get("structured_outputs") or form.get("type", "text") != "text"
    return {name: value for name, value in sampling.items() if asked or name != "structured_outputs"}


def _words(body: bytes) -> str:
    """vLLM's message in an error's body."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body[:500].decode(errors="replace")
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:1000]
