"""The submitit plugin `hpcgym`: `submitit.AutoExecutor(cluster="hpcgym")` finds it by its entry point."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.core.core import Executor
from submitit.core.utils import DelayedSubmission

from hpc_gym.errors import UserError
from hpc_gym.jobs.job import HpcgymJob
from hpc_gym.jobs.submit import run, submit_prepared

if TYPE_CHECKING:
    from hpc_gym.jobs.request import Request


class HpcgymExecutor(Executor):
    """Submits runs of one experiment; `folder` is where their run directories go.

    Parameters, with the prefix `hpcgym_` through AutoExecutor: `experiment` (a file or a name), `overrides` (a list of
    `KEY=VALUE`), `cluster` (the name of a cluster profile). What is submitted is `hpc_gym.run`, with further overrides
    as arguments. submitit's shared parameter `name` names the run; nodes, time and GPUs are the experiment's.
    """

    job_class = HpcgymJob

    def __init__(self, folder: Path | str, **parameters: Any) -> None:
        super().__init__(folder)
        self._internal_update_parameters(**parameters)

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return {"experiment", "overrides", "cluster", "name"}

    @classmethod
    def affinity(cls) -> int:
        """Never chosen unless asked for: it runs experiments, not functions."""
        return 0

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() - self._valid_parameters()):
            raise UserError(
                f"the hpcgym executor takes no parameter {', '.join(unknown)}; it takes experiment, overrides, cluster "
                "and name. Nodes, time and GPUs are part of the experiment: give them as overrides."
            )
        super()._internal_update_parameters(**kwargs)

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        experiment = self.parameters.get("experiment")
        if not experiment:
            raise UserError("the hpcgym executor needs an experiment: update_parameters(hpcgym_experiment=...)")
        # Every supervisor loads this plugin, and needs nothing of what makes a Plan.
        from hpc_gym.jobs.request import prepare

        # All are prepared before one is submitted, so that a mistake in the last leaves nothing half done.
        requests = [
            prepare(experiment, self._overrides(delayed), self.parameters.get("cluster"), self.parameters.get("name"))
            for delayed in delayed_submissions
        ]
        names = [request.plan.run_dir for request in requests]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"several runs would be called the same: {', '.join(twice)}. Give each its own name=...")
        return _submit_all(requests)

    def _overrides(self, delayed: DelayedSubmission) -> list[str]:
        if delayed.function is not run or delayed.kwargs:
            raise UserError(
                "the hpcgym executor runs experiments: submit hpc_gym.run, with overrides as its arguments, as in "
                "executor.submit(hpc_gym.run, 'grpo.max_steps=10')"
            )
        given: Sequence[str] = self.parameters.get("overrides") or ()
        own = [part for argument in delayed.args for part in shlex.split(str(argument))]
        return [f"cluster.runs_dir={self.folder}", *given, *own]


def _submit_all(requests: Sequence[Request]) -> list[HpcgymJob]:
    """Raises UserError, with the jobs that are submitted already, when one of them is refused."""
    jobs: list[HpcgymJob] = []
    for request in requests:
        try:
            jobs.append(submit_prepared(request))
        except UserError as error:
            if not jobs:
                raise
            raise UserError(f"{request.plan.name}: {error}\n{_left_behind(jobs, len(requests))}") from None
    return jobs


def _left_behind(jobs: Sequence[HpcgymJob], wanted: int) -> str:
    """What is there of a sweep that was cut short, which nobody has been given the jobs of."""
    lines = [f"{len(jobs)} of the {wanted} runs are submitted, and go on:"]
    lines += [f"  job {', '.join(job.record.job_ids)}: {job.run_dir}" for job in jobs]
    lines.append("To cancel them:")
    lines += [f"  hpc-gym cancel {shlex.quote(str(job.run_dir))}" for job in jobs]
    return "\n".join(lines)
