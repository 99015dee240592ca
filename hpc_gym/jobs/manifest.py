"""`manifest.json`: which code, versions, locks and command a run was submitted with. It holds no secret's value."""

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

from hpc_gym.jobs.snapshot import Source
from hpc_gym.plan.plan import Plan
from hpc_gym.shipped import shipped

_PACKAGES = ("hpc-gym", "submitit", "omegaconf", "pydantic", "jinja2", "aiohttp", "starlette", "uvicorn", "numpy")


def manifest(plan: Plan, argv: tuple[str, ...], source: Source) -> str:
    """The manifest as JSON text."""
    data: dict[str, Any] = {
        "name": plan.name,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": list(argv),
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
        "runtimes": {name: {"root": each.root, "lock": each.lock} for name, each in plan.runtimes.items()},
        "locks": {file.name: _digest(file) for file in sorted(shipped("locks").iterdir()) if file.is_file()},
    }
    return json.dumps(data, indent=1) + "\n"


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
