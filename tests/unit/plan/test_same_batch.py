"""Another number of ranks makes the same step, or none can."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hpc_gym.plan.batch import batch_of
from hpc_gym.plan.same_batch import possible_ranks, same_batch

SMALL = st.integers(1, 12)


@given(
    ranks_before=SMALL,
    ranks=st.integers(1, 64),
    per_device=SMALL,
    accumulation=SMALL,
    generations=st.integers(2, 8),
    given_as=st.sampled_from(["steps_per_generation", "generation_batch_size", ""]),
    factor=st.integers(1, 3),
)
def test_the_step_and_its_generation_batch_stay_as_they_were(
    ranks_before: int, ranks: int, per_device: int, accumulation: int, generations: int, given_as: str, factor: int
) -> None:
    grpo: dict[str, Any] = {
        "max_steps": 6,
        "num_generations": generations,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
    }
    if given_as == "steps_per_generation":
        grpo[given_as] = accumulation * factor
    elif given_as:
        grpo[given_as] = per_device * ranks_before * accumulation * factor
    before, problems = batch_of(grpo, ranks_before, max_staleness=1)
    if before is None:
        assert problems
        return
    found = same_batch(grpo, ranks_before, ranks)
    assert (found is None) == (ranks not in possible_ranks(grpo, ranks_before))
    if found is None:
        # Not even with one row at a time.
        assert (per_device * ranks_before * accumulation) % ranks
        return
    after, problems = batch_of(grpo | found, ranks, max_staleness=1)
    assert not problems and after is not None
    assert after.prompts_per_step == before.prompts_per_step
    assert after.steps_per_cycle == before.steps_per_cycle
    assert (grpo | found)["per_device_train_batch_size"] <= per_device
    assert bool(found) == (ranks != ranks_before)


def test_defaults_count() -> None:
    """TRL's batch of 8 rows per device, one micro-step."""
    assert same_batch({}, 2, 1) == {"gradient_accumulation_steps": 2}
    assert same_batch({}, 2, 4) == {"per_device_train_batch_size": 4}
    assert same_batch({}, 2, 3) is None
    assert possible_ranks({}, 2) == [1, 2, 4, 8, 16]
