"""A checkpoint counts only once it is marked; what is torn is removed, and the newest are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gym.training.checkpoints import MARKER, CheckpointError, Checkpoints


def write(checkpoints: Checkpoints, step: int, *, whole: bool = True, world_size: int = 2) -> Path:
    path = checkpoints.path(step)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if whole:
        checkpoints.mark_complete(step, world_size, draws=10 * step)
    return path


def test_the_newest_whole_one_is_resumed_from(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, kept=3)
    for step in (2, 10, 9):
        write(checkpoints, step)
    write(checkpoints, 11, whole=False)
    found = checkpoints.last(prompts_per_step=10)
    assert found is not None
    assert (found.step, found.draws, found.path) == (10, 100, tmp_path / "checkpoint-10")


def test_a_run_without_checkpoints_starts_from_the_beginning(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing", kept=1).last(10) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 4}', "null"])
def test_a_marker_that_is_not_whole_does_not_count(tmp_path: Path, content: str) -> None:
    checkpoints = Checkpoints(tmp_path, kept=1)
    (write(checkpoints, 4, whole=False) / MARKER).write_text(content)
    assert not checkpoints.is_complete(4)
    assert checkpoints.last(10) is None


def test_torn_ones_are_removed_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, kept=1)
    whole, torn = write(checkpoints, 4), write(checkpoints, 6, whole=False)
    (tmp_path / "notes").mkdir()
    checkpoints.remove_torn()
    assert whole.exists() and (tmp_path / "notes").exists()
    assert not torn.exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, kept=2)
    for step in (1, 2, 3, 10):
        write(checkpoints, step)
    checkpoints.prune()
    assert [checkpoint.step for checkpoint in checkpoints.complete()] == [3, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-3"]


def test_any_number_of_ranks_goes_on_but_not_another_batch(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, kept=2)
    write(checkpoints, 5, world_size=8)
    found = checkpoints.last(prompts_per_step=10)
    assert found is not None and found.world_size == 8
    with pytest.raises(
        CheckpointError, match=r"after 50 prompts in 5 steps, but this job trains on 4 prompts per step"
    ):
        checkpoints.last(prompts_per_step=4)
