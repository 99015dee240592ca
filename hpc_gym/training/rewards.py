"""Rewards: what the environments said, one TRL reward function per environment so that each has metrics of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

RewardFunction = Callable[..., list[float | None]]


def environment_reward(environment: str) -> RewardFunction:
    """The reward function of one environment: its rows' rewards, None for the rows of others and for failed rollouts.

    TRL leaves a row that every function answers with None out of its group's mean and deviation, and gives it advantage
    0 (TRL 1.16, grpo_trainer.py, `unscorable_mask`).
    """

    def reward(
        environment_name: Sequence[str], environment_reward: Sequence[float | None], **_: Any
    ) -> list[float | None]:
        pairs = zip(environment_name, environment_reward, strict=True)
        return [value if name == environment else None for name, value in pairs]

    reward.__name__ = environment
    return reward
