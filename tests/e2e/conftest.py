"""Where the tests with the real parts put what those parts leave behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def short_temporary_directory() -> Iterator[None]:
    """A `TMPDIR` for vLLM's sockets, torch's rendezvous files and W&B's uploads, removed at the end.

    Short, and not pytest's own: the path of a Unix socket has at most 107 characters.
    """
    made = Path(tempfile.mkdtemp(prefix="hge-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(made))
        patch.setattr(tempfile, "tempdir", None)
        yield
    shutil.rmtree(made, ignore_errors=True)
