"""One YAML file as a tree of plain values, with the line on which every key stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpc_gym.config.provenance import KeyPath, display
from hpc_gym.errors import UserError


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 except that `1e-5` is a number (YAML 1.1 wants `1.0e-5`), and that dates and times stay text, as in
    OmegaConf: to YAML 1.1 `24:00:00` is 86400, which sbatch would take for minutes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][\d_]*|0x[\da-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Document:
    """`tree` is what the file says; `lines` maps the path of every key and list element to its line, from 1."""

    file: Path
    tree: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_document(file: Path) -> Document:
    """The YAML file. Raises UserError naming the line when it is no YAML, no mapping, sets a key twice, or holds an
    anchor inside itself.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{display(file)}:{line}: not a text file in UTF-8: save it as one.") from None
    except OSError as error:
        raise UserError(f"{display(file)}: cannot be read: {error.strerror}.") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(file, {})
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{display(file)}:{_line(node)}: the file must hold `key: value` pairs at its top level.")
        lines: dict[KeyPath, int] = {(): 1}
        _refuse_circles(node, (), file)
        tree = _build(node, (), lines, loader, file)
    except yaml.YAMLError as error:
        raise _syntax_error(file, text, error) from None
    finally:
        loader.dispose()
    return Document(file, tree, lines)


def parse_value(text: str) -> Any:
    """The value of an override, typed as the same text would be in a YAML file.

    Raises ValueError when it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or "not a YAML value") from None


def _build(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], loader: Any, file: Path) -> Any:
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python" in node.tag:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{display(file)}:{_line(node)}: the tag {tag} means nothing here: write plain values.")
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node, file)
        loader.flatten_mapping(node)  # `<<: *anchor`; what the section says itself comes last and wins
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                # `on:` and `2:` are no text in YAML; NeMo Gym configurations and DeepSpeed need no such keys.
                raise UserError(f"{display(file)}:{_line(key_node)}: the key {key!r} is no text: write it in quotes.")
            lines[(*path, key)] = _line(key_node)
            tree[key] = _build(value_node, (*path, key), lines, loader, file)
        return tree
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = _line(item)
            items.append(_build(item, (*path, index), lines, loader, file))
        return items
    return loader.construct_object(node, deep=True)


def _refuse_circles(node: yaml.Node, around: tuple[yaml.Node, ...], file: Path) -> None:
    """`around`: the sections and lists that `node` lies in."""
    if any(each is node for each in around):
        raise UserError(
            f"{display(file)}:{_line(node)}: the section's anchor (&) is used (*) inside the section itself."
        )
    if isinstance(node, yaml.CollectionNode):
        children = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        for child in children:
            _refuse_circles(child, (*around, node), file)


def _refuse_repeated_keys(node: yaml.MappingNode, file: Path) -> None:
    first: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{display(file)}:{_line(key_node)}: a key must be text, not a list or a section.")
        if key_node.value in first:
            raise UserError(
                f"{display(file)}:{_line(key_node)}: '{key_node.value}' is set twice in one section "
                f"(first on line {first[key_node.value]})."
            )
        first[key_node.value] = _line(key_node)


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _syntax_error(file: Path, text: str, error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    position = getattr(error, "position", None)  # of a character that no YAML may hold
    number = mark.line + 1 if mark else text.count("\n", 0, position) + 1 if position is not None else 0
    where = f"{display(file)}:{number}" if number else display(file)
    lines = text.splitlines()
    if mark and mark.line < len(lines) and lines[mark.line][mark.column :].startswith("\t"):
        problem = "a tab stands here, and YAML indents with blanks only"
    elif "another document" in problem:
        problem = "a second document begins here ('---'), and an experiment is one"
    return UserError(f"{where}: not YAML: {problem}.")
