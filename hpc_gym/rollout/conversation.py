"""The record of one attempt at a rollout: every token the policy saw and said, in order."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.rollout.chat import Entry
from hpc_gym.rollout.replicas import Replica, version_of
from hpc_gym.rollout.vllm import Choice, WeightSpan


class NotContiguous(AssertionError):
    """A prompt does not begin with the ids so far: a bug of hpc-gym, never a thing to train on."""


class StaleWeights(Exception):
    """A replica generated with older weights than the rollout wants: it was restarted a moment ago."""


@dataclass(eq=False)
class Conversation:
    """What happened under one tag. It ends when it is dropped or failed: chats under its tag are then refused."""

    tag: str
    replica: Replica
    incarnation: str
    weight_version: int
    """Tokens of older weights are not wanted."""
    deadline: float
    """On the event loop's clock."""
    tokens: list[int] = field(default_factory=list)
    """All ids so far: what the next turn's prompt begins with."""
    prompt_length: int = 0
    first_messages: int = 0
    """Messages of the first prompt."""
    history: list[Entry] = field(default_factory=list)
    """Up to the policy's last turn."""
    stop_id: int | None = None
    """The token that ended the last turn."""
    turns: int = 0
    tool_calls: int = 0
    busy: bool = False
    truncated: str = ""
    """Why the policy could not go on; empty when it could."""
    failure: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Calls to vLLM under way, cancelled when it ends."""
    _mask: bytearray = field(default_factory=bytearray)
    _logprobs: array[float] = field(default_factory=lambda: array("f"))
    _versions: array[int] = field(default_factory=lambda: array("i"))

    def fail(self, reason: str) -> None:
        """Ends it: the first reason counts. What vLLM still generates for it is stopped."""
        if not self.ended.is_set():
            self.failure = reason
            self.end()

    def end(self) -> None:
        """Ends it as it is."""
        self.ended.set()
        for task in self.tasks:
            task.cancel()

    def add_turn(self, prompt: Sequence[int], choice: Choice) -> None:
        """Takes in a turn: `prompt` as it was sent to vLLM, and what vLLM generated.

        Raises NotContiguous when the prompt is no continuation, StaleWeights when a token is of weights older than
        wanted, ValueError when log-probabilities or weight versions are missing.
        """
        if prompt[: len(self.tokens)] != self.tokens:
            raise NotContiguous(f"turn {self.turns + 1} does not begin with the {len(self.tokens)} tokens before it")
        generated = choice.token_ids or []
        content = choice.logprobs.content if choice.logprobs is not None else None
        if content is None or len(content) != len(generated):
            raise ValueError("vLLM gave no log-probability for each token; it must be asked with logprobs")
        versions = versions_of(choice.weight_versions, len(generated))
        if min(versions, default=self.weight_version) < self.weight_version:
            raise StaleWeights(f"{self.replica.name} generated with weights {min(versions)}, not {self.weight_version}")
        if self.turns == 0:
            self.prompt_length = len(prompt)
        between = len(prompt) - max(len(self.tokens), self.prompt_length)
        self._mask += bytes(between) + b"\1" * len(generated)
        self._logprobs.extend([math.nan] * between)
        self._logprobs.extend([token.logprob for token in content])
        self._versions.extend([-1] * between)
        self._versions.extend(versions)
        self.tokens = [*prompt, *generated]
        self.turns += 1
        ended = choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str) and generated
        self.stop_id = generated[-1] if ended else None

    def trajectory(self, index: int, outcome: Outcome, **facts: Any) -> Trajectory:
        """The arrays of the whole conversation."""
        return Trajectory(
            index=index,
            outcome=outcome,
            prompt_ids=np.array(self.tokens[: self.prompt_length], np.int32),
            completion_ids=np.array(self.tokens[self.prompt_length :], np.int32),
            policy_mask=np.frombuffer(bytes(self._mask), np.uint8),
            logprobs=np.array(self._logprobs, np.float32),
            weight_versions=np.array(self._versions, np.int32),
            turns=self.turns,
            **facts,
        )


def versions_of(spans: Sequence[WeightSpan] | None, length: int) -> list[int]:
    """The weight version of each of `length` tokens. Raises ValueError when the spans do not cover them."""
    versions: list[int] = []
    for span in spans or ():
        if span.start != len(versions):
            raise ValueError("vLLM's weight versions leave tokens out")
        versions += [version_of(span.version)] * (span.end - span.start)
    if len(versions) != length:
        raise ValueError(f"vLLM gave weight versions for {len(versions)} of {length} tokens")
    return versions
