"""How the job is launched: the cluster section as directives, in components where roles ask for different nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations, groupby
from typing import Any

from hpc_gym.config.problems import Problem
from hpc_gym.config.schema import Experiment
from hpc_gym.plan.plan import Launch, RoleName

ROLES: tuple[RoleName, ...] = ("rollout", "judge", "environment", "train")
"""In order of the nodes' ranks. Rollout nodes first: the coordinator is on a node that no checkpoint is written from.
"""

_WITHOUT_GPUS: tuple[RoleName, ...] = ("environment",)

_CARRIED_OVER = frozenset(
    {"account", "begin", "comment", "core_spec", "deadline", "dependency", "exclude", "hint", "mem", "nice", "priority"}
    | {"qos", "time", "wckey"}
)
"""What sbatch takes over from a component into later ones that do not say it (22.05; each was submitted)."""


def nodes_per_role(experiment: Experiment) -> dict[RoleName, int]:
    """Nodes of each role that has any, in order of rank."""
    numbers: dict[RoleName, int] = {role: getattr(experiment.nodes, role) for role in ROLES}
    return {role: number for role, number in numbers.items() if number}


def components_of(experiment: Experiment) -> dict[RoleName, int]:
    """The component that each role's nodes are in. Roles that follow one another and ask for the same share one."""
    if experiment.cluster.kind == "local":
        return dict.fromkeys(nodes_per_role(experiment), 0)
    effective = {role: _effective(experiment, role) for role in nodes_per_role(experiment)}
    groups = groupby(effective, key=effective.__getitem__)
    return {role: index for index, (_, roles) in enumerate(groups) for role in roles}


def launch(experiment: Experiment) -> Launch:
    """One plain allocation when all roles ask for the same nodes, else a component per run of roles that do."""
    cluster = experiment.cluster
    if cluster.kind == "local":
        return Launch(
            kind="local",
            setup=tuple(cluster.setup),
            network_interface=cluster.network_interface,
            scratch=cluster.scratch,
        )
    return Launch(
        kind="slurm",
        options=_common(experiment),
        components=_components(experiment),
        srun=_directives(cluster.srun),
        chain=cluster.chain,
        setup=tuple(cluster.setup),
        network_interface=cluster.network_interface,
        scratch=cluster.scratch,
    )


def carried_over(experiment: Experiment) -> Iterable[Problem]:
    """Options of one role that sbatch would give to the nodes of later roles too, which do not ask for them."""
    where = components_of(experiment)
    for role, later in combinations(where, 2):
        if where[role] == where[later]:
            continue
        said = _effective(experiment, later)
        for written in getattr(experiment.cluster.slurm, role):
            name = written.replace("-", "_")
            if name in _CARRIED_OVER and name in _effective(experiment, role) and name not in said:
                yield Problem(
                    ("cluster", "slurm", role, written),
                    f"sbatch takes it over into later components of a heterogeneous job, here that of the role "
                    f"{later}, which does not say it: say it for {later} too, or for all nodes under cluster.slurm.",
                )


def _components(experiment: Experiment) -> tuple[Mapping[str, Any], ...]:
    nodes, where = nodes_per_role(experiment), components_of(experiment)
    if len(set(where.values())) == 1 and not any(_own(experiment, role) for role in nodes):
        return ()
    components: list[dict[str, Any]] = []
    for role, index in where.items():
        if index == len(components):
            components.append({"nodes": 0, **_own(experiment, role)})
        components[index]["nodes"] += nodes[role]
    return tuple(components)


def _effective(experiment: Experiment, role: RoleName) -> dict[str, Any]:
    """The directives that nodes of the role get in the end."""
    all_of_them = {**_common(experiment), **_own(experiment, role)}
    return {name: value for name, value in all_of_them.items() if value is not None and value is not False}


def _common(experiment: Experiment) -> dict[str, Any]:
    """The directives of all nodes, with `gpus_per_node` where the profile does not say how GPUs are counted."""
    slurm = experiment.cluster.slurm
    common = _directives(slurm.options)
    own = [_directives(getattr(slurm, role)) for role in nodes_per_role(experiment) if role not in _WITHOUT_GPUS]
    counted = any(_asks_for_gpus(name) for options in (common, *own) for name in options)
    return common if counted or not experiment.gpus_per_node else {**common, "gpus_per_node": experiment.gpus_per_node}


def _own(experiment: Experiment, role: RoleName) -> dict[str, Any]:
    """What differs from `_common` for nodes of the role."""
    own = _directives(getattr(experiment.cluster.slurm, role))
    if role not in _WITHOUT_GPUS:
        return own
    # What the profile asks for on all nodes it says with the GPU nodes in mind.
    return {**{name: None for name, value in _common(experiment).items() if _means_gpus(name, value)}, **own}


def _directives(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _asks_for_gpus(name: str) -> bool:
    return name == "gres" or name.startswith("gpus") or name.startswith("tres_per")


def _means_gpus(name: str, value: object) -> bool:
    return "gpu" in name or (name.startswith(("gres", "tres")) and "gpu" in str(value))
