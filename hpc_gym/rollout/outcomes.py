"""What came of a rollout: reading a verifier's answer, and which failures are worth another attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec


class Failed(Exception):
    """An attempt gave no reward. Its text is the reason: a code, a colon, and what happened."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def explained(self, trouble: str) -> Failed:
        """The same with the trouble that the judge has: NeMo Gym says only that a server of its own failed, or nothing
        until the deadline.
        """
        code, _, rest = self.reason.partition(":")
        if not trouble or trouble in self.reason or code not in ("agent_error", "deadline"):
            return self
        return Failed(f"{code}: {trouble};{rest}")


RETRIED = ("agent_error", "agent_unreachable", "environment_server_lost", "replica_lost", "vllm_error")
"""Codes of failures that another attempt may not have: something crashed, was restarted, or was overloaded."""


def worth_retrying(reason: str) -> bool:
    """Whether another attempt may succeed where one failed for this reason."""
    return reason.partition(":")[0] in RETRIED


def read_verdict(body: bytes) -> tuple[float, dict[str, float]]:
    """The reward and the other numbers at the top of a `/run` answer.

    The rest, most of it the conversation over again, is skipped unread. Booleans count as 0 and 1. Raises Failed when
    there is no answer of that kind or no finite reward in it.
    """
    try:
        fields: Mapping[str, msgspec.Raw] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as error:
        raise Failed(f"no_reward: the agent's answer is no JSON object: {error}") from error
    numbers = {}
    for name, raw in fields.items():
        text = bytes(raw)
        if text in (b"true", b"false"):
            numbers[name] = float(text == b"true")
        elif text[:1] in b"-0123456789" and text:
            numbers[name] = float(text)
    reward = numbers.pop("reward", math.nan)
    if not math.isfinite(reward):
        found = bytes(fields["reward"])[:100].decode(errors="replace") if "reward" in fields else "nothing"
        raise Failed(f"no_reward: the verifier gave no finite number as reward, but {found}")
    return reward, numbers
