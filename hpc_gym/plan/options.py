"""Checks the options that pass through to vLLM, TRL and DeepSpeed against what the locked runtimes accept.

The tables come from `hpc_gym.runtimes.options`; nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hpc_gym.config.problems import Problem, nearest, value_text
from hpc_gym.config.provenance import KeyPath
from hpc_gym.plan.owned import DEEPSPEED, GRPO, JUDGE_VLLM, VLLM, ZERO_STAGE
from hpc_gym.runtimes.options import Option, Section, table

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
_OURS: Mapping[KeyPath, frozenset[str]] = {("deepspeed",): frozenset({"zero_stage"})}


def option_problems(tree: Mapping[str, Any]) -> list[Problem]:
    """Problems of the sections `vllm`, `judge.vllm`, `grpo` and `deepspeed` of a composed experiment."""
    problems: list[Problem] = []
    sections: tuple[tuple[Section, Mapping[str, str]], ...] = (
        ("vllm", VLLM),
        ("grpo", GRPO),
        ("deepspeed", DEEPSPEED),
    )
    for section, owned in sections:
        values = tree.get(section)
        if isinstance(values, Mapping):
            problems += _section_problems(section, (section,), values, table(section), owned)
    judge = tree.get("judge")
    values = judge.get("vllm") if isinstance(judge, Mapping) else None
    if isinstance(values, Mapping):
        problems += _section_problems("vllm", ("judge", "vllm"), values, table("vllm"), JUDGE_VLLM)
    return [*problems, *_zero_problems(tree.get("deepspeed")), *_dtype_problems(tree.get("grpo"))]


def _section_problems(
    section: Section,
    path: KeyPath,
    values: Mapping[str, Any],
    options: Mapping[str, Option],
    owned: Mapping[str, str],
) -> Iterable[Problem]:
    """Unknown options, options that hpc-gym owns, and values of a wrong type, also inside DeepSpeed's sections."""
    ours = _OURS.get(path, frozenset())
    for name, value in values.items():
        key = (*path, name)
        if reason := owned.get(name) or owned.get(name.replace("-", "_")):
            yield Problem(key, f"hpc-gym owns this option: {reason}.")
        elif name in ours:
            continue
        elif name not in options:
            valid = {*options, *ours} - set(owned)
            yield Problem(key, f"{_PROGRAMS[section]} has no such option; {nearest(name, valid)}")
        elif options[name].fields and isinstance(value, Mapping):
            yield from _section_problems(section, key, value, options[name].fields, {})
        elif sentence := _wrong_value(section, options[name], value):
            yield Problem(key, sentence)


def _wrong_value(section: Section, option: Option, value: Any) -> str:
    if (section == "vllm" and value is None) or (section == "deepspeed" and value == "auto"):
        return ""  # null leaves a flag out; what is "auto" transformers fills in
    if option.choices and value is not None and not isinstance(value, list | dict) and value not in option.choices:
        allowed = ", ".join(value_text(choice) for choice in option.choices)
        return f"{value_text(value)} is not allowed; allowed: {allowed}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {value_text(value)}."
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{value_text(value)} is too large for a 64-bit number."
    kinds = [kind for kind in option.type.split("|") if kind]
    if not kinds or any(_is(kind, value) for kind in kinds):
        return ""
    told = f"the text {value_text(value)}" if isinstance(value, str) else value_text(value)
    return f"must be {' or '.join(_WORDS[kind] for kind in kinds)}, not {told}."


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _KINDS[kind])


def _dtype_problems(grpo: Any) -> list[Problem]:
    init = grpo.get("model_init_kwargs") if isinstance(grpo, Mapping) else None
    return [
        Problem(("grpo", "model_init_kwargs", name), f"hpc-gym owns this option: {GRPO['bf16']}.")
        for name in ("dtype", "torch_dtype")
        if isinstance(init, Mapping) and name in init
    ]


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
