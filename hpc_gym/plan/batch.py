"""The arithmetic of a GRPO step, as TRL 1.16 does it (`GRPOConfig.__post_init__`), and what hpc-gym asks beyond it.

TRL counts in completions. A *generation batch* holds `per_device_train_batch_size x ranks x steps_per_generation` of them, in
whole groups of `num_generations`; it is generated at once and used for `steps_per_generation x num_iterations` micro-steps, of
which `gradient_accumulation_steps` make one optimizer step. A *cycle* is the shortest run of optimizer steps that ends where a
generation batch ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_gym.config.problems import Problem


@dataclass(frozen=True)
class Batch:
    """A step in numbers."""

    world_size: int
    """Training ranks."""
    prompts_per_step: int
    """Draws from the mixture per optimizer step."""
    steps_per_cycle: int
    """Optimizer steps after which a generation batch is used up: checkpoints fall on multiples of it."""
    max_steps: int


# GRPOConfig's own defaults (TRL 1.16, transformers 5).
_PER_DEVICE, _ACCUMULATION, _ITERATIONS, _GENERATIONS = 8, 1, 1, 8


def batch_of(grpo: Mapping[str, Any], world_size: int, max_staleness: int) -> tuple[Batch | None, list[Problem]]:
    """The step that these GRPOConfig fields make on so many ranks, or the problems that TRL or a resume would have with it."""
    problems = _wrong_counts(grpo)
    if problems:
        return None, problems
    per_device = grpo.get("per_device_train_batch_size", _PER_DEVICE)
    accumulation = grpo.get("gradient_accumulation_steps", _ACCUMULATION)
    iterations = grpo.get("num_iterations", _ITERATIONS)
    generations = grpo.get("num_generations", _GENERATIONS)
    micro = per_device * world_size
    told = f"{per_device} per device x {world_size} ranks"

    given, per_generation = grpo.get("generation_batch_size"), grpo.get("steps_per_generation")
    if given is not None and per_generation is not None:
        return None, [
            Problem(
                ("grpo", "generation_batch_size"),
                "set this or steps_per_generation, not both: one follows from the other.",
            )
        ]
    if given is not None:
        if given % micro:
            return None, [
                Problem(
                    ("grpo", "generation_batch_size"),
                    f"{given} must be a multiple of the batch of one micro-step, {micro} ({told}); "
                    f"nearest: {_nearest_multiple(given, micro)}.",
                )
            ]
        per_generation = given // micro
    per_generation = per_generation or accumulation
    generation_batch = micro * per_generation

    if generation_batch % generations:
        problems.append(
            Problem(
                ("grpo", "num_generations"),
                f"{generations} must divide the generation batch of {generation_batch} completions ({told} x "
                f"{per_generation} steps per generation), for a group must not be cut; "
                f"{_divisors(generation_batch)}, or change per_device_train_batch_size, gradient_accumulation_steps or "
                "the number of ranks.",
            )
        )
    used = per_generation * iterations
    if max_staleness == 0 and iterations > 1:
        problems.append(
            Problem(
                ("grpo", "num_iterations"),
                f"{iterations} trains on every rollout {iterations} times, all but the first with weights it was not sampled "
                "from, but max_staleness 0 means strictly on-policy: set it to 1.",
            )
        )
    elif max_staleness == 0 and used > accumulation:
        problems.append(
            Problem(
                ("max_staleness",),
                f"0 means strictly on-policy, but steps_per_generation x num_iterations = {per_generation} x {iterations} = "
                f"{used} is more than gradient_accumulation_steps = {accumulation}: the weights would change while a "
                f"generation batch is still being used. Set grpo.gradient_accumulation_steps to {used}, or steps_per_generation to {accumulation}.",
            )
        )
    if used % accumulation and accumulation % used:
        problems.append(
            Problem(
                ("grpo", "gradient_accumulation_steps"),
                f"{accumulation} must divide, or be a multiple of, steps_per_generation x num_iterations = {used}: "
                "otherwise no checkpoint falls between two generation batches.",
            )
        )
    if problems:
        return None, problems
    return _whole_steps(grpo, world_size, micro * accumulation, generations * iterations, max(1, used // accumulation))


def _whole_steps(
    grpo: Mapping[str, Any], world_size: int, completions: int, per_prompt: int, cycle: int
) -> tuple[Batch | None, list[Problem]]:
    if completions % per_prompt:
        return None, [
            Problem(
                ("grpo", "num_generations"),
                f"an optimizer step uses {completions} completions, which is no whole number of prompts at {per_prompt} "
                "uses each (num_generations x num_iterations): raise gradient_accumulation_steps or "
                "per_device_train_batch_size.",
            )
        ]
    max_steps = grpo["max_steps"]
    if max_steps % cycle:
        return None, [
            Problem(
                ("grpo", "max_steps"),
                f"{max_steps} must be a multiple of {cycle}, the steps for which a generation batch is used; "
                f"nearest: {_nearest_multiple(max_steps, cycle)}.",
            )
        ]
    return Batch(world_size, completions // per_prompt, cycle, max_steps), []


def _wrong_counts(grpo: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if "max_steps" not in grpo:
        problems.append(Problem(("grpo",), "max_steps is missing: say how many optimizer steps to train."))
    for name, least in (
        ("max_steps", 1),
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("num_iterations", 1),
        ("num_generations", 2),
        ("generation_batch_size", 1),
        ("steps_per_generation", 1),
    ):
        value = grpo.get(name)
        if value is None and (name not in grpo or name in ("generation_batch_size", "steps_per_generation")):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            why = ": a group's baseline needs at least two" if name == "num_generations" else ""
            problems.append(Problem(("grpo", name), f"must be a whole number of at least {least}, not {value!r}{why}."))
    return problems


def _nearest_multiple(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else str(above)


def _divisors(value: int) -> str:
    divisors = [number for number in range(2, min(value, 128) + 1) if value % number == 0]
    return f"allowed: {', '.join(map(str, divisors))}" if divisors else f"nothing from 2 up divides {value}"
