"""Finds a Python interpreter of a wanted version on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_gym.errors import UserError

_ASK = "import sys; print('%d.%d' % sys.version_info[:2], sys.implementation.name, sys.executable, sep='\\n')"


def find_python(versions: Sequence[str], purpose: str) -> Path:
    """An interpreter of the first of `versions` ("3.12", ...) that this machine has.

    Looked at: `$HPC_GYM_PYTHON` (a list of interpreters, joined by ":"), the running interpreter, PATH, pyenv's
    versions and uv's own. Raises UserError, which says where it looked and how to get one, when there is none;
    `purpose` begins its sentence.
    """
    for version in versions:
        for candidate in _candidates(version):
            found = _version(candidate)
            if found is not None and found[0] == version:
                return found[1]
    wanted = " or ".join(versions)
    raise UserError(
        f"{purpose} needs Python {wanted}, and this machine has none that hpc-gym can find.\n"
        f"Looked at: $HPC_GYM_PYTHON ({os.environ.get('HPC_GYM_PYTHON') or 'not set'}), {sys.executable}, "
        f"{' and '.join(f'python{version}' for version in versions)} on PATH, {_pyenv_root()}/versions, "
        f"{_uv_pythons()}.\n"
        f"To get one: `uv python install {versions[0]}`, or `pyenv install {versions[0]}`, or load your site's module "
        f"that puts python{versions[0]} on PATH; or set HPC_GYM_PYTHON to its path."
    )


def _candidates(version: str) -> Iterator[Path]:
    yield from (Path(path) for path in os.environ.get("HPC_GYM_PYTHON", "").split(":") if path)
    if version == "{}.{}".format(*sys.version_info):
        yield Path(getattr(sys, "_base_executable", sys.executable))
    for program in (f"python{version}", "python3", "python"):
        if found := shutil.which(program):
            yield Path(found)
    yield from sorted(_pyenv_root().glob(f"versions/{version}*/bin/python{version}"), reverse=True)
    yield from sorted(_uv_pythons().glob(f"*/bin/python{version}"), reverse=True)


def _version(candidate: Path) -> tuple[str, Path] | None:
    """Its minor version and real path; None where it does not run or is not CPython.

    Running it is the only test that counts: pyenv puts a `python3.12` on PATH that only prints an error unless 3.12
    is activated.
    """
    try:
        answer = subprocess.run([candidate, "-I", "-c", _ASK], capture_output=True, text=True, timeout=30, check=True)
        version, implementation, executable = answer.stdout.splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return (version, Path(executable)) if implementation == "cpython" else None


def _pyenv_root() -> Path:
    return Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")


def _uv_pythons() -> Path:
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
