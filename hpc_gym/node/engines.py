"""How a program is entered into its runtime: the command and environment for each kind.

Nothing secret stands in a command: the environment carries it through, which all kinds inherit.

* venv: the folder's `bin` first on PATH.
* modules: a login shell loads environment modules, then as venv.
* apptainer: `apptainer exec` (Apptainer user guide, "apptainer exec"); it inherits the environment but PATH.
* pyxis: no prefix but a step of its own, `srun --overlap --container-image` (NVIDIA pyxis, README "Usage"); variables
  that an image defines too keep our values only where `--container-env` names them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gym.plan.plan import Runtime

Environment = dict[str, str]

_OF_THE_IMAGE = ("PATH", "HOME", "LD_LIBRARY_PATH", "PWD", "HOSTNAME")
"""Variables that a container has its own of."""
_NVIDIA = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Place:
    """Where a runtime is entered: on which host, in which component, and what a container must see of it."""

    host: str
    component: int
    """Of a heterogeneous job."""
    heterogeneous: bool
    run_dir: str
    visible: Sequence[str]
    """Files and folders that the program reads or writes, besides the run directory."""


def entered(
    runtime: Runtime, argv: Sequence[str], environment: Mapping[str, str], place: Place
) -> tuple[tuple[str, ...], Environment]:
    """(argv, environment) that run `argv` in `runtime`."""
    if runtime.kind == "venv":
        return _in_venv(runtime, argv, environment)
    if runtime.kind == "modules":
        return _with_modules(runtime, argv, environment)
    if runtime.kind == "apptainer":
        return _in_apptainer(runtime, argv, environment, place)
    return _in_pyxis(runtime, argv, environment, place)


def _in_venv(
    runtime: Runtime, argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[tuple[str, ...], Environment]:
    folder = Path(runtime.root) / "bin"
    program = argv[0] if "/" in argv[0] or not (folder / argv[0]).exists() else str(folder / argv[0])
    path = f"{folder}{os.pathsep}{environment['PATH']}"
    return (program, *argv[1:]), {**environment, "VIRTUAL_ENV": runtime.root, "PATH": path}


def _with_modules(
    runtime: Runtime, argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[tuple[str, ...], Environment]:
    inside, environment = _in_venv(runtime, argv, environment)
    loaded = " ".join(shlex.quote(module) for module in runtime.modules)
    # Modules set PATH anew; exec, for the process id must be the program's own.
    script = f'module load {loaded} && export PATH={shlex.quote(runtime.root)}/bin:"$PATH" && exec "$@"'
    return ("bash", "--login", "-c", script, "bash", *inside), environment


def _in_apptainer(
    runtime: Runtime, argv: Sequence[str], environment: Mapping[str, str], place: Place
) -> tuple[tuple[str, ...], Environment]:
    binds = [part for path in (place.run_dir, *place.visible) for part in ("--bind", path)]
    nvidia = ("--nv",) if _NVIDIA.exists() else ()
    options = (*nvidia, *binds, "--pwd", place.run_dir, *runtime.options)
    return ("apptainer", "exec", *options, runtime.root, *argv), dict(environment)


def _in_pyxis(
    runtime: Runtime, argv: Sequence[str], environment: Mapping[str, str], place: Place
) -> tuple[tuple[str, ...], Environment]:
    mounts = ",".join(f"{path}:{path}" for path in (place.run_dir, *place.visible))
    kept = ",".join(sorted(name for name in environment if name not in _OF_THE_IMAGE and not name.startswith("SLURM_")))
    options = [
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={place.host}",
        *([f"--het-group={place.component}"] if place.heterogeneous else []),
        "--export=ALL",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=0",
        "--unbuffered",
        f"--container-image={runtime.root}",
        f"--container-mounts={mounts}",
        f"--container-workdir={place.run_dir}",
        f"--container-env={kept}",
        "--no-container-mount-home",
        *runtime.options,
    ]
    return ("srun", *options, *argv), dict(environment)
