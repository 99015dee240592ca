"""Container images are named as other files are, or by the address that a registry knows them by."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_project import Project

from hpc_gym.plan.references import image_source
from hpc_gym.plan.resolve import resolve
from hpc_gym.runtimes.spec import root_of

FILES = "images: {inference: images/a.sif, gym: ../b.sif, train: ~/c.sif}"


@pytest.mark.parametrize(
    "address",
    [
        "docker://nvcr.io#nvidia/pytorch:24.01-py3",
        "oras://registry.example/a:1",
        "docker-archive:/a.tar",
        "nvcr.io#nvidia/pytorch",
        "ubuntu:24.04",
    ],
)
def test_the_address_of_a_registry_stays_as_it_is(address: str) -> None:
    assert image_source(address, Path("/anywhere")) == address


def test_a_file_may_have_the_marks_of_an_address_in_its_name() -> None:
    assert image_source("./a:1#2.sif", Path("/anywhere")) == "/anywhere/a:1#2.sif"


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_file_is_relative_to_the_profile_that_names_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    folder = project.folder / "site"
    folder.mkdir()
    (folder / "profile.yaml").write_text(f"cluster: {{runtime: {{kind: {kind}, {FILES}}}}}\n")
    (project.folder / "top.yaml").write_text("extends: [./small.yaml, ./site/profile.yaml]\n")
    resolved = resolve("top.yaml")
    roots = {name: runtime.root for name, runtime in resolved.plan.runtimes.items() if name != "base"}
    expected = {"inference": f"{folder}/images/a.sif", "gym": f"{project.folder}/b.sif", "train": "/home/me/c.sif"}
    assert roots == {"inference-cpu": expected["inference"], "gym": expected["gym"], "train-cpu": expected["train"]}
    written = yaml.safe_load(resolved.experiment_yaml())
    assert written["cluster"]["runtime"]["images"] == expected


def test_images_that_no_engine_is_asked_to_enter_have_no_effect(project: Project) -> None:
    runtimes = project.plan(more=f"cluster: {{runtime: {{kind: venv, {FILES}}}}}\n").runtimes
    assert runtimes == project.plan().runtimes
    assert runtimes["inference-cpu"].root == str(root_of("inference-cpu"))
