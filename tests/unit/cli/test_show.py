"""`hpc-gym show`: the resolved experiment, and who set what."""

from __future__ import annotations

import json

import pytest
import yaml
from small_project import Project

from hpc_gym.cli.main import run


def test_the_resolved_experiment_is_yaml_that_can_be_submitted(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["show", "small.yaml", "grpo.max_steps=20"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["grpo"]["max_steps"] == 20
    assert shown["data"]["train"][0]["path"] == str(project.folder / "reasoning.jsonl")
    assert run(["show", "small.yaml", "grpo.max_steps=20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_why_tells_the_file_and_line_and_what_was_overridden(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write("grpo:\n  max_steps: 11\n")
    assert run(["show", "top.yaml", "grpo.max_steps=12", "--why", "grpo.max_steps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "key": "grpo.max_steps",
            "value": 12,
            "written": None,
            "set_by": "override 'grpo.max_steps=12'",
            "overrode": [{"value": 11, "set_by": "top.yaml:3"}, {"value": 10, "set_by": "small.yaml:11"}],
        }
    ]
    assert run(["show", "top.yaml", "--why", "grpo.max_steps"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "grpo.max_steps",
        "11",
        "top.yaml:3",
        "10",
        "(small.yaml:11)",
    ]


def test_why_of_a_section_tells_all_below_it(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "small.yaml", "--why", "data.train.1", "--json"]) == 0
    entries = {entry["key"]: entry["set_by"] for entry in json.loads(capsys.readouterr().out)}
    assert entries == {
        "data.train.1.environment": "small.yaml:8",
        "data.train.1.path": "small.yaml:8",
        "data.train.1.weight": "default",
    }


def test_why_of_a_wrong_key_names_the_nearest(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "small.yaml", "--why", "grpo.max_step"]) == 2
    assert "did you mean 'grpo.max_steps'?" in capsys.readouterr().err


def test_a_wrong_experiment_ends_with_two(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "small.yaml", "grpo.max_steps=0"]) == 2
    assert "grpo.max_steps: must be a whole number of at least 1" in capsys.readouterr().err


def test_what_cannot_be_submitted_yet_is_shown_with_what_is_wrong(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", "small.yaml", "data.train.0.path=absent.jsonl", "grpo.max_steps=21"]
    assert run(arguments) == 2
    told = capsys.readouterr()
    shown = yaml.safe_load(told.out)
    assert (shown["grpo"]["max_steps"], shown["data"]["train"][0]["path"]) == (21, "absent.jsonl")
    assert "data.train.0.path: there is no file" in told.err
    assert run([*arguments, "--why", "grpo.max_steps", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)[0]["set_by"] == "override 'grpo.max_steps=21'"
