"""Dataset files of NeMo Gym: JSON lines, one row each, read by number and checked before a job is submitted."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hpc_gym.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# numpy is imported where it is used: `hpc-gym submit --dry-run` checks rows, and its import takes as long as all that.


class Rows:
    """The rows of a JSONL file as raw bytes, by number from 0. Blank lines are no rows.

    Only the lines' offsets are kept in memory (16 bytes a row); the file itself is mapped.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises OSError when the file cannot be read."""
        with Path(path).open("rb") as file:
            # An empty file cannot be mapped.
            empty = os.fstat(file.fileno()).st_size == 0
            self._data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends, self._lines = _index(self._data)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> bytes:
        """The JSON of row `number`, without its line end."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return bytes(self._data[int(self._starts[number]) : int(self._ends[number])])

    def line(self, number: int) -> int:
        """The line of the file, from 1, on which row `number` stands."""
        return int(self._lines[number])


@dataclass(frozen=True)
class RowsSummary:
    """What a dataset file holds: its number of rows, and how many of them name which agent in `agent_ref`."""

    rows: int
    agents: Mapping[str, int]
    first_line: Mapping[str, int]
    """Per agent the line, from 1, that names it first."""


def check_rows(path: str | Path) -> RowsSummary:
    """Reads the whole file and makes sure that NeMo Gym can run every row of it.

    Raises UserError naming file and line for what is missing, empty, no JSON object, or lacks
    `responses_create_params` with an `input`.
    """
    decoder = msgspec.json.Decoder(_Row)
    agents: Counter[str] = Counter()
    first_line: dict[str, int] = {}
    rows = 0
    try:
        with Path(path).open("rb") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = decoder.decode(text)
                except msgspec.DecodeError as error:
                    raise UserError(_sentence(path, line, text.strip(), error)) from None
                if problem := _problem(text, row):
                    raise UserError(f"{path}:{line}: {problem}")
                rows += 1
                if row.agent_ref is not None:
                    agents[row.agent_ref.name] += 1
                    first_line.setdefault(row.agent_ref.name, line)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} is empty: it must hold one JSON row per line")
    return RowsSummary(rows, dict(agents), first_line)


class _Params(msgspec.Struct):
    input: msgspec.Raw


class _AgentRef(msgspec.Struct):
    name: str


class _Row(msgspec.Struct):
    responses_create_params: _Params
    agent_ref: _AgentRef | None = None


_OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"\xef\xbb\xbf": "written with a byte-order mark",
    b"\xff\xfe": "written in UTF-16",
    b"version https://git-lfs": "a pointer of Git LFS, whose content was not fetched",
}
"""What people take for rows, by its first bytes."""


def _problem(text: bytes, row: _Row) -> str:
    """What keeps a row from being one although it is JSON: the rest of it is read by others, later."""
    # The first byte tells a value of JSON's kind.
    messages = bytes(row.responses_create_params.input).lstrip()
    if not messages.startswith((b'"', b"[")):
        told = messages[:40].decode(errors="replace")
        return f"'responses_create_params.input' must be a list of messages or text, not {told}"
    if messages.startswith(b"[") and messages[1:].lstrip().startswith(b"]"):
        return "'responses_create_params.input' is an empty list: a rollout starts with at least one message"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "not UTF-8: save the file as UTF-8"
    return ""


def _sentence(path: str | Path, line: int, text: bytes, error: msgspec.DecodeError) -> str:
    where = f"{path}:{line}"
    if line == 1 and (kind := next((kind for magic, kind in _OTHER_KINDS.items() if text.startswith(magic)), "")):
        return f"{path} is {kind}: rows are JSON lines in UTF-8, one row per line"
    if not isinstance(error, msgspec.ValidationError):
        return f"{where}: not JSON: {error}"
    message = str(error)
    if "missing required field `responses_create_params`" in message:
        return (
            f"{where}: the row lacks 'responses_create_params' (the request that its rollout starts with, as NeMo Gym "
            "datasets have it)"
        )
    if "missing required field `input`" in message:
        return f"{where}: the row's 'responses_create_params' lacks 'input', the messages that the rollout starts with"
    if "$.agent_ref" in message:
        return (
            f'{where}: the row\'s \'agent_ref\' must be {{"type": "responses_api_agents", "name": AGENT}}, or not there'
        )
    if not text.lstrip().startswith(b"{"):
        return f"{where}: a row must be a JSON object, not {text[:40].decode(errors='replace')!r}"
    return f"{where}: {message}"


def _index(data: mmap.mmap | bytes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Start, end and line number of every line that is not blank."""
    import numpy as np

    size = len(data)
    if not size:
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    ends = _newlines(data)
    if not len(ends) or ends[-1] != size - 1:
        ends = np.append(ends, size)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines = np.arange(1, len(ends) + 1)
    # A row has far more than 64 characters: only shorter lines may be blank and are looked at.
    filled = ends - starts >= 64
    for short in np.flatnonzero(~filled):
        filled[short] = bool(data[int(starts[short]) : int(ends[short])].strip())
    return starts[filled], ends[filled], lines[filled]


def _newlines(data: mmap.mmap | bytes, chunk: int = 1 << 26) -> NDArray[np.int64]:
    """Offsets of all newline bytes; in chunks, since the comparison makes an array as large as its input."""
    import numpy as np

    found = []
    for offset in range(0, len(data), chunk):
        piece = np.frombuffer(data[offset : offset + chunk], dtype=np.uint8)
        found.append(np.flatnonzero(piece == 10) + offset)
    return np.concatenate(found)
