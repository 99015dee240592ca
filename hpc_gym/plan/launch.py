"""How the job is launched: the cluster section as directives, in components where roles ask for different nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations, groupby
from typing import Any

from hpc_gym.config.problems import Problem
from hpc_gym.config.provenance import KeyPath
from hpc_gym.config.schema import Experiment
from hpc_gym.config.slurm_gpus import gpu_option
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
    asked = {role: effective(experiment, role) for role in nodes_per_role(experiment)}
    groups = groupby(asked, key=asked.__getitem__)
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


def effective(experiment: Experiment, role: RoleName) -> dict[str, Any]:
    """The directives that nodes of the role get in the end."""
    all_of_them = {**_common(experiment), **_own(experiment, role)}
    return {name: value for name, value in all_of_them.items() if value is not None and value is not False}


def key_of(experiment: Experiment, role: RoleName, option: str) -> KeyPath | None:
    """Where the experiment says the option for nodes of the role; None where hpc-gym does."""
    slurm = experiment.cluster.slurm
    own = [("cluster", "slurm", role, written) for written in getattr(slurm, role)]
    keys: list[KeyPath] = [*own, *(("cluster", "slurm", written) for written in slurm.options)]
    return next((key for key in keys if str(key[-1]).replace("-", "_") == option), None)


def carried_over(experiment: Experiment) -> Iterable[Problem]:
    """Options of a component that sbatch would give to the nodes of later ones too, which do not ask for them."""
    where = components_of(experiment)
    for role, later in combinations(where, 2):
        if where[role] == where[later]:
            continue
        said, asked = effective(experiment, role), effective(experiment, later)
        for name in sorted(_CARRIED_OVER & said.keys() - asked.keys()):
            yield _carried_over(experiment, name, role, later)


def _carried_over(experiment: Experiment, name: str, role: RoleName, later: RoleName) -> Problem:
    written = key_of(experiment, role, name)
    if written is not None and role in written:
        return Problem(
            written,
            f"sbatch takes it over into later components of a heterogeneous job, here that of the role {later}, which "
            f"does not say it: say it for {later} too, or for all nodes under cluster.slurm.",
        )
    return Problem(
        key_of(experiment, later, name) or ("cluster", "slurm", later),
        "does not take it away: sbatch gives what earlier components of a heterogeneous job say, here "
        f"cluster.slurm.{name}, to later ones that say nothing: give {later} a value of its own.",
        tuple(filter(None, [written])),
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


def _common(experiment: Experiment) -> dict[str, Any]:
    """The directives of all nodes, with `gpus_per_node` where they do not say how GPUs are counted."""
    options = _directives(experiment.cluster.slurm.options)
    return {**options, **_default_gpus(experiment, options)}


def _own(experiment: Experiment, role: RoleName) -> dict[str, Any]:
    """What differs from `_common` for nodes of the role."""
    own, common = _directives(getattr(experiment.cluster.slurm, role)), _common(experiment)
    if role in _WITHOUT_GPUS:
        # What the profile asks for on all nodes it says with the GPU nodes in mind.
        return {**{name: None for name, value in common.items() if _means_gpus(name, value)}, **own}
    said = {**_directives(experiment.cluster.slurm.options), **own}
    default = _default_gpus(experiment, said)
    if "gpus_per_node" not in said and "gpus_per_node" in common and not default:
        # It counts its GPUs in a way of its own.
        return {**own, "gpus_per_node": None}
    return {**own, **{name: value for name, value in default.items() if name not in common}}


def _default_gpus(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """`gpus_per_node` for nodes whose options name no GPUs: asked for none, Slurm gives none. A null of the profile
    takes it away, as any option: for sites whose nodes bring their GPUs along.
    """
    if not experiment.gpus_per_node or "gpus_per_node" in options or gpu_option(options):
        return {}
    return {"gpus_per_node": experiment.gpus_per_node}


def _directives(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _means_gpus(name: str, value: object) -> bool:
    return "gpu" in name or (name.startswith(("gres", "tres")) and "gpu" in str(value))
