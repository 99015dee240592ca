"""Makes run directories and starts jobs: all of it happens, or nothing is left behind.

A run directory is filled under a hidden name beside its place and renamed into it, so that nobody sees half of one and
two submits of one name cannot both succeed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hpc_gym.errors import UserError
from hpc_gym.jobs import local, slurm
from hpc_gym.jobs.manifest import manifest
from hpc_gym.jobs.records import JobRecord, remember_runs_folder
from hpc_gym.jobs.rendering import render
from hpc_gym.jobs.request import Request, refuse_existing
from hpc_gym.jobs.snapshot import snapshot
from hpc_gym.node.attempt import SUBMITTED
from hpc_gym.plan.plan import Plan

SUBMISSION = "submitit/submitted.pkl"
"""In the run directory: what submitit runs on every node. Each job's own name for it is a link."""


def submit_request(request: Request, dump: Callable[[Path], None]) -> JobRecord:
    """Makes the run directory and starts its job. `dump(path)` writes the submission that submitit runs on every node.

    Raises UserError when the run name is taken, or the scheduler refuses; then nothing is left behind.
    """
    plan = request.plan
    run_dir = Path(plan.run_dir)
    refuse_existing(plan)
    job_id = local.new_job_id() if plan.launch.kind == "local" else ""
    _make_run_directory(request, dump, job_id)
    try:
        record = start(request, job_id)
    except BaseException:
        # The scheduler's refusal, or Ctrl-C just now.
        _undo(run_dir, plan, job_id)
        raise
    remember_runs_folder(run_dir.parent)
    return record


def start(request: Request, job_id: str) -> JobRecord:
    """Starts the job of a run directory that is complete, and writes its record. `job_id`: of a local job."""
    plan, run_dir = request.plan, Path(request.plan.run_dir)
    process = None
    jobs: list[str] = []
    try:
        if plan.launch.kind == "local":
            process = local.start(run_dir, job_id)
        else:
            for _ in range(1 + plan.launch.chain):
                jobs.append(_to_slurm(plan, jobs[-1] if jobs else None))
            job_id = jobs[0]
        record = JobRecord(
            job_id=job_id,
            kind=plan.launch.kind,
            name=plan.name,
            run_dir=str(run_dir),
            experiment=request.experiment,
            cluster=request.cluster,
            nodes=len(plan.nodes),
            submitted=time.time(),
            process=process,
            chain=tuple(jobs[1:]),
        )
        record.write()
    except BaseException:
        if jobs:
            slurm.cancel_jobs(jobs)
        raise
    return record


def _to_slurm(plan: Plan, after: str | None) -> str:
    """The id of the job that sbatch makes. Its refusals are short: the checks know what would be allowed."""
    try:
        return slurm.submit(Path(plan.run_dir), after)
    except UserError as error:
        _, refused, told = str(error).partition("job.sh failed: ")
        if not refused:
            raise
        told = told.replace("sbatch: error: ", "").replace("Batch job submission failed: ", "")
        reasons = list(dict.fromkeys(line.strip().rstrip(".") for line in told.splitlines()))
        lines = [f"Slurm refuses the job: {'; '.join(reasons)}."]
        if "contact" not in told:
            from hpc_gym.jobs.slurm_check import slurm_findings

            failed = [each for each in slurm_findings(plan) if each.status == "failed"]
            lines += [f"  {each.check}: {each.detail}" for each in failed if each.check not in ("slurm", "sbatch")]
        lines.append(
            "sbatch's options are in cluster.slurm: `hpc-gym show EXPERIMENT --why cluster.slurm` says who set them, "
            "`hpc-gym check EXPERIMENT` all that is wrong."
        )
        raise UserError("\n".join(lines)) from None


def _make_run_directory(request: Request, dump: Callable[[Path], None], job_id: str) -> None:
    plan, run_dir = request.plan, Path(request.plan.run_dir)
    staging: Path | None = None
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.", dir=run_dir.parent))
        _fill(staging, request)
        dump(staging / SUBMISSION)
        if job_id:
            (staging / "submitit" / f"{job_id}_submitted.pkl").symlink_to("submitted.pkl")
        # mkdtemp makes it private; colleagues read each other's runs as the umask allows.
        staging.chmod(0o777 & ~_umask())
        staging.rename(run_dir)
    except OSError as error:
        _remove(staging)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            refuse_existing(plan)
        # Of a copy the name is that of the file which was read.
        where = run_dir.parent if error.errno == errno.ENOSPC else error.filename or run_dir
        raise UserError(
            f"the run directory {run_dir} cannot be made: {error.strerror or error} ({where}). "
            "Choose another place with cluster.runs_dir=FOLDER, or make room there."
        ) from error
    except BaseException:
        _remove(staging)
        raise


def _fill(folder: Path, request: Request) -> None:
    """Writes everything a job needs below `folder`."""
    plan = request.plan
    write_job(folder, request)
    (folder / "submitit").mkdir()
    source = snapshot(folder / "code")
    (folder / "manifest.json").write_text(manifest(request, source))
    write_secrets(folder / "secrets", plan)


def write_job(folder: Path, request: Request) -> None:
    """Writes what says what the job is: `experiment.yaml`, `plan.json` and `job.sh`."""
    (folder / "experiment.yaml").write_text(request.resolved())
    (folder / "plan.json").write_text(request.plan.to_json())
    script = folder / "job.sh"
    script.write_text(render(request.plan))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def write_secrets(folder: Path, plan: Plan) -> None:
    """The values of the secret environment variables that are set here, mode 0600 in a 0700 folder.

    Raises UserError when the judge's key is not among them.
    """
    judge = plan.rollout.judge
    if judge is not None and judge.api_key_env and not os.environ.get(judge.api_key_env):
        raise UserError(
            f"judge.api_key_env: {judge.api_key_env} is not set here, and the judge wants it: export it before the "
            "submit, or take api_key_env away where the address needs no key."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    values = {name: os.environ[name] for name in plan.secrets if name in os.environ}
    descriptor = os.open(folder / SUBMITTED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"env": values}, file)


def _undo(run_dir: Path, plan: Plan, job_id: str) -> None:
    record = JobRecord(job_id, plan.launch.kind, plan.name, str(run_dir), "", "", len(plan.nodes), 0.0)
    if plan.launch.kind == "local":
        local.kill(record)
    _remove(run_dir)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
