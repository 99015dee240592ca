"""Four unmodified environments of NeMo Gym in one job on the real Slurm, one of them with a judge: two vLLM servers on
the rollout node, DeepSpeed over two training nodes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from slurm_jobs import SlurmJob

import hpc_gym
from hpc_gym import submit
from hpc_gym.runtimes.build import build
from hpc_gym.runtimes.spec import spec_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS, ROLLOUTS = 2, 32
ENVIRONMENTS = {"workplace_assistant", "reasoning_gym", "mcqa", "math_with_judge"}
# The experiment is for GPUs and large models: this is what small ones on CPUs need otherwise.
SMALL = [
    "judge.vllm={max_model_len: 4096, dtype: float32, enforce_eager: true, kv_cache_memory_bytes: 134217728}",
    "vllm.max_model_len=2048",
    "vllm.kv_cache_memory_bytes=134217728",
    "rollouts.max_output_tokens=64",
    f"grpo.max_steps={STEPS}",
    "grpo.num_generations=4",
    "grpo.per_device_train_batch_size=16",
    "grpo.gradient_accumulation_steps=1",
    "grpo.gradient_checkpointing=false",
]


@pytest.fixture(scope="module")
def models(slurm_session: Cluster) -> Path:
    """The folder with `policy` and `judge`, which the nodes see."""
    build(["gym", "train-cpu", "inference-cpu"])
    folder = Path(tempfile.mkdtemp(dir=slurm_session.shared))
    (folder / "code").mkdir()
    (folder / "code" / "hpc_gym").symlink_to(Path(hpc_gym.__file__).parent)
    packages = next(spec_of("gym").python.parents[1].glob("lib/python3.*/site-packages"))
    program = [str(spec_of("train-cpu").python), str(Path(__file__).parent / "small_models.py")]
    environment = os.environ | {"PYTHONPATH": str(folder / "code"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*program, str(folder), str(packages)], check=True, env=environment, timeout=300)
    return folder


def submitted(cluster: Cluster, folder: Path, models: Path, *overrides: str) -> SlurmJob:
    job = submit(
        "multi-environment-examples",
        [
            f"cluster.runs_dir={folder}",
            f"model.path={models / 'policy'}",
            f"judge.model={models / 'judge'}",
            *SMALL,
            *overrides,
        ],
        cluster="slurm-test",
    )
    return SlurmJob(job, cluster)


def steps(run: SlurmJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]


def log(run: SlurmJob, name: str) -> str:
    return (run.attempt() / "logs" / name).read_text()


def test_four_environments_train_together_and_the_judge_decides_what_only_it_can(
    slurm_cluster: Cluster, shared: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    run = submitted(slurm_cluster, shared, models)
    run.freed(within_s=420)
    assert run.job.state == "COMPLETED", run.story()

    found = steps(run)
    assert [step["step"] for step in found] == list(range(1, STEPS + 1))
    for step in found:
        assert {name.removeprefix("reward/") for name in step if name.startswith("reward/")} == ENVIRONMENTS
        assert step["rollouts"] == ROLLOUTS
        assert step["failed"] == 0
        assert step["logp_diff"] < 1e-4
        assert step["logp_unknown"] == 0
        # Of the four only the office has tools, and so a second turn.
        assert step["turns"] > step["rollouts"]

    # Two servers: the judge's answered, and by what it said some answers are right that no symbols prove.
    processes = {event["process"] for event in run.events("ready")}
    assert {"vllm-0", "judge"} <= processes
    (answered,) = re.findall(r"the judge has answered (\d+) questions", log(run, "rollout-0-rollout-server.log"))
    assert int(answered) > 0
    assert run.left() == {}
