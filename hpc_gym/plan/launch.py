"""How the job is launched: the cluster section as directives, in components where roles ask for different nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpc_gym.config.schema import Experiment
from hpc_gym.plan.plan import Launch


def launch(experiment: Experiment) -> Launch:
    """One plain allocation when all roles ask for the same nodes, else one component per role."""
    cluster = experiment.cluster
    if cluster.kind == "local":
        return Launch(
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
    return Launch(
        kind="slurm",
        options=common,
        components=components,
        srun=_directives(cluster.srun),
        chain=cluster.chain,
        setup=tuple(cluster.setup),
        network_interface=cluster.network_interface,
        scratch=cluster.scratch,
    )


def _directives(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _asks_for_gpus(options: Iterable[str]) -> bool:
    return any(name == "gres" or name.startswith("gpus") or name.startswith("tres_per") for name in options)
