"""A save begins in time for the time limit, however long the run's checkpoints take."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from job_plans import plan, task

from hpc_gym.node import scontrol
from hpc_gym.node.time_limit import TimeLimit, longest_save


def write(run_dir: Path, step: int, text: str) -> None:
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(text)


def test_the_slowest_save_is_read_from_the_checkpoints(tmp_path: Path) -> None:
    assert longest_save(tmp_path) == 0.0
    for step, text in enumerate(('{"seconds": 3.5}', '{"step": 1}', '{"seconds": 8.25}', "{", "[]")):
        write(tmp_path, step, text)
    assert longest_save(tmp_path) == 8.25


@pytest.mark.parametrize(("left", "due"), [(300.0, False), (200.0, True), (20.0, True)])
def test_it_is_due_when_one_and_a_half_of_it_and_the_stop_are_left(
    left: float, due: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scontrol, "time_left", lambda job_id: left)
    write(tmp_path, 5, json.dumps({"seconds": 130.0}))
    stop = plan(tmp_path, train=[[task("rank-0", "pass")]]).supervision.stop_within_s

    async def asked() -> float:
        limit = TimeLimit(plan(tmp_path, train=[[task("rank-0", "pass")]]), "7")
        return await asyncio.wait_for(limit.comes_too_soon(), 0.5)

    if due:
        assert asyncio.run(asked()) == max(1.0, left - stop - 5.0)
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(asked())


def test_where_the_margin_is_enough_slurm_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job_id: str) -> float:
        raise AssertionError("asked")

    monkeypatch.setattr(scontrol, "time_left", refuse)
    write(tmp_path, 5, json.dumps({"seconds": 1.0}))

    async def asked() -> float:
        return await asyncio.wait_for(
            TimeLimit(plan(tmp_path, train=[[task("rank-0", "pass")]]), "7").comes_too_soon(), 0.5
        )

    with pytest.raises(TimeoutError):
        asyncio.run(asked())


@pytest.mark.parametrize(("left", "allowed"), [(float("inf"), 60.0), (50.0, 37.0), (3.0, 1.0)])
def test_a_save_that_has_begun_may_take_what_the_time_limit_leaves(
    left: float, allowed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scontrol, "time_left", lambda job_id: left)

    async def asked() -> float:
        limit = TimeLimit(plan(tmp_path, train=[[task("rank-0", "pass")]]), "7")
        limit.longest = 40.0
        return await limit.allows()

    assert asyncio.run(asked()) == allowed
