"""Reads files of JSON objects, one a line, that grow while they are read: events, metrics, evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.protocol.files import json_objects

_CHUNK = 1 << 20


@dataclass
class JsonLines:
    """A file that is read on from where the last reading ended. A line that is just being written is left for the next
    time; a file that is not there (yet), or cannot be read, has no lines.
    """

    path: Path
    offset: int = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The objects that have come since."""
        return json_objects(self.lines())

    def lines(self) -> Iterator[bytes]:
        """The whole lines that have come since, as they are."""
        partial = b""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while chunk := file.read(_CHUNK):
                    lines = (partial + chunk).split(b"\n")
                    partial = lines.pop()
                    self.offset = file.tell() - len(partial)
                    yield from lines
        except OSError:
            return
