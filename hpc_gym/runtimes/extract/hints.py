"""Type hints as the words of the tables: `int float bool str list dict null`, joined by "|"; "" for anything."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_ORDER = ("bool", "int", "float", "str", "list", "dict", "null")
_SCALARS: Mapping[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


def words(hint: Any) -> set[str]:
    """The words for a type hint; the empty set where any value may stand."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return {_SCALARS[hint]}
    if origin is typing.Annotated:
        return words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        parts = [words(argument) for argument in arguments]
        return set().union(*parts) if all(parts) else set()
    if origin is typing.Literal:
        return {word_of(value) for value in arguments}
    kind = origin or hint
    if isinstance(kind, type):
        if issubclass(kind, enum.Enum):
            return {word_of(member.value) for member in kind}
        if issubclass(kind, list | tuple | set):
            return {"list"}
        if issubclass(kind, Mapping) or hasattr(kind, "model_fields") or hasattr(kind, "__dataclass_fields__"):
            return {"dict"}
    return set()


def choices(hint: Any) -> list[Any] | None:
    """The values that a hint of literals or enumerations allows; None where it allows others too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return list(arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    if origin in (typing.Union, types.UnionType):
        # TRL and transformers write `Enum | str` for a field whose text they turn into the enumeration.
        parts = [argument for argument in arguments if argument is not type(None)]
        enums = [argument for argument in parts if isinstance(argument, type) and issubclass(argument, enum.Enum)]
        if enums and all(argument in (*enums, str) for argument in parts):
            return [member.value for argument in enums for member in argument]
        found = [choices(argument) for argument in parts]
        if found and all(values is not None for values in found):
            return [value for values in found for value in values or ()]
    return None


def word_of(value: Any) -> str:
    """The word for a value."""
    if value is None:
        return "null"
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return _SCALARS[kind]
    return "dict" if isinstance(value, Mapping) else "list"


def joined(found: Iterable[str]) -> str:
    """The words in a fixed order, joined."""
    present = set(found)
    return "|".join(word for word in _ORDER if word in present)


def plain(value: Any) -> Any:
    """A default value as JSON has it; a value that JSON has no form for, as its text, without addresses in memory."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return f"<{type(value).__name__}>"


def first_paragraph(text: str | None) -> str:
    """The beginning of a help text, in one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())
