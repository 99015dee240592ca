"""What a rollout gives a trainer: arrays of what the policy saw and said, and the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class Outcome(StrEnum):
    """How a rollout ended. A failure of infrastructure is never a reward of zero."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The policy ran out of tokens or context; the verifier's reward counts."""
    FAILED = "failed"
    """No reward exists; `Trajectory.reason` says why. Never trained on."""


REPLICA_GONE = ("weights_stale", "replica_lost")
"""How the reason begins of a rollout whose vLLM replica died, or that found none with the current weights: after a
restart and a push of weights it can run.
"""


@dataclass(frozen=True)
class Trajectory:
    """One rollout. P prompt tokens of the first turn, C tokens after them.

    `completion_ids` is everything after the first prompt: what the policy generated (`policy_mask` 1) and what the
    environment put between (`policy_mask` 0). `logprobs` are those of the sampling policy, natural log, NaN where the
    mask is 0. `weight_versions` says which weights generated each token, -1 where the mask is 0.
    """

    index: int
    """Position of its row in the request."""
    outcome: Outcome
    reason: str = ""
    prompt_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    completion_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    policy_mask: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    weight_versions: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    reward: float = float("nan")
    turns: int = 0
    attempts: int = 1
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numeric fields of the verifier's answer, besides the reward."""
