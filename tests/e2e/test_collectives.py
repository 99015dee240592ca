"""The small all-reduce that real ranks begin with: quick where they reach one another, and a sentence where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_processes import json_lines, start_ranks, wait_ranks

pytestmark = pytest.mark.e2e


def test_a_first_all_reduce_is_quick_and_one_that_does_not_end_is_told(tmp_path: Path) -> None:
    wait_ranks(start_ranks("collectives.py", [], tmp_path), tmp_path)
    first, last = (json_lines((tmp_path / f"rank-{rank}.log").read_text())[-1] for rank in (0, 1))
    assert max(first["seconds"], last["seconds"]) < 20
    assert first["failure"].startswith("a small all-reduce by gloo over 2 ranks")
    assert first["failure"].endswith("did not end within 2 s")
    assert "failure" not in last
    # Neither the store nor gloo listens where nobody asked it to.
    assert first["listening"] == last["listening"] == ["127.0.0.1"]
