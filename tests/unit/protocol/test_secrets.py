"""The secrets file is private, and a wrong one is refused without quoting it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_gym.protocol.secrets import Secrets, read_secrets, write_secrets


def test_what_is_read_is_what_was_written_and_only_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "attempt-1.json"
    before = os.umask(0)
    try:
        write_secrets(path, Secrets("s3cret", {"WANDB_API_KEY": "k"}))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secrets(path) == Secrets("s3cret", {"WANDB_API_KEY": "k"})
    assert "s3cret" not in repr(read_secrets(path))
    with pytest.raises(FileExistsError):
        write_secrets(path, Secrets("other"))


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attempt-1.json"
    write_secrets(path, Secrets("s3cret"))
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="0600"):
        read_secrets(path)


@pytest.mark.parametrize(
    "text", ["", "hunter2", "[]", "{}", '{"token": "", "env": {}}', '{"token": "hunter2", "env": []}']
)
def test_another_file_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "attempt-1.json"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ValueError, match="no secrets file") as caught:
        read_secrets(path)
    assert "hunter2" not in str(caught.value)
