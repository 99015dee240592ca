"""Reads files of JSON objects, one a line, that grow while they are read: events, metrics, evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return parsed(self.lines())

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


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among `lines`. Whatever is none, as a line cut off by the end of an attempt, is passed over."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
