"""A folder with a model, rows and an experiment, small but complete."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_gym.errors import UserError
from hpc_gym.plan.nemo_gym import INSIDE
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import plan_for
from hpc_gym.runtimes.spec import root_of

EXPERIMENT = """\
extends: [clusters/local, environments/reasoning_gym, environments/mcqa]
name: small
nodes: {rollout: 1, train: 2}
model: {path: model}
data:
  train:
    - {environment: reasoning_gym, path: reasoning.jsonl, weight: 2}
    - {environment: mcqa, path: mcqa.jsonl}
vllm: {max_model_len: 2048, tool_call_parser: hermes}
grpo:
  max_steps: 10
  num_generations: 4
  per_device_train_batch_size: 6
"""


def row(agent: str | None = None) -> str:
    """A dataset row as JSON."""
    content: dict[str, object] = {"responses_create_params": {"input": [{"role": "user", "content": "hi"}]}}
    if agent:
        content["agent_ref"] = {"type": "responses_api_agents", "name": agent}
    return json.dumps(content) + "\n"


def write_rows(written: str) -> None:
    """Rows in the file that an experiment names: below the working directory, or in what stands for the gym runtime.

    `HPC_GYM_CACHE` must be a folder of the test's.
    """
    path = Path(written)
    if written.startswith(INSIDE):
        packages = root_of("gym") / "lib" / "python3.12" / "site-packages"
        (packages / "nemo_gym").mkdir(parents=True, exist_ok=True)
        (packages / "nemo_gym" / "__init__.py").touch()
        path = packages / written.removeprefix(INSIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(row() * 3)


def make_model(folder: Path) -> Path:
    """A folder that looks like a model from outside."""
    folder.mkdir(parents=True)
    files = {"config.json": '{"model_type": "qwen3"}', "tokenizer.json": "{}", "model.safetensors": ""}
    for name, text in {**files, "chat_template.jinja": "{{ messages }}"}.items():
        (folder / name).write_text(text)
    return folder


@dataclass(frozen=True)
class Project:
    """The folder, and its experiment with some lines on top."""

    folder: Path

    def plan(self, *overrides: str, more: str = "", cluster: str | None = None) -> Plan:
        """The Plan of the experiment, changed by `more` YAML and overrides."""
        return plan_for(self.write(more), overrides, cluster)

    def refused(self, *overrides: str, more: str = "", cluster: str | None = None) -> str:
        """What is said against it."""
        with pytest.raises(UserError) as caught:
            self.plan(*overrides, more=more, cluster=cluster)
        return str(caught.value)

    def write(self, more: str = "") -> Path:
        """The experiment's file."""
        if not more:
            return self.folder / "small.yaml"
        (self.folder / "top.yaml").write_text("extends: [./small.yaml]\n" + more)
        return self.folder / "top.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    (tmp_path / "reasoning.jsonl").write_text(row() + row("reasoning_gym_simple_agent"))
    (tmp_path / "mcqa.jsonl").write_text(row("mcqa_simple_agent") * 3)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    return Project(tmp_path)
