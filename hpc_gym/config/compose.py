"""Composes an experiment: its parents (`extends`), itself, a cluster profile, overrides, then interpolation.

Precedence, lowest first: `configs/base.yaml`; the parents in the order in which `extends` lists them, each with its own
parents below it; the file itself; overrides. Sections merge key by key, lists and values replace. `--cluster NAME`
takes the place of any `clusters/...` among the parents, as the last of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.config.document import Document, parse_value, read_document
from hpc_gym.config.interpolate import interpolate
from hpc_gym.config.parents import find_cluster, find_experiment, find_parent
from hpc_gym.config.problems import Problem, refuse
from hpc_gym.config.provenance import KeyPath, Provenance, Setting, display, key_text
from hpc_gym.errors import UserError
from hpc_gym.shipped import shipped


@dataclass(frozen=True)
class Composed:
    """An experiment as plain values, not validated yet; `file` is the user's own."""

    file: Path
    tree: dict[str, Any]
    provenance: Provenance

    def folder_of(self, path: KeyPath) -> Path:
        """The folder that a relative file name at `path` is relative to: that of the YAML file which set it.

        An override's, and that of hpc-gym's own files (which name no file beside themselves), is the working directory.
        """
        origin = self.provenance.origin(path)
        if origin is None or origin.file is None or origin.file.is_relative_to(shipped("configs").resolve()):
            return Path.cwd()
        return origin.file.parent


def compose(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> Composed:
    """Composes the experiment of that file or name.

    Raises UserError for a parent that is missing or its own ancestor, for what is no YAML, and for an override or an
    interpolation that leads nowhere.
    """
    file = find_experiment(experiment)
    base = shipped("configs").resolve() / "base.yaml"
    composed = Composed(file, {}, Provenance())
    # What nothing sets is missing in the user's own file.
    composed.provenance.record((), Setting(value={}, file=file, line=1))
    _add(read_document(base), composed)
    for document in _in_order(file, cluster):
        _add(document, composed)
    for override in overrides:
        _override(composed, override)
    tree, problems = interpolate(composed.tree)
    problems += [
        Problem(path, "must be set: '???' stands for a value that the experiment has to give.") for path in _unset(tree)
    ]
    refuse(problems, composed.provenance)
    return Composed(file, tree, composed.provenance)


def _in_order(file: Path, cluster: str | None) -> list[Document]:
    """The documents of the experiment, each after its parents; a parent that two files share comes once, at its
    first place.
    """
    documents: dict[Path, Document] = {}
    if cluster is None:
        _visit(file, (), documents, clusters=True)
        return list(documents.values())
    _visit(file, (), documents, clusters=False)
    own = documents.pop(file)
    _visit(find_cluster(cluster, file), (), documents, clusters=True)
    documents.pop(file, None)
    return [*documents.values(), own]


def _visit(file: Path, chain: tuple[Path, ...], documents: dict[Path, Document], *, clusters: bool) -> None:
    if file in chain:
        circle = " -> ".join(display(member) for member in (*chain[chain.index(file) :], file))
        raise UserError(f"{display(chain[-1])}: extends: the parents go in a circle: {circle}. Take one of them out.")
    if file in documents:
        return
    document = read_document(file)
    for index, name in enumerate(_parents(document)):
        if not clusters and name.startswith("clusters/"):
            continue
        line = document.lines.get(("extends", index), document.lines[("extends",)])
        parent = find_parent(name, file, f"{display(file)}:{line}: extends")
        _visit(parent, (*chain, file), documents, clusters=clusters)
    documents[file] = document


def _parents(document: Document) -> list[str]:
    parents = document.tree.get("extends") or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise UserError(
            f"{display(document.file)}:{document.lines[('extends',)]}: extends: must be a list of names or files, "
            "such as [clusters/local, models/demo]."
        )
    return parents


def _add(document: Document, composed: Composed) -> None:
    tree = {key: value for key, value in document.tree.items() if key != "extends"}
    _merge(composed.tree, tree, (), composed.provenance, lambda path, value: _setting(document, path, value))


def _setting(document: Document, path: KeyPath, value: Any) -> Setting:
    return Setting(value=value, file=document.file, line=document.lines.get(path, 1))


def _merge(target: dict[str, Any], source: dict[str, Any], path: KeyPath, provenance: Provenance, setting: Any) -> None:
    for key, value in source.items():
        here = (*path, key)
        provenance.record(here, setting(here, value))
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, here, provenance, setting)
            continue
        target[key] = copy.deepcopy(value)
        provenance.forget_below(here)
        for below, item in _nodes(value, here):
            provenance.record(below, setting(below, item))


def _nodes(value: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    """Everything below `path`, sections and elements included."""
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found: list[tuple[KeyPath, Any]] = []
    for key, item in children:
        found.append(((*path, key), item))
        found += _nodes(item, (*path, key))
    return found


def _unset(tree: Any) -> list[KeyPath]:
    return [path for path, value in _nodes(tree, ()) if value == "???"]


def _override(composed: Composed, text: str) -> None:
    key, separator, value_of = text.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise UserError(f"override '{text}': must be KEY=VALUE, such as grpo.learning_rate=1e-5.")
    if names[0] == "extends":
        raise UserError(f"override '{text}': parents cannot be overridden; --cluster NAME chooses the cluster profile.")
    try:
        value = parse_value(value_of)
    except ValueError as error:
        raise UserError(f"override '{text}': the value is not YAML: {error}.") from None
    target, path = _descend(composed, names, text)
    last = names[-1]
    if isinstance(target, list):
        index = _index(target, last, path, text)
        target[index] = value
        composed.provenance.record((*path, index), Setting(value=value, override=text))
        composed.provenance.forget_below((*path, index))
        return
    _merge(target, {last: value}, path, composed.provenance, lambda _, item: Setting(value=item, override=text))


def _descend(composed: Composed, names: Sequence[str], text: str) -> tuple[Any, KeyPath]:
    """The section (or list) that holds the last of `names`; sections that are missing or null are made."""
    target: Any = composed.tree
    path: KeyPath = ()
    for name in names[:-1]:
        if isinstance(target, list):
            key: str | int = _index(target, name, path, text)
            inner = target[int(key)]
        else:
            key = name
            inner = target.get(name)
            if inner is None:
                inner = target[name] = {}
                composed.provenance.record((*path, name), Setting(value=inner, override=text))
        path = (*path, key)
        if not isinstance(inner, dict | list):
            where = composed.provenance.where(path)
            raise UserError(f"override '{text}': {key_text(path)} is a value (set by {where}), so nothing is below it.")
        target = inner
    return target, path


def _index(target: list[Any], name: str, path: KeyPath, text: str) -> int:
    if not name.isdigit() or int(name) >= len(target):
        raise UserError(
            f"override '{text}': {key_text(path)} is a list of {len(target)}: name an element by 0 to "
            f"{len(target) - 1}, or give the whole list: {key_text(path)}=[...]."
        )
    return int(name)
