"""Where the tests with the real parts put what those parts leave behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def short_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A `TMPDIR` for vLLM's sockets, torch's rendezvous files and W&B's uploads, removed at the end.

    Short, and not pytest's own: the path of a Unix socket has at most 107 characters.
    """
    tmp_path_factory.getbasetemp()  # Made now, outside: what it keeps of the last runs is there to be looked at.
    made = Path(tempfile.mkdtemp(prefix="hge-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(made))
        patch.setattr(tempfile, "tempdir", None)
        yield
    shutil.rmtree(made, ignore_errors=True)
