"""Decides from what was reported how an attempt ends. Pure bookkeeping: no clock, no network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hpc_gym.node.causes import is_collateral
from hpc_gym.protocol.attempt import STOPPED_AT_CHECKPOINT, Failure, Outcome

Task = tuple[int, str]
"""(rank of the node, name of the process)."""


@dataclass
class Verdict:
    """What is known of the end of an attempt so far. `tasks`: every task of the plan."""

    tasks: frozenset[Task]
    ended: dict[Task, int] = field(default_factory=dict)
    """Exit codes of tasks that ended well: 0, or stopped at a checkpoint."""
    failures: list[Failure] = field(default_factory=list)
    """In the order in which they were reported."""
    complaints: list[Failure] = field(default_factory=list)
    """What tasks said of why they fail, before they have ended."""
    lost: list[tuple[Failure, str]] = field(default_factory=list)
    """Nodes that fell silent, with their host names."""
    stalled: Failure | None = None
    """Training does not move any more."""
    stalled_requeues: bool = False
    cancelled: str = ""
    """Who asked for the end."""
    checkpoint: str = ""
    """Why tasks were asked to stop at a checkpoint."""
    script_killed: Failure | None = None
    """The job script is dead: nobody could queue the job again."""
    overdue: bool = False
    """The time that was allowed for that checkpoint is over."""

    def finished(self, tasks: Iterable[Task] | None = None) -> bool:
        """Whether every task has ended well."""
        return all(task in self.ended for task in (self.tasks if tasks is None else tasks))

    def outcome(self) -> Outcome | None:
        """How the attempt ends, None while it goes on.

        A signal to the job explains whatever dies with it. A lost node explains what failed: the coordinator asks for
        the end only when it has heard every node since the failure, or knows that one is lost. Once tasks were told to
        stop at a checkpoint, the job is to be requeued whatever dies: there may be no time left.
        """
        stopped = STOPPED_AT_CHECKPOINT in self.ended.values()
        if self.finished():
            return (
                Outcome("requeue", self.checkpoint or "a task stopped at a checkpoint")
                if stopped
                else Outcome("completed")
            )
        if self.cancelled:
            return Outcome("cancelled", self.cancelled)
        if self.script_killed is not None:
            return Outcome("failed", failure=self.script_killed)
        if self.checkpoint:
            over = self.overdue or self.lost or self._cannot_save()
            return Outcome("requeue", self.checkpoint, self._bad_hosts()) if over else None
        if self.stalled is not None:
            return Outcome("requeue" if self.stalled_requeues else "failed", "the job stalled", failure=self.stalled)
        if self.lost:
            return Outcome("requeue", "a node was lost", self._bad_hosts(), self.lost[0][0])
        if self.failures:
            return Outcome("failed", failure=(self._causes() or self.failures)[0])
        return None

    def _cannot_save(self) -> bool:
        """Whether a task has failed, or a supervisor with its tasks; services are not needed any more."""
        saving = {name for _, name in self.tasks} | {"supervisor"}
        return any(failure.process in saving for failure in self.failures)

    def only_collateral(self) -> bool:
        """Whether all that failed so far failed because something else is gone."""
        return bool(self.failures) and not self._causes()

    def _causes(self) -> list[Failure]:
        """What failed by itself. A task that complained first, but takes long to end, comes after those that have
        ended.
        """
        return [failure for failure in (*self.failures, *self.complaints) if not _follows(failure)]

    def _bad_hosts(self) -> tuple[str, ...]:
        return tuple(host for _, host in self.lost if host)


def _follows(failure: Failure) -> bool:
    """Whether it failed because another is gone. Who was killed did not, whatever its last words were; C++ libraries
    abort.
    """
    return failure.signal in (None, "SIGABRT") and is_collateral(failure.cause)
