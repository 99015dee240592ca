"""TRL's configuration of a run: what the experiment says under TRL's own names, and what hpc-gym owns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_gym.plan.plan import Training

ZERO_3 = 3


def grpo_arguments(
    training: Training, seed: int, output_dir: Path, *, on_gpu: bool, timeout_s: float
) -> dict[str, Any]:
    """The arguments of GRPOConfig. That the batch fits the data order and is on-policy was checked at planning."""
    return {
        "seed": seed,
        **training.grpo,
        "output_dir": str(output_dir),
        "deepspeed": deepspeed_config(training.deepspeed),
        "use_cpu": not on_gpu,
        # The data order is hpc-gym's (`hpc_gym.data.draw`): TRL's sampler has no epoch and would replay its first one.
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        # Generation is ours; PolicyTrainer turns the correction on without vLLM in this runtime.
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "temperature": training.sampling.temperature,
        "top_p": training.sampling.top_p,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of earlier steps where the loss is no number
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
        # transformers would remove an older checkpoint before all ranks have written the new one: pruning is ours.
        "save_strategy": "steps",
        "save_steps": training.checkpoint_every or int(training.grpo["max_steps"]),
        "save_total_limit": None,
        "push_to_hub": False,
        "ddp_timeout": int(timeout_s),
    }


def deepspeed_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's DeepSpeed config; what the trainer's arguments decide is filled in by transformers ("auto")."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **given,
    }
    zero = dict(config.get("zero_optimization", {}))
    if zero.get("stage") == ZERO_3:
        # So that a checkpoint also holds a whole model, and the export can be gathered.
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    config["zero_optimization"] = zero
    return config
