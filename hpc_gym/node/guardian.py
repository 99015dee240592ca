"""Stands above a node's supervisor and does nothing but wait for it, so that nothing is left whichever of them is
killed.

submitit's task (guardian) → `python -m hpc_gym.node` (supervisor, a session of its own) → the node's processes. When
the supervisor is killed with -9, everything below it falls to the guardian, a child subreaper, which kills it and
reports to the coordinator. When the guardian is killed, the kernel sends the supervisor a SIGHUP and it stops the job
in good order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from hpc_gym.node import shared_memory, tree
from hpc_gym.node.causes import cause_from_log
from hpc_gym.node.channel import Message, Refused, connect
from hpc_gym.node.context import NodeContext, host_name
from hpc_gym.node.coordinator import DECIDED, failure_message
from hpc_gym.node.left_behind import SHARED_MEMORY_RECORD, hold, remove_left_behind
from hpc_gym.node.log_pump import LogPump
from hpc_gym.node.signals import STOP_SIGNALS, forwarded, start_blocked
from hpc_gym.protocol.attempt import Failure, Outcome

_BEFORE_SILENT_S = 1.0
"""So long before a node counts as silent its stopped supervisor is killed: Slurm kills what is left of a node that is
given up, and nobody cleans up after that.
"""
_LOOK_EVERY_S = 1.0
_TELL_AGAIN_S = 0.2
JOB_SCRIPT_PID = "HPC_GYM_SCRIPT_PID"
"""Variable with the pid of the job script, which is on the machine of node rank 0."""
UNFIT = 86
"""Exit code of a supervisor that finds no place for its private directory on its node; its last word says why."""


def guard(run_dir: Path) -> Outcome:
    """Runs this node's supervisor and returns how the attempt ended. Nothing of this node is left when it returns."""
    tree.become_subreaper()
    context = NodeContext.from_environment(run_dir)
    log = context.log(context.node.role, "supervisor")
    for directory in remove_left_behind(context.private_dir.parent):
        print(f"{context.node.name}: removed what a dead job left: {directory}", flush=True)
    since, before = time.time(), shared_memory.names()
    try:
        code, stopped = _run_supervisor(context, log)
        for signum in STOP_SIGNALS:
            # Slurm's SIGTERM may come now, and its SIGKILL later: there is time to clean up.
            signal.signal(signum, signal.SIG_IGN)
        if left := tree.kill_all(context.marker):
            print(f"{context.node.name}: processes that do not die: {left}", flush=True)
        with contextlib.suppress(OSError, ValueError):
            return _told(context, Outcome.from_json((context.private_dir / "outcome.json").read_text()))
        return _report_death(context, log, code, stopped)
    finally:
        clean(context, before, since)
        _continue_job_script(context)


def _continue_job_script(context: NodeContext) -> None:
    """A job script that was stopped (SIGSTOP) would hold the nodes until the time limit."""
    pid = int(os.environ.get(JOB_SCRIPT_PID, "0"))
    if context.node.rank == 0 and pid and (script := tree.process(pid)) is not None and script.stopped:
        tree.send([script], signal.SIGCONT)


def _told(context: NodeContext, outcome: Outcome) -> Outcome:
    """What the supervisor said, or is said of it. Where the coordinator could not, it becomes the attempt's outcome."""
    if context.node.rank == 0 and Outcome.read(context.attempt_dir) is None:
        outcome.write(context.run_dir, context.attempt_dir)
    return outcome


def clean(context: NodeContext, shared_memory_before: list[str], since: float) -> None:
    """Removes what a node whose processes are dead left on this machine."""
    record = context.private_dir / SHARED_MEMORY_RECORD
    shared_memory.remove_left(shared_memory.recorded(record), shared_memory_before, since)
    shutil.rmtree(context.private_dir, ignore_errors=True)


def _run_supervisor(context: NodeContext, log: Path) -> tuple[int, float]:
    """(the exit code of the supervisor, negative for a signal; for how many seconds it was stopped when it was killed
    for that). Passes signals on to it meanwhile.
    """
    pump = LogPump()
    sink, stream = pump.attach(log)
    environment = {**os.environ, "HPC_GYM_GUARDIAN": str(os.getpid())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
            return
        child.send_signal(number)
        if number == signal.SIGTERM:
            # Slurm's SIGKILL follows: one that was stopped must go on to clean up. Slurm itself reaches only the task.
            child.send_signal(signal.SIGCONT)

    with forwarded(forward):
        try:
            # Ctrl-C goes to the whole foreground group: in a session of its own the supervisor hears of it once, from
            # here.
            child = start_blocked(
                [sys.executable, "-m", "hpc_gym.node", str(context.run_dir)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        finally:
            os.close(sink)
        for number in early:
            child.send_signal(number)
        supervision = context.plan.supervision
        allowed = supervision.node_silent_s - supervision.heartbeat_s - _BEFORE_SILENT_S
        watch = _StoppedWatch(child.pid, max(1.0, allowed), context.private_dir)
        code = child.wait()
    stream.ended.wait(0.5)
    pump.close()
    return code, watch.stopped_s


class _StoppedWatch:
    """Kills a supervisor that was stopped (SIGSTOP) and not continued: nobody else could end what it has started, and
    where it is the coordinator's, nobody could end the job.
    """

    def __init__(self, pid: int, allowed_s: float, private_dir: Path) -> None:
        """`private_dir` is held meanwhile, once the supervisor has made it: see `hpc_gym.node.left_behind`."""
        self.stopped_s = 0.0
        """How long it had been stopped when it was killed for that."""
        self._pid = pid
        self._allowed_s = allowed_s
        self._private_dir = private_dir
        threading.Thread(target=self._run, name="stopped", daemon=True).start()

    def _run(self) -> None:
        stopped, looked, held = 0.0, time.monotonic(), False
        while (proc := tree.process(self._pid)) is not None and proc.parent == os.getpid() and not proc.zombie:
            time.sleep(_LOOK_EVERY_S)
            # Where Slurm suspends the whole job, this process was stopped too: only the time that it saw counts.
            seen, looked = min(time.monotonic() - looked, 2 * _LOOK_EVERY_S), time.monotonic()
            stopped = stopped + seen if proc.stopped else 0.0
            if not held:
                with contextlib.suppress(OSError):
                    hold(self._private_dir)
                    held = True
            if stopped > self._allowed_s:
                self.stopped_s = stopped
                tree.send([proc], signal.SIGKILL)
                return


def _report_death(context: NodeContext, log: Path, code: int, stopped_s: float) -> Outcome:
    """Tells the coordinator that this node's supervisor died; where that was the coordinator, writes the outcome
    itself. A supervisor that was stopped for good is a node that is lost.
    """
    node, killed_by = context.node, signal.Signals(-code).name if code < 0 else None
    cause = "from outside, or by the kernel for lack of memory" if killed_by == "SIGKILL" else cause_from_log(log)
    host = host_name()
    if stopped_s:
        cause, killed_by = f"host {host}: stopped by a signal for {stopped_s:.0f} s", None
    if code == UNFIT:
        cause = f"host {host}: not fit for the job: {cause}"
    failure = Failure(
        node.role,
        node.name,
        "supervisor",
        cause,
        str(log),
        context.attempt,
        time.time(),
        code if code >= 0 else None,
        killed_by,
    )
    outcome = Outcome("failed", failure=failure)
    lost = bool(stopped_s) or code == UNFIT
    if lost:
        outcome = Outcome("requeue", "a node was lost", (host,), failure)
    if node.rank != 0:
        message = failure_message(failure.process, failure)
        # A node that is not fit may say so before the coordinator is there.
        tell(context, {**message, "type": "lost", "host": host} if lost else message, 10.0 if code == UNFIT else 0.0)
        return outcome
    with contextlib.suppress(OSError, ValueError):
        outcome = Outcome.from_json((context.private_dir / DECIDED).read_text())
    return _told(context, outcome)


def report(context: NodeContext, failure: Failure) -> bool:
    """Reports a failure to the coordinator from outside a supervisor; whether it was there to hear it."""
    return tell(context, failure_message(failure.process, failure))


def tell(context: NodeContext, message: Message, within_s: float = 0.0) -> bool:
    """Sends the coordinator one message; whether it was there to hear it, or came within that time."""

    async def send() -> None:
        async with asyncio.timeout(3):
            host, port = context.coordinator
            channel = await connect(host, port, context.secrets.token, {"guardian": True})
            channel.send(message)
            await channel.close()

    deadline = time.monotonic() + within_s
    while True:
        try:
            asyncio.run(send())
        except (OSError, TimeoutError, Refused):
            if time.monotonic() > deadline:
                return False
            time.sleep(_TELL_AGAIN_S)
        else:
            return True
