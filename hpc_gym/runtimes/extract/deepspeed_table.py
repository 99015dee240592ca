"""The keys that DeepSpeed reads from its configuration."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hpc_gym.runtimes.extract.hints import choices, first_paragraph, joined, plain, word_of, words


class Recorder(dict[str, Any]):
    """A configuration that notes which keys it is asked for, and with which default.

    DeepSpeed has no list of its top-level keys: it asks for one after the other, by `get`, `in` or `[]`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: dict[str, Any] = {}

    def __copy__(self) -> Recorder:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        # A presence test by `in` may have come first: the default says more.
        self.asked[key] = default if self.asked.get(key) is None else self.asked[key]
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __contains__(self, key: object) -> bool:
        return key in self._recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorder)


def table() -> dict[str, Any]:
    """Top-level keys by name; a section whose keys DeepSpeed declares has them under `fields`."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = Recorder({"train_batch_size": 1})
    DeepSpeedConfig(recorder)
    sections, auto = _sections(), set(_filled_by_transformers())
    options = {}
    for key, default in recorder.asked.items():
        if key in sections:
            options[key] = _entry("dict", None, {}) | {"fields": _fields(sections[key], key, auto)}
        else:
            options[key] = _entry(_type(key, default, auto), None, default)
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "transformers")}
    return {"source": versions, "options": options}


def _sections() -> dict[str, Any]:
    """The sections of a training configuration that are pydantic models."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "compile": CompileConfig,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
    }


def _fields(model: Any, path: str, auto: set[str]) -> dict[str, Any]:
    fields = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=False)
        nested = list(_models(field.annotation))
        for key in (name, *filter(None, [field.alias])):
            found = words(field.annotation)
            if found and (default is None or f"{path}.{key}" in auto):
                found |= {"null"} if default is None else {"str"}
            # `float` and `int` are one to pydantic where the number is whole (reduce_bucket_size: 5e8).
            found |= {"float"} if "int" in found else set()
            entry = _entry(joined(found), choices(field.annotation), default, first_paragraph(field.description))
            if len(nested) == 1:
                entry["fields"] = _fields(nested[0], f"{path}.{key}", auto)
            fields[key] = entry
    return fields


def _models(hint: Any) -> Iterable[Any]:
    """The pydantic models in a type hint."""
    for kind in getattr(hint, "__args__", None) or (hint,):
        if isinstance(kind, type) and hasattr(kind, "model_fields"):
            yield kind


def _type(key: str, default: Any, auto: set[str]) -> str:
    if default is None or default == {}:
        # Asked for without a default: nothing says what it may be, unless the empty section that stands for none.
        return "dict" if default == {} else ""
    found = {word_of(default)}
    if "int" in found:
        found.add("float")
    return joined(found | ({"str"} if key in auto else set()))


def _entry(kind: str, allowed: list[Any] | None, default: Any, text: str = "") -> dict[str, Any]:
    return {"type": kind, "choices": allowed, "default": plain(default), "help": text}


def _filled_by_transformers() -> list[str]:
    """Keys where the value "auto" may stand, because transformers fills it in from its TrainingArguments."""
    from transformers.integrations import deepspeed

    source = inspect.getsource(deepspeed.HfTrainerDeepSpeedConfig)
    return re.findall(r'fill_(?:match|only)\(\s*"([^"]+)"', source)
