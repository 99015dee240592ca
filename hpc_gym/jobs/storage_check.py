"""Whether a job finds room where it writes, and whether its nodes see what it needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpc_gym.jobs.findings import Finding
from hpc_gym.plan.plan import Plan
from hpc_gym.plan.processes import BASE

_CHECKPOINT_BYTES_PER_WEIGHT_BYTE = 7.0
"""Of mixed-precision Adam: 2 bytes of weights against 12 of master weights and both moments, and the weights again."""
_NODE_LOCAL_TYPES = ("tmpfs", "ramfs", "overlay")
_NODE_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def storage_findings(plan: Plan) -> Iterator[Finding]:
    """The findings: run directory, room, and for a job on other nodes what those may not see."""
    run_dir = Path(plan.run_dir)
    if run_dir.exists():
        yield Finding("run directory", "failed", f"{run_dir} exists: choose another name=...")
    else:
        folder = next(parent for parent in run_dir.parents if parent.exists())
        yield from _writable(run_dir, folder, plan)
    if plan.launch.kind == "slurm":
        yield from _unseen(plan)


def _writable(run_dir: Path, folder: Path, plan: Plan) -> Iterator[Finding]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpc-gym-check-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("run directory", "failed", f"{folder} cannot be written to: {error.strerror}")
        return
    if plan.launch.kind == "slurm" and (what := node_local(folder)):
        detail = f"{folder} can be written to here, but is {what}: do all nodes see it? (cluster.runs_dir)"
        yield Finding("run directory", "warning", detail)
    else:
        yield Finding("run directory", "ok", str(run_dir))
    yield _room(plan, folder)


def _unseen(plan: Plan) -> Iterator[Finding]:
    """What the nodes need and may not see."""
    needed = {f"runtime {name}": runtime.root for name, runtime in plan.runtimes.items() if name != BASE}
    needed["hpc-gym's own Python"] = plan.python
    needed["model"] = plan.training.model
    for source in (*plan.training.sources, *plan.training.evaluation.sources):
        needed[f"rows of {source.environment}"] = source.path
    links = {link.target for node in plan.nodes for process in node.processes for link in process.links}
    inside = tuple(runtime.root for runtime in plan.runtimes.values())
    needed |= {f"code of {Path(each).name}": each for each in sorted(links) if not each.startswith(inside)}
    unseen: dict[str, list[str]] = {}
    for what, path in needed.items():
        if Path(path).is_absolute() and Path(path).exists() and (kind := node_local(Path(path))):
            unseen.setdefault(kind, []).append(f"{what} ({path})")
    for kind, found in unseen.items():
        detail = f"{', '.join(found)}: {kind}. Do all nodes see it? (HPC_GYM_CACHE says where runtimes are built)"
        yield Finding("seen by the nodes", "warning", detail)
    if not unseen:
        yield Finding("seen by the nodes", "ok", "nothing of the job lies where only this machine would have it")


def node_local(path: Path) -> str:
    """What a path is on, where that looks like no storage that nodes share; "" where it may be."""
    mounts: list[tuple[str, str]] = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if path.is_relative_to(point):
            mounts.append((point, kind))
    point, kind = max(mounts, key=lambda mount: len(mount[0])) if mounts else ("/", "")
    if kind in _NODE_LOCAL_TYPES:
        return f"on a {kind} of this machine"
    # A mount below one of them is another matter.
    local = next((each for each in _NODE_LOCAL_FOLDERS if path.is_relative_to(each)), "")
    return f"under {local}, which most clusters keep per node" if local and Path(local).is_relative_to(point) else ""


def _room(plan: Plan, folder: Path) -> Finding:
    weights = weight_bytes(Path(plan.training.model)) if Path(plan.training.model).is_absolute() else 0
    # One more than is kept, for the newest is written before the oldest goes; and the model that is exported.
    wanted = weights * (_CHECKPOINT_BYTES_PER_WEIGHT_BYTE * (plan.training.checkpoints_kept + 1) + 1)
    free = shutil.disk_usage(folder).free
    told = (
        f"checkpoints and the model want about {size_text(wanted)}" if weights else "what the model takes is not known"
    )
    detail = f"{free / 1e9:.0f} GB free; {told}"
    return Finding("room", "ok" if free > wanted else "failed", detail)


def size_text(size: float) -> str:
    """So many bytes, as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def weight_bytes(folder: Path) -> int:
    """Size of the weights in a model's folder; 0 where there is none."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
