"""`manifest.json`: which code, configuration, versions, locks and command a run was submitted with; each attempt adds
where it ran (`hpc_gym.node.record`). It holds no secret's value.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from hpc_gym.errors import UserError
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.slurm import ask
from hpc_gym.jobs.snapshot import Source
from hpc_gym.plan.plan import Runtime
from hpc_gym.runtimes.spec import names, spec_of
from hpc_gym.shipped import shipped

_PACKAGES = ("hpc-gym", "submitit", "omegaconf", "pydantic", "jinja2", "aiohttp", "starlette", "uvicorn", "numpy")


def manifest(request: Request, source: Source) -> str:
    """The manifest as JSON text."""
    import yaml

    plan = request.plan
    data: dict[str, Any] = {
        "name": plan.name,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": list(request.argv),
        "user": _user(),
        "host": platform.node(),
        "directory": str(Path.cwd()),
        "python": {"version": platform.python_version(), "executable": plan.python},
        "system": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "code": {
            "path": source.path,
            "commit": source.commit,
            "branch": source.branch,
            "dirty": None if source.diff is None else bool(source.diff),
            "diff": source.diff or None,
        },
        "slurm": _slurm() if plan.launch.kind == "slurm" else None,
        "runtimes": {name: _runtime(each) for name, each in plan.runtimes.items()},
        "locks": {file.name: _digest(file) for file in sorted(shipped("locks").iterdir()) if file.is_file()},
        "experiment": {"named": request.experiment, "resolved": yaml.safe_load(request.resolved())},
        "attempts": {},
    }
    return json.dumps(data, indent=1) + "\n"


def _runtime(runtime: Runtime) -> dict[str, Any]:
    """Where it is, and the packages that its lock pins; of a container, those that its image is meant to hold."""
    pins = spec_of(runtime.name).lock.splitlines() if runtime.name in names() else []
    packages = [pin.partition(";")[0].strip().partition("==") for pin in pins]
    return {
        "kind": runtime.kind,
        "root": runtime.root,
        "lock": runtime.lock,
        "packages": {name: version for name, equal, version in packages if equal},
    }


def _slurm() -> str | None:
    """Slurm's version on this machine."""
    try:
        return ask(["sinfo", "--version"]).split()[-1]
    except (UserError, IndexError):
        return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
