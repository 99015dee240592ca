"""`hpc-gym resume` of runs that ended while they waited: what is submitted anew, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster import Cluster
from small_project import Project, project

from hpc_gym import submit
from hpc_gym.errors import UserError
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.resume import resume
from hpc_gym.plan.plan import Plan

__all__ = ["project"]


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


def test_another_number_of_training_ranks_than_wrote_the_checkpoint_is_refused(waiting: HpcgymJob) -> None:
    waiting.cancel()
    checkpoint = waiting.run_dir / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text(json.dumps({"step": 4, "world_size": 3, "draws": 12}))
    with pytest.raises(UserError, match="was written by 3 training ranks; this job would have 2"):
        resume(str(waiting.run_dir))


def test_a_resumed_run_keeps_its_name_and_place(waiting: HpcgymJob) -> None:
    waiting.cancel()
    with pytest.raises(UserError, match="leave out overrides of name"):
        resume(str(waiting.run_dir), ["name=other"])
