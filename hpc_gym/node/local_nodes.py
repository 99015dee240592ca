"""`python -m hpc_gym.node.local_nodes RUN_DIR`: what srun does on a cluster, on this machine.

One task per node of the plan, each with a supervisor. An attempt that is to be requeued is followed by the next one:
a local job has nobody else to do it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from hpc_gym.errors import UserError
from hpc_gym.node import attempt as attempts
from hpc_gym.node import shared_memory, tree
from hpc_gym.node.context import NodeContext, job_marker
from hpc_gym.node.guardian import clean, report
from hpc_gym.node.signals import forwarded, start_blocked
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Failure, Outcome

_LOST_NODES_ALLOWED = 2
"""Attempts that may follow one another because a node was lost."""


class LocalNodes:
    """The tasks of one attempt."""

    def __init__(self, plan: Plan, environment: dict[str, str]) -> None:
        self._plan = plan
        self._run_dir = Path(plan.run_dir)
        self._environment = environment
        self._tasks: dict[int, subprocess.Popen[bytes]] = {}
        self._ranks: dict[int, int] = {}
        self._last_end = 0.0

    def run(self, early: list[int]) -> Outcome:
        """Starts all tasks and returns the outcome of the attempt when nothing of it is left.

        `early`: signals that came when there was no attempt to pass them on to; emptied.
        """
        since, shared_memory_before = time.time(), shared_memory.names()
        marker = job_marker(self._context(0).secrets)
        for node in self._plan.nodes:
            self._start(node.rank)
        while early:
            self.forward(early.pop(0))
        self._wait()
        self._wait_for_orphans()
        if left := tree.kill_all(marker):
            print(f"processes that do not die: {left}", flush=True)
        for node in self._plan.nodes:
            clean(self._context(node.rank), shared_memory_before, since)
        outcome = Outcome.read(self._context(0).attempt_dir)
        if outcome is None:
            outcome = self._without_outcome()
            outcome.write(self._run_dir, self._context(0).attempt_dir)
            print(outcome.sentence(), flush=True)
        return outcome

    def _start(self, rank: int) -> None:
        environment = {**self._environment, "HPC_GYM_NODE_RANK": str(rank), "HPC_GYM_NODES": str(len(self._plan.nodes))}
        environment |= {"HPC_GYM_LAUNCHER": str(os.getpid())}
        folder = self._run_dir / "submitit"
        command = [sys.executable, "-m", "hpc_gym.node.supervisor", str(self._run_dir)]
        if any(folder.glob("*_submitted.pkl")):
            command = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]
        # Node rank 0 speaks for the job: it has this process's own output.
        out, err = (None, None) if rank == 0 else self._outputs(folder, rank)
        self._tasks[rank] = start_blocked(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self._ranks[self._tasks[rank].pid] = rank
        for descriptor in (out, err):
            if descriptor is not None:
                os.close(descriptor)

    def _outputs(self, folder: Path, rank: int) -> tuple[int, int]:
        folder.mkdir(exist_ok=True)
        stem = f"{self._environment.get('HPC_GYM_JOB_ID', 'local')}_{rank}_log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(folder / f"{stem}.out", flags), os.open(folder / f"{stem}.err", flags)

    def _wait(self) -> None:
        """Waits for all tasks; a task that was killed is reported to the coordinator, as its guardian no longer can."""
        running = dict(self._tasks)
        while running:
            for pid, status in tree.reap():
                rank = self._ranks.get(pid)
                if rank is None or running.pop(rank, None) is None:
                    continue
                code = os.waitstatus_to_exitcode(status)
                self._tasks[rank].returncode = code
                self._last_end = time.monotonic()
                if code < 0 and running and not report(self._context(rank), self._killed(rank, code)):
                    self.forward(signal.SIGTERM)
            if self._overdue():
                self.forward(signal.SIGKILL)
            time.sleep(0.05)

    def _overdue(self) -> bool:
        """Whether the tasks that still run have had their time: some after the coordinator's end, more after
        another's.
        """
        supervision = self._plan.supervision
        patience = supervision.stop_within_s + supervision.checkpoint_grace_s + 10
        if (first := self._tasks[0].returncode) is not None:
            # After an orderly end only a node that has been given up still runs.
            patience = supervision.stop_within_s / 2 if first >= 0 else supervision.stop_within_s + 2
        return self._last_end > 0 and time.monotonic() - self._last_end > patience

    def _wait_for_orphans(self) -> None:
        """A supervisor whose task was killed ends its node in good order, as a child of this process now."""
        deadline = time.monotonic() + self._plan.supervision.stop_within_s
        while orphans := [child for child in tree.children(os.getpid()) if _is_supervisor(child)]:
            if time.monotonic() > deadline:
                return
            # One that was stopped has been given up; it can still clean up.
            tree.send(orphans, signal.SIGCONT)
            tree.reap()
            time.sleep(0.05)

    def forward(self, signum: int) -> None:
        """Passes a signal on to every task."""
        for task in self._tasks.values():
            if task.returncode is None:
                task.send_signal(signum)

    def _context(self, rank: int) -> NodeContext:
        environment = {**self._environment, "HPC_GYM_NODE_RANK": str(rank)}
        return NodeContext.from_environment(self._run_dir, environment)

    def _killed(self, rank: int, code: int) -> Failure:
        context = self._context(rank)
        node, log = context.node, str(context.log(context.node.role, "supervisor"))
        cause, name = "the task of this node was killed from outside", signal.Signals(-code).name
        return Failure(node.role, node.name, "supervisor", cause, log, context.attempt, time.time(), None, name)

    def _without_outcome(self) -> Outcome:
        """What is said when no coordinator lived to say it."""
        killed = [(rank, task.returncode) for rank, task in self._tasks.items() if task.returncode < 0]
        rank, code = (killed or [(0, self._tasks[0].returncode)])[0]
        if killed:
            return Outcome("failed", failure=self._killed(rank, code))
        context = self._context(0)
        log = str(context.log(context.node.role, "supervisor"))
        failure = Failure(
            context.node.role,
            context.node.name,
            "supervisor",
            "it ended without an outcome",
            log,
            context.attempt,
            time.time(),
            code,
        )
        return Outcome("failed", failure=failure)


def main() -> int:
    """Runs attempt after attempt until one is not to be requeued. Returns the exit code of the last."""
    run_dir = Path(sys.argv[1]).resolve()
    tree.become_subreaper()
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    nodes: LocalNodes | None = None
    early: list[int] = []
    lost = 0

    def forward(signum: int, _: FrameType | None) -> None:
        nodes.forward(signum) if nodes is not None else early.append(signum)

    try:
        with forwarded(forward):
            while True:
                nodes = LocalNodes(Plan.read(run_dir), environment)
                outcome = nodes.run(early)
                nodes = None
                lost = lost + 1 if outcome.failure else 0
                if outcome.kind != "requeue" or lost > _LOST_NODES_ALLOWED:
                    attempts.end(run_dir)
                    return outcome.exit_code
                environment |= attempts.begin(run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _is_supervisor(proc: tree.Proc) -> bool:
    try:
        return b"\0hpc_gym.node\0" in Path(f"/proc/{proc.pid}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
