"""metrics.jsonl is whole lines of plain JSON, whatever happened to the attempt before."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hpc_gym.training.metrics import append_line, read_lines


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "reward": math.nan, "loss": math.inf, "entropy": 0.5})
    assert json.loads(path.read_text()) == {"step": 1, "entropy": 0.5}


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "rew')
    append_line(path, {"step": 2, "attempt": 2})
    append_line(path, {"step": 3, "attempt": 2})
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3]
    assert path.read_text().endswith('{"step": 3, "attempt": 2}\n')


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl") == []
