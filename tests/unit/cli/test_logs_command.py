from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.cli.main import run
from hpc_gym.jobs.records import JobRecord


def test_a_job_without_a_line_says_so_beside_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    JobRecord("local-1", "local", "quiet", str(tmp_path), "x", "local", 1, 0.0).write()
    assert run(["logs", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("hpc-gym: no lines in the logs of job local-1, which is ")
