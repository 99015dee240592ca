"""Composed values to the typed `Experiment`, with pydantic's findings told as sentences for the author of the YAML."""

from __future__ import annotations

import re
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hpc_gym.config.compose import Composed
from hpc_gym.config.problems import Problem, nearest, value_text
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment, Slurm
from hpc_gym.config.slurm_options import slurm_problems

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a section of `key: value` pairs",
    "model_type": "a section of `key: value` pairs",
    "list_type": "a list",
    "finite_number": "a finite number",
}
_EMPTY: dict[KeyPath, str] = {
    ("data", "train"): "list at least one {environment: NAME, path: FILE.jsonl}",
    ("environments",): "extend environments/NAME, or name one with its config_paths",
}
_MISSING: dict[KeyPath, str] = {
    ("model",): "extend models/NAME, or set model.path to a model's folder or its name on the hub",
    ("model", "path"): "extend models/NAME, or set it to a model's folder or its name on the hub",
}


def validate(composed: Composed) -> tuple[Experiment | None, list[Problem]]:
    """The typed experiment, or None and the problems that keep it from being one."""
    problems = slurm_problems(composed.tree)
    try:
        experiment = Experiment.model_validate(composed.tree)
    except ValidationError as error:
        return None, [*_problems(error.errors(include_url=False), composed.tree), *problems]
    return (None if problems else experiment), problems


def _problems(errors: list[ErrorDetails], tree: dict[str, Any]) -> list[Problem]:
    """One problem per key: a value that may be of several kinds fails once for each of them."""
    found: list[Problem] = []
    wrong_kinds: dict[KeyPath, list[ErrorDetails]] = {}
    for details in errors:
        if details["type"] in _KINDS:
            wrong_kinds.setdefault(_key_path(details["loc"], tree, missing=False), []).append(details)
        else:
            found.append(_problem(details, tree))
    for path, group in wrong_kinds.items():
        kinds = list(dict.fromkeys(_KINDS[details["type"]] for details in group))
        allowed = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
        value = group[0]["input"]
        # YAML reads 123, true and 1e5 as something else than text.
        quote = (
            f': write it in quotes, "{value_text(value)}"'
            if kinds == ["text"] and isinstance(value, int | float)
            else ""
        )
        found.append(Problem(path, f"must be {allowed}, not {_typed(value)}{quote}."))
    return found


def _problem(details: ErrorDetails, tree: dict[str, Any]) -> Problem:
    path = _key_path(details["loc"], tree, missing=details["type"] == "missing")
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, f"unknown key; {nearest(str(path[-1]), _fields_at(path[:-1]))}")
    if kind == "missing":
        return Problem(path, f"is missing: {_MISSING.get(path, 'it must be set')}.")
    if kind == "literal_error":
        allowed = re.sub(r"'([^']*)' or ", r"'\1' or ", str(context.get("expected", "")))
        return Problem(path, f"{value_text(details['input'])} is not allowed; allowed: {allowed}.")
    if kind == "value_error":
        message = str(context.get("error", details["msg"]))
        quoted = f"{value_text(details['input'])}: " if isinstance(details["input"], str) else ""
        return Problem(path, quoted + message)
    if kind == "too_short":
        hint = _EMPTY.get(path, "")
        return Problem(path, f"must not be empty{f': {hint}' if hint else ''}.")
    if kind == "string_too_short":
        return Problem(path, "must not be empty text.")
    bound = details["msg"].replace("Input should be ", "").lower()
    return Problem(path, f"{value_text(details['input'])} is not allowed; it must be {bound}.")


def _typed(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value_text(value)}"
    return value_text(value)


def _key_path(loc: tuple[int | str, ...], tree: Any, *, missing: bool) -> KeyPath:
    """`loc` without what pydantic adds for the member of a union that it tried."""
    path: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node = node[part]
        elif not (missing and index == len(loc) - 1):
            break
        path.append(part)
    return tuple(path)


def _fields_at(path: KeyPath) -> list[str]:
    """The keys that may stand in the section at `path`."""
    kind: Any = Experiment
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = _section(field.annotation if field else None)
        else:
            kind = _section(_element(kind))
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Slurm:
        return list(kind.model_fields) + (["extends"] if kind is Experiment else [])
    return []


def _element(kind: Any) -> Any:
    arguments = typing.get_args(kind)
    return arguments[-1] if arguments else None


def _section(kind: Any) -> Any:
    """The section, list or mapping inside an `Annotated` or an optional."""
    if typing.get_origin(kind) is typing.Annotated:
        return _section(typing.get_args(kind)[0])
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if typing.get_origin(kind) in (list, dict) or not members:
        return kind
    return _section(members[0])
