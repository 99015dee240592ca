"""Loads a checkpoint of DeepSpeed that another number of ranks wrote. Written against DeepSpeed 0.19.

DeepSpeed itself refuses it for ZeRO 1 to 3, and its universal checkpoints would be a second copy of the whole state on
the shared storage, that one process writes. Here `DeepSpeedEngine.load_checkpoint` runs as always, but each rank gets
as its part what it would have written, put together from the parts of the checkpoint (`hpc_gym.training.parts`);
nothing is written. Without ZeRO (stage 0) every rank has everything, and there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from hpc_gym.training.checkpoints import Checkpoint, CheckpointError
from hpc_gym.training.parts import Part, Piece, SavedParts, cut_each, cut_flat

Groups = Sequence[Sequence[tuple[str, int]]]
"""Per flat group, names of its parameters in their order, with their numbers of elements."""


@contextmanager
def repartitioning(engine: Any, checkpoint: Checkpoint) -> Iterator[None]:
    """In here `engine.load_checkpoint` reads the checkpoint, whose number of ranks is another one than the engine's.

    Raises CheckpointError where the state cannot be divided anew.
    """
    _refuse_unknown(engine)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        yield
        return
    saved = _SavedByZero(checkpoint, stage)
    if not saved.model_file(0).exists():
        raise CheckpointError(
            f"{checkpoint.path} was not written with ZeRO stage {stage}: resume with the deepspeed.zero_stage that it "
            "was trained with"
        )
    ours = {
        # Every rank has its own in stage 3, of which only what differs between ranks has to be its own.
        "_get_all_ckpt_names": lambda load_dir, tag: [str(saved.model_file(0))],
        "load_module_state_dict": lambda checkpoint, **keywords: type(engine).load_module_state_dict(
            engine, checkpoint | saved.frozen(engine, checkpoint), **keywords
        ),
        "_load_zero_checkpoint": lambda load_dir, tag, load_optimizer_states=True: _load(engine, saved),
    }
    vars(engine).update(ours)
    try:
        yield
    finally:
        for name in ours:
            delattr(engine, name)


class _SavedByZero:
    """The files of a checkpoint, as the ranks wrote them."""

    def __init__(self, checkpoint: Checkpoint, stage: int) -> None:
        self.count = checkpoint.world_size
        self.stage = stage
        tag = (checkpoint.path / "latest").read_text().strip()
        self.folder = checkpoint.path / tag

    def model_file(self, rank: int) -> Path:
        name = f"zero_pp_rank_{rank}_mp_rank_00" if self.stage == 3 else "mp_rank_00"
        return self.folder / f"{name}_model_states.pt"

    def optimizer(self, rank: int) -> Any:
        """What DeepSpeed's optimizer of that rank had saved."""
        found = [self.folder / f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for kind in ("bf16_", "")]
        return _mapped(next((file for file in found if file.exists()), found[-1]))["optimizer_state_dict"]

    def groups(self) -> Groups:
        shapes = _mapped(self.model_file(0))["param_shapes"]
        return [[(name, shape.numel()) for name, shape in group.items()] for group in shapes]

    def parts(self) -> SavedParts:
        groups, ranks = self.groups(), range(self.count)
        if self.stage == 3:
            cuts = [[cut_each(group, self.count, rank) for group in groups] for rank in ranks]
            return SavedParts(lambda rank: _part_of_weights(self.optimizer(rank)), cuts)
        first = self.optimizer(0)
        padding = first.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
        # Of the first rank: only at the end of the last one is padding, which it did not save.
        sizes = [len(flat) for flat in first["single_partition_of_fp32_groups"]]
        cuts = [[cut_flat(*group, rank) for group in zip(groups, padding, sizes, strict=True)] for rank in ranks]
        return SavedParts(lambda rank: _part_of_states(self.optimizer(rank)), cuts)

    def frozen(self, engine: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the parameters that are not trained: in stage 3 each rank keeps one of these too."""
        shapes = checkpoint.get("frozen_param_shapes")
        if self.stage != 3 or not shapes:
            return {}
        fragments = [_mapped(self.model_file(rank))["frozen_param_fragments"] for rank in range(self.count)]
        rank, count, ours = dist.get_rank(), dist.get_world_size(), {}
        for name, shape in shapes.items():
            whole = torch.cat([fragment[name].view(-1) for fragment in fragments])[: shape.numel()]
            size = -(-shape.numel() // count)
            mine = whole[rank * size : (rank + 1) * size]
            ours[name] = torch.nn.functional.pad(mine, (0, size - mine.numel()))
        return {"frozen_param_fragments": ours}


def _load(engine: Any, saved: _SavedByZero) -> bool:
    state = _state_of_weights(engine, saved) if saved.stage == 3 else _state_of_states(engine, saved)
    rank = dist.get_rank(group=engine.optimizer.dp_process_group)
    engine.optimizer.load_state_dict(
        state_dict_list=[None] * rank + [state],
        load_optimizer_states=True,
        load_from_fp32_weights=engine.zero_load_from_fp32_weights(),
    )
    return True


def _state_of_states(engine: Any, saved: _SavedByZero) -> dict[str, Any]:
    """What this rank's optimizer would have saved in stage 1 or 2."""
    optimizer = engine.optimizer
    groups = [[(name, shape.numel()) for name, shape in group.items()] for group in engine._get_zero_param_shapes()]
    padding = getattr(optimizer, "round_robin_bit16_padding", [[0] * len(group) for group in groups])
    flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    sizes = [tensor.numel() for tensor in flat]
    cuts = [
        cut_flat(group, padded, size, dist.get_rank())
        for group, padded, size in zip(groups, padding, sizes, strict=True)
    ]
    weights, states = _regrouped(saved, groups, cuts, sizes)
    first = saved.optimizer(0)
    base = first["base_optimizer_state"]
    identities = [group["params"][0] for group in base["param_groups"]]
    return {
        **first,
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": {**base, "state": _by_identity(identities, states)},
        "param_alignment_paddings": padding,
        "group_paddings": [0] * len(weights),
    }


def _state_of_weights(engine: Any, saved: _SavedByZero) -> dict[str, Any]:
    """What this rank's optimizer would have saved in stage 3."""
    optimizer = engine.optimizer
    groups = [[(engine.param_names[p], p.ds_numel) for p in group] for group in optimizer.fp16_groups]
    sizes = [sum(p.partition_numel() for p in group) for group in optimizer.fp16_groups]
    cuts = [cut_each(group, dist.get_world_size(), dist.get_rank()) for group in groups]
    weights, states = _regrouped(saved, groups, cuts, sizes)
    first = saved.optimizer(0)
    base = first["optimizer_state_dict"]
    # Sub-groups have a size in elements of one rank, so there may be more or fewer of them.
    of_group = [optimizer.sub_group_to_group_id[index] for index in range(len(groups))]
    numbered = [
        {**group, "params": [index for index, owner in enumerate(of_group) if owner == number]}
        for number, group in enumerate(base["param_groups"])
    ]
    return {
        **first,
        "fp32_flat_groups": weights,
        "optimizer_state_dict": {"state": _by_identity(range(len(groups)), states), "param_groups": numbered},
    }


def _regrouped(
    saved: _SavedByZero, groups: Groups, cuts: Sequence[Sequence[Piece]], sizes: Sequence[int]
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    parts = saved.parts()
    found = [
        parts.group([name for name, _ in group], pieces, size)
        for group, pieces, size in zip(groups, cuts, sizes, strict=True)
    ]
    return [weights for weights, _ in found], [state for _, state in found]


def _by_identity(identities: Sequence[int], states: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {identity: state for identity, state in zip(identities, states, strict=True) if state}


def _part_of_states(saved: Mapping[str, Any]) -> Part:
    base = saved["base_optimizer_state"]
    if not isinstance(base, Mapping):
        raise CheckpointError(
            "the checkpoint was written with zero_optimization.elastic_checkpoint, which cannot be resumed by another "
            "number of training ranks: resume with as many as wrote it"
        )
    states = [base["state"].get(group["params"][0], {}) for group in base["param_groups"]]
    return Part(saved["single_partition_of_fp32_groups"], states)


def _part_of_weights(saved: Mapping[str, Any]) -> Part:
    base = saved["optimizer_state_dict"]
    identities = [identity for group in base["param_groups"] for identity in group["params"]]
    return Part(saved["fp32_flat_groups"], [base["state"].get(identity, {}) for identity in identities])


def _mapped(file: Path) -> Any:
    """A file that DeepSpeed saved; its tensors are read when they are used."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _refuse_unknown(engine: Any) -> None:
    """What divides parameters in yet other ways, or keeps them elsewhere than in the checkpoint's files."""
    for there, what in (
        (engine.has_moe_layers, "DeepSpeed's expert parallelism"),
        (engine.mp_world_size > 1, "tensor parallelism"),
        (engine.zero_nvme_offload_optimizer(), "an optimizer offloaded to NVMe"),
    ):
        if there:
            raise CheckpointError(
                f"a checkpoint with {what} cannot be resumed by another number of training ranks: resume with as many "
                "as wrote it"
            )
