"""The demo's job on the real Slurm: vLLM, NeMo Gym, TRL and DeepSpeed over nodes with addresses of their own."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from slurm_jobs import SlurmJob

from hpc_gym import submit
from hpc_gym.jobs.demo_inputs import DemoInputs, ModelMaking

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SEED = 1
STEPS = 6


@pytest.fixture(scope="module")
def inputs() -> DemoInputs:
    """The demo's model and rows, in the user's cache, which the nodes see."""
    made = DemoInputs.of(SEED)
    making = ModelMaking(made, threads=os.cpu_count() or 1, progress=lambda said: None)
    making.start()
    making.wait()
    made.write_rows()
    return made


@pytest.fixture
def demo(slurm_cluster: Cluster, shared: Path, inputs: DemoInputs, monkeypatch: pytest.MonkeyPatch) -> SlurmJob:
    """The demo's job as a heterogeneous one, of a few steps and without evaluations."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    job = submit(
        "demo",
        [
            *inputs.overrides(eval_rows=8),
            f"cluster.runs_dir={shared}",
            "cluster.slurm.rollout.partition=cpu",
            "evaluation.at_start=false",
            "evaluation.at_end=false",
            f"grpo.max_steps={STEPS}",
            "checkpoints.every=2",
        ],
        cluster="slurm-test",
    )
    return SlurmJob(job, slurm_cluster)


def rows(run: SlurmJob) -> list[dict[str, Any]]:
    path = run.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def refused(address: str, path: str) -> int:
    """The status with which an endpoint answers whoever has no token."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_demo_trains_over_nodes_survives_the_loss_of_one_and_shows_outside_only_what_it_must(
    demo: SlurmJob,
) -> None:
    run = demo
    run.all_started(within_s=60)
    run.until(lambda: any(row["step"] >= 1 for row in rows(run)), within_s=240)
    assert run.host("rollout-0") == "node1"
    assert len({run.host(node) for node in ("rollout-0", "train-0", "train-1")}) == 3

    for node in ("rollout-0", "train-0", "train-1"):
        print(node, run.listening(run.host(node)))
    run.until(lambda: (run.run_dir / "checkpoints" / "checkpoint-2" / "complete.json").exists(), within_s=120)
    lost = run.host("train-1")
    crashed = time.time()
    run.cluster.crash(lost)
    run.until(lambda: run.events("joined", attempt=2), within_s=120)
    print(f"joined again after {run.events('joined', attempt=2)[0]['time'] - crashed:.1f} s")
    run.freed(within_s=300)
    assert run.job.state == "COMPLETED", run.story()
    assert lost not in {event["host"] for event in run.events("joined", attempt=2)}

    first, second = ([row["step"] for row in rows(run) if row["attempt"] == attempt] for attempt in (1, 2))
    assert first[:2] == [1, 2]
    assert second == list(range(second[0], STEPS + 1))
    assert second[0] in (3, 5)
    assert max(row["logp_diff"] for row in rows(run)) < 1e-4
    assert (run.run_dir / "model" / "model.safetensors").stat().st_size > 0
    assert run.left() == {}
