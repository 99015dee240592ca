"""What a signal to the job means for the attempt. Slurm says SIGTERM for many things: what for, it must be asked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from hpc_gym.node import scontrol
from hpc_gym.node.verdict import Verdict
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Failure

JOB_SCRIPT = "job script"
"""Stands for a process where the script of the job itself was killed."""
_ASK_SLURM_FOR_S = 1.0
_ONE_SIGNAL_S = 5.0


class JobSignals:
    """Takes the signals that any node, or the job script, has received."""

    def __init__(
        self,
        plan: Plan,
        attempt: int,
        verdict: Verdict,
        save: Callable[[str, float | None], None],
        changed: Callable[[], None],
    ) -> None:
        """`save(reason, within_s)` orders tasks to stop at a checkpoint. `changed` is called where the verdict has
        changed after `take` returned.
        """
        self._plan = plan
        self._attempt = attempt
        self._verdict = verdict
        self._save = save
        self._changed = changed
        self._asking: asyncio.Task[None] | None = None
        self._asked = 0.0

    def take(self, signal: str) -> None:
        if signal == "SIGUSR2":
            self._save(f"the job received {signal}: its time limit is near", None)
        elif signal == "SIGTERM" and self._plan.launch.kind == "slurm":
            # It comes to all nodes at once; and again at the end of a preemption's grace, after which Slurm kills.
            if self._asking is None or (self._asking.done() and time.monotonic() - self._asked > _ONE_SIGNAL_S):
                self._asked = time.monotonic()
                self._asking = asyncio.create_task(self._ask_slurm(), name="why SIGTERM")
        elif not self._verdict.cancelled:
            self._verdict.cancelled = f"the job received {signal}"

    async def _ask_slurm(self) -> None:
        """SIGTERM is also all that a job hears when Slurm takes its nodes for another: then there is a grace time."""
        standing = await asyncio.to_thread(scontrol.standing, os.environ.get("HPC_GYM_JOB_ID", ""), _ASK_SLURM_FOR_S)
        if standing.preempted and standing.state == "RUNNING":
            # Slurm says the end of the grace time as the job's end, and SIGTERM once more then.
            supervision = self._plan.supervision
            self._save(scontrol.PREEMPTED, supervision.time_limit_margin_s - supervision.stop_within_s)
        elif standing.state in ("PENDING", "PREEMPTED", "NODE_FAIL"):
            # SIGKILL follows after KillWait: the other half of it is for the stop.
            within_s = await asyncio.to_thread(scontrol.kill_wait, _ASK_SLURM_FOR_S) / 2
            self._save(scontrol.PREEMPTED if standing.preempted else scontrol.QUEUED_AGAIN, within_s)
        elif standing.script_killed_by:
            self._verdict.script_killed = self._script_killed(standing.script_killed_by)
        elif not self._verdict.cancelled:
            self._verdict.cancelled = "the job received SIGTERM"
        self._changed()

    def _script_killed(self, by: str) -> Failure:
        """Slurm ends a job whose script has ended: then there is nobody else to say why, and to clean up after it."""
        node, job_id = self._plan.nodes[0], os.environ.get("HPC_GYM_JOB_ID", "")
        log = Path(self._plan.run_dir) / "submitit" / f"{job_id}_batch.out"
        cause = "from outside, or by the kernel for lack of memory" if by == "SIGKILL" else ""
        return Failure(node.role, node.name, JOB_SCRIPT, cause, str(log), self._attempt, time.time(), None, by)
