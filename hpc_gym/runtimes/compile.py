"""`python -m hpc_gym.runtimes.compile [NAME ...] [--upgrade]`: makes the locks in `locks/` again (`make locks`).

A lock holds for every Python that `runtimes.toml` allows, on Linux on x86_64 and aarch64, with CPython. It pins every
package, dependencies included, and is installed without looking at dependencies again: so what `NAME.overrides` leaves
out stays out. Versions that a lock already has are kept unless `--upgrade` is given.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import tempfile
from collections.abc import Set as AbstractSet
from pathlib import Path

from packaging.requirements import Requirement

from hpc_gym.errors import UserError
from hpc_gym.runtimes.index import index_environment, torch_arguments
from hpc_gym.runtimes.install import find_uv
from hpc_gym.runtimes.spec import names, table
from hpc_gym.shipped import shipped

BASE_PYTHONS = ("3.11", "3.12", "3.13")
"""What the base install runs on: `requires-python` of the project."""


def compile_lock(name: str, upgrade: bool = False) -> str:
    """The text of the lock of that name: a runtime's, or `base` or `dev`, the sets of the base install."""
    locks = shipped("locks")
    if name in ("base", "dev"):
        made_from, pythons, torch = ["pyproject.toml"], BASE_PYTHONS, ""
        sources = made_from if name == "base" else ["--group", "dev", "--constraints", "locks/base.txt"]
    else:
        made_from, pythons, torch = [f"locks/{name}.in"], tuple(table()[name]["pythons"]), table()[name]["torch"]
        sources = list(made_from)
        if (locks / f"{name}.overrides").exists():
            made_from.append(f"locks/{name}.overrides")
            sources += ["--overrides", made_from[-1]]
    oldest = min(pythons, key=_version)
    how = ["uv", "pip", "compile", "--universal", "--python-version", oldest, *sources]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"{name}.txt"
        if not upgrade and (locks / output.name).exists():
            output.write_text((locks / output.name).read_text())
        quietly = ["--quiet", "--no-annotate", "--no-header", "--output-file", str(output)]
        subprocess.run(
            [find_uv(), *how[1:], *torch_arguments(torch), *quietly],
            check=True,
            cwd=locks.parent,
            env=index_environment(os.environ),
            stdout=subprocess.DEVNULL,
        )
        pins = simplify(output.read_text(), pythons)
    return (
        f"# Made from {' and '.join(made_from)} by `make locks`; do not edit.\n"
        f"# {' '.join(how)}\n# and then only what Python {', '.join(pythons)} on Linux needs.\n{pins}"
    )


def simplify(lock: str, pythons: tuple[str, ...]) -> str:
    """`lock` without the pins and the conditions that no allowed Python on Linux needs."""
    targets = [_environment(*target) for target in itertools.product(pythons, ("x86_64", "aarch64"))]
    lines = []
    for line in lock.splitlines():
        if not line or line.startswith("#"):
            continue
        marker = Requirement(line).marker
        needed = [marker is None or marker.evaluate(target) for target in targets]
        if all(needed):
            lines.append(line.split(";")[0].strip())
        elif any(needed):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _environment(python: str, machine: str) -> dict[str, str | AbstractSet[str]]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.9",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": "",
    }


def _version(python: str) -> tuple[int, ...]:
    return tuple(int(part) for part in python.split("."))


def main() -> None:
    """Writes the locks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="locks to make; default: all")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions, not those of the lock")
    arguments = parser.parse_args()
    known = ("base", "dev", *names())
    for name in arguments.names or known:
        if name not in known:
            raise UserError(f"lock '{name}' does not exist; the locks are: {', '.join(known)}")
        path = shipped("locks") / f"{name}.txt"
        text = compile_lock(name, arguments.upgrade)
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{path.name}: {len(text.splitlines()) - 3} packages{'' if changed else ', unchanged'}")


if __name__ == "__main__":
    main()
