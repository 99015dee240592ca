"""Where a node's private directory is made: what a profile may ask for is used, and what cannot be used is not."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from job_plans import plan, task
from small_project import Project

from hpc_gym.errors import UserError
from hpc_gym.node.context import LONGEST_SCRATCH, NodeContext
from hpc_gym.protocol.secrets import Secrets


@pytest.fixture
def longest() -> Iterator[Path]:
    """A folder whose path has just the length that is allowed."""
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    path = folder / ("x" * (LONGEST_SCRATCH - len(str(folder)) - 1))
    path.mkdir()
    yield path
    shutil.rmtree(folder)


def private_dir(run_dir: Path, scratch: str) -> Path:
    wanted = plan(run_dir, train=[[task("a", "pass")]])
    wanted = replace(wanted, launch=replace(wanted.launch, scratch=scratch))
    return NodeContext(wanted, wanted.nodes[0], 1, ("", 0), Secrets("attempt"), "", "").private_dir


def test_the_longest_scratch_that_a_profile_may_name_is_used(project: Project, longest: Path) -> None:
    assert project.plan(f"cluster.scratch={longest}").launch.scratch == str(longest)
    with pytest.raises(UserError, match=r"cluster\.scratch"):
        project.plan(f"cluster.scratch={longest}x")
    assert private_dir(project.folder, str(longest)).parent == longest


def test_a_scratch_that_is_not_there_is_not_used(tmp_path: Path) -> None:
    assert private_dir(tmp_path, "/nowhere").parent == Path("/tmp")
