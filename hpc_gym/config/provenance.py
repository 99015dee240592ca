"""Which file and line, or which override, set each value of a composed experiment, and what it replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_gym.shipped import shipped

KeyPath = tuple[str | int, ...]
"""`("data", "train", 0, "path")`; written `data.train.0.path`."""


def key_text(path: KeyPath) -> str:
    """The key as people write it, and as an override names it."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True)
class Setting:
    """One place that set a value. `file` is None for an override, whose text is then in `override`."""

    value: Any
    file: Path | None = None
    line: int = 0
    override: str = ""

    @property
    def where(self) -> str:
        """`file:line`, or the override as it was typed."""
        return f"{display(self.file)}:{self.line}" if self.file else f"override '{self.override}'"


@dataclass
class Provenance:
    """Per key all settings in the order in which they were applied: the last one holds, the others were overridden."""

    settings: dict[KeyPath, list[Setting]] = field(default_factory=dict)

    def record(self, path: KeyPath, setting: Setting) -> None:
        """`setting` is now what holds at `path`."""
        self.settings.setdefault(path, []).append(setting)

    def forget_below(self, path: KeyPath) -> None:
        """What lay below `path` has been replaced as a whole: its elements are no longer those that were set."""
        for key in [key for key in self.settings if len(key) > len(path) and key[: len(path)] == path]:
            del self.settings[key]

    def history(self, path: KeyPath) -> list[Setting]:
        """All settings of exactly that key, first to last; empty when nothing set it."""
        return self.settings.get(path, [])

    def origin(self, path: KeyPath) -> Setting | None:
        """The setting that holds at `path`, or at the nearest section around it that something set."""
        for length in range(len(path), -1, -1):
            if found := self.settings.get(path[:length]):
                return found[-1]
        return None

    def where(self, path: KeyPath) -> str:
        """`file:line` or the override that set `path`."""
        origin = self.origin(path)
        return origin.where if origin else "hpc-gym's defaults"

    def below(self, path: KeyPath) -> Iterator[tuple[KeyPath, list[Setting]]]:
        """The leaves at or below `path` with their histories, in key order of first setting."""
        for key, history in self.settings.items():
            if key[: len(path)] == path and not isinstance(history[-1].value, dict | list):
                yield key, history


def display(file: Path) -> str:
    """The file as a reader finds it: relative to the working directory, or to where hpc-gym's own configs are."""
    own = shipped("configs").resolve()
    if file.is_relative_to(own) and (own.parent.name == "_shipped" or not file.is_relative_to(Path.cwd())):
        # Installed, they lie deep in a venv, which may stand in the working directory.
        return f"hpc-gym's configs/{file.relative_to(own)}"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
