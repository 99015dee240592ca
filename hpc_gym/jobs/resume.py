"""Goes on with a run that has ended: the same run directory and code, from the last checkpoint, as a new job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_gym.config.compose import compose
from hpc_gym.config.validate import validate
from hpc_gym.errors import UserError
from hpc_gym.jobs import local, records
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.state import CANCEL_MARK, is_over, job_state, last_outcome
from hpc_gym.jobs.submission import SUBMISSION, start, write_job, write_secrets
from hpc_gym.jobs.submit import refuse_missing_runtimes, submission_of
from hpc_gym.plan.checks import ranks_per_node
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import resolve
from hpc_gym.plan.same_batch import BATCH_KEYS, possible_ranks, same_batch

_OF_THE_JOB = ("experiment.yaml", "plan.json", "job.sh", records.RECORD)
_READ_PLAN = "import sys; from hpc_gym.plan.plan import Plan; Plan.from_json(sys.stdin.read())"
_OF_ITS_END = (CANCEL_MARK, "failure.json", "attempts/latest")
_SAME_HOWEVER_LONG = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")
"""Values of `lr_scheduler_type` for which the learning rate of a step does not depend on `max_steps`."""


@dataclass(frozen=True)
class Saved:
    """The newest whole checkpoint of a run: after how many steps and draws which number of ranks wrote it."""

    folder: Path
    step: int
    draws: int
    ranks: int


@dataclass(frozen=True)
class Resumption:
    """A run that can go on, checked; nothing is written yet."""

    request: Request
    before: Plan
    """What the job that ended was."""
    saved: Saved | None
    """None: nothing was saved, and it begins at the beginning."""
    adapted: Mapping[str, int]
    """What was changed, by key, so that another number of training ranks makes the same step."""

    @property
    def told(self) -> tuple[str, ...]:
        """What is not as it was, in sentences."""
        training, before = self.request.plan.training, self.before.training
        sentences = []
        if self.adapted:
            changed = ", ".join(f"{key}={value}" for key, value in self.adapted.items())
            sentences.append(
                f"{_ranks(training.world_size)} instead of {before.world_size} "
                f"{'trains' if training.world_size == 1 else 'train'} on the same {training.prompts_per_step} prompts "
                f"per step with {changed}."
            )
        steps, steps_before = training.grpo["max_steps"], before.grpo["max_steps"]
        schedule = training.grpo.get("lr_scheduler_type", "linear")
        if self.saved and steps != steps_before and schedule not in _SAME_HOWEVER_LONG:
            sentences.append(
                f"The learning rate goes on as that of a run of {steps} steps, no longer of {steps_before} "
                f"(grpo.lr_scheduler_type={schedule})."
            )
        return tuple(sentences)

    @property
    def where(self) -> str:
        """Where it goes on, to be read after the run directory."""
        steps = self.request.plan.training.grpo["max_steps"]
        if self.saved is None:
            return "from the beginning, since it has no checkpoint"
        if self.saved.step == steps:
            return f"from step {self.saved.step}, the last one: only what follows the training is left"
        return f"from step {self.saved.step} of {steps}"


def resume(job: str = "latest", overrides: Sequence[str] = ()) -> HpcgymJob:
    """Submits the run of `job` again, changed by `overrides` (nodes, time limit, ...); it keeps its name and directory.

    Raises UserError while the job lives, when the run is complete and `overrides` ask for no more steps, or when they
    do not fit what was saved.
    """
    return submit_resumption(prepare_resumption(job, overrides))


def prepare_resumption(job: str = "latest", overrides: Sequence[str] = ()) -> Resumption:
    """What `resume` submits. With another number of training ranks, and no override of the batch, the batch of a rank
    is changed so that the step stays what it was.
    """
    record = records.find(job, only=True)
    run_dir = Path(record.run_dir)
    state = job_state(record)
    if not is_over(record, state):
        raise UserError(f"job {record.job_id} is {state}: `hpc-gym cancel {record.name}` first")
    before = records.read_plan(run_dir)
    adapted = _adapted(run_dir / "experiment.yaml", overrides, before)
    changes = [
        *_where_it_lies(run_dir, before, overrides),
        *overrides,
        *(f"{key}={value}" for key, value in adapted.items()),
    ]
    resolved = resolve(run_dir / "experiment.yaml", changes, runtimes=before.runtimes)
    plan = _of_the_same_wandb_run(resolved.plan, before)
    if Path(plan.run_dir) != run_dir:
        raise UserError(f"a resumed run stays in {run_dir}: leave out overrides of name and cluster.runs_dir")
    refuse_missing_runtimes(plan)
    saved = _last_checkpoint(run_dir)
    outcome = last_outcome(run_dir)
    if outcome is not None and outcome.kind == "completed":
        _refuse_what_is_complete(record.name, before, plan, saved)
    if saved is not None:
        _refuse_what_was_not_saved(saved, before, plan)
    _refuse_what_its_code_cannot_read(plan)
    request = Request(plan, record.experiment, resolved.experiment_yaml, record.cluster, tuple(changes))
    return Resumption(request, before, saved, adapted)


def submit_resumption(resumption: Resumption) -> HpcgymJob:
    """Submits it; what said what the earlier job was goes beside that job's last attempt.

    Raises UserError when the scheduler refuses; then the run is as it was, and can be resumed another way.
    """
    request = resumption.request
    run_dir = Path(request.plan.run_dir)
    _keep(run_dir)
    with _put_back_on_error(run_dir):
        write_job(run_dir, request)
        write_secrets(run_dir / "secrets", request.plan)
        if resumption.before.run_dir != request.plan.run_dir:
            # What submitit runs on every node names the place where the run was.
            submission_of(request.plan).dump(run_dir / SUBMISSION)
            records.remember_runs_folder(run_dir.parent)
        for name in _OF_ITS_END:
            (run_dir / name).unlink(missing_ok=True)
        job_id = ""
        if request.plan.launch.kind == "local":
            job_id = local.new_job_id()
            (run_dir / "submitit" / f"{job_id}_submitted.pkl").symlink_to("submitted.pkl")
        return HpcgymJob.of(start(request, job_id))


def _adapted(experiment: Path, overrides: Sequence[str], before: Plan) -> dict[str, int]:
    """The settings that keep the step of `before` on the number of ranks that `overrides` ask for.

    Raises UserError when no setting does.
    """
    wanted = validate(compose(experiment, overrides))[0]
    names = {override.partition("=")[0].strip() for override in overrides}
    if wanted is None or names & {"grpo", *(f"grpo.{key}" for key in BATCH_KEYS)}:
        return {}
    training = before.training
    grpo, ranks_before = training.grpo, training.world_size
    per_node = ranks_per_node(wanted)
    ranks = wanted.nodes.train * per_node
    if ranks == ranks_before:
        return {}
    found = same_batch(grpo, ranks_before, ranks)
    if found is None:
        possible = possible_ranks(grpo, ranks_before)
        nodes = [str(number // per_node) for number in possible if number % per_node == 0]
        raise UserError(
            f"{_ranks(ranks)} cannot share the step of this run, {training.prompts_per_step} prompts with "
            f"{grpo.get('num_generations', 8)} rollouts each: the number of ranks must be one of "
            f"{', '.join(map(str, possible))}; that is nodes.train={' or '.join(nodes) or 'none'} with {per_node} "
            f"{'rank' if per_node == 1 else 'ranks'} per node (ranks_per_node)"
        )
    return {f"grpo.{name}": value for name, value in found.items()}


def _where_it_lies(run_dir: Path, before: Plan, overrides: Sequence[str]) -> list[str]:
    """Of a run directory that was moved: the name and the place that it has now, where `overrides` do not say them."""
    if Path(before.run_dir) == run_dir:
        return []
    given = {override.partition("=")[0].strip() for override in overrides}
    name, place = json.dumps(run_dir.name), json.dumps(str(run_dir.parent))
    found = [] if "name" in given else [f"name={name}"]
    return found if given & {"cluster", "cluster.runs_dir"} else [*found, f"cluster.runs_dir={place}"]


def _of_the_same_wandb_run(plan: Plan, before: Plan) -> Plan:
    """`plan`, with the W&B run that the earlier jobs wrote to: a directory that was moved would be another."""
    wandb, earlier = plan.training.wandb, before.training.wandb
    if wandb is None or earlier is None or "run_id" not in earlier:
        return plan
    return replace(plan, training=replace(plan.training, wandb={**wandb, "run_id": earlier["run_id"]}))


def _refuse_what_its_code_cannot_read(plan: Plan) -> None:
    """Raises UserError when the code of the run, which may be of an older hpc-gym, does not know such a Plan: its job
    would fail after the queue.
    """
    environment = {**os.environ, "PYTHONPATH": f"{plan.run_dir}/code", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [plan.python, "-c", _READ_PLAN],
        input=plan.to_json(),
        env=environment,
        cwd=plan.run_dir,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"the code of this run, {plan.run_dir}/code, cannot read the plan that this hpc-gym makes ({why}): resume "
            "it with the hpc-gym that it was submitted with (manifest.json names it)"
        )


def _refuse_what_is_complete(name: str, before: Plan, after: Plan, saved: Saved | None) -> None:
    """Raises UserError when a complete run is not to become longer, or cannot."""
    steps = before.training.grpo["max_steps"]
    elsewhere = f"submit an experiment with model.path={Path(after.run_dir) / 'model'}"
    if after.training.grpo["max_steps"] <= steps:
        raise UserError(
            f"the run '{name}' is complete, with its {steps} steps: to go on, ask for more, as grpo.max_steps="
            f"{2 * steps}. To train its model on other data or by other settings, {elsewhere}"
        )
    if saved is None:
        raise UserError(
            f"the run '{name}' is complete and its checkpoints are gone, so it cannot go on. To train its model "
            f"further, {elsewhere}"
        )


def _refuse_what_was_not_saved(saved: Saved, before: Plan, after: Plan) -> None:
    """Raises UserError when the last checkpoint cannot be gone on from as `after` wants it."""
    training = after.training
    if saved.draws != saved.step * training.prompts_per_step:
        raise UserError(
            f"{saved.folder} was trained on {saved.draws / saved.step:g} prompts per step, this job would be on "
            f"{training.prompts_per_step}: the order of the data would not go on where it was. Leave out the overrides "
            f"of {', '.join(f'grpo.{key}' for key in BATCH_KEYS)}, or set them so that it is the same"
        )
    if training.grpo["max_steps"] < saved.step:
        raise UserError(
            f"grpo.max_steps={training.grpo['max_steps']} is less than the {saved.step} steps of {saved.folder}"
        )
    stages = [plan.training.deepspeed["zero_optimization"]["stage"] for plan in (before, after)]
    if stages[0] != stages[1]:
        raise UserError(
            f"{saved.folder} was written with deepspeed.zero_stage={stages[0]}: it cannot change to {stages[1]}"
        )
    zero = training.deepspeed["zero_optimization"]
    if saved.ranks != training.world_size and (why := _bound_to_its_ranks(zero)):
        raise UserError(
            f"{saved.folder} was written by {_ranks(saved.ranks)}, this job would have {training.world_size}: with "
            f"deepspeed.zero_optimization.{why} they must stay as many (nodes.train, ranks_per_node)"
        )


def _bound_to_its_ranks(zero: Mapping[str, object]) -> str:
    """The option for which the ranks' parts of the optimizer cannot be divided anew; "" when there is none."""
    offload = zero.get("offload_optimizer")
    if isinstance(offload, Mapping) and offload.get("device") == "nvme":
        return "offload_optimizer.device=nvme"
    return "elastic_checkpoint=true" if zero.get("elastic_checkpoint") else ""


def _last_checkpoint(run_dir: Path) -> Saved | None:
    found = []
    for marker in run_dir.glob("checkpoints/checkpoint-*/complete.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(marker.read_text())
            found.append(Saved(marker.parent, int(facts["step"]), int(facts["draws"]), int(facts["world_size"])))
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def _ranks(count: int) -> str:
    return "1 training rank" if count == 1 else f"{count} training ranks"


def _keep(run_dir: Path) -> None:
    """Puts what said what the earlier job was beside its last attempt."""
    latest = run_dir / "attempts" / "latest"
    if latest.exists():
        for name in _OF_THE_JOB:
            shutil.copy2(run_dir / name, latest.resolve() / name)


@contextlib.contextmanager
def _put_back_on_error(run_dir: Path) -> Iterator[None]:
    """A scheduler that refuses must not leave a run whose plan is not that of the job that it had."""
    names = (*_OF_THE_JOB, *_OF_ITS_END, SUBMISSION)
    links = {name: (run_dir / name).readlink() for name in names if (run_dir / name).is_symlink()}
    files = {name: (run_dir / name).read_bytes() for name in names if name not in links and (run_dir / name).exists()}
    try:
        yield
    except BaseException:
        for name, content in files.items():
            (run_dir / name).write_bytes(content)
        for name, target in links.items():
            (run_dir / name).unlink(missing_ok=True)
            (run_dir / name).symlink_to(target)
        shutil.rmtree(run_dir / "secrets", ignore_errors=True)
        raise
