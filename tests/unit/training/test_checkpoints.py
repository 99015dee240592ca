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
        checkpoints.mark_complete(step, world_size, draws=10 * step, seconds=1.5)
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


def test_one_whose_files_were_cut_off_is_torn(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, kept=3)
    for step in (2, 4, 6):
        write(checkpoints, step)
    (checkpoints.path(6) / "model.safetensors").write_text("weigh")
    (checkpoints.path(4) / "model.safetensors").unlink()
    found = checkpoints.last(prompts_per_step=10)
    assert found is not None and found.step == 2
    checkpoints.remove_torn()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_every_file_is_made_durable_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, kept=3)
    folder = write(checkpoints, 2, whole=False) / "global_step2"
    folder.mkdir()
    parts = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1, 10)]
    for name in (*parts, "mp_rank_00_model_states.pt", "rng_state_1.pth"):
        (folder / name).touch()
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink().name))
    found = {}
    for rank in (0, 1, 2, 10):
        checkpoints.make_durable(2, rank)
        found[rank], synced[:] = set(synced), []
    assert found == {
        0: {"model.safetensors", "mp_rank_00_model_states.pt", parts[0]},
        1: {parts[1], "rng_state_1.pth"},
        2: set(),
        10: {parts[2]},
    }


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
