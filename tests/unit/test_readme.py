"""What the README shows works: its experiment resolves, its commands exist, its pictures are there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hpc_gym.cli.main import COMMANDS
from hpc_gym.plan.resolve import plan_for
from hpc_gym.shipped import shipped

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
ROW = '{"responses_create_params": {"input": [{"role": "user", "content": "What is 1 + 1?"}]}}\n'


def test_the_experiment_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = (block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "extends:" in block)
    Path("workplace-sums.yaml").write_text(text)
    profile = Path("configs/clusters/my-site.yaml")
    profile.parent.mkdir(parents=True)
    shutil.copyfile(shipped("configs") / "clusters" / "slurm-example.yaml", profile)
    for path in re.findall(r"path: ([^,}]+)", text):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(ROW)
    plan = plan_for("workplace-sums.yaml")
    assert [node.name for node in plan.nodes] == ["rollout-0", *(f"train-{index}" for index in range(4))]
    assert {source.environment for source in plan.training.sources} == {"workplace_assistant", "reasoning_gym"}


def test_the_commands_exist() -> None:
    assert set(re.findall(r"`hpc-gym ([a-z]+)", README)) == set(COMMANDS)


def test_links_and_pictures_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("https://")]
    assert "docs/reward-curve.png" in targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target
