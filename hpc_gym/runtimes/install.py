"""Fills the folder of one runtime: the venv, its packages, what they lack, byte code, and a smoke test."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_gym.errors import UserError
from hpc_gym.runtimes.index import index_environment, torch_arguments
from hpc_gym.runtimes.spec import RuntimeSpec

Stage = Literal["waiting", "creating", "installing", "checking", "ready"]


@dataclass(frozen=True)
class Event:
    """Where the build of a runtime stands: `done` of `total` packages while installing; `text` is for people."""

    runtime: str
    stage: Stage
    done: int = 0
    total: int = 0
    text: str = ""


_NO_SPACE = re.compile(r"os error 28|No space left on device")
_NO_INDEX = re.compile(r"Failed to fetch|error sending request|dns error|Could not connect")
_NO_COMPILER = re.compile(
    r"No such file or directory: '[^']*(cc|clang)'|command '[^']*(cc|clang)' failed|Python\.h: No such"
)
"""What uv, and the build of a source package, say when that is the trouble."""

Progress = Callable[[Event], None]
"""Called from the threads that build, one per runtime."""


class Cancelled(Exception):
    """The build was told to stop."""


@dataclass(frozen=True)
class Builder:
    """One build of one runtime, by the process that holds its lock.

    Every program it starts inherits the lock: were hpc-gym killed, the next builder waits until the programs have ended
    too, and does not clear the folder under their hands.
    """

    spec: RuntimeSpec
    interpreter: Path
    lock_fd: int
    log: Path
    niceness: int
    """Added to that of this process for the programs it starts, so that a more urgent build gets the cores first."""
    cancelled: threading.Event
    progress: Progress

    def install(self) -> None:
        """Everything but the marker. Raises UserError for what the person must mend, Cancelled when told to stop."""
        spec, root = self.spec, self.spec.root
        uv = find_uv()
        self._say("creating", text=f"Python {self.interpreter}")
        self._run([uv, "venv", "--quiet", "--python", str(self.interpreter), str(root)], "make the venv")
        lock = root / "lock.txt"
        lock.write_text(spec.lock)
        command = [uv, "pip", "sync", "--python", str(spec.python), *torch_arguments(spec.torch), str(lock)]
        # Every version is pinned, so what uv's cache has is what the index would give. Asked first, an index costs a
        # request per package, and a source package is compiled again where the index sends no validator.
        if not self._succeeds([*command, "--offline"], watch=self._say_installed):
            self._run(command, "install the packages", watch=self._say_installed)
        for name, version in spec.provides.items():
            _add_metadata(site_packages(root), name, version)
        if spec.link_servers:
            link_servers(root)
        self._say("checking", text="importing what its programs import")
        self._check()

    def _check(self) -> None:
        missing = [name for name in self.spec.commands if not os.access(self.spec.root / "bin" / name, os.X_OK)]
        if missing:
            raise RuntimeError(
                f"runtime {self.spec.name} has no program {', '.join(missing)}: locks/{self.spec.name}.txt is wrong"
            )
        imports = "import importlib, json, sys; [importlib.import_module(name) for name in json.loads(sys.argv[1])]"
        # -P: a folder of the person's that is called like a package must not be imported in its place.
        command = [str(self.spec.python), "-P", "-c", imports, json.dumps(self.spec.imports)]
        self._run(command, "import what its programs need")

    def _say(self, stage: Stage, done: int = 0, total: int = 0, text: str = "") -> None:
        self.progress(Event(self.spec.name, stage, done, total, text))

    def _say_installed(self, output: str) -> None:
        done = sum(1 for _ in self.spec.root.glob("lib/python*/site-packages/*.dist-info"))
        steps = [
            line.strip() for line in output.splitlines() if line.lstrip().startswith(("Download", "Built", "Build"))
        ]
        self._say("installing", done, self.spec.packages, steps[-1] if steps and not done else "")

    def _succeeds(self, command: Sequence[str], watch: Callable[[str], None]) -> bool:
        return self._execute(command, watch)[0] == 0

    def _run(self, command: Sequence[str], what: str, watch: Callable[[str], None] | None = None) -> None:
        """Runs a program to its end; UserError when it fails."""
        status, output = self._execute(command, watch)
        if status != 0:
            raise self._failure(what, status, output)

    def _execute(self, command: Sequence[str], watch: Callable[[str], None] | None) -> tuple[int, str]:
        """Runs a program to its end, its output in the log; its exit status and output. Raises Cancelled."""
        environment = index_environment(os.environ) | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.spec.root.parent,
                env=environment,
                pass_fds=(self.lock_fd,),
            )
            with contextlib.suppress(ProcessLookupError):
                niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + self.niceness)
                os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
            while (status := _wait(process, 0.2)) is None:
                if self.cancelled.is_set():
                    process.terminate()
                    if _wait(process, 5.0) is None:
                        process.kill()
                        process.wait()
                    raise Cancelled
                if watch:
                    watch(_text_from(self.log, start))
        return status, _text_from(self.log, start)

    def _failure(self, what: str, status: int, output: str) -> UserError:
        name, tail = self.spec.name, "\n".join(output.strip().splitlines()[-8:])
        if _NO_SPACE.search(output):
            free = shutil.disk_usage(self.spec.root.parent).free // 2**20
            return UserError(
                f"runtime {name}: no space left while hpc-gym was to {what}: {free} MiB free for "
                f"{self.spec.root.parent}, {self.spec.disk_mib} MiB needed, and as much again for uv's cache.\n"
                f"Free some space, or set HPC_GYM_CACHE (and UV_CACHE_DIR) to a folder on a larger file system."
            )
        if _NO_INDEX.search(output):
            return UserError(
                f"runtime {name}: no package index could be reached:\n{tail}\n"
                f"Set UV_DEFAULT_INDEX (or PIP_INDEX_URL) to an index that this machine reaches, and PIP_FIND_LINKS to "
                f"a folder with the torch wheel where PyTorch's index is out of reach. Whole log: {self.log}"
            )
        if _NO_COMPILER.search(output):
            return UserError(
                f"runtime {name}: a package has to be compiled, and there is no C compiler (or no headers of "
                f"{self.interpreter}):\n{tail}\nInstall them: `apt-get install gcc`, or load your site's compiler "
                f"module. Whole log: {self.log}"
            )
        return UserError(f"runtime {name}: could not {what} (exit code {status}):\n{tail}\nWhole log: {self.log}")


def find_uv() -> str:
    """The uv program: the one installed with hpc-gym, else the one on PATH. Raises UserError when there is none."""
    try:
        import uv

        return str(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if not found:
        raise UserError(
            "hpc-gym builds its runtimes with uv, and there is none: `pip install uv` in hpc-gym's own environment."
        )
    return found


def site_packages(root: Path) -> Path:
    """The folder of packages of the venv at `root`."""
    (folder,) = root.glob("lib/python3.*/site-packages")
    return folder


def link_servers(root: Path) -> None:
    """Makes `root/servers/TYPE/NAME/.venv`, NeMo Gym's `uv_venv_dir`, with the one venv for every server of the wheel.

    NeMo Gym wants a venv per server and installs it when the server starts; with `skip_venv_if_present` it takes these.
    """
    packages = site_packages(root)
    for kind in ("resources_servers", "responses_api_agents", "responses_api_models"):
        for app in sorted(packages.glob(f"{kind}/*/app.py")):
            folder = root / "servers" / kind / app.parent.name
            folder.mkdir(parents=True)
            (folder / ".venv").symlink_to("../../..")


def _add_metadata(packages: Path, name: str, version: str) -> None:
    """Metadata of a distribution `name` with nothing else in it, for programs that ask for their own version."""
    folder = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("hpc-gym\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _text_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
