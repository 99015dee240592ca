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
from pathlib import Path

from packaging.markers import Environment, default_environment
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
        sources = [str(locks.parent / "pyproject.toml")] if name == "base" else ["--group", "dev", "-c", "locks/base.txt"]
        made_from, pythons, torch = "pyproject.toml", BASE_PYTHONS, ""
    else:
        entry = table()[name]
        sources, made_from = [f"locks/{name}.in"], f"locks/{name}.in"
        if (locks / f"{name}.overrides").exists():
            sources += ["--overrides", f"locks/{name}.overrides"]
            made_from += f" and locks/{name}.overrides"
        pythons, torch = tuple(entry["pythons"]), entry["torch"]
    oldest = min(pythons, key=_version)
    uv = find_uv()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"{name}.txt"
        if not upgrade and (locks / output.name).exists():
            output.write_text((locks / output.name).read_text())
        command = [uv, "pip", "compile", "--quiet", "--universal", "--no-annotate", "--no-header"]
        command += ["--python-version", oldest, *torch_arguments(torch), *sources, "--output-file", str(output)]
        subprocess.run(command, check=True, cwd=locks.parent, env=index_environment(os.environ), stdout=subprocess.DEVNULL)
        pins = simplify(output.read_text(), pythons)
    version = subprocess.run([uv, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    how = f"uv pip compile --universal --python-version {oldest}, uv {version}"
    return f"# Made from {made_from} by `make locks` ({how}; Python {', '.join(pythons)} on Linux). Do not edit.\n{pins}"


def simplify(lock: str, pythons: tuple[str, ...]) -> str:
    """`lock` without the pins and the conditions that no allowed Python on Linux needs."""
    targets = [_environment(*target) for target in itertools.product(pythons, ("x86_64", "aarch64"))]
    lines = []
    for line in lock.splitlines():
        if not line or line.startswith("#"):
            continue
        marker = Requirement(line).marker
        needed = [marker is None or marker.evaluate(dict(target)) for target in targets]
        if all(needed):
            lines.append(line.split(";")[0].strip())
        elif any(needed):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _environment(python: str, machine: str) -> Environment:
    environment = default_environment()
    environment.update(
        python_version=python,
        python_full_version=f"{python}.9",
        implementation_version=f"{python}.9",
        platform_machine=machine,
        sys_platform="linux",
        platform_system="Linux",
        os_name="posix",
    )
    return environment


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
        print(f"{path.name}: {len(text.splitlines()) - 1} packages{'' if changed else ', unchanged'}")


if __name__ == "__main__":
    main()
