"""Builds runtimes: each once, however many processes ask at the same time, and never half."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.runtimes.install import Builder, Cancelled, Event, Progress, find_uv
from hpc_gym.runtimes.interpreter import find_python
from hpc_gym.runtimes.spec import MARKER, RuntimeSpec, is_built, runtimes_folder, spec_of


def build(names: Sequence[str], progress: Progress = lambda event: None) -> None:
    """Builds those of the named runtimes that are not there yet, side by side; those named first get the cores first.

    Raises UserError when one could not be built: no Python, no uv, no space, no index; what was built till then stays.
    An interrupt stops the programs it started and leaves no half runtime.
    """
    build_specs([spec_of(name) for name in names], progress)


def build_specs(specs: Sequence[RuntimeSpec], progress: Progress = lambda event: None) -> None:
    """`build` for specs at hand."""
    missing = []
    for spec in specs:
        if is_built(spec):
            progress(Event(spec.name, "ready", text="already built"))
        else:
            missing.append(spec)
    if not missing:
        return
    find_uv()
    interpreters = [find_python(spec.pythons, f"runtime {spec.name}") for spec in missing]
    _make_folder()
    check_space(missing)
    cancelled = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
        jobs = [
            pool.submit(_build, spec, interpreter, 5 * place, cancelled, progress)
            for place, (spec, interpreter) in enumerate(zip(missing, interpreters, strict=True))
        ]
        try:
            concurrent.futures.wait(jobs)
        except BaseException:
            cancelled.set()
            raise
    failures = [error for job in jobs if (error := job.exception())]
    if len(failures) > 1 and all(isinstance(error, UserError) for error in failures):
        raise UserError("\n\n".join(str(error) for error in failures))
    if failures:
        raise failures[0]


def check_space(specs: Sequence[RuntimeSpec]) -> None:
    """Raises UserError when the file system of the cache has less room than the runtimes take."""
    folder = runtimes_folder()
    needed, free = sum(spec.disk_mib for spec in specs), shutil.disk_usage(folder).free // 2**20
    if free < needed:
        raise UserError(
            f"no space for {', '.join(spec.name for spec in specs)}: {needed} MiB needed, {free} MiB free for "
            f"{folder}.\n"
            f"Free some space, or set HPC_GYM_CACHE to a folder on a larger file system."
        )


def _make_folder() -> None:
    try:
        runtimes_folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{runtimes_folder()}, where runtimes are built, can't be made: {error.strerror}. "
            f"Set HPC_GYM_CACHE to a folder of yours."
        ) from error


def _build(spec: RuntimeSpec, interpreter: Path, niceness: int, cancelled: threading.Event, progress: Progress) -> None:
    root = spec.root
    with _sole_builder(root.with_name(root.name + ".lock"), spec.name, cancelled, progress) as lock_fd:
        if is_built(spec):
            progress(Event(spec.name, "ready", text="built by another process"))
            return
        started = time.monotonic()
        log = root.with_name(root.name + ".log")
        try:
            if root.exists():
                shutil.rmtree(root)
            log.unlink(missing_ok=True)
            Builder(spec, interpreter, lock_fd, log, niceness, cancelled, progress).install()
            _write_marker(spec, time.monotonic() - started)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        progress(Event(spec.name, "ready", text=f"built in {time.monotonic() - started:.0f} s"))


@contextlib.contextmanager
def _sole_builder(path: Path, name: str, cancelled: threading.Event, progress: Progress) -> Iterator[int]:
    """Holds the file lock at `path`; gives its descriptor.

    The file stays: were it removed, a third process could lock a new file of that name while a second holds the old.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(Event(name, "waiting", text="another process is building it"))
            except OSError as error:
                raise UserError(
                    f"the file system of {path.parent} has no file locks ({error.strerror}), so two builds could meet. "
                    f"Set HPC_GYM_CACHE to a folder on one that has (a Lustre mount needs `-o flock`)."
                ) from error
            if cancelled.wait(0.3):
                raise Cancelled
        yield descriptor
    finally:
        os.close(descriptor)


def _write_marker(spec: RuntimeSpec, seconds: float) -> None:
    """Declares the runtime complete, in one step that a crash can't tear."""
    version = subprocess.run([spec.python, "-I", "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    facts = {
        "name": spec.name,
        "digest": spec.digest,
        "python": version,
        "size_mib": folder_size(spec.root) // 2**20,
        "seconds": round(seconds, 1),
        "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    draft = spec.root / f".{MARKER}"
    with draft.open("w") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(spec.root / MARKER)


def folder_size(folder: Path) -> int:
    """Bytes in the files below `folder`, links not followed."""
    return sum((Path(parent) / file).lstat().st_size for parent, _, files in os.walk(folder) for file in files)
