"""The folder for private files leaves the Unix sockets in it as much of a path as they need."""

from __future__ import annotations

import pytest
from small_project import Project

LONGEST = "/local/" + "x" * 17


def test_the_longest_path_passes(project: Project) -> None:
    assert len(LONGEST) == 24
    assert project.plan(f"cluster.scratch={LONGEST}").launch.scratch == LONGEST


@pytest.mark.parametrize(("scratch", "length"), [(LONGEST + "x", 25), (LONGEST[:-1] + "é", 25)])
def test_a_longer_one_is_refused_with_the_limit_and_its_reason(project: Project, scratch: str, length: int) -> None:
    message = project.refused(more=f"cluster:\n  scratch: {scratch}\n")
    assert message == (
        f"top.yaml:3: cluster.scratch: '{scratch}': is {length} bytes long, and 24 are allowed: Unix sockets lie deep "
        "inside it, and their paths are at most 108 bytes. Name a folder with a shorter path, or set it to null."
    )


@pytest.mark.parametrize("scratch", ["local", "~/tmp"])
def test_a_path_that_is_not_absolute_is_refused(project: Project, scratch: str) -> None:
    message = project.refused(f"cluster.scratch={scratch}")
    assert message.endswith(f"cluster.scratch: '{scratch}': must be an absolute path: it is a folder on each node.")
