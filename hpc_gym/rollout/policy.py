"""The policy endpoint: OpenAI chat completions for NeMo Gym's model server, token-exact, on loopback (and, for NeMo Gym
on nodes of its own, behind the job's token).

A chat is taken only with the tag of a live rollout, which `runs` put into its row: the tag is the capability, and
under it the conversation is recorded. Answers never make NeMo Gym try again: its client retries 429, 502, 503, 504 and
520 for ever and 500 three times (nemo-gym 0.4.0, `openai_utils.py`), so what fails here is answered with other codes,
and the record says why.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hpc_gym.rollout import chat
from hpc_gym.rollout.conversation import Conversation, StaleWeights
from hpc_gym.rollout.memo import Memo
from hpc_gym.rollout.prompts import Prompts, encode
from hpc_gym.rollout.replicas import ASK_S, Replica
from hpc_gym.rollout.serving import as_json, openai_error
from hpc_gym.rollout.splice import SpliceError
from hpc_gym.rollout.vllm import Choice, Message, Rendered, VllmError, VllmUnreachable, unconstrained

log = logging.getLogger(__name__)

TAG = "hpc_gym_rollout"
"""Key of the tag in a chat request; NeMo Gym's vLLM adapter merges it in from `metadata.extra_body` of the row."""
SEED_IDS = 32
"""So many ids of the prompt's end go along when generated ids are turned into text (vLLM reads the last few)."""
ENDED_KEPT = 10_000
OWN_FIELDS = ("metadata", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "store", "user")
"""Fields of a request that are dealt with here and mean nothing to the chat template."""


class Refused(Exception):
    """Answered with `status`: never one that NeMo Gym retries."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class PolicyEndpoint:
    """Serves `/v1/chat/completions` and `/v1/models` for the conversations that are open."""

    def __init__(self, model_name: str, max_model_len: int, address: str = "") -> None:
        """`address`: `host:port` at which environment nodes reach this endpoint; it stands before each tag."""
        self._model_name = model_name
        self._prefix = f"{address}/" if address else ""
        self._max_model_len = max_model_len
        self._open: dict[str, Conversation] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._prompts = Prompts()
        self._messages: Memo[Message] = Memo(4096)

    def open(self, replica: Replica, weight_version: int, deadline: float) -> Conversation:
        """A new conversation on that replica, under a tag that cannot be guessed."""
        tag = self._prefix + secrets.token_urlsafe(24)
        conversation = Conversation(tag, replica, replica.incarnation, weight_version, deadline)
        self._open[conversation.tag] = conversation
        return conversation

    def close(self, conversation: Conversation) -> None:
        """Ends it: later chats under its tag are refused, what vLLM still generates for it is stopped."""
        conversation.end()
        if self._open.pop(conversation.tag, None) is not None:
            self._ended[conversation.tag] = None
            if len(self._ended) > ENDED_KEPT:
                self._ended.popitem(last=False)

    def routes(self) -> list[Route]:
        """The routes of a listener on which it is asked."""
        chat = Route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        return [chat, models_route(self._model_name)]

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        try:
            body, tag = _read(await request.body())
            conversation = self._find(tag)
            task = asyncio.ensure_future(self._turn(conversation, body))
            conversation.tasks.add(task)
            try:
                return as_json(await task)
            except asyncio.CancelledError:
                if not conversation.ended.is_set():
                    raise
                raise Refused(410, f"this rollout has ended: {conversation.failure or 'it was dropped'}") from None
            finally:
                conversation.tasks.discard(task)
        except Refused as refused:
            kind = "invalid_request_error" if refused.status < 410 else "rollout_ended"
            return openai_error(refused.status, str(refused), kind)

    def _find(self, tag: object) -> Conversation:
        if not isinstance(tag, str):
            raise Refused(403, f"the request carries no '{TAG}': only rollouts of hpc-gym are served here")
        conversation = self._open.get(tag)
        if conversation is None:
            if tag in self._ended:
                raise Refused(410, "this rollout has ended")
            raise Refused(403, f"the request's '{TAG}' is no rollout of this server")
        if conversation.ended.is_set():
            raise Refused(410, f"this rollout has ended: {conversation.failure}")
        return conversation

    async def _turn(self, conversation: Conversation, body: dict[str, Any]) -> dict[str, Any]:
        """One turn of the policy, as an OpenAI chat completion. Whatever fails ends the conversation with its
        reason.
        """
        if conversation.busy:
            raise _failed(conversation, 422, "history_rewritten: the agent asked for two turns at the same time")
        conversation.busy = True
        try:
            return await self._answer(conversation, body)
        except (Refused, asyncio.CancelledError):
            raise
        except VllmError as error:
            if error.status == 400 and "context length" in error.text:
                raise self._overflow(conversation, error.text) from error
            if 400 <= error.status < 500 and error.status != 429:
                raise _failed(conversation, 400, f"policy_request_refused: {error}") from error
            # Of an engine that has just died vLLM itself answers, and a moment later nobody.
            code = "vllm_error" if await conversation.replica.vllm.healthy(ASK_S) else "replica_lost"
            raise _failed(conversation, 424, f"{code}: {error}") from error
        except VllmUnreachable as error:
            code = "replica_lost" if _left(conversation) > 0 else "deadline"
            raise _failed(conversation, 424, f"{code}: {error}") from error
        except StaleWeights as error:
            raise _failed(conversation, 424, f"weights_stale: {error}") from error
        except SpliceError as error:
            raise _failed(conversation, 422, f"template_unsupported: {error}") from error
        except Exception as error:
            log.exception("a turn failed")
            raise _failed(conversation, 422, f"internal_error: {error!r}") from error
        finally:
            conversation.busy = False

    async def _answer(self, conversation: Conversation, body: dict[str, Any]) -> dict[str, Any]:
        replica = conversation.replica
        if not replica.up or replica.bound() != conversation.incarnation:
            raise VllmUnreachable(f"{replica.name} was restarted")
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        request = {key: value for key, value in body.items() if key not in OWN_FIELDS}
        request |= {"model": self._model_name, "logprobs": True, "top_logprobs": 0}
        rendered = await self._prompt(conversation, request)
        room = self._max_model_len - len(rendered.token_ids)
        if room < 1:
            raise self._overflow(conversation, f"the prompt has {len(rendered.token_ids)} tokens")
        sampling = unconstrained(rendered.sampling_params, request) | {"max_tokens": min(asked or room, room)}
        choice = await self._generate(conversation, rendered, sampling)
        generated = choice.token_ids or []
        conversation.add_turn(rendered.token_ids, choice)
        if choice.finish_reason == "length":
            conversation.truncated = "the policy ran out of tokens in its last turn"
        # As in vLLM's own chat answers, the token that ended the turn is no text: its derender would show it.
        spoken = generated if conversation.stop_id is None else generated[:-1]
        message = await self._message(conversation, request, rendered, spoken) if spoken else Message()
        if request.get("parallel_tool_calls") is False and message.tool_calls:
            # As in vLLM's own chat answers: of several calls the first is made.
            message = msgspec.structs.replace(message, tool_calls=message.tool_calls[:1])
        said = _openai_message(message, conversation)
        conversation.history = chat.canonical([*request["messages"], said])
        if conversation.turns == 1:
            conversation.first_messages = len(request["messages"])
        finish = "tool_calls" if said.get("tool_calls") and choice.finish_reason == "stop" else choice.finish_reason
        return {
            "id": f"chatcmpl-{conversation.turns}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._model_name,
            "choices": [{"index": 0, "finish_reason": finish, "logprobs": None, "message": said}],
            "usage": {
                "prompt_tokens": len(rendered.token_ids),
                "completion_tokens": len(generated),
                "total_tokens": len(rendered.token_ids) + len(generated),
            },
        }

    async def _prompt(self, conversation: Conversation, request: Mapping[str, Any]) -> Rendered:
        vllm, left = conversation.replica.vllm, _left(conversation)
        if conversation.turns == 0:
            rendered = await self._prompts.first(vllm, request, left)
        else:
            end = chat.end_of(conversation.history, request["messages"])
            if end is None:
                raise _failed(conversation, 422, "history_rewritten: the agent changed or dropped earlier messages")
            conversation.truncated = ""
            rendered = await self._prompts.following(vllm, request, conversation, end, left)
        if rendered.features is not None:
            raise VllmError(vllm.name, "render", 400, "images and audio in prompts are not supported by hpc-gym")
        return rendered

    async def _generate(self, conversation: Conversation, rendered: Rendered, sampling: Mapping[str, Any]) -> Choice:
        request = msgspec.structs.asdict(rendered) | {
            "request_id": f"{conversation.tag}-{conversation.turns}",
            "sampling_params": sampling,
        }
        generated = await conversation.replica.vllm.generate(msgspec.json.encode(request), _left(conversation))
        if len(generated.choices) != 1 or generated.choices[0].finish_reason not in ("stop", "length"):
            reason = generated.choices[0].finish_reason if generated.choices else "no choice"
            raise VllmUnreachable(f"{conversation.replica.name} gave up the generation ({reason})")
        return generated.choices[0]

    async def _message(
        self, conversation: Conversation, request: Mapping[str, Any], rendered: Rendered, spoken: Sequence[int]
    ) -> Message:
        """The generated ids as vLLM's parsers read them. It depends on nothing but what is sent, so it is
        remembered.
        """
        vllm = conversation.replica.vllm
        data = encode(
            {
                "model": self._model_name,
                "generate_response": {
                    "request_id": "derender",
                    "choices": [{"index": 0, "token_ids": spoken, "finish_reason": "stop"}],
                },
                "prompt_token_ids": rendered.token_ids[-SEED_IDS:],
                "chat_request": {**request, "messages": [], "logprobs": False, "top_logprobs": None},
            }
        )

        async def derender() -> Message:
            return (await vllm.derender(data, _left(conversation))).choices[0].message

        return await self._messages.get(data, derender)

    def _overflow(self, conversation: Conversation, text: str) -> Refused:
        """NeMo Gym's adapter takes a 400 that speaks of the context length for a turn that was cut off."""
        conversation.truncated = f"the conversation reached the context length of {self._max_model_len} tokens ({text})"
        return Refused(400, f"This model's maximum context length is {self._max_model_len} tokens: {text}")


def models_route(model_name: str) -> Route:
    """`GET /v1/models`."""

    async def models(_: Request) -> Response:
        return as_json({"object": "list", "data": [{"id": model_name, "object": "model", "owned_by": "hpc-gym"}]})

    return Route("/v1/models", models, methods=["GET"])


def _read(data: bytes) -> tuple[dict[str, Any], object]:
    """The request without the rollout's tag, and the tag. Raises Refused for what is not supported."""
    try:
        body = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request is no JSON object")
    tag = body.pop(TAG, None)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise Refused(400, "'messages' must be a list of messages, and not an empty one")
    if body.get("n") not in (None, 1):
        raise Refused(400, "'n' must be 1: a rollout is one conversation")
    if body.get("stream"):
        raise Refused(400, "'stream' is not supported: a turn is answered as a whole")
    return body, tag


def _openai_message(message: Message, conversation: Conversation) -> dict[str, Any]:
    """The message as it is answered, its tool calls numbered over the whole rollout: an id names its call for good."""
    said: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning:
        said["reasoning"] = said["reasoning_content"] = message.reasoning
    calls = []
    for call in message.tool_calls or ():
        # Nine letters and digits: the form that Mistral's templates insist on.
        calls.append({"id": f"call{conversation.tool_calls:05d}", "type": "function", "function": call["function"]})
        conversation.tool_calls += 1
    if calls:
        said["tool_calls"] = calls
    return said


def _failed(conversation: Conversation, status: int, reason: str) -> Refused:
    conversation.fail(reason)
    return Refused(status, reason)


def _left(conversation: Conversation) -> float:
    return max(0.0, conversation.deadline - asyncio.get_running_loop().time())
