"""Weights sent into a real vLLM are the weights it generates with: its log-probabilities become transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_processes import json_lines, run_program, vllm_server

pytestmark = pytest.mark.e2e

SAME = 1e-4
OTHER = 1e-2


@pytest.fixture(scope="module", params=["tied", "untied"])
def scenarios(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What weights.py saw, by scenario, for a model with a tied LM head and for one without."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    run_program("models.py", folder / "model", request.param)
    options = ["--worker-extension-cls", "repacking.SwitchableExtension"]
    with vllm_server(folder / "model", folder / "vllm.log", *options) as url:
        lines = json_lines(run_program("weights.py", url, folder / "model", request.param))
    found = {line["scenario"]: line for line in lines}
    found["kind"] = request.param
    return found


def test_every_way_brings_the_exact_weights(scenarios: dict[str, Any]) -> None:
    assert scenarios["loaded"]["logp_diff"] < SAME
    assert scenarios["before an update"]["logp_diff"] > OTHER
    for name in ("gloo 1", "gloo 2", "small buckets, a new group", "filesystem"):
        assert scenarios[name]["logp_diff"] < SAME, name
        assert scenarios[name]["greedy_same"] == 1.0, name


def test_the_folder_keeps_only_the_newest_weights(scenarios: dict[str, Any]) -> None:
    assert scenarios["filesystem"]["left"] == ["version-4"]


def test_a_transfer_that_broke_off_ends_soon_and_harms_nothing(scenarios: dict[str, Any]) -> None:
    assert "the trainer broke off" in scenarios["broken off"]["error"]
    assert scenarios["broken off"]["seconds"] < 10
    assert scenarios["after one that broke off"]["logp_diff"] < SAME


def test_an_error_of_vllm_reaches_the_sender_instead_of_hanging_it(scenarios: dict[str, Any]) -> None:
    assert "no_such_layer" in scenarios["refused by vLLM"]["error"]
    assert scenarios["refused by vLLM"]["seconds"] < 10
    assert scenarios["after one that was refused"]["logp_diff"] < SAME


def test_a_tied_lm_head_keeps_old_weights_unless_it_is_repacked(scenarios: dict[str, Any]) -> None:
    """vLLM's own reload leaves the prepacked copy of a tied LM head as it was; an untied head gets weights of its
    own.
    """
    stale = scenarios["without repacking"]["logp_diff"]
    assert stale > OTHER if scenarios["kind"] == "tied" else stale < SAME
    assert scenarios["with repacking again"]["logp_diff"] < SAME
