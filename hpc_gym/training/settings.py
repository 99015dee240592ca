"""TRL's configuration of a run: what the experiment says under TRL's own names, and what hpc-gym owns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Training

ZERO_3 = 3


def grpo_arguments(
    training: Training, seed: int, output_dir: Path, *, on_gpu: bool, timeout_s: float
) -> dict[str, Any]:
    """The arguments of GRPOConfig.

    Raises UserError when the batch is not what the data order counts on, or steps would be off-policy.
    """
    arguments = {"seed": seed, **training.grpo}
    _check(training, arguments)
    arguments |= {
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
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "no",
        # transformers would remove an older checkpoint before all ranks have written the new one: pruning is ours.
        "save_strategy": "steps",
        "save_steps": training.checkpoint_every or int(arguments["max_steps"]),
        "save_total_limit": None,
        "push_to_hub": False,
        "ddp_timeout": int(timeout_s),
    }
    return arguments


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


def _check(training: Training, arguments: Mapping[str, Any]) -> None:
    accumulation = int(arguments.get("gradient_accumulation_steps", 1))
    per_device = int(arguments.get("per_device_train_batch_size", 8))
    steps_per_generation = int(arguments.get("steps_per_generation") or accumulation)
    generate_every = steps_per_generation * int(arguments.get("num_iterations", 1))
    generations = int(arguments.get("num_generations", 8))
    if int(arguments.get("max_steps", -1)) < 1:
        raise UserError("grpo.max_steps must say how many steps to train: the data order has no epochs")
    if training.max_staleness != 0:
        raise UserError(
            f"max_staleness is {training.max_staleness}, but only 0 (strictly on-policy) is there yet: "
            "set max_staleness to 0"
        )
    if accumulation % generate_every:
        raise UserError(
            f"grpo.steps_per_generation x grpo.num_iterations is {generate_every}, which does not divide "
            f"grpo.gradient_accumulation_steps = {accumulation}: later steps would train on rollouts of older weights"
        )
    if per_device * accumulation * training.world_size != training.prompts_per_step * generations:
        raise UserError(
            f"a step has {training.prompts_per_step} prompts x {generations} generations, but "
            f"per_device_train_batch_size {per_device} x gradient_accumulation_steps {accumulation} x {training.world_size} ranks is "
            f"{per_device * accumulation * training.world_size} rollouts"
        )
    if arguments.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise UserError(
            "grpo.multi_objective_aggregation must be sum_then_normalize: the environments' rewards are one objective, "
            "and failed rollouts must stay out of it"
        )
    if training.weight_transfer == "adapter":
        raise UserError("weights.transfer: adapter is not there yet; use gloo, nccl or filesystem")
