"""Several vLLM servers on a rollout node, each over several workers, in the demo's job: the trained weights reach every
worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_job import small_demo

from hpc_gym import submit
from hpc_gym.jobs import local
from hpc_gym.jobs.job import HpcgymJob

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 2


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HpcgymJob]:
    """The demo's job with two vLLM servers of two workers each, of a few steps and without evaluations."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    changes = [
        *small_demo(tmp_path / "runs", STEPS),
        *("rollouts.replicas=2", "vllm.tensor_parallel_size=2", "nodes.train=1"),
        *("grpo.per_device_train_batch_size=24", f"checkpoints.every={STEPS}", "tracking.wandb=null"),
    ]
    found = submit("demo", changes, cluster="local")
    yield found
    local.kill(found.record)


def test_two_replicas_of_two_workers_get_the_weights_of_every_step(job: HpcgymJob) -> None:
    assert job.result()["outcome"] == "completed"
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    # Had a worker kept older weights, the second step would show it.
    assert max(row["logp_diff"] for row in rows) < 1e-4
    assert sum(row["failed"] for row in rows) == 0
    logs = job.run_dir / "attempts" / "1" / "logs"
    for replica in ("vllm-0", "vllm-1"):
        log = (logs / f"rollout-0-{replica}.log").read_text()
        # Before each step.
        loaded = re.findall(r"(Worker_TP\d) .*hpc_gym: loaded", log)
        assert sorted(loaded) == sorted(["Worker_TP0", "Worker_TP1"] * STEPS), replica
