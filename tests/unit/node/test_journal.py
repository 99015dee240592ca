from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from hpc_gym.node import journal
from hpc_gym.node.journal import Journal
from hpc_gym.protocol.files import append_whole


def test_events_that_find_no_room_are_written_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, full = tmp_path / "events.jsonl", [True, True]

    def append(path: Path, text: bytes) -> None:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        append_whole(path, text)

    monkeypatch.setattr(journal, "append_whole", append)
    events = Journal(path)
    for number in range(4):
        events.write({"event": number})
    events.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("No space left on device") == 1
