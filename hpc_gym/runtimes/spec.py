"""What each runtime is, and the folder it lives in: known from the locks alone, whether it is built or not.

A runtime is a venv that the programs of a role run in. `locks/runtimes.toml` says what each needs, `locks/NAME.txt`
pins its packages. Its folder is `CACHE/runtimes/NAME-DIGEST`, where the digest covers everything the build depends on:
so a changed lock never touches a runtime that a running job uses, and two checkouts of one version share theirs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_gym.errors import UserError
from hpc_gym.shipped import shipped

Device = Literal["cpu", "cuda"]

RECIPE = 1
"""Version of what `build` does beside installing the lock; a new number gives new folders."""

MARKER = "runtime.json"
"""Written last into a runtime's folder: a folder without it is no runtime."""


@dataclass(frozen=True)
class RuntimeSpec:
    """One runtime. `lock` is the pinned requirement set without comments, one `name==version` a line."""

    name: str
    pythons: tuple[str, ...]
    """Minor versions of Python it may run on, best first."""
    torch: str
    """PyTorch's index that `torch` comes from ("cpu"); "" where the ordinary index has it, or nobody needs it."""
    disk_mib: int
    commands: tuple[str, ...]
    imports: tuple[str, ...]
    provides: Mapping[str, str]
    link_servers: bool
    lock: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits over the lock, the recipe, the Python versions and the platform."""
        facts = asdict(self) | {"platform": f"{platform.system()}-{platform.machine()}", "recipe": RECIPE}
        # Only what the installed files depend on: space and smoke test may change without a new folder.
        for field in ("disk_mib", "commands", "imports"):
            del facts[field]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def root(self) -> Path:
        """Its folder, built or not."""
        return runtimes_folder() / f"{self.name}-{self.digest}"

    @property
    def python(self) -> Path:
        """Its interpreter, once built."""
        return self.root / "bin" / "python"

    @property
    def packages(self) -> int:
        """How many packages the lock pins (a few less are installed where a pin is for another Python)."""
        return len(self.lock.splitlines())


def cache_folder() -> Path:
    """`$HPC_GYM_CACHE`, or `~/.cache/hpc-gym`: what can be made again, shared by all runs of a user."""
    folder = os.environ.get("HPC_GYM_CACHE")
    return Path(folder).expanduser().absolute() if folder else Path.home() / ".cache" / "hpc-gym"


def runtimes_folder() -> Path:
    """The folder that holds one folder per runtime."""
    return cache_folder() / "runtimes"


def names() -> tuple[str, ...]:
    """The names of all runtimes that hpc-gym knows."""
    return tuple(table())


def default_names(device: Device) -> tuple[str, ...]:
    """The runtimes that a job on this device needs, the one wanted first: the demo makes its model in `train`."""
    return (f"train-{device}", f"inference-{device}", "gym")


def spec_of(name: str) -> RuntimeSpec:
    """The runtime of that name. Raises UserError for a name that is none."""
    if name not in table():
        raise UserError(f"runtime '{name}' does not exist; the runtimes are: {', '.join(names())}")
    return _spec(name, shipped("locks") / f"{name}.txt")


def root_of(name: str) -> Path:
    """The folder of the runtime of that name, built or not. Raises UserError for a name that is none."""
    return spec_of(name).root


def is_built(spec: RuntimeSpec) -> bool:
    """Whether the runtime is complete. Costs one look at the file system."""
    return is_runtime(spec.root)


def is_runtime(folder: Path) -> bool:
    """Whether a complete runtime is in the folder."""
    return (folder / MARKER).is_file()


@functools.cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """`locks/runtimes.toml`: what each runtime is, by name."""
    return tomllib.loads((shipped("locks") / "runtimes.toml").read_text())


@functools.cache
def _spec(name: str, lock: Path) -> RuntimeSpec:
    entry = table()[name]
    lines = (line.strip() for line in lock.read_text().splitlines())
    pins = "\n".join(line for line in lines if line and not line.startswith("#"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return RuntimeSpec(name=name, lock=pins + "\n", **values)
