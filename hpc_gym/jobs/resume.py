"""Goes on with a run that has ended: the same run directory and code, from the last checkpoint, as a new job."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs import local, records
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.request import Request
from hpc_gym.jobs.state import CANCEL_MARK, has_ended, job_state, last_outcome
from hpc_gym.jobs.submission import start, write_job, write_secrets
from hpc_gym.jobs.submit import refuse_missing_runtimes
from hpc_gym.plan.resolve import resolve

_OF_THE_JOB = ("experiment.yaml", "plan.json", "job.sh", records.RECORD)


def resume(job: str = "latest", overrides: Sequence[str] = ()) -> HpcgymJob:
    """Submits the run of `job` again, changed by `overrides` (nodes, time limit, ...); it keeps its name and directory.

    Raises UserError while the job lives, when the run is complete, or when `overrides` do not fit what was saved.
    """
    record = records.find(job)
    run_dir = Path(record.run_dir)
    state = job_state(record)
    if not has_ended(state):
        raise UserError(f"job {record.job_id} is {state}: `hpc-gym cancel {record.name}` first")
    outcome = last_outcome(run_dir)
    if outcome is not None and outcome.kind == "completed":
        raise UserError(f"the run '{record.name}' is complete: there is nothing to go on with")
    resolved = resolve(run_dir / "experiment.yaml", overrides)
    if Path(resolved.plan.run_dir) != run_dir:
        raise UserError(f"a resumed run stays in {run_dir}: leave out overrides of name and cluster.runs_dir")
    refuse_missing_runtimes(resolved.plan)
    _refuse_other_ranks(run_dir, resolved.plan.training.world_size)
    request = Request(resolved.plan, record.experiment, resolved.experiment_yaml, record.cluster, tuple(overrides))
    _keep(run_dir)
    write_job(run_dir, request)
    write_secrets(run_dir / "secrets", resolved.plan)
    for name in (CANCEL_MARK, "failure.json", "attempts/latest"):
        (run_dir / name).unlink(missing_ok=True)
    job_id = ""
    if resolved.plan.launch.kind == "local":
        job_id = local.new_job_id()
        (run_dir / "submitit" / f"{job_id}_submitted.pkl").symlink_to("submitted.pkl")
    return HpcgymJob.of(start(request, job_id))


def _refuse_other_ranks(run_dir: Path, world_size: int) -> None:
    for marker in sorted(run_dir.glob("checkpoints/checkpoint-*/complete.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            saved = int(json.loads(marker.read_text())["world_size"])
            if saved != world_size:
                raise UserError(
                    f"{marker.parent} was written by {saved} training ranks; this job would have {world_size}: keep "
                    "nodes.train and ranks_per_node (nodes.rollout may change)"
                )


def _keep(run_dir: Path) -> None:
    """Puts what said what the earlier job was beside its last attempt."""
    latest = run_dir / "attempts" / "latest"
    if latest.exists():
        for name in _OF_THE_JOB:
            shutil.copy2(run_dir / name, latest.resolve() / name)
