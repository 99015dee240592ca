"""Values of single keys that the programs would refuse, or do nonsense with, only once the job runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hpc_gym.config.problems import Problem, value_text
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment

_NOT_NEGATIVE = ("learning_rate", "weight_decay", "beta", "max_grad_norm", "warmup_steps")
"""Of GRPOConfig."""
_AT_LEAST_ONE = (
    "max_model_len",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "nnodes",
    "max_num_seqs",
    "max_num_batched_tokens",
)
"""Of vLLM."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def value_problems(experiment: Experiment) -> Iterable[Problem]:
    """Numbers out of their range, and names that no environment variable can have."""
    for name in _NOT_NEGATIVE:
        value = experiment.grpo.get(name)
        if isinstance(value, int | float) and value < 0:
            yield Problem(("grpo", name), f"must not be negative, and is {value}.")
    yield from _vllm(("vllm",), experiment.vllm)
    if experiment.judge is not None:
        yield from _vllm(("judge", "vllm"), experiment.judge.vllm)
    beat, silent = experiment.supervision.heartbeat_s, experiment.supervision.node_silent_s
    if 2 * beat > silent:
        yield Problem(
            ("supervision", "heartbeat_s"),
            f"a node that is heard of every {beat:g} s would count as lost after {silent:g} s of silence "
            f"(supervision.node_silent_s) when one heartbeat is late: at most {silent / 2:g}.",
            (("supervision", "node_silent_s"),),
        )
    if experiment.cluster.kind == "local" and experiment.cluster.chain:
        yield Problem(
            ("cluster", "chain"), "only Slurm jobs wait for one another, and cluster.kind is local: set it to 0."
        )
    yield from _variables(experiment)


def _vllm(path: KeyPath, options: Mapping[str, object]) -> Iterable[Problem]:
    for name in _AT_LEAST_ONE:
        value = options.get(name)
        if isinstance(value, int | float) and value < 1:
            yield Problem((*path, name), f"must be at least 1, and is {value}.")
    share = options.get("gpu_memory_utilization")
    if isinstance(share, int | float) and not 0 < share <= 1:
        yield Problem((*path, "gpu_memory_utilization"), f"must be a share above 0 and up to 1, and is {share}.")


def _variables(experiment: Experiment) -> Iterable[Problem]:
    cluster = experiment.cluster
    names: list[tuple[KeyPath, str]] = [(("secrets", index), name) for index, name in enumerate(experiment.secrets)]
    names += [(("cluster", "env", name), name) for name in cluster.env]
    names += [(("cluster", "role_env", role, name), name) for role, own in cluster.role_env.items() for name in own]
    for path, name in names:
        if not _VARIABLE.fullmatch(name):
            yield Problem(
                path,
                f"{value_text(name)} is no name of an environment variable: letters, digits and '_', no digit first.",
            )
