"""Checks the options that pass through to vLLM, TRL and DeepSpeed against what the locked runtimes accept.

The tables come from `hpc_gym.runtimes.options`; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hpc_gym.config.problems import Problem, nearest, value_text
from hpc_gym.config.provenance import KeyPath
from hpc_gym.plan.owned import DEEPSPEED, GRPO, VLLM, ZERO_STAGE


class Option(Protocol):
    """One option: `type` is a union of `int float bool str list dict` and `null` joined by "|", or "" for anything."""

    @property
    def type(self) -> str: ...

    @property
    def choices(self) -> Sequence[Any] | None: ...


Table = Mapping[str, Option]

_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
    "null": (type(None),),
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a section",
    "null": "null",
}
_PROGRAMS = {"vllm": "`vllm serve`", "grpo": "TRL's GRPOConfig", "deepspeed": "DeepSpeed"}


def option_problems(tree: Mapping[str, Any]) -> list[Problem]:
    """Problems of the sections `vllm`, `grpo` and `deepspeed` of a composed experiment."""
    try:
        from hpc_gym.runtimes.options import table
    except ModuleNotFoundError:  # until the tables are in the tree
        return _zero_problems(tree.get("deepspeed"))

    problems = []
    for section, owned in (("vllm", VLLM), ("grpo", GRPO), ("deepspeed", DEEPSPEED)):
        values = tree.get(section)
        if isinstance(values, Mapping):
            extra = frozenset({"zero_stage"}) if section == "deepspeed" else frozenset()
            problems += section_problems(section, values, table(section), owned, extra)
    return problems + _zero_problems(tree.get("deepspeed"))


def section_problems(
    section: str, values: Mapping[str, Any], table: Table, owned: Mapping[str, str], extra: frozenset[str] = frozenset()
) -> list[Problem]:
    """Unknown options, options that hpc-gym owns, and values of a wrong type. `extra` are names of our own."""
    problems = []
    for name, value in values.items():
        path: KeyPath = (section, name)
        if name in owned:
            problems.append(Problem(path, f"hpc-gym owns this option: {owned[name]}."))
        elif name.replace("-", "_") in owned and section == "vllm":
            problems.append(Problem(path, f"hpc-gym owns this option: {owned[name.replace('-', '_')]}."))
        elif name in extra:
            continue
        elif name not in table:
            valid = {*table, *extra} - set(owned)
            problems.append(Problem(path, f"{_PROGRAMS[section]} has no such option; {nearest(name, valid)}"))
        elif sentence := _wrong_value(table[name], value):
            problems.append(Problem(path, sentence))
    return problems


def _wrong_value(option: Option, value: Any) -> str:
    if option.choices and value is not None and not isinstance(value, list | dict) and value not in option.choices:
        allowed = ", ".join(value_text(choice) for choice in option.choices)
        return f"{value_text(value)} is not allowed; allowed: {allowed}."
    kinds = [kind for kind in option.type.split("|") if kind]
    if not kinds or value is None or any(_is(kind, value) for kind in kinds):
        return ""
    told = f"the text {value_text(value)}" if isinstance(value, str) else value_text(value)
    return f"must be {' or '.join(_WORDS[kind] for kind in kinds if kind != 'null')}, not {told}."


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _KINDS[kind])


def _zero_problems(deepspeed: Any) -> list[Problem]:
    if not isinstance(deepspeed, Mapping):
        return []
    problems = []
    stage = deepspeed.get("zero_stage")
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(
            Problem(("deepspeed", "zero_stage"), f"{value_text(stage)} is not allowed; allowed: 0, 1, 2, 3.")
        )
    zero = deepspeed.get("zero_optimization")
    if isinstance(zero, Mapping) and "stage" in zero:
        problems.append(Problem(("deepspeed", "zero_optimization", "stage"), f"{ZERO_STAGE}."))
    return problems
