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
import tempfile
import time
from pathlib import Path
from types import FrameType

from hpc_gym.node import shared_memory, tree
from hpc_gym.node.causes import cause_from_log
from hpc_gym.node.channel import Refused, connect
from hpc_gym.node.context import NodeContext
from hpc_gym.node.coordinator import failure_message
from hpc_gym.node.log_pump import LogPump
from hpc_gym.plan.plan import Plan
from hpc_gym.protocol.attempt import Failure, Outcome

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def guard(run_dir: Path) -> Outcome:
    """Runs this node's supervisor and returns how the attempt ended. Nothing of this node is left when it returns."""
    tree.become_subreaper()
    private_dir = make_private_dir(run_dir)
    since, before = time.time(), shared_memory.names()
    try:
        context = NodeContext.from_environment(run_dir, private_dir)
        log = context.log(context.node.role, "supervisor")
        code = _run_supervisor(run_dir, private_dir, log)
        left = tree.kill_all(context.marker)
        if left:
            print(f"{context.node.name}: processes that do not die: {left}", flush=True)
        shared_memory.remove_left(shared_memory.recorded(private_dir / "shared_memory"), before, since)
        with contextlib.suppress(OSError, ValueError):
            return Outcome.from_json((private_dir / "outcome.json").read_text())
        return _report_death(context, log, code)
    finally:
        shutil.rmtree(private_dir, ignore_errors=True)


def make_private_dir(run_dir: Path) -> Path:
    """A new 0700 directory on this node, with a path short enough for Unix sockets (108 bytes) deep inside it
    (Ray's).
    """
    scratch = Plan.read(run_dir).launch.scratch or tempfile.gettempdir()
    if len(scratch) > 24 or not os.access(scratch, os.W_OK | os.X_OK):
        scratch = "/tmp"
    return Path(tempfile.mkdtemp(prefix="hg-", dir=scratch))


def _run_supervisor(run_dir: Path, private_dir: Path, log: Path) -> int:
    """The exit code of the supervisor, negative for a signal. Passes signals on to it meanwhile."""
    pump = LogPump()
    sink, stream = pump.attach(log)
    environment = {**os.environ, "HPC_GYM_PRIVATE_DIR": str(private_dir), "HPC_GYM_GUARDIAN": str(os.getpid())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    early: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, _: early.append(number)) for signum in _FORWARDED}
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "hpc_gym.node", str(run_dir)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            # Ctrl-C goes to the whole foreground group: the supervisor shall hear of it once, from here.
            start_new_session=True,
        )

        def forward(number: int, _: FrameType | None) -> None:
            child.send_signal(number)

        for signum in _FORWARDED:
            signal.signal(signum, forward)
        for number in early:
            child.send_signal(number)
        code = child.wait()
    finally:
        os.close(sink)
        stream.ended.wait(0.5)
        pump.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return code


def _report_death(context: NodeContext, log: Path, code: int) -> Outcome:
    """Tells the coordinator that this node's supervisor died; where that was the coordinator, writes the outcome
    itself.
    """
    node, killed_by = context.node, signal.Signals(-code).name if code < 0 else None
    cause = "from outside, or by the kernel for lack of memory" if killed_by == "SIGKILL" else cause_from_log(log)
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
    if node.rank == 0:
        if Outcome.read(context.attempt_dir) is None:
            outcome.write(context.run_dir, context.attempt_dir)
    else:
        report(context, failure)
    return outcome


def report(context: NodeContext, failure: Failure) -> bool:
    """Reports a failure to the coordinator from outside a supervisor; whether it was there to hear it."""

    async def tell() -> None:
        async with asyncio.timeout(3):
            host, port = context.coordinator
            channel = await connect(host, port, context.secrets.token, {"guardian": True})
            channel.send(failure_message(failure.process, failure))
            await channel.close()

    try:
        asyncio.run(tell())
    except (OSError, TimeoutError, Refused):
        return False
    return True
