"""Plan to job script: a pure function. The same Plan gives the same bytes, which `--dry-run` prints and `submit` sends.

The templates hold no logic worth testing on its own; every value they print is quoted for the shell, by Jinja's
`finalize`, so that none can be forgotten. Only `| shell` lets text through as it is: option names, checked here, and
the cluster profile's own shell lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import jinja2

from hpc_gym.errors import UserError
from hpc_gym.plan.plan import Launch, Plan
from hpc_gym.shipped import shipped

_OPTION = re.compile(r"[a-z][a-z0-9-]*")

Directives = dict[str, str | None]
"""Options of sbatch or srun without the dashes; None marks a flag that takes no value."""


class _Shell(str):
    """Text that is shell by intention and is printed unquoted."""

    __slots__ = ()


def render(plan: Plan) -> str:
    """The job script of `plan`. Raises UserError for a value that no shell line can carry."""
    values: dict[str, Any] = {
        "name": plan.name,
        "run_dir": plan.run_dir,
        "code": f"{plan.run_dir}/code",
        "submitit": f"{plan.run_dir}/submitit",
        "python": plan.python,
        "setup": plan.launch.setup,
    }
    if plan.launch.kind == "slurm":
        values["components"] = slurm_directives(plan)
        values["srun"] = srun_options(plan.launch, sum(component_nodes(plan.launch, len(plan.nodes))))
    template = _templates().get_template(f"{plan.launch.kind}.sh.j2")
    return template.render(values)


def slurm_directives(plan: Plan) -> list[Directives]:
    """The `#SBATCH` options per component; more than one component makes a heterogeneous job.

    `--nodes` and `--ntasks` stand on every component: Slurm 24.11 starts too few tasks in the second one without.
    """
    components = []
    sizes = component_nodes(plan.launch, len(plan.nodes))
    for index, component in enumerate(plan.launch.components or ({},)):
        own: dict[str, Any] = {**plan.launch.options, **component, "nodes": sizes[index], "ntasks": sizes[index]}
        own["ntasks-per-node"] = 1
        if index == 0:
            own |= {"job-name": plan.name, "output": f"{_pattern(plan.run_dir)}/submitit/%j_batch.out"}
            own |= {"open-mode": "append"}
        components.append(_directives(own))
    return components


def component_nodes(launch: Launch, nodes: int) -> list[int]:
    """Nodes of each component; a plain allocation has all of them."""
    return [int(component["nodes"]) for component in launch.components] or [nodes]


def srun_options(launch: Launch, tasks: int) -> Directives:
    """One srun over all components, one supervisor per node, in rank order.

    `--kill-on-bad-exit=0`: one supervisor's exit leaves the ending of the others to the coordinator.
    """
    options: dict[str, Any] = {}
    if len(launch.components) > 1:
        options["het-group"] = ",".join(str(index) for index in range(len(launch.components)))
    options |= {"nodes": tasks, "ntasks": tasks} if len(launch.components) <= 1 else {}
    options |= {"kill-on-bad-exit": 0, "wait": 0, "unbuffered": True, "label": True}
    return _directives(options)


def _directives(options: Mapping[str, Any]) -> Directives:
    """Options in Slurm's spelling: `_` becomes `-`, true a flag, false and null leave the option out."""
    directives: Directives = {}
    for name, value in options.items():
        option = name.replace("_", "-")
        if not _OPTION.fullmatch(option):
            raise UserError(f"'{name}' is no option of sbatch: option names are lower-case letters, digits and dashes")
        if value is None or value is False:
            continue
        directives[option] = None if value is True else str(value)
    return directives


def _pattern(path: str) -> str:
    """A path inside a file name pattern of Slurm, where a lone % would start a replacement symbol."""
    return path.replace("%", "%%")


def _quoted(value: object) -> str:
    if isinstance(value, _Shell):
        return value
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UserError(f"a value of the job script holds a control character, which no script line carries: {text!r}")
    return shlex.quote(text)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped("templates")),
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["shell"] = _Shell
    return environment
