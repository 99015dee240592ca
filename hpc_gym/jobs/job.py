"""A submitted job: submitit's `Job`, which knows its run directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from submitit.core.core import Job
from submitit.core.utils import FailedJobError, UncompletedJobError

from hpc_gym.errors import UserError
from hpc_gym.jobs import records
from hpc_gym.jobs.cancellation import cancel
from hpc_gym.jobs.log_files import Selection, refuse_unknown
from hpc_gym.jobs.records import JobRecord
from hpc_gym.jobs.script_log import output, script_log, without_outcome
from hpc_gym.jobs.state import JobWatch, has_ended, last_outcome

if TYPE_CHECKING:
    from hpc_gym.jobs.status import Status


class HpcgymJob(Job[dict[str, Any]]):
    """A job of hpc-gym, as submitit's futures are. Its tasks are the nodes of the job, by rank.

    The job has ended when its state says so, not when some task's result file exists: after a requeue those of an
    earlier attempt are still there.
    """

    def __init__(self, folder: Path | str, job_id: str, tasks: Sequence[int] = (0,)) -> None:
        self._record: JobRecord | None = None
        self._watch: JobWatch | None = None
        super().__init__(folder, job_id, tasks)

    @classmethod
    def of(cls, record: JobRecord) -> HpcgymJob:
        """The job of a record."""
        job = cls(Path(record.run_dir) / "submitit", record.job_id, tuple(range(record.nodes)))
        job._record = record
        return job

    @classmethod
    def find(cls, job: str = "latest") -> HpcgymJob:
        """The job with that job id, run name or run directory, or the latest. Raises UserError when there is none."""
        return cls.of(records.find(job))

    @property
    def run_dir(self) -> Path:
        return Path(self.paths.folder).parent

    @property
    def record(self) -> JobRecord:
        if self._record is None:
            self._record = JobRecord.read(self.run_dir)
        return self._record

    def _register_in_watcher(self) -> None:
        """There is nothing to register: states come from files, the process or the queue."""

    @property
    def state(self) -> str:
        """The job's state in Slurm's words, right from any process; Slurm is asked every few seconds at most."""
        return self._refreshed(force=False)

    def _refreshed(self, force: bool) -> str:
        return self._watched().state(force)

    def _watched(self) -> JobWatch:
        if self._watch is None:
            self._watch = JobWatch(self.record)
        return self._watch

    def get_info(self, mode: str = "force") -> dict[str, str]:
        return {"JobID": self.job_id, "State": self._refreshed(force=mode == "force"), "WorkDir": str(self.run_dir)}

    def done(self, force_check: bool = False) -> bool:
        return has_ended(self._refreshed(force_check))

    def wait(self) -> None:
        """Waits until the job has ended."""
        while not self.done():
            time.sleep(0.2)

    def result(self) -> dict[str, Any]:
        """Waits, and says `outcome`, `steps` (how far training came), `attempts` and `run_dir`.

        Raises FailedJobError with the first cause when the job failed, UncompletedJobError when it was cancelled.
        """
        error = self.exception()
        if error is not None:
            raise error
        status = self.status()
        return {
            "outcome": "completed",
            "steps": status.step,
            "attempts": status.attempt,
            "run_dir": str(self.run_dir),
        }

    def results(self) -> list[dict[str, Any]]:
        """As `result`, once per node."""
        return [self.result() for _ in self._tasks]

    def exception(self) -> UncompletedJobError | FailedJobError | None:
        """Waits; the first cause of the job's failure, None when it completed."""
        self.wait()
        state = self.state
        if state == "COMPLETED":
            return None
        outcome = last_outcome(self.run_dir)
        told = outcome.sentence() if outcome else without_outcome(self.record, state)
        kind = FailedJobError if state == "FAILED" else UncompletedJobError
        return kind(f"job {self.job_id} ({self.run_dir}): {told}")

    def cancel(self, check: bool = True) -> None:
        """Stops the job in good order; with `check`, waits until nothing of it is left. Raises UserError otherwise."""
        outcome = cancel(self.record, wait=check)
        self._watch = None
        if check and not outcome.gone:
            raise UserError(outcome.sentence)

    def stdout(self) -> str | None:
        """What the job script wrote, which ends with how the job ended; of a `task(K)`, what that one wrote on its
        node. None before it began.
        """
        return _text(output(self.record, self._task_file("out")) if self._is_a_task else script_log(self.record))

    def stderr(self) -> str | None:
        """What the task of node rank 0 wrote to stderr, or that of a `task(K)`; None before it began."""
        return _text(output(self.record, self._task_file("err")))

    @property
    def _is_a_task(self) -> bool:
        """Whether this stands for one node of a job that has several."""
        return len(self._tasks) == 1 < self.record.nodes

    def _task_file(self, stream: str) -> str:
        return f"{self._tasks[0]}_log.{stream}"

    def logs(
        self,
        *,
        role: str | None = None,
        node: str | None = None,
        process: str | None = None,
        attempt: int | None = None,
        errors_only: bool = False,
        follow: bool = False,
    ) -> Iterator[str]:
        """The lines of all log files, merged in time order, each with role, node, process and time.

        `errors_only`: the errors with the lines around them, the first cause first. `follow`: also what is written
        until the job ends.
        """
        from hpc_gym.jobs.logs import errors, logs

        selection = Selection(role, node, process, attempt)
        refuse_unknown(self.run_dir, selection)
        if errors_only:
            pieces = errors(self.run_dir, selection)
        else:
            pieces = logs(self.run_dir, selection, ended=self.done if follow else None)
        for piece in pieces:
            yield from piece.decode(errors="replace").splitlines()

    def status(self) -> Status:
        """Where the job stands, in stages."""
        from hpc_gym.jobs.status import read_status

        return read_status(self.record, self._watched().standing())

    def task(self, task_id: int) -> HpcgymJob:
        return cast(HpcgymJob, super().task(task_id))

    def __del__(self) -> None:
        if getattr(self, "_cancel_at_deletion", False) and not self.done():
            self.cancel(check=False)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
