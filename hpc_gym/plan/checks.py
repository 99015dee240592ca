"""Checks across the sections and roles of an experiment: each finding is a sentence at the key that should change."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hpc_gym.config.problems import Problem, nearest, value_text
from hpc_gym.config.schema import Experiment
from hpc_gym.config.slurm_gpus import gpu_option, gpus_per_node
from hpc_gym.errors import UserError
from hpc_gym.plan.judge import judge_problems
from hpc_gym.plan.launch import carried_over, effective, key_of, nodes_per_role
from hpc_gym.plan.plan import RoleName
from hpc_gym.plan.processes import gpus_of_judge
from hpc_gym.plan.spread import gpus_of, gpus_per_replica, nodes_of, spread_problems
from hpc_gym.plan.values import value_problems
from hpc_gym.plan.written_secrets import secret_problems
from hpc_gym.runtimes.spec import cache_folder

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def role_problems(experiment: Experiment) -> list[Problem]:
    """What the numbers of nodes, GPUs, replicas and ranks, and the settings that depend on them, say against each
    other.
    """
    return [
        *_reserved(experiment),
        *judge_problems(experiment),
        *spread_problems(experiment),
        *(carried_over(experiment) if experiment.cluster.kind == "slurm" else ()),
        *_gpus(experiment),
        *_gpus_of_slurm(experiment),
        *_lengths(experiment),
        *_sampling(experiment),
        *value_problems(experiment),
        *_evaluation(experiment),
        *_weights(experiment),
        *_containers(experiment),
        *secret_problems(experiment),
    ]


def replicas_of(experiment: Experiment) -> int:
    """vLLM servers per rollout node."""
    if nodes_of(experiment.vllm) > 1:
        return 1
    if experiment.rollouts.replicas is not None:
        return experiment.rollouts.replicas
    return max(1, (experiment.gpus_per_node - gpus_of_judge(experiment)) // gpus_per_replica(experiment))


def ranks_per_node(experiment: Experiment) -> int:
    """Training ranks per training node."""
    return experiment.ranks_per_node or max(1, experiment.gpus_per_node)


def model_source(written: str, folder: Path) -> str:
    """The model as vLLM and transformers are told it: the absolute folder, or the name on the hub.

    Raises UserError when it is neither.
    """
    path = (folder / Path(written).expanduser()).resolve()
    if path.is_dir():
        missing = [what for what, found in _parts_of_model(path).items() if not found]
        if missing:
            raise UserError(f"the folder {path} is no model: it has no {' and no '.join(missing)}.")
        _refuse_config(path / "config.json")
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file; a model is a folder with config.json, weights and a tokenizer.")
    if path.is_relative_to(cache_folder() / "demo"):
        raise UserError(f"there is no folder {path}: `hpc-gym demo` makes the demo's model there.")
    local = written.startswith((".", "/", "~"))
    if not local and _HUB_NAME.fullmatch(written):
        return written
    raise UserError(
        f"there is no folder {path}" + ("." if local else ", and it is no name on the hub either (ORGANIZATION/NAME).")
    )


def refuse_absent_hub_model(model: str, cache: Path, key: str = "model.path") -> None:
    """Raises UserError when `model` is a hub name that the cache (`HF_HOME/hub`) of this machine does not hold.

    `key`: where the experiment names it.
    """
    if Path(model).is_absolute():
        return
    folder = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    if not any(folder.glob("*/config.json")):
        raise UserError(
            f"the model {model} is not in the cache {cache}, and a job never downloads: fetch it first "
            f"(`hf download {model}`), or set {key} to a folder."
        )


def default_hub_cache() -> Path:
    """Where Hugging Face keeps models on this machine."""
    home = os.environ.get("HF_HOME")
    return Path(
        os.environ.get("HF_HUB_CACHE") or (Path(home) if home else Path.home() / ".cache" / "huggingface") / "hub"
    )


def refuse_without_chat_template(model: str, vllm: Mapping[str, object], section: str) -> None:
    """Raises UserError when a model's folder has no chat template (as many base models have none) and the options of
    its vLLM, in `section` of the experiment, name none: every chat would be refused once the job runs.
    """
    folder = Path(model)
    # Mistral's own tokenizers (tekken.json, tokenizer.model.v3) render chats without one.
    own_way = [*folder.glob("chat_template*"), *folder.glob("tekken.json"), *folder.glob("tokenizer.model.v*")]
    if not folder.is_absolute() or own_way or vllm.get("chat_template") or vllm.get("tokenizer_mode"):
        return
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        if isinstance(config, dict) and config.get("chat_template"):
            return
    raise UserError(
        f"the model {folder} has no chat template (chat_template.jinja, or 'chat_template' in tokenizer_config.json), "
        f"and rollouts are chats: take an instruct model, add the file, or name one in {section}.chat_template."
    )


def _refuse_config(file: Path) -> None:
    """Raises UserError when a model's `config.json` does not say what the model is."""
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no model's configuration: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{file} is no model's configuration: it has no 'model_type', from which transformers and vLLM know it."
        )


def _parts_of_model(folder: Path) -> Mapping[str, bool]:
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    tokenizer = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")]
    return {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors)": bool(weights),
        "tokenizer (tokenizer.json)": any(file.is_file() for file in tokenizer),
    }


def _reserved(experiment: Experiment) -> Iterable[Problem]:
    if experiment.max_staleness:
        yield Problem(
            ("max_staleness",),
            f"{experiment.max_staleness} is reserved: training is strictly on-policy so far; allowed: 0.",
        )
    if experiment.weights.transfer == "adapter":
        yield Problem(
            ("weights", "transfer"), "'adapter' is reserved and not there yet; allowed: gloo, nccl, filesystem."
        )


def _gpus(experiment: Experiment) -> Iterable[Problem]:
    gpus, device = experiment.gpus_per_node, experiment.runtimes.device
    if device == "cpu" and gpus:
        yield Problem(
            ("gpus_per_node",), f"{gpus} GPUs, but runtimes.device is cpu: set it to 0, or the device to cuda."
        )
        return
    if device == "cuda" and not gpus:
        yield Problem(
            ("gpus_per_node",),
            "0 GPUs, but runtimes.device is cuda: say how many GPUs a node has, or set the device to cpu.",
        )
        return
    if device == "cuda" and ranks_per_node(experiment) > gpus:
        yield Problem(
            ("ranks_per_node",),
            f"{experiment.ranks_per_node} training ranks, but a node has {gpus} GPUs: one GPU per rank.",
        )
    size, replicas, judge = gpus_per_replica(experiment), replicas_of(experiment), gpus_of_judge(experiment)
    if device == "cuda" and judge and judge + size * replicas > gpus:
        yield Problem(
            ("judge", "vllm"),
            f"the judge takes {judge} of the {gpus} GPUs of a rollout node (gpus_per_node), and vLLM for the policy "
            f"{replicas} x {size}: that is {judge + size * replicas}. Take less in judge.vllm, vllm or "
            "rollouts.replicas, or set judge.url.",
        )
    elif device == "cuda" and size * replicas > gpus:
        over = f" / nnodes {nodes}" if (nodes := nodes_of(experiment.vllm)) > 1 else ""
        parts = f"tensor_parallel_size x pipeline_parallel_size x data_parallel_size{over} = {size} GPUs per vLLM"
        key = ("vllm", "tensor_parallel_size") if size > gpus else ("rollouts", "replicas")
        hint = " vllm.nnodes spreads one vLLM over several nodes." if size > gpus else ""
        yield Problem(
            key,
            f"{parts}, times {replicas} on a rollout node, is {size * replicas}; a node has {gpus} (gpus_per_node)."
            f"{hint}",
        )


def _gpus_of_slurm(experiment: Experiment) -> Iterable[Problem]:
    """Nodes that get fewer GPUs from Slurm, by options of the profile, than the programs on them take."""
    gpus = experiment.gpus_per_node
    if experiment.cluster.kind != "slurm" or experiment.runtimes.device != "cuda" or not gpus:
        return
    for role in nodes_per_role(experiment):
        options = effective(experiment, role)
        option, given = gpu_option(options), gpus_per_node(options)
        key = key_of(experiment, role, option) if option else None
        taken, by = _gpus_taken(experiment, role)
        if option and key and given is not None and given < taken:
            yield Problem(
                key,
                f"{value_text(options[option])} gives a {role} node {given} GPUs, and its programs take {taken} "
                f"({by}; gpus_per_node = {gpus}): ask for {taken} here, or set gpus_per_node, and what follows from "
                f"it, to what {role} nodes get.",
                (("gpus_per_node",),),
            )


def _gpus_taken(experiment: Experiment, role: RoleName) -> tuple[int, str]:
    """GPUs of a node that the role's programs take, counted from the first, and the keys that say so."""
    if role == "train":
        return ranks_per_node(experiment), "ranks_per_node"
    if role == "judge" and experiment.judge is not None:
        return gpus_of(experiment.judge.vllm), "judge.vllm"
    if role == "rollout" and gpus_of_judge(experiment):
        return experiment.gpus_per_node, "judge.vllm has the last of them"
    if role == "rollout":
        return gpus_per_replica(experiment) * replicas_of(experiment), "rollouts.replicas, vllm"
    return 0, ""


def _lengths(experiment: Experiment) -> Iterable[Problem]:
    length = experiment.vllm.get("max_model_len")
    if not isinstance(length, int):
        yield Problem(
            ("vllm",), "max_model_len is missing: say how many tokens a whole rollout may have, prompt included."
        )
        return
    if length < 1:
        return
    for name, value in (
        ("rollouts", experiment.rollouts.max_output_tokens),
        ("evaluation", experiment.evaluation.max_output_tokens or 0),
    ):
        if value > length:
            yield Problem(
                (name, "max_output_tokens"), f"{value} tokens a turn do not fit into vllm.max_model_len = {length}."
            )


def _sampling(experiment: Experiment) -> Iterable[Problem]:
    if experiment.rollouts.temperature == 0:
        yield Problem(
            ("rollouts", "temperature"),
            "0 makes all rollouts of a group equal, and GRPO learns from their differences.",
        )
    if experiment.rollouts.top_p < 1 and experiment.on_policy_tolerance:
        yield Problem(
            ("rollouts", "top_p"),
            f"{experiment.rollouts.top_p} cuts the distribution that vLLM samples, but not the trainer's, so "
            "log-probabilities differ by more than on_policy_tolerance: set it to 1, or the tolerance to 0.",
        )
    if experiment.grpo.get("multi_objective_aggregation") == "normalize_then_sum":
        yield Problem(
            ("grpo", "multi_objective_aggregation"),
            "'normalize_then_sum' would normalize each environment's reward by itself and count a failed rollout in; "
            "allowed: 'sum_then_normalize'.",
        )


def _evaluation(experiment: Experiment) -> Iterable[Problem]:
    wanted = experiment.evaluation.at_start or experiment.evaluation.at_end or experiment.evaluation.every
    if wanted and not experiment.data.eval:
        yield Problem(("evaluation",), "asks for an evaluation, but data.eval names no rows: list held-out rows there.")
    for kind, sources in (("train", experiment.data.train), ("eval", experiment.data.eval)):
        for index, source in enumerate(sources):
            if source.environment not in experiment.environments:
                yield Problem(
                    ("data", kind, index, "environment"),
                    f"'{source.environment}' is not configured; {nearest(source.environment, experiment.environments)} "
                    "Add it under environments, or extend environments/NAME.",
                )


def _weights(experiment: Experiment) -> Iterable[Problem]:
    if experiment.weights.transfer == "nccl" and experiment.runtimes.device == "cpu":
        yield Problem(("weights", "transfer"), "'nccl' needs GPUs; allowed on CPUs: gloo, filesystem.")


def _containers(experiment: Experiment) -> Iterable[Problem]:
    container = experiment.cluster.runtime
    if container.kind in ("apptainer", "pyxis"):
        for role in ("inference", "gym", "train"):
            if role not in container.images:
                yield Problem(
                    ("cluster", "runtime", "images"), f"names no image for '{role}', which kind {container.kind} needs."
                )
    if container.kind == "modules" and not container.modules:
        yield Problem(
            ("cluster", "runtime", "modules"), "is empty, but kind modules loads environment modules: list them."
        )
