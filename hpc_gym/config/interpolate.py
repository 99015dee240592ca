"""`${other.key}` and OmegaConf's resolvers (`${oc.env:NAME,default}`) in composed values."""

from __future__ import annotations

import copy
from typing import Any

from hpc_gym.config.problems import Problem, nearest
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.secret_names import ADVICE, read_by


def interpolate(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The tree with every interpolation replaced by its value, and what could not be resolved.

    `\\${...}` is left for others (NeMo Gym has interpolation of its own) as `${...}`.
    """
    paths = list(_interpolated(tree, ()))
    if not paths:
        return tree, []
    # Imported here: most of its cost would fall on experiments that interpolate nothing.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = [*_unreadable(tree, paths), *_secret(tree, paths)]
    if problems:
        return tree, problems
    lazy = OmegaConf.create(tree)
    result = copy.deepcopy(tree)
    for path in paths:
        try:
            node: Any = lazy
            for part in path:
                node = node[part]
        except OmegaConfBaseException as error:
            sentence = _sentence(error, tree)
            # What uses a value that cannot be resolved fails alike: it is told once, where it was tried first.
            if all(problem.message != sentence for problem in problems):
                problems.append(Problem(path, sentence))
            continue
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        _set(result, path, value)
    return result, problems


def _unreadable(tree: dict[str, Any], paths: list[KeyPath]) -> list[Problem]:
    """What OmegaConf cannot read at all: one such value would keep it from reading the others."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    problems = []
    for path in paths:
        text = _at(tree, path)
        try:
            OmegaConf.create({"value": text})
        except GrammarParseError:
            problems.append(
                Problem(path, f"'{text}' is no interpolation: write ${{KEY}}, or \\${{ for text that holds '${{'.")
            )
    return problems


def _secret(tree: dict[str, Any], paths: list[KeyPath]) -> list[Problem]:
    """Values of secret variables, which would stand in the run directory for everybody to read."""
    return [
        Problem(path, f"would write the value of {name} into the run directory, where others read it: {ADVICE}.")
        for path in paths
        for name in read_by(_at(tree, path))
    ]


def _at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _interpolated(value: Any, path: KeyPath) -> list[KeyPath]:
    if isinstance(value, str):
        return [path] if "${" in value else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _interpolated(item, (*path, key))]


def _set(tree: Any, path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _sentence(error: Exception, tree: dict[str, Any]) -> str:
    text = str(error).splitlines()[0]
    _, _, missing = text.partition("Interpolation key '")
    if missing:
        name = missing.split("'")[0]
        return f"'${{{name}}}' names no key; {_nearest_key(name, tree)}"
    if "Environment variable" in text:
        name = text.split("'")[1]
        return f"the environment variable {name} is not set; set it, or give a default: ${{oc.env:{name},DEFAULT}}."
    return f"the interpolation cannot be resolved: {text}."


def _nearest_key(name: str, tree: dict[str, Any]) -> str:
    """The key most like `name`, or else those of the section that `name` leads into: all of a tree helps nobody."""
    keys = [".".join(map(str, path)) for path in _keys(tree, ())]
    hint = nearest(name, keys)
    if hint.startswith("did you mean"):
        return hint
    section, prefix = tree, ""
    for part in name.split(".")[:-1]:
        if not isinstance(section.get(part), dict):
            break
        section, prefix = section[part], f"{prefix}{part}."
    return nearest(name, [f"{prefix}{key}" for key in section])


def _keys(value: Any, path: KeyPath) -> list[KeyPath]:
    if not isinstance(value, dict):
        return [path]
    return [found for key, item in value.items() for found in _keys(item, (*path, key))]
