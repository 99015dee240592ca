"""A container image that is not there is found before a node is waited for."""

from __future__ import annotations

import pytest
from small_project import Project

from hpc_gym.jobs.check import check_experiment
from hpc_gym.jobs.findings import Finding


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_missing_image_fails_and_one_in_a_registry_is_left_to_the_nodes(project: Project, kind: str) -> None:
    (project.folder / "gym.sif").touch()
    images = "{inference: images/a.sif, gym: gym.sif, train: 'docker://registry.example/train'}"
    more = f"cluster: {{runtime: {{kind: {kind}, images: {images}}}}}\n"
    found = {each.check: each for each in check_experiment(project.write(more))}
    assert found["runtime inference-cpu"] == Finding(
        "runtime inference-cpu",
        "failed",
        f"there is no image {project.folder}/images/a.sif; one in a registry is written with its scheme, as "
        "docker://NAME",
    )
    assert found["runtime gym"] == Finding("runtime gym", "ok", f"{project.folder}/gym.sif")
    assert found["runtime train-cpu"] == Finding("runtime train-cpu", "ok", "docker://registry.example/train")
