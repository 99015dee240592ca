"""Run directories for the training tests: a Plan, its data, a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_gym.plan.plan import (
    DataSource,
    Environment,
    Evaluation,
    Launch,
    Plan,
    RolloutSettings,
    Sampling,
    Supervision,
    Training,
)
from hpc_gym.plan.same_batch import same_batch

ROWS = 12
"""Rows of each of the two environments."""


def run_directory(
    folder: Path,
    model: Path,
    *,
    steps: int,
    num_generations: int = 4,
    prompts_per_step: int = 1,
    world_size: int = 2,
    zero_stage: int = 2,
    grpo: Mapping[str, Any] | None = None,
    checkpoint_every: int = 0,
    weight_transfer: Any = "filesystem",
    on_policy_tolerance: float = 0.0,
    evaluate: bool = False,
    evaluate_every: int = 0,
    wandb: Mapping[str, Any] | None = None,
    tokens: int = 8,
) -> Path:
    """A run directory in `folder` with everything that training ranks read."""
    folder.mkdir(parents=True)
    sources = tuple(_source(folder, name, tokens) for name in ("alpha", "beta"))
    sampling = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=tokens)
    evaluation = Evaluation(sources if evaluate else (), evaluate, evaluate, evaluate_every, sampling, 2)
    training = Training(
        method="grpo",
        model=str(model),
        grpo=_grpo(steps, num_generations, num_generations * prompts_per_step // world_size) | dict(grpo or {}),
        deepspeed={"zero_optimization": {"stage": zero_stage}},
        prompts_per_step=prompts_per_step,
        world_size=world_size,
        max_staleness=0,
        sources=sources,
        sampling=sampling,
        evaluation=evaluation,
        weight_transfer=weight_transfer,
        checkpoint_every=checkpoint_every,
        checkpoints_kept=2,
        wandb=wandb,
        on_policy_tolerance=on_policy_tolerance,
    )
    (folder / "plan.json").write_text(_plan(folder, training).to_json())
    return folder


def _grpo(steps: int, num_generations: int, batch: int) -> dict[str, Any]:
    """What the tests do not change unless they say so. `batch`: rollouts of one rank in one step."""
    return {
        "max_steps": steps,
        "num_generations": num_generations,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 512,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "beta": 0.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }


def _plan(folder: Path, training: Training) -> Plan:
    return Plan(
        name=folder.name,
        run_dir=str(folder),
        seed=7,
        python="python",
        nodes=(),
        runtimes={},
        environments=tuple(Environment(name, name, (), 60.0, 2) for name in ("alpha", "beta")),
        rollout=RolloutSettings("policy", 512, 16, 1),
        training=training,
        launch=Launch("local"),
        supervision=Supervision(),
    )


def _source(folder: Path, name: str, tokens: int) -> DataSource:
    path = folder / f"{name}.jsonl"
    first = 10 if name == "alpha" else 150
    rows = [{"prompt": list(range(first + n, first + n + 10)), "tokens": tokens} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(environment=name, path=str(path), weight=1.0, rows=ROWS)


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The file's records; none when it is not there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def copy_of(run: Path, folder: Path) -> Path:
    """The same run from the beginning, in another folder: the data stay where they are."""
    folder.mkdir(parents=True)
    shutil.copy(run / "plan.json", folder)
    plan = json.loads((folder / "plan.json").read_text())
    plan["run_dir"] = str(folder)
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def on_other_ranks(run: Path, folder: Path, ranks: int, *, from_step: int, steps: int) -> Path:
    """What `hpc-gym resume` makes of a run that ended after `from_step`, in another folder: other ranks, same step."""
    folder.mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / f"checkpoint-{from_step}", folder / "checkpoints" / f"checkpoint-{from_step}")
    plan = json.loads((run / "plan.json").read_text())
    training = plan["training"]
    changed = same_batch(training["grpo"], training["world_size"], ranks)
    assert changed
    training |= {"world_size": ranks, "grpo": training["grpo"] | changed | {"max_steps": steps}}
    (folder / "plan.json").write_text(json.dumps(plan | {"run_dir": str(folder)}))
    return folder
