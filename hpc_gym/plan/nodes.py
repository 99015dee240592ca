"""The nodes of a job in order of rank, and what runs on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hpc_gym.config.schema import Experiment
from hpc_gym.plan.checks import ranks_per_node, replicas_of
from hpc_gym.plan.gym_code import links, venvs
from hpc_gym.plan.gym_processes import GymSetup, environment_processes, gym_process
from hpc_gym.plan.judge import judge_endpoints, judge_node_processes, judge_processes, judge_servers
from hpc_gym.plan.launch import components_of, nodes_per_role
from hpc_gym.plan.nemo_gym import API_KEY, Served, node_config
from hpc_gym.plan.plan import Node, Process, Runtime
from hpc_gym.plan.processes import MODEL_NAME, Names, rollout_processes, train_processes
from hpc_gym.plan.spread import nodes_of


def places(experiment: Experiment) -> tuple[Node, ...]:
    """The nodes without their processes."""
    components = components_of(experiment)
    found = [(role, index) for role, number in nodes_per_role(experiment).items() for index in range(number)]
    return tuple(Node(rank, role, index, components[role], ()) for rank, (role, index) in enumerate(found))


def nodes(
    experiment: Experiment,
    names: Names,
    model: str,
    judge: str | None,
    runtimes: Mapping[str, Runtime],
    served: Mapping[str, Served],
) -> tuple[Node, ...]:
    """The nodes with their processes. `model`, `judge`: what vLLM serves as the policy and as the judge."""
    setup = _gym_setup(experiment, runtimes[names.gym], served)

    def processes(node: Node) -> tuple[Process, ...]:
        if node.role == "rollout":
            return _rollout_node(experiment, names, node.index, model, judge, setup)
        if node.role == "judge":
            return judge_node_processes(experiment, names, node.index, judge)
        if node.role == "environment":
            judges = judge_endpoints(experiment, node.role)
            return environment_processes(experiment, names, setup, node.index, judges)
        return train_processes(experiment, names, node.index, ranks_per_node(experiment))

    return tuple(replace(node, processes=processes(node)) for node in places(experiment))


def _rollout_node(
    experiment: Experiment, names: Names, index: int, model: str, judge: str | None, setup: GymSetup
) -> tuple[Process, ...]:
    apart = experiment.nodes.environment > 0
    gym = () if apart else (gym_process(experiment, names, setup, "rollout"),)
    flags: tuple[str, ...] = ("--policy-port", "{port:policy}", "--gym-port", "{port:gym-head}")
    if apart:
        flags = ("--environments", "{endpoints:environment}")
    if judges := judge_endpoints(experiment, "rollout"):
        flags += ("--judges", judges)
    # Of a vLLM over several nodes only the first has a rollout server, which is who asks the judge.
    judged = () if index % nodes_of(experiment.vllm) else judge_processes(experiment, names, judge)
    return (
        *judged,
        *rollout_processes(experiment, names, index, model, replicas_of(experiment), gym, flags),
    )


def _gym_setup(experiment: Experiment, runtime: Runtime, served: Mapping[str, Served]) -> GymSetup:
    paths = list(dict.fromkeys(path for each in served.values() for path in each.config_paths))
    config = [environment.config for environment in experiment.environments.values()]
    asked = {name for each in served.values() for name in each.asks}
    defined = {name for each in served.values() for name in each.instances}
    judged = judge_servers(experiment.judge, asked - defined, API_KEY)
    own = {server: folder for each in served.values() for server, folder in each.code.own.items()}
    servers = {server for each in served.values() for server in each.code.servers}
    text = node_config(config, venvs(own, runtime), MODEL_NAME, judged)
    return GymSetup(text, paths, links(servers, own, runtime) if own else ())
