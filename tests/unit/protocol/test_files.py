"""What is written is whole or not there, on a file system that takes only a part of it."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_gym.protocol.files import append_whole, json_rows, write_whole


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: as where it is full, the first write takes a part and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_whole(path, b'{"step": 1}\n')
    with room(20), pytest.raises(OSError, match="too large"):
        append_whole(path, b'{"step": 2}\n')
    assert path.read_bytes() == b'{"step": 1}\n'
    append_whole(path, b'{"step": 2}\n')
    assert [row["step"] for row in json_rows(path.read_bytes())] == [1, 2]


def test_a_line_that_a_writer_left_behind_is_cut_off_from_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n{"st')
    append_whole(path, b'{"step": 2}\n')
    assert [row["step"] for row in json_rows(path.read_bytes())] == [1, 2]


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    write_whole(path, json.dumps("old"))
    with room(8), pytest.raises(OSError, match="too large"):
        write_whole(path, json.dumps("a long new text"))
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]
