"""`hpc-gym resume` of runs that ended while they waited: what is submitted anew, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cluster import Cluster
from small_project import Project

from hpc_gym import submit
from hpc_gym.errors import UserError
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.resume import resume
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Outcome


@pytest.fixture
def waiting(slurm_cluster: Cluster, project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[HpcgymJob]:
    """A job that waits for a day that the test does not live to see."""
    monkeypatch.setenv("XDG_STATE_HOME", str(project.folder / "state"))
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    later = ["cluster.kind=slurm", "cluster.slurm.begin=now+1day", f"cluster.runs_dir={slurm_cluster.shared}/runs"]
    yield submit(project.write(), [*later, f"name=resume-{project.folder.name}"])


def test_a_run_goes_on_in_its_directory_as_a_new_job_with_what_was_changed(waiting: HpcgymJob) -> None:
    run_dir = str(waiting.run_dir)
    waiting.cancel()
    code = (waiting.run_dir / "code" / "hpc_gym" / "__init__.py").stat().st_mtime_ns
    again = resume(run_dir, ["nodes.rollout=2", "cluster.slurm.time=90"])
    assert (again.run_dir, again.job_id != waiting.job_id) == (waiting.run_dir, True)
    assert again.state == "PENDING"
    plan = Plan.read(run_dir)
    assert [node.name for node in plan.nodes] == ["rollout-0", "rollout-1", "train-0", "train-1"]
    script = (again.run_dir / "job.sh").read_text()
    assert script == render(plan)
    assert "#SBATCH --time=90" in script
    assert "planted-secret" in (again.run_dir / "secrets" / "submitted.json").read_text()
    assert (waiting.run_dir / "code" / "hpc_gym" / "__init__.py").stat().st_mtime_ns == code
    again.cancel()


def test_a_job_that_lives_is_not_resumed(waiting: HpcgymJob) -> None:
    with pytest.raises(UserError, match="is PENDING: `hpc-gym cancel"):
        resume(str(waiting.run_dir))


def test_another_number_of_training_nodes_goes_on_with_the_same_step(waiting: HpcgymJob) -> None:
    waiting.cancel()
    checkpoint = waiting.run_dir / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text(json.dumps({"step": 4, "world_size": 2, "draws": 12}))
    again = resume(str(waiting.run_dir), ["nodes.train=4"])
    plan = Plan.read(waiting.run_dir)
    again.cancel()
    assert [node.name for node in plan.nodes if node.role == "train"] == [f"train-{index}" for index in range(4)]
    assert (plan.training.world_size, plan.training.prompts_per_step) == (4, 3)
    assert "per_device_train_batch_size: 3" in (waiting.run_dir / "experiment.yaml").read_text()
    # Nothing was trained meanwhile; the batch of the job that ended last is what is kept.
    resume(str(waiting.run_dir), ["nodes.train=1"]).cancel()
    assert Plan.read(waiting.run_dir).training.grpo["gradient_accumulation_steps"] == 4
    with pytest.raises(UserError, match="5 training ranks cannot share the step"):
        resume(str(waiting.run_dir), ["nodes.train=5"])


def test_a_job_that_slurm_has_forgotten_is_resumed(waiting: HpcgymJob) -> None:
    waiting.cancel()
    record = JobRecord.read(waiting.run_dir)
    replace(record, job_id="1").write()
    assert HpcgymJob.find(str(waiting.run_dir)).state == "UNKNOWN"
    again = resume(str(waiting.run_dir))
    assert again.state == "PENDING"
    again.cancel()


def test_a_run_that_slurm_refuses_to_go_on_with_stays_as_it_was(waiting: HpcgymJob) -> None:
    waiting.cancel()
    attempt = waiting.run_dir / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt.parent / "latest").symlink_to("1")
    (attempt / "outcome.json").write_text(Outcome("cancelled", "by its user").to_json())
    kept = ("experiment.yaml", "plan.json", "job.sh", "job.json", "attempts/latest/outcome.json")
    before = [(waiting.run_dir / name).read_bytes() for name in kept]
    with pytest.raises(UserError, match="invalid partition specified: nowhere"):
        resume(str(waiting.run_dir), ["cluster.slurm.partition=nowhere", "nodes.train=4"])
    assert [(waiting.run_dir / name).read_bytes() for name in kept] == before
    assert not (waiting.run_dir / "secrets").exists()
    again = resume(str(waiting.run_dir))
    assert again.state == "PENDING"
    again.cancel()


def test_a_resumed_run_keeps_its_name_and_place(waiting: HpcgymJob) -> None:
    waiting.cancel()
    with pytest.raises(UserError, match="leave out overrides of name"):
        resume(str(waiting.run_dir), ["name=other"])
