"""NeMo Gym on a node of its own, on the real Slurm: the demo's job as a heterogeneous one of three components."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cluster import Cluster
from demo_job import small_demo
from slurm_jobs import SlurmJob

from hpc_gym import submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 2


def test_the_demo_trains_with_nemo_gym_on_a_node_of_another_partition(
    slurm_cluster: Cluster, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shared / "state"))
    changes = [
        *small_demo(shared, STEPS),
        *("nodes.environment=1", "nodes.train=1"),
        # The one node of that partition is in the other one too.
        *("cluster.slurm.environment.partition=cpu", "cluster.slurm.exclude=node1"),
        # Another list, not none: sbatch (22.05) hands the first component's on to those that have none.
        "cluster.slurm.environment.exclude=node5",
        *("grpo.per_device_train_batch_size=24", f"checkpoints.every={STEPS}"),
    ]
    run = SlurmJob(submit("demo", changes, cluster="slurm-test"), slurm_cluster)
    assert [node.component for node in run.plan.nodes] == [0, 1, 2]
    run.until(lambda: (run.run_dir / "metrics.jsonl").exists(), within_s=300)
    assert run.host("environment-0") == "node1"
    assert len({run.host(node.name) for node in run.plan.nodes}) == 3
    log = (run.attempt() / "logs" / "environment-0-environment-server.log").read_text()
    door = re.search(r"on (\S+:\d+)\n", log)
    assert door is not None
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{door[1]}/run/reasoning_gym_simple_agent", b"{}", timeout=10)
    assert caught.value.code == 401

    run.freed(within_s=120)
    assert run.job.state == "COMPLETED", run.story()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["logp_diff"] for row in rows) < 1e-4
    assert sum(row["failed"] for row in rows) == 0
    assert run.left() == {}
