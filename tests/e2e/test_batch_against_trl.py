"""The arithmetic of `hpc_gym.plan.batch` is TRL's: it refuses what GRPOConfig refuses, and no group that TRL takes."""

from __future__ import annotations

import itertools
import json
import subprocess
from typing import Any

import pytest

from hpc_gym.plan.batch import batch_of
from hpc_gym.runtimes.spec import is_built, spec_of

pytestmark = pytest.mark.e2e

ASK_TRL = """
import json, sys, tempfile
from transformers import TrainingArguments
from trl import GRPOConfig
answers = []
for ranks, fields in json.load(sys.stdin):
    # The number of ranks that a launcher would have started.
    TrainingArguments.world_size = property(lambda self, ranks=ranks: ranks)
    try:
        config = GRPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", **fields)
        answers.append([config.generation_batch_size, config.steps_per_generation])
    except ValueError as error:
        answers.append(str(error))
print("ANSWERS" + json.dumps(answers))
"""


def cases() -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    for ranks, device, accumulation, generations in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2, 3, 4, 8)):
        fields = {
            "per_device_train_batch_size": device,
            "gradient_accumulation_steps": accumulation,
            "num_generations": generations,
            "max_steps": 12,
        }
        found.append((ranks, fields))
        found.append((ranks, {**fields, "steps_per_generation": 2}))
        found.append((ranks, {**fields, "generation_batch_size": 8}))
    found.append((1, {"max_steps": 12}))  # the defaults
    found.append((2, {"max_steps": 12, "generation_batch_size": 16, "steps_per_generation": 1}))
    return found


def test_batches_are_accepted_and_refused_as_by_trl() -> None:
    runtime = spec_of("train-cpu")
    if not is_built(runtime):
        pytest.skip("the runtime train-cpu is not built: hpc-gym runtimes build")
    asked = cases()
    done = subprocess.run(
        [str(runtime.python), "-c", ASK_TRL],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    accepted = 0
    for (ranks, fields), answer in zip(asked, answers, strict=True):
        # Staleness 99: only what TRL itself demands, and whole cycles, are left.
        batch, problems = batch_of(fields, ranks, max_staleness=99)
        if isinstance(answer, str):
            assert problems, (ranks, fields, answer)
            continue
        generation_batch, steps_per_generation = answer
        beyond_trl = [problem for problem in problems if "must divide the generation batch" in problem.message]
        assert not beyond_trl, (ranks, fields, problems)
        if batch is not None:
            accepted += 1
            # Prompts of a cycle, counted from either side.
            generations = fields.get("num_generations", 8)
            accumulation = fields.get("gradient_accumulation_steps", 1)
            per_cycle = batch.steps_per_cycle * batch.prompts_per_step
            assert per_cycle * steps_per_generation == (
                generation_batch // generations * batch.steps_per_cycle * accumulation
            ), (ranks, fields)
    assert accepted > 50
