"""How large one vLLM is: its GPUs, and the nodes it is spread over by vLLM's own multi-node mode (`--nnodes`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpc_gym.config.problems import Problem
from hpc_gym.config.schema import Experiment

_WITHIN_ONE = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
_FACTORS = (*_WITHIN_ONE, "data_parallel_size")


def gpus_of(options: Mapping[str, Any]) -> int:
    """GPUs that a vLLM with these options takes, on all of its nodes together."""
    product = 1
    for name in _FACTORS:
        product *= int(options.get(name) or 1)
    return product


def nodes_of(options: Mapping[str, Any]) -> int:
    """Nodes that a vLLM with these options is spread over."""
    return max(1, int(options.get("nnodes") or 1))


def gpus_per_replica(experiment: Experiment) -> int:
    """GPUs of one node that one vLLM of the policy takes."""
    return max(1, gpus_of(experiment.vllm) // nodes_of(experiment.vllm))


def spread_problems(experiment: Experiment) -> Iterable[Problem]:
    """What is wrong with a policy's vLLM over several nodes, as vLLM 0.32 demands it (`engine/arg_utils.py`)."""
    options, nnodes = experiment.vllm, experiment.vllm.get("nnodes")
    if isinstance(nnodes, int) and nnodes < 1:
        yield Problem(("vllm", "nnodes"), f"must be a whole number of at least 1, not {nnodes}.")
    nodes, size, rollout = nodes_of(options), gpus_of(options), experiment.nodes.rollout
    if nodes == 1:
        return
    if rollout % nodes:
        nearest = " or ".join(str(each) for each in (rollout // nodes * nodes, (rollout // nodes + 1) * nodes) if each)
        yield Problem(
            ("nodes", "rollout"),
            f"{rollout} must be a multiple of vllm.nnodes = {nodes}, the nodes of one vLLM; nearest: {nearest}.",
            (("vllm", "nnodes"),),
        )
    if int(options.get("data_parallel_size") or 1) > 1:
        yield Problem(
            ("vllm", "data_parallel_size"),
            f"does not go with vllm.nnodes = {nodes}: one vLLM over several nodes is split by tensor_parallel_size and "
            "pipeline_parallel_size; more rollout nodes give more of them.",
        )
    elif size % nodes:
        yield Problem(
            ("vllm", "nnodes"),
            f"{nodes} must divide tensor_parallel_size x pipeline_parallel_size = {size}: each node takes as many of "
            "its workers as the others.",
        )
    if (experiment.rollouts.replicas or 1) > 1:
        yield Problem(
            ("rollouts", "replicas"),
            f"{experiment.rollouts.replicas} vLLM servers per rollout node, but vllm.nnodes = {nodes} makes one of "
            f"{nodes} nodes: leave it out, and raise nodes.rollout for more of them.",
        )
    backend = options.get("distributed_executor_backend")
    if backend not in (None, "mp"):
        yield Problem(
            ("vllm", "distributed_executor_backend"),
            f"'{backend}' does not start the workers of a vLLM over several nodes (vllm.nnodes); allowed: mp.",
        )


def master(group: int) -> str:
    """Name of the endpoint at which the workers of rollout group `group`'s vLLM meet."""
    return f"vllm-master-{group}"


def node_flags(group: int, part: int) -> tuple[str, ...]:
    """`vllm serve` flags of the `part`-th node of a group; only the first, 0, has an API server."""
    place = ("--node-rank", str(part), "--master-addr", f"{{host:{master(group)}}}")
    port = ("--master-port", f"{{portof:{master(group)}}}")
    return (*place, *port, "--headless") if part else (*place, *port)
