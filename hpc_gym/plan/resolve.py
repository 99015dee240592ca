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
from hpc_gym.plan.findings import Findings
from hpc_gym.plan.judge import judge_processes, judge_servers, judge_settings, secret_names
from hpc_gym.plan.launch import launch
from hpc_gym.plan.nemo_gym import API_KEY, Gym, Served, node_config
from hpc_gym.plan.options import option_problems
from hpc_gym.plan.processes import BASE, MODEL_NAME, Names, rollout_processes, train_processes
from hpc_gym.plan.settings import deepspeed_config, grpo_fields

Paths = Mapping[KeyPath, str]
"""Keys that name files, and what they mean: absolute."""


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
    """What a well-formed experiment asks for is not there, or does not go together; `described` can still be shown."""

    def __init__(self, text: str, problems: Sequence[Problem], described: Described) -> None:
        super().__init__(text)
        self.problems = tuple(problems)
        self.described = described


def plan_for(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> frozen.Plan:
    """The Plan of an experiment (a file, or a name under `configs/experiments/`).

    Raises UserError telling all problems that were found, each with file, line and key.
    """
    return resolve(experiment, overrides, cluster).plan


def resolve(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> Resolved:
    """As `plan_for`, with the typed experiment and where its values come from.

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
    return _resolve(composed, typed)


def _resolve(composed: Composed, experiment: Experiment) -> Resolved:
    found = Findings(composed, experiment)
    names = _runtime_names(experiment)
    runtimes = found.runtimes(names)
    gym = Gym.of(Path(runtimes[names.gym].root))
    ranks = ranks_per_node(experiment)
    found.problems += role_problems(experiment)
    batch, problems = batch_of(experiment.grpo, experiment.nodes.train * ranks, experiment.max_staleness)
    found.problems += problems
    found.check_saves(batch)
    model, judge = found.model(), found.judge()
    served = found.environments()
    train = found.sources(gym, "train", experiment.data.train, served)
    held_out = found.sources(gym, "eval", experiment.data.eval, served)
    try:
        refuse(found.problems, composed.provenance)
    except UserError as error:
        raise NotReadyError(
            str(error), found.problems, Described(experiment, composed.provenance, found.paths)
        ) from None
    assert batch is not None

    # Relative to where the user submits, whichever cluster profile says it.
    runs_dir = (Path.cwd() / Path(experiment.cluster.runs_dir).expanduser()).resolve()
    run_dir = str(runs_dir / experiment.name)
    found.paths["cluster", "runs_dir"] = str(runs_dir)
    nodes = _nodes(experiment, names, model, judge, ranks, runtimes, served)
    plan = frozen.Plan(
        name=experiment.name,
        run_dir=run_dir,
        seed=experiment.seed,
        python=runtimes[BASE].python,
        nodes=nodes,
        runtimes=runtimes,
        environments=_environments(experiment, served),
        rollout=_rollout_settings(experiment, judge),
        training=_training(experiment, batch, model, train, held_out, run_dir),
        launch=launch(experiment),
        supervision=_supervision(experiment),
        env={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **experiment.cluster.env},
        secrets=secret_names(experiment),
    )
    return Resolved(experiment, composed.provenance, found.paths, plan)


def _environments(experiment: Experiment, served: Mapping[str, Served]) -> tuple[frozen.Environment, ...]:
    return tuple(
        frozen.Environment(name, served[name].agent, served[name].config_paths, each.timeout_s, each.max_attempts)
        for name, each in experiment.environments.items()
    )


def _rollout_settings(experiment: Experiment, judge: str | None) -> frozen.RolloutSettings:
    return frozen.RolloutSettings(
        model_name=MODEL_NAME,
        max_model_len=experiment.vllm["max_model_len"],
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


def _nodes(
    experiment: Experiment,
    names: Names,
    model: str,
    judge: str | None,
    ranks: int,
    runtimes: Mapping[str, frozen.Runtime],
    served: Mapping[str, Served],
) -> tuple[frozen.Node, ...]:
    """Rollout nodes first: the coordinator is on a node that no checkpoint is written from."""
    paths = list(dict.fromkeys(path for each in served.values() for path in each.config_paths))
    config = [environment.config for environment in experiment.environments.values()]
    asked = {name for each in served.values() for name in each.asks}
    defined = {name for each in served.values() for name in each.instances}
    judged = judge_servers(experiment.judge, asked - defined, API_KEY)
    text = node_config(config, f"{runtimes[names.gym].folder}/servers", MODEL_NAME, judged)
    rollout = experiment.nodes.rollout
    separate = len(launch(experiment).components) > 1
    nodes = [
        frozen.Node(
            index,
            "rollout",
            index,
            0,
            (
                *judge_processes(experiment, names, judge),
                *rollout_processes(experiment, names, index, model, replicas_of(experiment), text, paths),
            ),
        )
        for index in range(rollout)
    ]
    nodes += [
        frozen.Node(rollout + index, "train", index, int(separate), train_processes(experiment, names, index, ranks))
        for index in range(experiment.nodes.train)
    ]
    return tuple(nodes)


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
