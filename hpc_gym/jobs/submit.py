"""The Python API: `hpc_gym.submit` and, through submitit's own executors, `hpc_gym.run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

    from hpc_gym.jobs.job import HpcgymJob
    from hpc_gym.jobs.request import Request
    from hpc_gym.plan.plan import Plan


def submit(
    experiment: str | Path, overrides: Sequence[str] = (), cluster: str | None = None, name: str | None = None
) -> HpcgymJob:
    """Submits an experiment (a YAML file, or a name under `configs/experiments/`) and returns its job.

    `overrides`: `KEY=VALUE`, as on the command line. `cluster`: a cluster profile in place of the experiment's own.
    `name`: of the run, which names its directory. Raises UserError for whatever is wrong with the request; then nothing
    is left behind.
    """
    from hpc_gym.jobs.request import prepare

    return submit_prepared(prepare(experiment, overrides, cluster, name))


def submit_prepared(request: Request) -> HpcgymJob:
    """Submits what `prepare` gave. Raises UserError when it has no runtimes to run in."""
    refuse_missing_runtimes(request.plan)
    # Late, for they cost more than everything that a dry run imports.
    from hpc_gym.jobs.job import HpcgymJob
    from hpc_gym.jobs.submission import submit_request

    return HpcgymJob.of(submit_request(request, submission_of(request.plan).dump))


def submission_of(plan: Plan) -> DelayedSubmission:
    """What submitit runs on every node of a job."""
    from submitit.core.utils import DelayedSubmission

    from hpc_gym.node.supervisor import supervise

    return DelayedSubmission(supervise, plan.run_dir)


def refuse_missing_runtimes(plan: Plan) -> None:
    """Raises UserError when a job has no runtimes to run in: they are built before, never inside one."""
    from hpc_gym.errors import UserError
    from hpc_gym.jobs.check import missing_runtimes

    if missing := missing_runtimes(plan):
        raise UserError("\n".join(missing))


def run(*overrides: str) -> dict[str, Any]:
    """What is submitted through submitit's `AutoExecutor(cluster="hpcgym")`: a run of the executor's experiment.

        executor = submitit.AutoExecutor(folder="runs", cluster="hpcgym")
        executor.update_parameters(hpcgym_experiment="workplace-sudoku")
        jobs = executor.map_array(hpc_gym.run, ["name=lr-1 grpo.learning_rate=1e-5", ...])

    Called by itself it submits nothing, for it has no experiment. Each of `overrides` is one `KEY=VALUE`, or several
    separated by blanks.
    """
    raise RuntimeError("hpc_gym.run is submitted through an executor; to submit an experiment, call hpc_gym.submit")
