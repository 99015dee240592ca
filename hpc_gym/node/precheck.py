"""Whether a node is fit for a job, asked in seconds before anything heavy is started on it.

What every node shows by joining is not asked again: the run directory can be read, and the coordinator reached
through the chosen interface.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hpc_gym.node.context import NodeContext
from hpc_gym.node.xid import xid_errors
from hpc_gym.protocol.attempt import FULL

_GPU_FIELDS = "index,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"
_GPU_MEMORY_USED = 0.05
"""Share of a GPU's memory that may be in use before the job starts."""
_CANARY_BYTES = 1 << 16
_PRIVATE_BYTES = 1 << 28
_SHARED_MEMORY_BYTES = 1 << 28
_NVIDIA = Path("/dev/nvidiactl")


def unfit(context: NodeContext) -> str:
    """Why this node cannot take part, in one line; "" when nothing was found."""
    found = [*_storage(context), *_room(context), *_gpus()]
    return "; ".join(found)


def full(context: NodeContext) -> str:
    """Why no node can take part, as the shared storage has no room; "" where it has. Makes a file, for a moment."""
    canary = context.attempt_dir / f".canary-{context.node.name}"
    try:
        with canary.open("wb") as file:
            file.write(os.urandom(_CANARY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in FULL:
            return f"{context.run_dir} has no room: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            canary.unlink()
    return ""


def _storage(context: NodeContext) -> Iterator[str]:
    """The run directory takes a file, and what the first node wrote at the start of the attempt is there."""
    canary = context.attempt_dir / f".canary-{context.node.name}"
    try:
        with canary.open("wb") as file:
            file.write(os.urandom(_CANARY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        canary.unlink()
    except OSError as error:
        yield f"{context.attempt_dir} cannot be written to: {error.strerror}"
    if not (context.run_dir / "code" / "hpc_gym").exists():
        yield f"{context.run_dir}/code is not there: the run directory is not on storage that all nodes share"


def _room(context: NodeContext) -> Iterator[str]:
    for folder, wanted in ((context.private_dir, _PRIVATE_BYTES), (Path("/dev/shm"), _SHARED_MEMORY_BYTES)):
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield f"{folder}: {error.strerror}"
            continue
        if free < wanted:
            yield f"{folder} has {free >> 20} MiB free, {wanted >> 20} are needed"


def _gpus() -> Iterator[str]:
    """What nvidia-smi says of GPUs that this job may use: memory in use, uncorrected ECC errors, no answer; and what
    the kernel's log says of any of the node.
    """
    if not _NVIDIA.exists():
        return
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi gives no answer: {error}"
        return
    if asked.returncode != 0:
        yield f"nvidia-smi: {(asked.stdout + asked.stderr).strip()}"
        return
    yield from gpu_problems(asked.stdout)
    yield from xid_errors()


def gpu_problems(table: str) -> Iterator[str]:
    """Problems in the answer of nvidia-smi to `_GPU_FIELDS`, a line per GPU, memory in MiB."""
    for row in csv.reader(table.splitlines(), skipinitialspace=True):
        if len(row) != len(_GPU_FIELDS.split(",")):
            yield f"nvidia-smi: {', '.join(row)}"
            continue
        index, used, total, errors = row
        if used.isdigit() and total.isdigit() and int(used) > _GPU_MEMORY_USED * int(total):
            yield f"GPU {index} has {used} of {total} MiB in use by somebody else"
        if errors.isdigit() and int(errors) > 0:
            yield f"GPU {index} has {errors} uncorrected ECC errors"
