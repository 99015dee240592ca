"""Checkpoints of DeepSpeed that another number of ranks wrote: `repartition.py save|load FOLDER WORLD_SIZE_THAT_SAVED`.

`save` trains a small model with many configurations, saves each, and writes down the state of every parameter, then
that after one more step. `load` loads each and prints a JSON line: how far the state is from what was written down,
before and after that step. Parameters are gathered by DeepSpeed itself, in its way for the configuration.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpc_gym.training.checkpoints import Checkpoint, CheckpointError
from hpc_gym.training.grpo import leave
from hpc_gym.training.ranks import Ranks, start_distributed
from hpc_gym.training.repartition import repartitioning

ROWS, STEPS = 12, 3


@dataclass(frozen=True)
class Case:
    """A configuration. `frozen`: one layer is not trained."""

    stage: int
    bf16: bool = False
    frozen: bool = False
    optimizer: str = "adam"
    zero: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "stage 0": Case(0),
    "stage 1": Case(1, frozen=True),
    "stage 1, momentum": Case(1, optimizer="momentum"),
    "stage 1, gradients in fp32": Case(1, bf16=True, more={"data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": Case(2),
    "stage 2, bf16": Case(2, bf16=True, frozen=True),
    "stage 2, parameters dealt out in turn": Case(2, zero={"round_robin_gradients": True}),
    "stage 2, aligned": Case(2, bf16=True, zero={"parameter_alignment": True}),
    "stage 3": Case(3, frozen=True),
    "stage 3, bf16": Case(3, bf16=True),
    "stage 3, small groups": Case(3, zero={"sub_group_size": 150, "stage3_param_persistence_threshold": 0}),
    "stage 3, another stage": Case(3),
}


class Model(torch.nn.Module):
    """Sizes that no number of ranks divides, an embedding that is also the last layer, parameters of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(37, 11)
        self.inner = torch.nn.Linear(11, 13)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.norm = torch.nn.LayerNorm(13)
        self.fixed = torch.nn.Linear(13, 11)
        self.head = torch.nn.Linear(11, 37, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.rand(11))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.inner(self.embedding(tokens))) * self.scale)
        logits = self.head(self.fixed(hidden) + self.shift)
        return torch.nn.functional.cross_entropy(logits.float(), targets)


def engine_of(case: Case, seed: int) -> Any:
    import deepspeed

    torch.manual_seed(seed)
    model = Model()
    model = model.bfloat16() if case.bf16 else model
    if case.frozen:
        model.fixed.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim != 2], "weight_decay": 0.0},
    ]
    made = (
        torch.optim.AdamW(groups, lr=1e-2)
        if case.optimizer == "adam"
        else torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    )
    config = {
        "train_micro_batch_size_per_gpu": ROWS // int(os.environ["WORLD_SIZE"]),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": case.bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, **case.zero},
        **case.more,
    }
    return deepspeed.initialize(model=model, optimizer=made, config=config)[0]


def step(engine: Any, number: int) -> float:
    """Trains on a batch that is the same whoever shares it; returns its loss."""
    import torch.distributed as dist

    numbers = torch.Generator().manual_seed(number)
    rows = torch.randint(0, 37, (2, ROWS), generator=numbers).chunk(dist.get_world_size(), 1)[dist.get_rank()]
    loss = engine(rows[0], rows[1])
    engine.backward(loss)
    engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def state_of(engine: Any, case: Case) -> dict[str, Any]:
    """Everything that training goes on with, whole: on all ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keys = ("exp_avg", "exp_avg_sq") if case.optimizer == "adam" else ("momentum_buffer",)
    found: dict[str, Any] = {}
    if case.stage in (1, 2):
        # It looks the state up before there is one, and after a load it is another.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
            found[f"{name} weights"] = parameter.detach().clone()
        # DeepSpeed's own look-up does not know that parameters were dealt out: there the next step has to tell.
        if not parameter.requires_grad or case.zero.get("round_robin_gradients"):
            continue
        if case.stage == 0:
            found |= {f"{name} {key}": engine.optimizer.state[parameter][key].clone() for key in keys}
            continue
        found[f"{name} fp32"] = safe_get_full_fp32_param(parameter).clone()
        found |= {f"{name} {key}": safe_get_full_optimizer_state(parameter, key).clone() for key in keys}
    found |= {f"{name} buffer": buffer.clone() for name, buffer in engine.module.named_buffers()}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if case.optimizer == "adam":
        found["steps"] = torch.tensor(sorted({float(state["step"]) for state in inner.state.values()}))
    for number, group in enumerate(inner.param_groups):
        found[f"group {number}"] = torch.tensor([group["lr"], group["weight_decay"]])
    return found


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    for name in ours:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def save(case: Case, folder: Path) -> None:
    engine = engine_of(case, seed=1)
    for number in range(STEPS):
        step(engine, number)
    for group in engine.optimizer.param_groups:
        group["lr"] *= 0.37
    engine.save_checkpoint(str(folder))
    saved = state_of(engine, case)
    loss = step(engine, STEPS)
    if engine.global_rank == 0:
        torch.save({"saved": saved, "next": state_of(engine, case), "loss": loss}, folder / "expected.pt")
    else:
        state_of(engine, case)


def load(case: Case, folder: Path, ranks: int) -> dict[str, float]:
    expected = torch.load(folder / "expected.pt")
    engine = engine_of(case, seed=2)
    with repartitioning(engine, Checkpoint(folder, STEPS, ranks, STEPS)):
        engine.load_checkpoint(str(folder))
    loaded = distance(state_of(engine, case), expected["saved"])
    loss = step(engine, STEPS)
    return {
        "loaded": loaded,
        "next": distance(state_of(engine, case), expected["next"]),
        "loss": abs(loss - expected["loss"]),
        "global_steps": engine.global_steps,
    }


def main(what: str, folder: str, ranks: str) -> None:
    start_distributed(120.0)
    for name, case in CASES.items():
        place = Path(folder) / name.replace(" ", "-").replace(",", "")
        if what == "save":
            save(case, place)
            continue
        try:
            facts: dict[str, Any] = load(case if "another" not in name else Case(2), place, int(ranks))
        except CheckpointError as error:
            facts = {"refused": str(error)}
        if os.environ["RANK"] == "0":
            print(json.dumps({"case": name, **facts}), flush=True)
    Ranks().barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
