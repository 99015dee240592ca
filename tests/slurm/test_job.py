"""A job on the real Slurm: placed, watched, ended and released."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import submitit
from cluster import Cluster
from slurm_jobs import FOREVER, SlurmJob, service, task
from small_project import Project

import hpc_gym
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.slurm import states
from hpc_gym.jobs.state import job_state

Submit = Callable[..., SlurmJob]

HETEROGENEOUS = ({"nodes": 1, "partition": "cpu"}, {"nodes": 2, "partition": "gpu", "gpus_per_node": 2})
WHO = (
    "import os, socket; print(os.environ['SLURM_PROCID'], socket.gethostname(), os.environ.get('CUDA_VISIBLE_DEVICES'))"
)


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
def test_training_ends_well_the_servers_are_stopped_and_the_nodes_are_free_within_10_s(
    submit: Submit, components: tuple[dict[str, object], ...]
) -> None:
    end = f"{WHO}\nimport time; time.sleep(2)"
    run = submit([service("server", FOREVER)], [task("rank-0", end)], [task("rank-1", end)], components=components)
    run.all_started()
    run.until(lambda: len(run.events("exited")) == 2)
    ended = max(event["time"] for event in run.events("exited"))
    run.figure("training ends: nodes free", run.freed() - ended, within=10)
    assert run.job.state == "COMPLETED"
    assert run.output().splitlines()[-1] == "COMPLETED"
    assert run.left() == {}
    logs = run.attempt() / "logs"
    seen = [(logs / f"train-{rank}-rank-{rank}.log").read_text().split()[-3:] for rank in (0, 1)]
    gpus = "0,1" if components else "None"
    assert seen == [["1", run.host("train-0"), gpus], ["2", run.host("train-1"), gpus]]
    assert len({run.host("rollout-0"), run.host("train-0"), run.host("train-1")}) == 3
    assert (run.host("rollout-0") == "node1") or not components
    assert not (run.run_dir / "secrets").exists()


@pytest.mark.parametrize("components", [(), HETEROGENEOUS], ids=["plain", "heterogeneous"])
@pytest.mark.parametrize("node, process", [("rollout-0", "server"), ("train-1", "rank-1")])
def test_a_killed_process_fails_the_job_which_says_role_node_process_cause_and_log(
    submit: Submit, components: tuple[dict[str, object], ...], node: str, process: str
) -> None:
    run = submit(
        [service("server", FOREVER)], [task("rank-0", FOREVER)], [task("rank-1", FOREVER)], components=components
    )
    run.all_started()
    killed = run.kill(node, process)
    run.figure(f"{process} killed: nodes free", run.freed() - killed, within=10)
    assert run.job.state == "FAILED"
    role = node.partition("-")[0]
    sentence = run.output().splitlines()[-1]
    assert sentence.startswith(f"FAILED: role {role}, node {node}, process {process} was killed by SIGKILL")
    assert sentence.endswith(f"(log: {run.run_dir}/attempts/1/logs/{role}-{node.partition('-')[2]}-{process}.log)")
    assert sentence.removeprefix("FAILED: ") in str(run.job.exception())
    assert run.left() == {}


def test_scancel_leaves_nothing(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)], [task("rank-1", FOREVER)])
    run.all_started()
    begin = time.time()
    run.cluster.slurm("scancel", run.id)
    run.figure("scancel: nodes free", run.freed() - begin, within=10)
    assert run.job.state == "CANCELLED"
    assert run.left() == {}
    assert run.output().splitlines()[-1].startswith("CANCELLED")


def test_cancel_of_a_running_job_is_orderly_and_slurm_calls_it_cancelled(submit: Submit) -> None:
    run = submit([service("server", FOREVER)], [task("rank-0", FOREVER)], [task("rank-1", FOREVER)])
    run.all_started()
    run.job.cancel()
    assert run.job.state == "CANCELLED"
    assert run.left() == {}
    assert run.events("outcome")[0]["kind"] == "cancelled"


def test_a_waiting_job_is_cancelled_at_once(submit: Submit) -> None:
    run = submit([task("rank-0", FOREVER)], options={"begin": "now+1hour"})
    assert run.job.state == "PENDING"
    queued = run.job.status().stages[0]
    assert queued.state == "running"
    assert queued.detail.startswith("BeginTime (")
    assert ", expected start 20" in queued.detail
    run.job.cancel()
    assert run.job.state == "CANCELLED"
    assert not (run.run_dir / "secrets").exists()


def test_the_script_that_slurm_runs_is_what_a_dry_run_prints(submit: Submit) -> None:
    run = submit([task("rank-0", FOREVER)])
    script = run.cluster.slurm("scontrol", "write", "batch_script", run.id, "-")
    assert script == (run.run_dir / "job.sh").read_text() == render(run.plan)


def test_an_exported_secret_reaches_the_processes_and_nothing_else(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-wandb")
    monkeypatch.setenv("UNNAMED_TOKEN", "planted-secret-unnamed")
    code = (
        "import os; print('planted' in os.environ.get('WANDB_API_KEY', ''), 'UNNAMED_TOKEN' in os.environ)"
        + f"\n{FOREVER}"
    )
    run = submit([service("server", FOREVER)], [task("rank-0", code)], secrets=("WANDB_API_KEY",))
    run.all_started()
    log = run.attempt() / "logs" / "train-0-rank-0.log"
    run.until(lambda: log.exists() and "True False" in log.read_text())
    for node in run.cluster.node_names:
        assert not any("planted-secret" in line for line in run.cluster.processes(node).values())
    for path in run.run_dir.rglob("*"):
        if path.is_file() and "planted-secret" in path.read_text(errors="replace"):
            assert path.parent.name == "secrets"
            assert path.stat().st_mode & 0o777 == 0o600
    assert "planted" not in run.cluster.slurm("scontrol", "show", "job", "-d", run.id)
    assert os.environ["WANDB_API_KEY"]


def test_the_manifest_says_from_what_and_where_a_run_came(submit: Submit) -> None:
    parts = ({"nodes": 1, "partition": "cpu"}, {"nodes": 1, "partition": "gpu"})
    run = submit([service("server", FOREVER)], [task("rank-0", "pass")], components=parts)
    run.freed()
    manifest = json.loads((run.run_dir / "manifest.json").read_text())
    version = run.cluster.slurm("sinfo", "--version").split()[-1]
    assert (manifest["slurm"], manifest["attempts"]["1"]["slurm"]) == (version, version)
    assert manifest["attempts"]["1"]["job"] == run.id
    assert manifest["attempts"]["1"]["nodes"] == [run.host("rollout-0"), run.host("train-0")]
    assert len(manifest["code"]["commit"]) == 40
    assert manifest["code"]["dirty"] == bool(manifest["code"]["diff"])


def test_what_slurm_has_forgotten_the_job_itself_remembers(submit: Submit) -> None:
    run = submit([task("rank-0", "pass")])
    run.freed()
    forgotten = replace(run.job.record, job_id="1")
    assert states([forgotten.job_id]) == {}
    assert job_state(forgotten) == "COMPLETED"


def test_a_sweep_through_submitit_is_a_job_per_point(
    slurm_cluster: Cluster, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(project.folder / "state"))
    executor = submitit.AutoExecutor(folder=slurm_cluster.shared / "sweep", cluster="hpcgym")
    later = ["cluster.kind=slurm", "cluster.slurm.begin=now+1day"]
    executor.update_parameters(hpcgym_experiment=str(project.write()), hpcgym_overrides=later)
    jobs = executor.map_array(hpc_gym.run, [f"name=lr-{rate} grpo.learning_rate={rate}" for rate in ("1e-5", "1e-4")])
    queue = slurm_cluster.slurm("squeue", "-h", "-o", "%i %j %T").splitlines()
    assert sorted(queue) == [
        f"{job.job_id} lr-{rate} PENDING" for job, rate in zip(jobs, ("1e-5", "1e-4"), strict=True)
    ]
    for job in jobs:
        job.cancel()
        assert job.state == "CANCELLED"
