"""Plans of small real programs: what is under test is the machinery around them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_gym.plan.plan import (
    Evaluation,
    Launch,
    Node,
    Plan,
    Probe,
    Process,
    RolloutSettings,
    Runtime,
    Sampling,
    Supervision,
    Training,
)

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_output_tokens=8)
SUPERVISION = Supervision(
    heartbeat_s=0.5, node_silent_s=5.0, stop_within_s=8.0, checkpoint_grace_s=5.0, time_limit_margin_s=15.0
)


def task(name: str, code: str, **fields: Any) -> Process:
    """A process that the job waits for, running Python code."""
    return Process(name=name, role="train", kind="task", runtime="base", argv=("{python}", "-c", code), **fields)


def service(name: str, code: str, **fields: Any) -> Process:
    """A process that must live as long as the job."""
    return Process(name=name, role="rollout", kind="service", runtime="base", argv=("{python}", "-c", code), **fields)


def notifying(name: str, code: str) -> Process:
    """A task that says READY itself."""
    return task(name, code, ready=Probe(kind="notify"), ready_within_s=30.0)


def plan(
    run_dir: Path,
    rollout: Sequence[Process] = (),
    train: Sequence[Sequence[Process]] = ((),),
    launch: Launch | None = None,
    **fields: Any,
) -> Plan:
    """A plan of one rollout node, where it has processes, and the training nodes. `rollout_nodes`: how many such."""
    count = fields.pop("rollout_nodes", 1)
    nodes = [Node(index, "rollout", index, 0, tuple(rollout)) for index in range(count if rollout else 0)]
    nodes += [Node(len(nodes) + index, "train", index, 0, tuple(each)) for index, each in enumerate(train)]
    training = Training(
        method="grpo",
        model="none",
        grpo={"max_steps": fields.pop("max_steps", 4)},
        deepspeed={},
        prompts_per_step=1,
        world_size=len(train),
        max_staleness=0,
        sources=(),
        sampling=SAMPLING,
        evaluation=Evaluation(
            sources=fields.pop("held_out", ()),
            at_start=True,
            at_end=True,
            every=0,
            sampling=SAMPLING,
            num_rollouts=1,
        ),
        weight_transfer="gloo",
        checkpoint_every=0,
        checkpoints_kept=1,
        wandb=None,
        on_policy_tolerance=0.0,
    )
    return Plan(
        name=run_dir.name,
        run_dir=str(run_dir),
        seed=0,
        python=sys.executable,
        nodes=tuple(nodes),
        runtimes={"base": Runtime("base", "venv", sys.prefix, sys.executable)},
        environments=(),
        rollout=RolloutSettings(model_name="policy", max_model_len=64, max_concurrent=1, replicas=1),
        training=training,
        launch=launch or Launch(kind="local"),
        supervision=SUPERVISION,
        **fields,
    )
