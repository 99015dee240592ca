"""Everything that can be found wrong with an experiment on the login node, before a node is waited for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_gym.plan.plan import Plan, Runtime
from hpc_gym.plan.resolve import resolve
from hpc_gym.runtimes.spec import is_built, names, spec_of

_CHECKPOINT_BYTES_PER_WEIGHT_BYTE = 7.0
"""Of mixed-precision Adam: 2 bytes of weights against 12 of master weights and both moments, and the weights again."""


@dataclass(frozen=True)
class Finding:
    """What one check found. `warning`: the job may run, but a person should look."""

    check: str
    status: Literal["ok", "warning", "failed"]
    detail: str


def check_experiment(
    experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None
) -> list[Finding]:
    """All findings, in the order in which a job would come upon them.

    Raises UserError, with every problem, when the experiment itself is wrong.
    """
    plan = resolve(experiment, overrides, cluster).plan
    sizes = ", ".join(f"{sum(node.role == role for node in plan.nodes)} {role}" for role in _roles(plan))
    findings = [
        Finding("experiment", "ok", f"{plan.name}: {sizes} node(s), {plan.training.world_size} training rank(s)")
    ]
    findings += _runtimes(plan)
    findings.append(_model("model", plan.training.model))
    findings += _judge(plan)
    findings += _data(plan)
    findings += _storage(plan)
    if plan.launch.kind == "slurm":
        from hpc_gym.jobs.slurm_check import slurm_findings

        findings += slurm_findings(plan)
    return findings


def _roles(plan: Plan) -> list[str]:
    return list(dict.fromkeys(node.role for node in plan.nodes))


def _runtimes(plan: Plan) -> Iterator[Finding]:
    for runtime in plan.runtimes.values():
        check = f"runtime {runtime.name}"
        if missing := missing_of(runtime):
            yield Finding(check, "failed", missing)
        else:
            yield Finding(check, "ok", runtime.root)


def missing_of(runtime: Runtime) -> str:
    """What is missing of a runtime, and what to do; "" when nothing is."""
    if runtime.kind in ("apptainer", "pyxis"):
        # Images are also named by a registry's address, which only the compute nodes may reach.
        looks_like_a_file = runtime.root.startswith(("/", "."))
        return f"there is no image {runtime.root}" if looks_like_a_file and not Path(runtime.root).exists() else ""
    if runtime.name in names() and not is_built(spec_of(runtime.name)):
        return f"it is not built: hpc-gym runtimes build {runtime.name}"
    return "" if Path(runtime.python).exists() else f"there is no interpreter {runtime.python}"


def _model(what: str, model: str) -> Finding:
    folder = Path(model)
    if not folder.is_dir():
        return Finding(what, "ok", f"{model}, in the cache of the hub")
    return Finding(what, "ok", f"{folder}, {_weight_bytes(folder) / 1e9:.1f} GB of weights")


def _judge(plan: Plan) -> Iterator[Finding]:
    judge = plan.rollout.judge
    if judge is None:
        return
    if judge.model is not None:
        yield _model("judge", judge.model)
    elif judge.api_key_env and not os.environ.get(judge.api_key_env):
        yield Finding("judge", "failed", f"{judge.url}: {judge.api_key_env} (judge.api_key_env) is not set here")
    else:
        yield Finding("judge", "ok", f"{judge.model_name} at {judge.url}")


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def _data(plan: Plan) -> Iterator[Finding]:
    training = plan.training
    for kind, sources in (("training", training.sources), ("held-out", training.evaluation.sources)):
        for source in sources:
            yield Finding(f"{kind} data", "ok", f"{source.environment}: {source.rows} rows, {source.path}")
    if not training.evaluation.sources:
        yield Finding("held-out data", "warning", "none: the report will have no evaluation (data.eval)")


def _storage(plan: Plan) -> Iterator[Finding]:
    run_dir = Path(plan.run_dir)
    if run_dir.exists():
        yield Finding("run directory", "failed", f"{run_dir} exists: choose another name=...")
        return
    folder = next(parent for parent in run_dir.parents if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpc-gym-check-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding("run directory", "failed", f"{folder} cannot be written to: {error.strerror}")
        return
    if plan.launch.kind == "slurm" and (kind := _node_local(folder)):
        yield Finding(
            "run directory", "warning", f"{folder} is on {kind}: other nodes do not see it (cluster.runs_dir)"
        )
    else:
        yield Finding("run directory", "ok", str(run_dir))
    yield _room(plan, folder)


def _node_local(folder: Path) -> str:
    """What a path is on, where that is no storage that nodes share; "" where it may be."""
    mounts: list[tuple[str, str]] = []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder == Path(point) or Path(point) in folder.parents:
            mounts.append((point, kind))
    kind = max(mounts, key=lambda mount: len(mount[0]))[1] if mounts else ""
    return f"a {kind}" if kind in ("tmpfs", "ramfs", "overlay") else ""


def _room(plan: Plan, folder: Path) -> Finding:
    weights = _weight_bytes(Path(plan.training.model)) if Path(plan.training.model).is_dir() else 0
    # One more than is kept, for the newest is written before the oldest goes; and the model that is exported.
    wanted = weights * (_CHECKPOINT_BYTES_PER_WEIGHT_BYTE * (plan.training.checkpoints_kept + 1) + 1)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.0f} GB free; checkpoints and the model want about {wanted / 1e9:.1f} GB"
    return Finding("room", "ok" if free > wanted else "failed", detail)
