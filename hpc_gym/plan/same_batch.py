"""The step of a run, kept when another number of training ranks goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

BATCH_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
)
"""GRPOConfig fields that the size of a step follows from: whoever sets one of them sets the batch."""


def same_batch(grpo: Mapping[str, Any], ranks_before: int, ranks: int) -> dict[str, int] | None:
    """The GRPOConfig fields to change so that `ranks` ranks make the step, of the generation batches, that `grpo` made
    on `ranks_before`; None when no value of them does.

    A rank never takes more rows at once than before, for its memory may not hold them.
    """
    step, generated = _completions(grpo, ranks_before)
    shared = gcd(step, generated)
    if shared % ranks:
        return None
    before = grpo.get("per_device_train_batch_size", 8)
    per_device = max(size for size in range(1, before + 1) if (shared // ranks) % size == 0)
    micro = per_device * ranks
    wanted = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": step // micro}
    if grpo.get("steps_per_generation") is not None:
        wanted["steps_per_generation"] = generated // micro
    defaults = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return {name: value for name, value in wanted.items() if value != grpo.get(name, defaults.get(name))}


def possible_ranks(grpo: Mapping[str, Any], ranks_before: int) -> list[int]:
    """All numbers of ranks that can make the step which `grpo` made on `ranks_before`."""
    shared = gcd(*_completions(grpo, ranks_before))
    return [ranks for ranks in range(1, shared + 1) if shared % ranks == 0]


def _completions(grpo: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Completions of an optimizer step and of a generation batch."""
    micro = grpo.get("per_device_train_batch_size", 8) * ranks
    accumulation = grpo.get("gradient_accumulation_steps", 1)
    generated = grpo.get("generation_batch_size") or micro * (grpo.get("steps_per_generation") or accumulation)
    return micro * accumulation, generated
