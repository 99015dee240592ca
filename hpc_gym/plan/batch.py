"""The arithmetic of a GRPO step, as TRL 1.16 does it (`GRPOConfig.__post_init__`), and what hpc-gym asks beyond it.

TRL counts in completions. A *generation batch* holds `per_device_train_batch_size x ranks x steps_per_generation` of
them, in whole groups of `num_generations`; it is generated at once and used for `steps_per_generation x
num_iterations` micro-steps, of which `gradient_accumulation_steps` make one optimizer step. A *cycle* is the
shortest run of optimizer steps that ends where a generation batch ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpc_gym.config.problems import Problem

_SIZES = (
    ("grpo", "per_device_train_batch_size"),
    ("grpo", "gradient_accumulation_steps"),
    ("grpo", "steps_per_generation"),
    ("grpo", "generation_batch_size"),
    ("nodes", "train"),
    ("ranks_per_node",),
)
"""Keys that the size of a batch follows from."""
_MOST = 10**9


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


@dataclass(frozen=True)
class _Counts:
    """What the fields say, with GRPOConfig's own defaults (TRL 1.16, transformers 5)."""

    world_size: int
    per_device: int
    accumulation: int
    iterations: int
    generations: int
    per_generation: int

    @property
    def micro(self) -> int:
        return self.per_device * self.world_size

    @property
    def used(self) -> int:
        """Micro-steps that a generation batch is used for."""
        return self.per_generation * self.iterations

    @property
    def told(self) -> str:
        return f"{self.per_device} per device x {self.world_size} ranks"


def batch_of(grpo: Mapping[str, Any], world_size: int, max_staleness: int) -> tuple[Batch | None, list[Problem]]:
    """The step that these GRPOConfig fields make on so many ranks, or the problems that TRL or a resume would have
    with it.
    """
    if problems := _wrong_counts(grpo):
        return None, problems
    per_device = grpo.get("per_device_train_batch_size", 8)
    accumulation = grpo.get("gradient_accumulation_steps", 1)
    per_generation, problems = _steps_per_generation(grpo, per_device * world_size, accumulation)
    if problems:
        return None, problems
    iterations, generations = grpo.get("num_iterations", 1), grpo.get("num_generations", 8)
    counts = _Counts(world_size, per_device, accumulation, iterations, generations, per_generation)
    if problems := [
        *_cut_groups(counts),
        *_off_policy(counts, max_staleness),
        *_uneven_cycles(counts, grpo["max_steps"]),
    ]:
        return None, problems
    prompts = counts.micro * accumulation // (generations * iterations)
    return Batch(world_size, prompts, max(1, counts.used // accumulation), grpo["max_steps"]), []


def _steps_per_generation(grpo: Mapping[str, Any], micro: int, accumulation: int) -> tuple[int, list[Problem]]:
    given, per_generation = grpo.get("generation_batch_size"), grpo.get("steps_per_generation")
    key = ("grpo", "generation_batch_size")
    if given is None:
        return per_generation or accumulation, []
    if per_generation is not None:
        return 0, [Problem(key, "set this or steps_per_generation, not both: one follows from the other.")]
    if given % micro:
        return 0, [
            Problem(
                key,
                f"{given} must be a multiple of the batch of one micro-step, {micro} (per_device_train_batch_size x "
                f"ranks); nearest: {_nearest_multiple(given, micro)}.",
            )
        ]
    return given // micro, []


def _cut_groups(counts: _Counts) -> Iterable[Problem]:
    batch = counts.micro * counts.per_generation
    if batch % counts.generations:
        yield Problem(
            ("grpo", "num_generations"),
            f"{counts.generations} must divide the generation batch of {batch} completions ({counts.told} x "
            f"steps_per_generation {counts.per_generation}), for a group must not be cut; {_divisors(batch)}, or "
            "change per_device_train_batch_size, gradient_accumulation_steps or the number of ranks.",
            _SIZES,
        )
        return
    completions, per_prompt = counts.micro * counts.accumulation, counts.generations * counts.iterations
    if completions % per_prompt:
        yield Problem(
            ("grpo", "num_generations"),
            f"an optimizer step uses {completions} completions ({counts.told} x {counts.accumulation} accumulated), "
            f"which is no whole number of prompts at {per_prompt} uses each: raise gradient_accumulation_steps.",
            _SIZES,
        )


def _off_policy(counts: _Counts, max_staleness: int) -> Iterable[Problem]:
    if max_staleness:
        return
    if counts.iterations > 1:
        yield Problem(
            ("grpo", "num_iterations"),
            f"{counts.iterations} trains on every rollout again with weights it was not sampled from, but "
            "max_staleness 0 means strictly on-policy: set it to 1.",
        )
    elif counts.used > counts.accumulation:
        yield Problem(
            ("max_staleness",),
            f"0 means strictly on-policy, but steps_per_generation = {counts.used} is more than "
            "gradient_accumulation_steps "
            f"= {counts.accumulation}: the weights would change while a generation batch is still being used. Set "
            f"grpo.gradient_accumulation_steps to {counts.used}, or steps_per_generation to {counts.accumulation}.",
            _SIZES[1:4],
        )


def _uneven_cycles(counts: _Counts, max_steps: int) -> Iterable[Problem]:
    used, accumulation = counts.used, counts.accumulation
    if used % accumulation and accumulation % used:
        yield Problem(
            ("grpo", "gradient_accumulation_steps"),
            f"{accumulation} must divide, or be a multiple of, steps_per_generation x num_iterations = {used}: "
            "otherwise no checkpoint falls between two generation batches.",
        )
        return
    cycle = max(1, used // accumulation)
    if max_steps % cycle:
        yield Problem(
            ("grpo", "max_steps"),
            f"{max_steps} must be a multiple of {cycle}, the steps for which a generation batch is used; "
            f"nearest: {_nearest_multiple(max_steps, cycle)}.",
        )


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
        if isinstance(value, int) and value > _MOST:
            problems.append(Problem(("grpo", name), f"{value} is more than anybody means: at most {_MOST:,}."))
            continue
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
