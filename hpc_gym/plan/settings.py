"""The GRPOConfig fields and the DeepSpeed configuration of a run: the user's, and what follows from the rest of the
experiment.

What names paths, processes and services, and DeepSpeed's "auto" values, the trainer adds (`hpc_gym.training.settings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc_gym.config.schema import Experiment


def grpo_fields(experiment: Experiment) -> dict[str, Any]:
    """Fields of TRL's GRPOConfig."""
    dtype = experiment.model.dtype
    return {
        # The longest completion there can be; TRL divides by it in some losses.
        "max_completion_length": experiment.vllm.get("max_model_len"),
        **experiment.grpo,
        "model_init_kwargs": {**(experiment.grpo.get("model_init_kwargs") or {}), "dtype": dtype},
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "seed": experiment.seed,
    }


def deepspeed_config(experiment: Experiment) -> dict[str, Any]:
    """A DeepSpeed configuration."""
    own = dict(experiment.deepspeed)
    stage = own.pop("zero_stage")
    return {**own, "zero_optimization": {**_section(own.get("zero_optimization")), "stage": stage}}


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
