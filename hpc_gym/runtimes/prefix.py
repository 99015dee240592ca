"""The command that runs a program in its runtime, for each kind of runtime.

Values never travel as arguments: every user of a node can read those, and some are secrets.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from hpc_gym.plan.plan import Runtime


def command(
    runtime: Runtime, argv: Sequence[str], env: Mapping[str, str], mounts: Sequence[str] = (), node: str = ""
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is executed for `argv` with the environment `env`, and in which environment.

    `mounts` are folders of the host that a container must see at the same place: the run directory, private files, the
    model. `node` is the name Slurm has for this node, which a nested `srun` (pyxis) must be bound to.
    """
    if runtime.kind == "venv":
        return tuple(argv), _with_venv(runtime.root, env)
    if runtime.kind == "modules":
        return _modules(runtime, argv), dict(env)
    if runtime.kind == "apptainer":
        binds = [argument for mount in mounts for argument in ("--bind", mount)]
        return ("apptainer", "exec", *runtime.options, *binds, runtime.root, *argv), dict(env)
    return _pyxis(runtime, argv, mounts, node), dict(env)


def _with_venv(root: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment that `activate` gives: a bare program name is looked up in the venv first."""
    path = f"{root}/bin{os.pathsep}{env['PATH']}" if env.get("PATH") else f"{root}/bin"
    return {**env, "VIRTUAL_ENV": root, "PATH": path}


def _modules(runtime: Runtime, argv: Sequence[str]) -> tuple[str, ...]:
    """Loads environment modules, and enters the venv after them: modules put themselves first on PATH."""
    lines = [
        "set -e",
        # A shell that is no login shell knows `module` only where the site exports the function.
        'type module >/dev/null 2>&1 || . "${MODULESHOME:-/usr/share/modules}/init/bash"',
    ]
    if runtime.modules:
        lines.append(f"module load {shlex.join(runtime.modules)}")
    if runtime.root:
        lines.append(f"export VIRTUAL_ENV={shlex.quote(runtime.root)}")
        lines.append('export PATH="$VIRTUAL_ENV/bin:$PATH"')
    lines.append('exec "$@"')
    return ("bash", "-c", "\n".join(lines), "hpc-gym", *argv)


def _pyxis(runtime: Runtime, argv: Sequence[str], mounts: Sequence[str], node: str) -> tuple[str, ...]:
    """A step of its own inside the job: pyxis is no program to put in front, but an option of srun.

    `--overlap` shares the node with the supervisor's own step.
    """
    placed = (f"--nodelist={node}",) if node else ()
    mounted = (f"--container-mounts={','.join(f'{mount}:{mount}' for mount in mounts)}",) if mounts else ()
    return (
        *("srun", "--overlap", "--nodes=1", "--ntasks=1", "--export=ALL"),
        *placed,
        f"--container-image={runtime.root}",
        *mounted,
        *runtime.options,
        *argv,
    )
