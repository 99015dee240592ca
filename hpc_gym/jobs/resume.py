"""Goes on with a run that has ended: the same run directory and code, from the last checkpoint, as a new job."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.config.compose import compose
from hpc_gym.config.validate import validate
from hpc_gym.errors import UserError
from hpc_gym.jobs import local, records
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.state import CANCEL_MARK, has_ended, job_state, last_outcome
from hpc_gym.jobs.submission import start, write_job, write_secrets
from hpc_gym.jobs.submit import refuse_missing_runtimes
from hpc_gym.plan.checks import ranks_per_node
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.resolve import resolve
from hpc_gym.plan.same_batch import BATCH_KEYS, possible_ranks, same_batch

_OF_THE_JOB = ("experiment.yaml", "plan.json", "job.sh", records.RECORD)


@dataclass(frozen=True)
class Resumption:
    """A run that can go on, checked; nothing is written yet."""

    request: Request
    ranks_before: int
    adapted: Mapping[str, int]
    """What was changed, by key, so that another number of training ranks makes the same step."""

    @property
    def told(self) -> str:
        """What was changed, as a sentence; "" when nothing was."""
        if not self.adapted:
            return ""
        training = self.request.plan.training
        changed = ", ".join(f"{key}={value}" for key, value in self.adapted.items())
        return (
            f"{training.world_size} training ranks instead of {self.ranks_before} train on the same "
            f"{training.prompts_per_step} prompts per step with {changed}."
        )


def resume(job: str = "latest", overrides: Sequence[str] = ()) -> HpcgymJob:
    """Submits the run of `job` again, changed by `overrides` (nodes, time limit, ...); it keeps its name and directory.

    Raises UserError while the job lives, when the run is complete, or when `overrides` do not fit what was saved.
    """
    return submit_resumption(prepare_resumption(job, overrides))


def prepare_resumption(job: str = "latest", overrides: Sequence[str] = ()) -> Resumption:
    """What `resume` submits. With another number of training ranks, and no override of the batch, the batch of a rank
    is changed so that the step stays what it was.
    """
    record = records.find(job)
    run_dir = Path(record.run_dir)
    state = job_state(record)
    if not has_ended(state):
        raise UserError(f"job {record.job_id} is {state}: `hpc-gym cancel {record.name}` first")
    outcome = last_outcome(run_dir)
    if outcome is not None and outcome.kind == "completed":
        raise UserError(
            f"the run '{record.name}' is complete: there is nothing to go on with. To train its model further, submit "
            f"an experiment with model.path={run_dir / 'model'}"
        )
    before = Plan.read(run_dir)
    adapted = _adapted(run_dir / "experiment.yaml", overrides, before)
    changes = [*overrides, *(f"{key}={value}" for key, value in adapted.items())]
    resolved = resolve(run_dir / "experiment.yaml", changes, runtimes=before.runtimes)
    if Path(resolved.plan.run_dir) != run_dir:
        raise UserError(f"a resumed run stays in {run_dir}: leave out overrides of name and cluster.runs_dir")
    refuse_missing_runtimes(resolved.plan)
    _refuse_what_was_not_saved(run_dir, before, resolved.plan)
    request = Request(resolved.plan, record.experiment, resolved.experiment_yaml, record.cluster, tuple(changes))
    return Resumption(request, before.training.world_size, adapted)


def submit_resumption(resumption: Resumption) -> HpcgymJob:
    """Submits it; what said what the earlier job was goes beside that job's last attempt."""
    request = resumption.request
    run_dir = Path(request.plan.run_dir)
    _keep(run_dir)
    write_job(run_dir, request)
    write_secrets(run_dir / "secrets", request.plan)
    for name in (CANCEL_MARK, "failure.json", "attempts/latest"):
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
            f"{ranks} training ranks cannot share the step of this run, {training.prompts_per_step} prompts with "
            f"{grpo.get('num_generations', 8)} rollouts each: the number of ranks must be one of "
            f"{', '.join(map(str, possible))}; that is nodes.train={' or '.join(nodes) or 'none'} with {per_node} "
            f"{'rank' if per_node == 1 else 'ranks'} per node (ranks_per_node)"
        )
    return {f"grpo.{name}": value for name, value in found.items()}


def _refuse_what_was_not_saved(run_dir: Path, before: Plan, after: Plan) -> None:
    """Raises UserError when the last checkpoint cannot be gone on from as `after` wants it."""
    found = _last_checkpoint(run_dir)
    if found is None:
        return
    folder, step, draws, ranks = found
    training = after.training
    if draws != step * training.prompts_per_step:
        raise UserError(
            f"{folder} was trained on {draws / step:g} prompts per step, this job would be on "
            f"{training.prompts_per_step}: the order of the data would not go on where it was. Leave out the overrides "
            f"of {', '.join(f'grpo.{key}' for key in BATCH_KEYS)}, or set them so that it is the same"
        )
    if training.grpo["max_steps"] < step:
        raise UserError(f"grpo.max_steps={training.grpo['max_steps']} is less than the {step} steps of {folder}")
    stages = [plan.training.deepspeed["zero_optimization"]["stage"] for plan in (before, after)]
    if stages[0] != stages[1]:
        raise UserError(f"{folder} was written with deepspeed.zero_stage={stages[0]}: it cannot change to {stages[1]}")
    if ranks != training.world_size and (why := _bound_to_its_ranks(training.deepspeed["zero_optimization"])):
        raise UserError(
            f"{folder} was written by {ranks} training ranks, this job would have {training.world_size}: with "
            f"deepspeed.zero_optimization.{why} they must stay as many (nodes.train, ranks_per_node)"
        )


def _bound_to_its_ranks(zero: Mapping[str, object]) -> str:
    """The option for which the ranks' parts of the optimizer cannot be divided anew; "" when there is none."""
    offload = zero.get("offload_optimizer")
    if isinstance(offload, Mapping) and offload.get("device") == "nvme":
        return "offload_optimizer.device=nvme"
    return "elastic_checkpoint=true" if zero.get("elastic_checkpoint") else ""


def _last_checkpoint(run_dir: Path) -> tuple[Path, int, int, int] | None:
    """Folder, steps, draws and ranks of the newest whole checkpoint."""
    found = []
    for marker in run_dir.glob("checkpoints/checkpoint-*/complete.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(marker.read_text())
            found.append((marker.parent, int(facts["step"]), int(facts["draws"]), int(facts["world_size"])))
    return max(found, key=lambda checkpoint: checkpoint[1], default=None)


def _keep(run_dir: Path) -> None:
    """Puts what said what the earlier job was beside its last attempt."""
    latest = run_dir / "attempts" / "latest"
    if latest.exists():
        for name in _OF_THE_JOB:
            shutil.copy2(run_dir / name, latest.resolve() / name)
