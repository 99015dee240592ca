"""One vLLM over two nodes of the real Slurm (vLLM's own `--nnodes`): its workers take part in every weight transfer
over addresses of their own, and when one of its parts is killed, both are started again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from demo_job import small_demo
from slurm_jobs import SlurmJob

from hpc_gym import submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 3


def test_one_vllm_over_two_nodes_trains_and_comes_back_whole_when_a_part_is_killed(
    slurm_cluster: Cluster, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    changes = [
        *small_demo(shared, STEPS),
        *("nodes.rollout=2", "nodes.train=1", "vllm.nnodes=2", "vllm.tensor_parallel_size=2"),
        *("grpo.per_device_train_batch_size=24", f"checkpoints.every={STEPS}"),
    ]
    run = SlurmJob(submit("demo", changes, cluster="slurm-test"), slurm_cluster)

    def rows() -> list[dict[str, Any]]:
        path = run.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    run.until(rows, within_s=300)
    heads = {run.host("rollout-0"), run.host("rollout-1")}
    assert len(heads) == 2
    programs = {each.program for host in heads for each in run.listening(host)} - {"slurmd", "slurmstepd", "srun"}
    assert {name.split(":")[0] for name in programs} <= {"VLLM", "python", "python3"}, programs
    run.kill("rollout-1", "vllm-headless")

    run.freed(within_s=240)
    assert run.job.state == "COMPLETED", run.story()
    assert [row["step"] for row in rows()] == list(range(1, STEPS + 1))
    assert max(row["logp_diff"] for row in rows()) < 1e-4
    assert sum(row["failed"] for row in rows()) == 0
    again = {each["process"]: each["cause"] for each in run.events("restarting")}
    assert set(again) == {"vllm-0", "vllm-headless"}
    assert "another part" in again["vllm-0"]
    assert run.left() == {}
