"""What `hpc-gym resume` makes of a run that has ended: another number of nodes, the same step, the same data order."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from small_project import Project
from submitit.core.utils import DelayedSubmission

from hpc_gym.errors import UserError
from hpc_gym.jobs import resume
from hpc_gym.jobs.records import JobRecord, ProcessIdentity
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.resume import Resumption, prepare_resumption
from hpc_gym.jobs.submission import SUBMISSION
from hpc_gym.jobs.submit import submission_of
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import resolve
from hpc_gym.protocol.attempt import Outcome
from hpc_gym.runtimes.spec import MARKER, default_names, spec_of


class Ended:
    """A local run on two ranks that has failed: twelve completions a step, three prompts with four rollouts each."""

    def __init__(self, project: Project, *overrides: str) -> None:
        resolved = resolve(project.write(), overrides)
        self.run_dir = Path(resolved.plan.run_dir)
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "plan.json").write_text(resolved.plan.to_json())
        (self.run_dir / "experiment.yaml").write_text(resolved.experiment_yaml())
        gone = ProcessIdentity(os.uname().nodename, "another life", 1, 1)
        JobRecord("local-1", "local", "small", str(self.run_dir), "small.yaml", "local", 3, 0.0, gone).write()

    def saved(self, step: int, draws: int, ranks: int = 2) -> Ended:
        folder = self.run_dir / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps({"step": step, "world_size": ranks, "draws": draws}))
        return self

    def resumed(self, *overrides: str) -> Resumption:
        return prepare_resumption(str(self.run_dir), overrides)

    def refused(self, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            self.resumed(*overrides)
        return str(caught.value)


@pytest.fixture(autouse=True)
def _built(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    build(project.folder / "cache", monkeypatch)


def build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a cache whose runtimes look built."""
    monkeypatch.setenv("HPC_GYM_CACHE", str(cache))
    for name in default_names("cpu"):
        spec = spec_of(name)
        spec.python.parent.mkdir(parents=True)
        (spec.root / MARKER).touch()
        spec.python.touch()


@pytest.fixture
def ended(project: Project) -> Ended:
    return Ended(project).saved(step=4, draws=12)


@pytest.mark.parametrize(
    ("overrides", "adapted"),
    [
        (["nodes.train=4"], {"grpo.per_device_train_batch_size": 3}),
        (["nodes.train=1"], {"grpo.gradient_accumulation_steps": 2}),
        (["nodes.train=3"], {"grpo.per_device_train_batch_size": 4}),  # the old batch would cut a group on so many
        (["nodes.train=3", "ranks_per_node=4"], {"grpo.per_device_train_batch_size": 1}),
        (["nodes.train=1", "ranks_per_node=2"], {}),
        (["nodes.rollout=3"], {}),
    ],
)
def test_another_number_of_ranks_makes_the_same_step(
    ended: Ended, overrides: list[str], adapted: dict[str, int]
) -> None:
    resumption = ended.resumed(*overrides)
    assert resumption.adapted == adapted
    training = resumption.request.plan.training
    assert training.prompts_per_step == 3
    # What was chosen is the run's from now on, and told to the user.
    experiment = yaml.safe_load(resumption.request.resolved())
    for key, value in adapted.items():
        assert experiment["grpo"][key.removeprefix("grpo.")] == value
        assert f"{key}={value}" in resumption.told[0]
    assert bool(resumption.told) == bool(adapted)


def test_nothing_is_written_before_it_is_submitted(ended: Ended) -> None:
    before = {path: path.stat().st_mtime_ns for path in ended.run_dir.rglob("*")}
    ended.resumed("nodes.train=4")
    assert {path: path.stat().st_mtime_ns for path in ended.run_dir.rglob("*")} == before


def test_a_number_of_ranks_that_cannot_share_the_step_is_refused_with_those_that_can(ended: Ended) -> None:
    assert ended.refused("nodes.train=5") == (
        "5 training ranks cannot share the step of this run, 3 prompts with 4 rollouts each: the number of ranks must "
        "be one of 1, 2, 3, 4, 6, 12; that is nodes.train=1 or 2 or 3 or 4 or 6 or 12 with 1 rank per node "
        "(ranks_per_node)"
    )
    assert "nodes.train=none with 8 ranks per node" in ended.refused("nodes.train=1", "ranks_per_node=8")


def test_a_batch_that_the_user_sets_is_taken_if_it_makes_the_same_step(ended: Ended) -> None:
    resumption = ended.resumed(
        "nodes.train=3", "grpo.per_device_train_batch_size=1", "grpo.gradient_accumulation_steps=4"
    )
    assert (resumption.adapted, resumption.request.plan.training.prompts_per_step) == ({}, 3)
    says = ended.refused("nodes.train=4", "grpo.per_device_train_batch_size=6")
    assert "checkpoint-4 was trained on 3 prompts per step, this job would be on 6" in says
    assert "grpo.gradient_accumulation_steps" in says


def test_a_run_without_a_checkpoint_may_begin_with_another_batch(project: Project) -> None:
    ended = Ended(project)
    assert ended.resumed("grpo.per_device_train_batch_size=2").request.plan.training.prompts_per_step == 1
    assert ended.resumed("nodes.train=4").adapted == {"grpo.per_device_train_batch_size": 3}


def test_a_checkpoint_of_another_number_of_draws_is_refused(project: Project) -> None:
    says = Ended(project).saved(step=4, draws=16).refused()
    assert "checkpoint-4 was trained on 4 prompts per step, this job would be on 3: the order of the data" in says


def test_training_may_become_longer_but_not_shorter_than_it_was(ended: Ended) -> None:
    assert ended.resumed("grpo.max_steps=20").request.plan.training.grpo["max_steps"] == 20
    assert ended.resumed("grpo.max_steps=4").request.plan.training.grpo["max_steps"] == 4
    assert "grpo.max_steps=3 is less than the 4 steps of" in ended.refused("grpo.max_steps=3")


def test_zero_must_stay_as_it_was(ended: Ended) -> None:
    assert "deepspeed.zero_stage=2: it cannot change to 3" in ended.refused("deepspeed.zero_stage=3")


def test_an_optimizer_on_nvme_stays_with_its_ranks(project: Project) -> None:
    nvme = 'deepspeed={"zero_stage": 3, "zero_optimization": {"offload_optimizer": {"device": "nvme"}}}'
    ended = Ended(project, nvme).saved(step=4, draws=12)
    assert ended.resumed().adapted == {}
    says = ended.refused("nodes.train=4")
    assert "written by 2 training ranks, this job would have 4: with deepspeed.zero_optimization.offload_opt" in says


def test_a_plan_that_the_code_of_the_run_does_not_know_is_refused(ended: Ended) -> None:
    package = ended.run_dir / "code" / "hpc_gym" / "plan"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "plan.py").write_text(
        "class Plan:\n    @classmethod\n    def from_json(cls, text):\n        raise TypeError('what is training?')\n"
    )
    before = {path: path.stat().st_mtime_ns for path in ended.run_dir.rglob("*")}
    says = ended.refused()
    assert says.startswith(f"the code of this run, {ended.run_dir}/code, cannot read the plan that this hpc-gym makes")
    assert "(TypeError: what is training?)" in says
    assert {path: path.stat().st_mtime_ns for path in ended.run_dir.rglob("*")} == before


def test_a_run_directory_that_was_moved_goes_on_where_it_lies_and_in_its_wandb_run(project: Project) -> None:
    ended = Ended(project, "tracking.wandb={project: p}").saved(step=4, draws=12)
    before = Plan.read(ended.run_dir)
    assert before.training.wandb and ended.resumed().request.plan.training.wandb == before.training.wandb
    place = project.folder / "another place"
    place.mkdir()
    ended.run_dir = ended.run_dir.rename(place / "moved")
    for overrides in ((), ("grpo.max_steps=20",), ("name=moved",), (f"cluster.runs_dir={json.dumps(str(place))}",)):
        plan = ended.resumed(*overrides).request.plan
        assert (plan.run_dir, plan.name) == (str(place / "moved"), "moved")
        assert plan.training.wandb and plan.training.wandb["run_id"] == before.training.wandb["run_id"]
    assert f"a resumed run stays in {place / 'moved'}" in ended.refused("name=another")


def test_what_runs_on_the_nodes_of_a_moved_run_is_told_where_it_lies(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Ended(project)
    (ended.run_dir / "submitit").mkdir()
    submission_of(Plan.read(ended.run_dir)).dump(ended.run_dir / SUBMISSION)
    ended.run_dir = ended.run_dir.rename(project.folder / "moved")
    monkeypatch.setenv("XDG_STATE_HOME", str(project.folder / "state"))

    def refuse(request: Request, job_id: str) -> JobRecord:
        assert DelayedSubmission.load(ended.run_dir / SUBMISSION).args == (str(ended.run_dir),)
        raise UserError("the scheduler refuses")

    monkeypatch.setattr(resume, "start", refuse)
    files = {path: path.read_bytes() for path in ended.run_dir.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match="the scheduler refuses"):
        resume.submit_resumption(ended.resumed())
    assert {path: path.read_bytes() for path in files} == files


def completed(ended: Ended) -> Ended:
    latest = ended.run_dir / "attempts" / "1"
    latest.mkdir(parents=True)
    (latest.parent / "latest").symlink_to("1")
    (latest / "outcome.json").write_text(Outcome("completed").to_json())
    return ended


def test_a_complete_run_goes_on_only_with_more_steps(project: Project) -> None:
    run = completed(Ended(project).saved(step=10, draws=30))
    for overrides in ((), ("grpo.max_steps=10",), ("nodes.train=1",)):
        says = run.refused(*overrides)
        assert "the run 'small' is complete, with its 10 steps: to go on, ask for more, as grpo.max_steps=20" in says
        assert f"model.path={run.run_dir / 'model'}" in says
    longer = run.resumed("grpo.max_steps=15", "nodes.train=4")
    assert longer.request.plan.training.grpo["max_steps"] == 15
    assert longer.adapted == {"grpo.per_device_train_batch_size": 3}
    assert longer.where == "from step 10 of 15"


def test_a_complete_run_without_its_checkpoints_does_not_begin_anew(project: Project) -> None:
    says = completed(Ended(project)).refused("grpo.max_steps=20")
    assert "is complete and its checkpoints are gone, so it cannot go on" in says


def test_where_it_goes_on_and_what_becomes_of_the_learning_rate_is_told(ended: Ended, project: Project) -> None:
    longer = ended.resumed("grpo.max_steps=20", "nodes.train=1")
    assert longer.told == (
        "1 training rank instead of 2 trains on the same 3 prompts per step with grpo.gradient_accumulation_steps=2.",
        "The learning rate goes on as that of a run of 20 steps, no longer of 10 (grpo.lr_scheduler_type=linear).",
    )
    assert longer.where == "from step 4 of 20"
    assert ended.resumed("grpo.max_steps=20", "grpo.lr_scheduler_type=constant").told == ()
    assert ended.resumed("grpo.max_steps=4").where.startswith("from step 4, the last one: only what follows")
    fresh = Ended(project, "name=fresh").resumed("grpo.max_steps=20")
    assert (fresh.told, fresh.where) == ((), "from the beginning, since it has no checkpoint")


def test_the_runtimes_of_the_run_are_kept_while_they_are_there(
    ended: Ended, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(project.folder / "another", monkeypatch)
    kept = ended.resumed().request.plan
    assert {Path(runtime.root).parent.parent for name, runtime in kept.runtimes.items() if name != "base"} == {
        project.folder / "cache"
    }
    (project.folder / "cache").rename(project.folder / "removed")
    found = ended.resumed().request.plan.runtimes
    assert found["gym"].root.startswith(str(project.folder / "another"))
