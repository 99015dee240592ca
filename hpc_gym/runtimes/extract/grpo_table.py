"""Every field of TRL's GRPOConfig, those of transformers' TrainingArguments included."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import typing
from typing import Any

from hpc_gym.runtimes.extract.hints import choices, first_paragraph, joined, plain, words


def table() -> dict[str, Any]:
    """Fields by name."""
    from trl import GRPOConfig

    hints = typing.get_type_hints(GRPOConfig)
    options = {
        field.name: {
            "type": joined(words(hints[field.name])),
            "choices": choices(hints[field.name]),
            "default": _default(field),
            "help": first_paragraph(field.metadata.get("help")),
        }
        for field in dataclasses.fields(GRPOConfig)
        if field.init
    }
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    return {"source": versions, "options": options}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return plain(field.default)
    return plain(field.default_factory()) if field.default_factory is not dataclasses.MISSING else None
