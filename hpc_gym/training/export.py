"""The trained model as a plain Hugging Face folder: config, safetensors, tokenizer with its chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hpc_gym.training.ranks import Ranks


def export_model(trainer: Any, folder: Path, ranks: Ranks) -> None:
    """Writes the whole model to `folder`, which appears complete or not at all. All ranks call it together.

    ZeRO-3 shards are gathered. The dtype is the one it was trained in.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if ranks.is_first:
        partial = folder.with_name(folder.name + ".partial")
        for path in (partial, folder):
            shutil.rmtree(path, ignore_errors=True)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.config.use_cache = True  # off only while training with gradient checkpointing
        model.save_pretrained(partial, state_dict=state)
        trainer.processing_class.save_pretrained(partial)
        partial.rename(folder)
    ranks.barrier()
