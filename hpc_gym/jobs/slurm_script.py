"""The options of sbatch and srun that a Plan leads to. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Launch, Plan

_OPTION = re.compile(r"[a-z][a-z0-9-]*")

Directives = dict[str, str | None]
"""Options of sbatch or srun without the dashes; None marks a flag that takes no value."""


def sbatch_options(plan: Plan) -> list[Directives]:
    """The `#SBATCH` options per component; more than one component makes a heterogeneous job.

    `--nodes` and `--ntasks` stand on every component: Slurm 24.11 starts too few tasks in the second one without.
    """
    components = []
    for index, (component, nodes) in enumerate(
        zip(plan.launch.components or ({},), component_nodes(plan.launch, len(plan.nodes)), strict=True)
    ):
        own = _spelt({**plan.launch.options, **component})
        own |= {"nodes": nodes, "ntasks": nodes, "ntasks-per-node": 1}
        if index == 0:
            own |= {
                "job-name": plan.name,
                "output": f"{_pattern(plan.run_dir)}/submitit/%j_batch.out",
                "open-mode": "append",
                # Nothing of the login shell: sites may keep a job's environment, and secrets in it, in the accounting.
                "export": "NONE",
                # B: to the batch script alone. A step's signals may reach every process, and SIGUSR2 kills most.
                "signal": f"B:USR2@{max(1, round(plan.supervision.time_limit_margin_s))}",
            }
        # In a chain the next job goes on; one that were requeued too would meet it in the same directory.
        components.append(_directives({**own, "no-requeue" if plan.launch.chain else "requeue": True}))
    return components


def component_nodes(launch: Launch, nodes: int) -> list[int]:
    """Nodes of each component; a plain allocation has all of them."""
    return [int(component["nodes"]) for component in launch.components] or [nodes]


def srun_options(launch: Launch, nodes: int) -> Directives:
    """Options of the one srun over all components: a task per node, in rank order.

    `kill-on-bad-exit`, `wait`: how the job ends is decided by the coordinator, not by the first task that ends.
    `cpu-bind`: a task may use all CPUs of its node's allocation, for it starts everything there.
    """
    options: dict[str, Any] = {"cpu-bind": "none", "mpi": "none", **_spelt(launch.srun)}
    if len(launch.components) > 1:
        options["het-group"] = ",".join(str(index) for index in range(len(launch.components)))
    else:
        options |= {"nodes": nodes, "ntasks": nodes}
    options |= {"export": "ALL", "overlap": True}
    return _directives({**options, "kill-on-bad-exit": 0, "wait": 0, "unbuffered": True, "label": True})


def _directives(options: Mapping[str, Any]) -> Directives:
    """Options in Slurm's spelling: `_` becomes `-`, true a flag, false and null leave the option out."""
    directives: Directives = {}
    # In order of name: that of a mapping is not the same once it has been through JSON.
    for name, value in sorted(options.items()):
        option = name.replace("_", "-")
        if not _OPTION.fullmatch(option):
            raise UserError(f"'{option}' is no option of sbatch or srun: their names are letters, digits and dashes")
        if value is None or value is False:
            continue
        directives[option] = None if value is True else str(value)
    return directives


def _spelt(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in options.items()}


def _pattern(path: str) -> str:
    """A path inside a file name pattern of Slurm, where a lone % would start a replacement symbol."""
    return path.replace("%", "%%")
