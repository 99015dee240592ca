"""The exact prompt of a turn: rendered by vLLM's chat template for the first one, spliced for those that follow."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hpc_gym.rollout import chat, splice
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.memo import Memo
from hpc_gym.rollout.vllm import Rendered, Vllm

MARK_IDS = 6
"""So many ids of the end of a stand-in's word mark its place. The word is random, so nobody else writes it."""
RENDERINGS = 4096
"""Renderings that are remembered: the prompts of a few steps, and what follows their turns."""


def encode(request: Mapping[str, Any]) -> bytes:
    """JSON with the keys in the order that NeMo Gym gave them: it is the order in which templates print a tool's
    parameters. Requests of one environment are built by the same code, so equal ones are equal bytes.
    """
    return msgspec.json.encode(request)


class Prompts:
    """Renders and splices. A rendering is a pure function of the request, so rollouts of a group share it."""

    def __init__(self) -> None:
        self.renderings: Memo[Rendered] = Memo(RENDERINGS)
        self._tails: Memo[tuple[Rendered, list[int]]] = Memo(RENDERINGS)
        word = "".join(secrets.choice(string.ascii_lowercase) for _ in range(24))
        self._words = (f"{word}a", f"{word}b")
        self._marks: dict[bool, list[int]] = {}
        self._closings: Memo[list[int]] = Memo(64)

    async def first(self, vllm: Vllm, request: Mapping[str, Any], timeout_s: float) -> Rendered:
        """The rendered conversation."""
        data = encode(request)
        return await self.renderings.get(data, lambda: vllm.render(data, timeout_s))

    async def following(
        self, vllm: Vllm, request: Mapping[str, Any], conversation: Conversation, end: int, timeout_s: float
    ) -> Rendered:
        """The conversation's ids so far, and what the template puts behind its last turn, which ends at message `end`.

        Raises SpliceError when the template does not show where a turn ends, VllmError when it refuses the
        conversation.
        """
        first, stop_id = conversation.first_messages, conversation.stop_id
        messages: Sequence[chat.Message] = request["messages"]
        start = end
        while start > first and messages[start - 1].get("role") == "assistant":
            start -= 1
        has_calls = any(message.get("tool_calls") for message in messages[start:end])
        rendered, rest = await self._behind(vllm, request, first, end, not has_calls, timeout_s)
        tail = None
        if stop_id is not None and stop_id in rest:
            closing = await self._closing(vllm, request, first, end, not has_calls, timeout_s)
            tail = splice.after_turn(rest, closing, stop_id)
        if tail is None and has_calls:
            # Behind tool calls the rest begins with their own syntax, and no token shows where it ends.
            rendered, rest = await self._behind(vllm, request, first, end, True, timeout_s)
        return msgspec.structs.replace(rendered, token_ids=conversation.tokens + (rest if tail is None else tail))

    async def _closing(
        self, vllm: Vllm, request: Mapping[str, Any], first: int, end: int, text_only: bool, timeout_s: float
    ) -> list[int]:
        """What the template puts behind a turn with which the conversation ends: the same for every conversation."""
        ending = {**request, "messages": [*request["messages"][:end]], "add_generation_prompt": False}

        async def find() -> list[int]:
            _, closing = await self._behind(vllm, ending, first, end, text_only, timeout_s)
            return closing

        return await self._closings.get((text_only, encode(request.get("chat_template_kwargs") or {})), find)

    async def _behind(
        self, vllm: Vllm, request: Mapping[str, Any], first: int, end: int, text_only: bool, timeout_s: float
    ) -> tuple[Rendered, list[int]]:
        """A rendering with a stand-in for the last turn, and what the template puts behind it."""
        data, other = (
            encode(
                {**request, "messages": chat.with_stand_in(request["messages"], first, end, word, text_only=text_only)}
            )
            for word in self._words
        )

        async def find() -> tuple[Rendered, list[int]]:
            one = await vllm.render(data, timeout_s)
            rest = splice.behind_mark(one.token_ids, self._marks.get(text_only, []))
            if rest is None:
                two = await vllm.render(other, timeout_s)
                rest = splice.behind(one.token_ids, two.token_ids)
                place = len(one.token_ids) - len(rest)
                self._marks[text_only] = one.token_ids[max(0, place - MARK_IDS) : place]
            return one, rest

        return await self._tails.get(data, find)
