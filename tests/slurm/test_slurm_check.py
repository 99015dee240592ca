"""`hpc-gym check` against the real Slurm."""

from __future__ import annotations

import pytest
from cluster import Cluster
from small_project import Project, project  # noqa: F401 (a fixture)

from hpc_gym.jobs.check import Finding, check_experiment

SLURM = "cluster.kind=slurm"


@pytest.fixture
def check(slurm_cluster: Cluster, project: Project) -> object:  # noqa: F811
    def findings(*overrides: str) -> dict[str, Finding]:
        shared = f"cluster.runs_dir={slurm_cluster.shared}"
        return {each.check: each for each in check_experiment(project.write(), [SLURM, shared, *overrides])}

    return findings


def test_a_request_that_fits_is_accepted_with_its_start_and_its_cost(check) -> None:  # type: ignore[no-untyped-def]
    found = check("cluster.slurm.time=30", "cluster.slurm.gpus_per_node=4")
    assert found["partition"].detail == "gpu: 5 nodes, at most 2-00:00:00"
    assert found["size"].detail == "3 nodes of 5 that are up"
    assert found["sbatch"].detail.startswith("accepted; expected start 20")
    assert found["cost"].detail == "6 GPU-hours, 1.5 node-hours at the time limit"
    assert found["time limit"].status == "ok"
    assert found["run directory"].status == "ok"


def test_what_slurm_would_refuse_is_found(check) -> None:  # type: ignore[no-untyped-def]
    unknown = check("cluster.slurm.partition=nope")
    assert unknown["partition"] == Finding(
        "partition", "failed", "there is no partition 'nope'; there are: cpu, gpu, preempt, short"
    )
    assert check("nodes.train=9", "grpo.per_device_train_batch_size=4")["size"].status == "failed"
    assert check("cluster.slurm.partition=short", "cluster.slurm.time=60")["time limit"].status == "failed"
    assert check("cluster.slurm.constraint=h200")["sbatch"].status == "failed"
    assert check("cluster.slurm.account=physics")["account"] == Finding(
        "account", "warning", "you have no account 'physics'; yours: root"
    )


def test_a_heterogeneous_request_that_never_fits_as_a_whole_is_found_where_sbatch_accepts_it(check) -> None:  # type: ignore[no-untyped-def]
    found = check(
        "cluster.slurm.exclusive=true",
        "cluster.slurm.rollout.partition=cpu",
        "nodes.train=5",
        "grpo.per_device_train_batch_size=4",
        "grpo.gradient_accumulation_steps=1",
    )
    assert found["sbatch"].status == "ok"
    assert found["size"] == Finding("size", "failed", "the job needs 6 nodes at once; 5 that are up can serve it")
