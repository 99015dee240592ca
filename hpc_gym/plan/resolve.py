"""Experiment to Plan: everything a job needs, checked and frozen. Pure: no cluster is asked, the same inputs give
the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.config.compose import Composed, compose
from hpc_gym.config.problems import Problem, refuse
from hpc_gym.config.provenance import KeyPath, Provenance, Setting
from hpc_gym.config.schema import Experiment, Section
from hpc_gym.config.validate import validate
from hpc_gym.errors import UserError
from hpc_gym.plan import plan as frozen
from hpc_gym.plan.batch import Batch, batch_of
from hpc_gym.plan.checks import ranks_per_node, replicas_of, role_problems
from hpc_gym.plan.judge import judge_settings, secret_names
from hpc_gym.plan.launch import launch
from hpc_gym.plan.nemo_gym import Gym, Served
from hpc_gym.plan.nodes import nodes, places
from hpc_gym.plan.options import option_problems
from hpc_gym.plan.owned import variable_problems
from hpc_gym.plan.processes import BASE, MODEL_NAME, Names
from hpc_gym.plan.references import References
from hpc_gym.plan.settings import deepspeed_config, grpo_fields

Paths = Mapping[KeyPath, str]
"""Keys that name files, and what they mean: absolute."""

_NO_BATCH = Batch(world_size=0, prompts_per_step=0, steps_per_cycle=1, max_steps=0)
"""In an outline whose batch sizes do not go together."""


@dataclass(frozen=True)
class Described:
    """An experiment that is well formed, where its values come from, and the files that it means."""

    experiment: Experiment
    provenance: Provenance
    paths: Paths

    def experiment_yaml(self) -> str:
        """The resolved experiment, for `experiment.yaml` of the run directory: submitting it gives the same Plan
        again.
        """
        import yaml

        tree = self.experiment.model_dump(mode="json")
        for path, value in self.paths.items():
            section = tree
            for part in path[:-1]:
                section = section[part]  # type: ignore[index]
            section[path[-1]] = value  # type: ignore[index]
        text: str = yaml.safe_dump(_literal(tree), sort_keys=False, allow_unicode=True)
        return text


@dataclass(frozen=True)
class Resolved(Described):
    """A Plan and where it came from."""

    plan: frozen.Plan


class NotReadyError(UserError):
    """What a well-formed experiment asks for is not there, or does not go together.

    `described` can still be shown; `outline` is as much of the Plan as there is, its nodes without processes: enough
    to look at the rest of what the job would meet.
    """

    def __init__(self, text: str, problems: Sequence[Problem], described: Described, outline: frozen.Plan) -> None:
        super().__init__(text)
        self.problems = tuple(problems)
        self.described = described
        self.outline = outline


def plan_for(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> frozen.Plan:
    """The Plan of an experiment (a file, or a name under `configs/experiments/`).

    Raises UserError telling all problems that were found, each with file, line and key.
    """
    return resolve(experiment, overrides, cluster).plan


def resolve(
    experiment: str | Path,
    overrides: Sequence[str] = (),
    cluster: str | None = None,
    runtimes: Mapping[str, frozen.Runtime] | None = None,
) -> Resolved:
    """As `plan_for`, with the typed experiment and where its values come from. `runtimes`: those of an earlier job of
    the run, each kept where it is still there.

    Raises NotReadyError, a UserError, when the experiment by itself is well formed.
    """
    composed = compose(experiment, overrides, cluster)
    if "name" not in composed.tree:
        composed.tree["name"] = composed.file.stem
        composed.provenance.record(("name",), Setting(value=composed.file.stem, file=composed.file, line=1))
    typed, problems = validate(composed)
    problems = [*problems, *option_problems(composed.tree)]
    if typed is None or problems:
        refuse(problems, composed.provenance)
        raise AssertionError("an experiment without a problem has a type")
    return _resolve(composed, typed, runtimes)


def _resolve(
    composed: Composed, experiment: Experiment, earlier: Mapping[str, frozen.Runtime] | None = None
) -> Resolved:
    found = References(composed, experiment, earlier)
    names = _runtime_names(experiment)
    runtimes = found.runtimes(names)
    gym = Gym.of(Path(runtimes[names.gym].root))
    ranks = ranks_per_node(experiment)
    found.problems += [*role_problems(experiment), *variable_problems(experiment)]
    batch, problems = batch_of(experiment.grpo, experiment.nodes.train * ranks, experiment.max_staleness)
    found.problems += problems
    found.check_saves(batch)
    model, judge = found.model(), found.judge()
    served = found.environments()
    train = found.sources(gym, "train", experiment.data.train, served)
    held_out = found.sources(gym, "eval", experiment.data.eval, served)
    # Relative to where the user submits, whichever cluster profile says it.
    runs_dir = (Path.cwd() / Path(experiment.cluster.runs_dir).expanduser()).resolve()
    run_dir = str(runs_dir / experiment.name)
    found.paths["cluster", "runs_dir"] = str(runs_dir)
    ready = not found.problems
    job = nodes(experiment, names, model, judge, runtimes, served) if ready else places(experiment)
    plan = frozen.Plan(
        name=experiment.name,
        run_dir=run_dir,
        seed=experiment.seed,
        python=runtimes[BASE].python,
        nodes=job,
        runtimes=runtimes,
        environments=_environments(experiment, served),
        rollout=_rollout_settings(experiment, judge),
        training=_training(experiment, batch or _NO_BATCH, model, train, held_out, run_dir),
        launch=launch(experiment),
        supervision=_supervision(experiment),
        env={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **experiment.cluster.env},
        secrets=secret_names(experiment),
    )
    try:
        refuse(found.problems, composed.provenance)
    except UserError as error:
        described = Described(experiment, composed.provenance, found.paths)
        raise NotReadyError(str(error), found.problems, described, plan) from None
    return Resolved(experiment, composed.provenance, found.paths, plan)


def _environments(experiment: Experiment, served: Mapping[str, Served]) -> tuple[frozen.Environment, ...]:
    return tuple(
        frozen.Environment(name, served[name].agent, served[name].config_paths, each.timeout_s, each.max_attempts)
        for name, each in experiment.environments.items()
        if name in served
    )


def _rollout_settings(experiment: Experiment, judge: str | None) -> frozen.RolloutSettings:
    return frozen.RolloutSettings(
        model_name=MODEL_NAME,
        max_model_len=experiment.vllm.get("max_model_len", 0),
        max_concurrent=experiment.rollouts.max_concurrent,
        replicas=replicas_of(experiment),
        judge=judge_settings(experiment, judge),
    )


def _literal(value: Any) -> Any:
    """`value` with what was resolved already, and looks like an interpolation, kept from being resolved again."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _runtime_names(experiment: Experiment) -> Names:
    chosen, device = experiment.runtimes, experiment.runtimes.device
    return Names(chosen.inference or f"inference-{device}", chosen.gym, chosen.train or f"train-{device}")


def _training(
    experiment: Experiment,
    batch: Batch,
    model: str,
    train: tuple[frozen.DataSource, ...],
    held_out: tuple[frozen.DataSource, ...],
    run_dir: str,
) -> frozen.Training:
    rollouts, evaluation = experiment.rollouts, experiment.evaluation
    sampling = frozen.Sampling(rollouts.temperature, rollouts.top_p, rollouts.max_output_tokens, rollouts.tool_choice)
    eval_sampling = frozen.Sampling(
        evaluation.temperature,
        evaluation.top_p,
        evaluation.max_output_tokens or rollouts.max_output_tokens,
        rollouts.tool_choice,
    )
    cuda = experiment.runtimes.device == "cuda"
    return frozen.Training(
        method="grpo",
        model=model,
        grpo=grpo_fields(experiment),
        deepspeed=deepspeed_config(experiment),
        prompts_per_step=batch.prompts_per_step,
        world_size=batch.world_size,
        max_staleness=experiment.max_staleness,
        sources=train,
        sampling=sampling,
        evaluation=frozen.Evaluation(
            sources=held_out,
            at_start=bool(held_out) if evaluation.at_start is None else evaluation.at_start,
            at_end=bool(held_out) if evaluation.at_end is None else evaluation.at_end,
            every=evaluation.every,
            sampling=eval_sampling,
            num_rollouts=evaluation.num_rollouts,
        ),
        weight_transfer=experiment.weights.transfer or ("nccl" if cuda else "gloo"),
        checkpoint_every=experiment.checkpoints.every,
        checkpoints_kept=experiment.checkpoints.keep,
        wandb=_wandb(experiment, run_dir),
        on_policy_tolerance=experiment.on_policy_tolerance,
    )


def _wandb(experiment: Experiment, run_dir: str) -> dict[str, Any] | None:
    wandb = experiment.tracking.wandb
    if wandb is None:
        return None
    # One id for all attempts of a run, known without asking anybody: a run is its directory.
    run_id = hashlib.sha256(f"hpc-gym {run_dir}".encode()).hexdigest()[:16]
    return {**_dump(wandb), "name": wandb.name or experiment.name, "run_id": run_id}


def _supervision(experiment: Experiment) -> frozen.Supervision:
    wanted = experiment.supervision
    return frozen.Supervision(
        heartbeat_s=wanted.heartbeat_s,
        node_silent_s=wanted.node_silent_s,
        stop_within_s=wanted.stop_within_s,
        checkpoint_grace_s=wanted.checkpoint_grace_s,
        time_limit_margin_s=wanted.time_limit_margin_s,
        stall_factor=wanted.stall_factor,
        stall_at_least_s=wanted.stall_at_least_s,
        on_stall=wanted.on_stall,
    )


def _dump(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")
