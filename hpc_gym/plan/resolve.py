"""Experiment to Plan: everything a job needs, checked and frozen. Pure: no cluster is asked, the same inputs give the same bytes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.config.compose import Composed, compose
from hpc_gym.config.problems import Problem, refuse
from hpc_gym.config.provenance import KeyPath, Provenance
from hpc_gym.config.schema import Experiment, Rows, Section, WeightedRows
from hpc_gym.config.validate import validate
from hpc_gym.data.rows import check_rows
from hpc_gym.errors import UserError
from hpc_gym.plan import plan as frozen
from hpc_gym.plan.batch import Batch, batch_of
from hpc_gym.plan.checks import model_source, ranks_per_node, replicas_of, role_problems
from hpc_gym.plan.nemo_gym import Gym, Served, clashes, data_file, node_config, serve
from hpc_gym.plan.options import option_problems
from hpc_gym.plan.processes import BASE, MODEL_NAME, Names, rollout_processes, train_processes
from hpc_gym.plan.settings import deepspeed_config, grpo_fields
from hpc_gym.runtimes.spec import spec_of

Paths = Mapping[KeyPath, str]
"""Keys that name files, and what they mean: absolute."""


@dataclass(frozen=True)
class Resolved:
    """A Plan and where it came from."""

    plan: frozen.Plan
    experiment: Experiment
    provenance: Provenance
    paths: Paths

    def experiment_yaml(self) -> str:
        """The resolved experiment, for `experiment.yaml` of the run directory: submitting it gives the same Plan again."""
        import yaml

        tree = self.experiment.model_dump(mode="json")
        for path, value in self.paths.items():
            section = tree
            for part in path[:-1]:
                section = section[part]  # type: ignore[index]
            section[path[-1]] = value  # type: ignore[index]
        text: str = yaml.safe_dump(_literal(tree), sort_keys=False, allow_unicode=True)
        return text


def plan_for(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> frozen.Plan:
    """The Plan of an experiment (a file, or a name under `configs/experiments/`).

    Raises UserError telling all problems that were found, each with file, line and key.
    """
    return resolve(experiment, overrides, cluster).plan


def resolve(experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None) -> Resolved:
    """As `plan_for`, with the typed experiment and where its values come from."""
    composed = compose(experiment, overrides, cluster)
    if "name" not in composed.tree:
        composed.tree["name"] = composed.file.stem
    typed, problems = validate(composed)
    problems = [*problems, *option_problems(composed.tree)]
    if typed is None or problems:
        refuse(problems, composed.provenance)
        raise AssertionError("an experiment without a problem has a type")
    return _resolve(composed, typed)


def _resolve(composed: Composed, experiment: Experiment) -> Resolved:
    found = _Findings(composed, experiment)
    names = _runtime_names(experiment)
    runtimes = found.runtimes(names)
    gym = Gym.of(Path(runtimes[names.gym].root))
    ranks = ranks_per_node(experiment)
    found.problems += role_problems(experiment)
    batch, problems = batch_of(experiment.grpo, experiment.nodes.train * ranks, experiment.max_staleness)
    found.problems += problems
    found.check_saves(batch)
    model = found.model()
    served = found.environments(gym)
    train = found.sources(gym, "train", experiment.data.train, served)
    held_out = found.sources(gym, "eval", experiment.data.eval, served)
    refuse(found.problems, composed.provenance)
    assert batch is not None

    runs_dir = (composed.folder_of(("cluster", "runs_dir")) / Path(experiment.cluster.runs_dir).expanduser()).resolve()
    run_dir = str(runs_dir / experiment.name)
    found.paths["cluster", "runs_dir"] = str(runs_dir)
    nodes = _nodes(experiment, names, model, ranks, runtimes, served)
    plan = frozen.Plan(
        name=experiment.name,
        run_dir=run_dir,
        seed=experiment.seed,
        python=runtimes[BASE].python,
        nodes=nodes,
        runtimes=runtimes,
        environments=tuple(
            frozen.Environment(name, served[name].agent, served[name].config_paths, each.timeout_s, each.max_attempts)
            for name, each in experiment.environments.items()
        ),
        rollout=frozen.RolloutSettings(
            model_name=MODEL_NAME,
            max_model_len=experiment.vllm["max_model_len"],
            max_concurrent=experiment.rollouts.max_concurrent,
            replicas=replicas_of(experiment),
        ),
        training=_training(experiment, batch, model, train, held_out, run_dir),
        launch=_launch(experiment),
        supervision=_supervision(experiment),
        env={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **experiment.cluster.env},
        secrets=tuple(experiment.secrets),
    )
    return Resolved(plan, experiment, composed.provenance, found.paths)


def _literal(value: Any) -> Any:
    """`value` with what was resolved already, and looks like an interpolation, kept from being resolved again."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


class _Findings:
    """Looks up what the experiment names outside itself (files, folders, runtimes), collecting problems as it goes."""

    def __init__(self, composed: Composed, experiment: Experiment) -> None:
        self.composed = composed
        self.experiment = experiment
        self.problems: list[Problem] = []
        self.paths: dict[KeyPath, str] = {}

    def runtimes(self, names: Names) -> dict[str, frozen.Runtime]:
        """The runtimes of the roles by name, with the base runtime that runs now."""
        container = self.experiment.cluster.runtime
        base = frozen.Runtime(BASE, "venv", sys.prefix, sys.executable)
        runtimes = {BASE: base}
        for role, name in (("inference", names.inference), ("gym", names.gym), ("train", names.train)):
            try:
                spec = spec_of(name)
            except UserError as error:
                self.problems.append(Problem(("runtimes", role), f"{error}."))
                runtimes[name] = base
                continue
            image = container.images.get(role)  # type: ignore[call-overload]
            runtimes[name] = frozen.Runtime(
                name=name,
                kind=container.kind,
                root=image or str(spec.root),
                python="python" if image else str(spec.python),
                lock=spec.digest,
                modules=tuple(container.modules),
                options=tuple(container.options),
            )
        return runtimes

    def check_saves(self, batch: Batch | None) -> None:
        every = self.experiment.checkpoints.every
        if batch and every % batch.steps_per_cycle:
            self.problems.append(
                Problem(
                    ("checkpoints", "every"),
                    f"{every} must be a multiple of {batch.steps_per_cycle}, the steps for which a generation batch is used: "
                    "a resume in the middle of one would shift the batches.",
                )
            )

    def model(self) -> str:
        key = ("model", "path")
        try:
            model = model_source(self.experiment.model.path, self.composed.folder_of(key))
        except UserError as error:
            self.problems.append(Problem(key, str(error)))
            return ""
        self.paths[key] = model
        return model

    def environments(self, gym: Gym) -> dict[str, Served]:
        served = {}
        for name, environment in self.experiment.environments.items():
            each, problems = serve(name, environment, self.composed, gym)
            self.problems += problems
            if each is not None:
                served[name] = each
                for index, path in enumerate(each.config_paths):
                    self.paths["environments", name, "config_paths", index] = path
        self.problems += clashes(served)
        return served

    def sources(
        self, gym: Gym, kind: str, sources: Sequence[Rows], served: Mapping[str, Served]
    ) -> tuple[frozen.DataSource, ...]:
        found = []
        for index, source in enumerate(sources):
            key: KeyPath = ("data", kind, index, "path")
            try:
                file = data_file(source.path, self.composed.folder_of(key), gym)
                summary = check_rows(file)
            except UserError as error:
                self.problems.append(Problem(key, f"{str(error).rstrip('.')}."))
                continue
            self.paths[key] = str(file)
            self._check_agents(key, file, source.environment, served, summary.first_line)
            weight = source.weight if isinstance(source, WeightedRows) else 1.0
            found.append(frozen.DataSource(source.environment, str(file), weight, summary.rows))
        return tuple(found)

    def _check_agents(
        self, key: KeyPath, file: Path, environment: str, served: Mapping[str, Served], agents: Mapping[str, int]
    ) -> None:
        if environment not in served or not served[environment].agent:
            return
        agent = served[environment].agent
        for name, line in agents.items():
            if name == agent:
                continue
            others = [other for other, each in served.items() if each.agent == name]
            hint = (
                f"that agent serves the environment '{others[0]}'"
                if others
                else "no configured environment has that agent"
            )
            self.problems.append(
                Problem(
                    key,
                    f"{file}:{line}: agent_ref names '{name}', but the environment '{environment}' is served by '{agent}'; {hint}.",
                )
            )


def _runtime_names(experiment: Experiment) -> Names:
    chosen, device = experiment.runtimes, experiment.runtimes.device
    return Names(chosen.inference or f"inference-{device}", chosen.gym, chosen.train or f"train-{device}")


def _nodes(
    experiment: Experiment,
    names: Names,
    model: str,
    ranks: int,
    runtimes: Mapping[str, frozen.Runtime],
    served: Mapping[str, Served],
) -> tuple[frozen.Node, ...]:
    """Rollout nodes first: the coordinator is on a node that no checkpoint is written from."""
    paths = list(dict.fromkeys(path for each in served.values() for path in each.config_paths))
    config = [environment.config for environment in experiment.environments.values()]
    text = node_config(config, f"{runtimes[names.gym].root}/servers", MODEL_NAME)
    rollout = experiment.nodes.rollout
    separate = len(_launch(experiment).components) > 1
    nodes = [
        frozen.Node(
            index,
            "rollout",
            index,
            0,
            rollout_processes(experiment, names, index, model, replicas_of(experiment), text, paths),
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


def _launch(experiment: Experiment) -> frozen.Launch:
    cluster = experiment.cluster
    if cluster.kind == "local":
        return frozen.Launch(
            kind="local",
            setup=tuple(cluster.setup),
            network_interface=cluster.network_interface,
            scratch=cluster.scratch,
        )
    slurm = cluster.slurm
    common = _directives(slurm.options)
    rollout, train = {**common, **_directives(slurm.rollout)}, {**common, **_directives(slurm.train)}
    components: tuple[Mapping[str, Any], ...] = ()
    if rollout != train:
        components = (
            {"nodes": experiment.nodes.rollout, **_directives(slurm.rollout)},
            {"nodes": experiment.nodes.train, **_directives(slurm.train)},
        )
    if experiment.gpus_per_node and not any(_asks_for_gpus(each) for each in (rollout, train)):
        common["gpus_per_node"] = experiment.gpus_per_node
    return frozen.Launch(
        kind="slurm",
        options=common,
        components=components,
        setup=tuple(cluster.setup),
        network_interface=cluster.network_interface,
        scratch=cluster.scratch,
    )


def _directives(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _asks_for_gpus(options: Iterable[str]) -> bool:
    return any(name == "gres" or name.startswith("gpus") or name.startswith("tres_per") for name in options)


def _supervision(experiment: Experiment) -> frozen.Supervision:
    wanted = experiment.supervision
    return frozen.Supervision(
        heartbeat_s=wanted.heartbeat_s,
        node_silent_s=wanted.node_silent_s,
        stop_within_s=wanted.stop_within_s,
        checkpoint_grace_s=wanted.checkpoint_grace_s,
        time_limit_margin_s=wanted.time_limit_margin_s,
    )


def _dump(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")


def default_hub_cache() -> Path:
    """Where Hugging Face keeps models on this machine."""
    home = os.environ.get("HF_HOME")
    return Path(
        os.environ.get("HF_HUB_CACHE") or (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"
    )
