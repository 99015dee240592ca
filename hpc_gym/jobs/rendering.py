"""Plan to job script: a pure function. The same Plan gives the same bytes, which `--dry-run` prints and `submit` sends.

The templates hold no logic worth testing on its own; every value they print is quoted for the shell, by Jinja's
`finalize`, so that none can be forgotten. Only `| shell` lets text through as it is: option names, checked here, and
the cluster profile's own shell lines.
"""

from __future__ import annotations

import shlex
from typing import Any

import jinja2

from hpc_gym.errors import UserError
from hpc_gym.jobs.slurm_script import sbatch_options, srun_options
from hpc_gym.plan.plan import Plan
from hpc_gym.shipped import shipped


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
        values["components"] = sbatch_options(plan)
        values["srun"] = srun_options(plan.launch, len(plan.nodes))
    template = _templates().get_template(f"{plan.launch.kind}.sh.j2")
    return template.render(values)


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
