"""A runtime of one small package, built by the real uv from a wheel made on the spot: no index is needed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from hpc_gym.runtimes.spec import RuntimeSpec

PYTHON = "{}.{}".format(*sys.version_info)


def make_wheel(folder: Path, name: str, files: Mapping[str, str | bytes], requires: str = "") -> None:
    """Writes the wheel of the package `name`, version 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    everything = {**files, **metadata}
    record = "".join(f"{path},,\n" for path in [*everything, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in {**everything, f"{info}/RECORD": record}.items():
            wheel.writestr(path, content)


TINY = RuntimeSpec(
    name="tiny",
    pythons=(PYTHON,),
    torch="",
    disk_mib=1,
    commands=("python",),
    imports=("small_package",),
    provides={},
    link_servers=False,
    lock="small-package==1.0\n",
)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Where everything of a test lies below `tmp_path`, and uv asks no index."""
    own = {
        "HPC_GYM_CACHE": str(tmp_path / "cache"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "UV_FIND_LINKS": str(tmp_path / "wheels"),
        "UV_NO_INDEX": "1",
    }
    return {**os.environ, **own, **more}


def builder(spec: RuntimeSpec, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process that builds `spec` and prints each event; exit code 2 and the sentence on stderr for a UserError."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    program = f"""
import sys
from hpc_gym.errors import UserError
from hpc_gym.runtimes.build import build_specs
from hpc_gym.runtimes.spec import RuntimeSpec
spec = RuntimeSpec(**{fields!r})
try:
    build_specs([spec], lambda event: print(event.stage, event.text, flush=True))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
