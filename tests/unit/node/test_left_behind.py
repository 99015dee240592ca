"""What dead jobs left is removed by the next one, and nothing that anybody alive still has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_gym.node.left_behind import remove_left_behind

HOLDS = (
    "import sys, time; from pathlib import Path; from hpc_gym.node.left_behind import hold; hold(Path(sys.argv[1]));"
)
STAYS = HOLDS + "print('held', flush=True); time.sleep(60)"


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A private directory, and the living supervisor that holds it."""
    directory = tmp_path / "hg-0123456789"
    directory.mkdir(mode=0o700)
    (directory / "vllm.sock").touch()
    holder = subprocess.Popen([sys.executable, "-c", STAYS, str(directory)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    yield directory, holder
    holder.kill()
    holder.wait()


def test_a_directory_stays_as_long_as_somebody_holds_it(job: tuple[Path, subprocess.Popen[str]]) -> None:
    directory, holder = job
    assert remove_left_behind(directory.parent) == []
    holder.kill()
    holder.wait()
    assert remove_left_behind(directory.parent) == [directory]
    assert not directory.exists()


def test_a_program_that_outlived_its_supervisor_holds_nothing_and_is_killed(
    job: tuple[Path, subprocess.Popen[str]],
) -> None:
    directory, holder = job
    program = subprocess.Popen(["sleep", "60"], env={**os.environ, "TMPDIR": str(directory)})
    other = subprocess.Popen(["sleep", "60"])
    try:
        holder.kill()
        holder.wait()
        assert remove_left_behind(directory.parent) == [directory]
        assert program.wait(5) == -9
        assert other.poll() is None
    finally:
        program.kill()
        other.kill()
        other.wait()


@pytest.mark.parametrize("name", ["hg-0123456789", "hg-short", "other"])
def test_what_was_never_held_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(mode=0o700)
    assert remove_left_behind(tmp_path) == []
    assert (tmp_path / name).exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "lock").touch()
    (tmp_path / "hg-0123456789").symlink_to(elsewhere)
    assert remove_left_behind(tmp_path) == []
    assert (elsewhere / "lock").exists()
