"""The code that runs is the code that was submitted: the package, and the folders it ships, in the run directory."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import hpc_gym
from hpc_gym.errors import UserError

_PACKAGE = Path(hpc_gym.__file__).resolve().parent
_WITH_PACKAGE = ("templates", "configs", "containers", "locks", "pyproject.toml")


@dataclass(frozen=True)
class Source:
    """Where the snapshot came from. `commit` and `diff` are None for an installed package."""

    path: str
    commit: str | None = None
    branch: str | None = None
    diff: str | None = None
    """What the working tree differs by from the commit; "" when it is clean."""


def snapshot(target: Path) -> Source:
    """Copies the package to `target`, importable with `PYTHONPATH=target`, and says what was copied.

    Of a checkout: the files git knows and, in the package itself, those it does not know yet and does not ignore, as
    they are in the working tree. Of an installed package: all its files.
    """
    root = _PACKAGE.parent
    commit = _git(root, "rev-parse", "HEAD")
    files = _git(root, "ls-files", "-z", "--cached", "--", "hpc_gym", *_WITH_PACKAGE)
    if not commit or not files:
        shutil.copytree(_PACKAGE, target / "hpc_gym", ignore=shutil.ignore_patterns("__pycache__"))
        return Source(path=str(_PACKAGE))
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "hpc_gym") or ""
    for name in (files + new).split("\0"):
        # A tracked file that was deleted in the working tree is part of the difference.
        if name and (root / name).is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy)
    if not (target / "hpc_gym" / "__init__.py").is_file():
        raise UserError(f"the checkout {root} holds no hpc_gym package that could be copied into the run directory")
    return Source(
        path=str(root),
        commit=commit.strip(),
        branch=(_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        diff=(_git(root, "diff", "HEAD", "--", "hpc_gym", *_WITH_PACKAGE) or "") + _untracked(new),
    )


def _untracked(names: str) -> str:
    return "".join(f"untracked: {name}\n" for name in names.split("\0") if name)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command at `root`; None without git, or where `root` is not the top of a checkout."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="surrogateescape")
