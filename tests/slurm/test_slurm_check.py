"""`hpc-gym check` against the real Slurm."""

from __future__ import annotations

import getpass

import pytest
from cluster import Cluster
from small_project import Project

from hpc_gym import submit
from hpc_gym.errors import UserError
from hpc_gym.jobs.check import check_experiment
from hpc_gym.jobs.findings import Finding

SLURM = "cluster.kind=slurm"


@pytest.fixture
def check(slurm_cluster: Cluster, project: Project) -> object:
    def findings(*overrides: str) -> dict[str, Finding]:
        shared = f"cluster.runs_dir={slurm_cluster.shared}"
        return {each.check: each for each in check_experiment(project.write(), [SLURM, shared, *overrides])}

    return findings


def test_a_request_that_fits_is_accepted_with_its_start_and_its_cost(check, slurm_cluster: Cluster) -> None:  # type: ignore[no-untyped-def]
    cluster = slurm_cluster
    found = check("cluster.slurm.time=30", "cluster.slurm.gpus_per_node=4")
    assert found["partition"].detail == "gpu: 5 nodes, at most 2-00:00:00"
    assert found["size"].detail == "3 nodes of 5 that are up"
    assert found["sbatch"].detail.startswith("accepted; expected start 20")
    assert found["cost"].detail == "6 GPU-hours, 1.5 node-hours at the time limit"
    assert found["time limit"].status == "ok"
    # It can be written to; that all nodes of this cluster see a folder in /tmp, nobody could know.
    assert found["run directory"].detail.startswith(f"{cluster.shared} can be written to here, but is under /tmp")
    assert found["node sharing"].status == "warning"
    assert "node sharing" not in check("cluster.slurm.exclusive=true")


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


def test_what_is_missing_of_the_experiment_hides_nothing_that_slurm_says(
    slurm_cluster: Cluster,
    project: Project,
) -> None:
    (project.folder / "mcqa.jsonl").unlink()
    wanted = [SLURM, f"cluster.runs_dir={slurm_cluster.shared}", "cluster.slurm.partition=nope", "model.path=./none"]
    findings = check_experiment(project.write(), wanted)
    failed = {each.check for each in findings if each.status == "failed"}
    assert failed >= {"model", "training data", "partition", "sbatch"}
    assert ("slurm", "ok") in {(each.check, each.status) for each in findings}


def test_limits_of_the_accounting_are_held_against_the_request(check, slurm_cluster: Cluster) -> None:  # type: ignore[no-untyped-def]
    def manage(*command: str) -> None:
        slurm_cluster.slurm("sacctmgr", "-i", "-Q", *command)

    user = getpass.getuser()
    manage("add", "qos", "tight", "set", "MaxTRESPerJob=node=2,gres/gpu=4", "MaxWall=00:20:00")
    manage("add", "account", "physics", "set", "QOS=tight")
    manage("add", "user", user, "Account=physics")
    try:
        asked = ("cluster.slurm.account=physics", "cluster.slurm.qos=tight", "cluster.slurm.time=30")
        found = check(*asked, "cluster.slurm.gpus_per_node=2")
        assert found["account"].status == "ok"
        assert found["limits"] == Finding(
            "limits",
            "failed",
            "QOS 'tight' allows jobs of at most 00:20:00 (time); QOS 'tight' allows at most node=2 (MaxTRES); this job "
            "asks for 3; QOS 'tight' allows at most gres/gpu=4 (MaxTRES); this job asks for 6",
        )
        assert check("cluster.slurm.qos=none")["qos"].detail.startswith("there is no QOS 'none'; there are: normal")
    finally:
        manage("remove", "user", user, "where", "Account=physics")
        manage("remove", "account", "physics")
        manage("remove", "qos", "tight")


def test_nodes_that_lack_what_a_component_asks_for_do_not_count(check) -> None:  # type: ignore[no-untyped-def]
    found = check("cluster.slurm.gpus_per_node=16", "cluster.slurm.rollout.partition=cpu")
    assert found["size"].status == "failed"
    assert found["size"].detail.endswith("0 that are up can serve it")


def test_a_submit_without_runtimes_is_refused_before_slurm_hears_of_it(
    slurm_cluster: Cluster,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HPC_GYM_CACHE", str(project.folder / "cache"))
    with pytest.raises(UserError, match="runtime gym: it is not built: hpc-gym runtimes build gym"):
        submit(project.write(), [SLURM, f"cluster.runs_dir={slurm_cluster.shared}"])
    assert slurm_cluster.slurm("squeue", "-h") == ""
    assert not (slurm_cluster.shared / "small").exists()
