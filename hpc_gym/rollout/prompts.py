"""The exact prompt of a turn: rendered by vLLM's chat template for the first one, spliced for those that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hpc_gym.rollout import chat, splice
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.memo import Memo
from hpc_gym.rollout.vllm import Rendered, Vllm

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
            ending = {**request, "messages": [*messages[:end]], "add_generation_prompt": False}
            _, closing = await self._behind(vllm, ending, first, end, not has_calls, timeout_s)
            tail = splice.after_turn(rest, closing, stop_id)
        if tail is None and has_calls:
            # Behind tool calls the rest begins with their own syntax, and no token shows where it ends.
            rendered, rest = await self._behind(vllm, request, first, end, True, timeout_s)
        return msgspec.structs.replace(rendered, token_ids=conversation.tokens + (rest if tail is None else tail))

    async def _behind(
        self, vllm: Vllm, request: Mapping[str, Any], first: int, end: int, text_only: bool, timeout_s: float
    ) -> tuple[Rendered, list[int]]:
        """A rendering with a stand-in for the last turn, and what the template puts behind it."""
        data, other = (
            encode(
                {**request, "messages": chat.with_stand_in(request["messages"], first, end, word, text_only=text_only)}
            )
            for word in ("a", "b")
        )

        async def render_both() -> tuple[Rendered, list[int]]:
            one = await vllm.render(data, timeout_s)
            two = await vllm.render(other, timeout_s)
            return one, splice.behind(one.token_ids, two.token_ids)

        return await self._tails.get(data, render_both)
