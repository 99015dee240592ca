"""Files of the run directory that are whole or not there, however the one who writes them ends, and however full the
file system is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replaces the file at `path` in one step, so that no reader ever sees half of it. Raises OSError, with the old one
    kept, where there is no room.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_whole(path: Path, text: bytes) -> None:
    """Appends whole lines, or nothing. Raises OSError where they find no room. For a file with one writer at a time.

    Begins on a fresh line where the file's last one was cut off by the end of an earlier writer.
    """
    with path.open("a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            if file.read(1) != b"\n":
                text = b"\n" + text
        try:
            view = memoryview(text)
            while view:
                # On a full file system the first write may take a part, and only the second one fail.
                view = view[file.write(view) :]
        except OSError:
            file.truncate(before)
            raise


def json_rows(text: bytes) -> list[dict[str, Any]]:
    """All whole JSON objects of a file of lines, in order."""
    return list(json_objects(text.splitlines()))


def json_objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among `lines`. What is none is passed over, as a line cut off by the end of its writer."""
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
