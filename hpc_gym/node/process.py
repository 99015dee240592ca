"""One process (group) of a node: its lives, one after the other, each from start to the end of everything it left
behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gym.node import tree
from hpc_gym.node.causes import cause_from_log
from hpc_gym.node.children import Children
from hpc_gym.node.log_pump import LogPump, Stream
from hpc_gym.node.notifications import Notifications
from hpc_gym.node.placeholders import Values
from hpc_gym.node.watch import Watch
from hpc_gym.plan.plan import Process

_START_WITHIN_S = 3.0
"""How long the end of the job waits for a start that hangs."""
_STATUS_AFTER_S = 0.3
"""From a new status to its event, which tells the newest."""
_STATUS_EVERY_S = 3.0
"""Between such events of a process that is ready: many ranks in many days would fill the event log."""


@dataclass(frozen=True)
class End:
    """How a life ended. `cause` is a text for people; a hung one has neither exit code nor signal."""

    exit_code: int | None
    signal: str | None
    cause: str
    seconds: float
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Command:
    """What is really executed."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    pass_fds: tuple[int, ...]


class ManagedProcess:
    """Starts, watches and ends one process of the plan. At most one life at a time; `stop` ends everything it made."""

    def __init__(
        self,
        spec: Process,
        *,
        log: Path,
        marker: str,
        private_dir: Path,
        pump: LogPump,
        table: tree.ProcessTable,
        children: Children,
        report: Callable[..., None],
    ) -> None:
        """`marker` stands in the environment of all it makes. `report(event, **fields)` is called for what happens."""
        self.spec = spec
        self.log = log
        self.said = Notifications(private_dir / f"{spec.name}.notify", self._on_said)
        self.leader: tree.Proc | None = None
        self.members: dict[int, tree.Proc] = {}
        """Everything this life has been seen to consist of, by pid."""
        self._marker = marker
        self._private_dir = private_dir
        self._pump = pump
        self._table = table
        self._children = children
        self._report = report
        self._started = 0.0
        self._status_due: asyncio.TimerHandle | None = None
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set from outside to end the life, with the cause."""
        self._first_signal: int | None = None
        self._status_told = float("-inf")
        self._stream: Stream | None = None
        self._watch: Watch | None = None

    async def live(self, command: Command, values: Values, restarts: int) -> End:
        """Runs one life; returns when its main process is dead (killed, if it hung), whatever else it left."""
        await self.said.open()
        target = self._target(values)
        if isinstance(target, Path):
            # A server refuses to bind where the life before left its socket.
            target.unlink(missing_ok=True)
        ended = await self._spawn(command)
        assert self.leader is not None
        self._report("started", pid=self.leader.pid, restarts=restarts)
        self._watch = Watch(self.spec, self.said, self.log, target, self._seen, self._report)
        watch = asyncio.create_task(self._watch.run(), name=f"watch-{self.spec.name}")
        try:
            ends: list[asyncio.Future[Any]] = [ended, watch, self.given_up]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            cause = ""
            if not ended.done():
                if self.given_up.done():
                    cause = self.given_up.result()
                else:
                    cause = watch.result()
                    self._report("hung", cause=cause)
                await self.kill()
                await ended
        finally:
            watch.cancel()
        return await self._end(*ended.result(), cause)

    async def _spawn(self, command: Command) -> asyncio.Future[tuple[int, float]]:
        with self._children.starting():
            # The log and the program may lie on a file system that hangs: that must not hold up a heartbeat.
            starting = asyncio.create_task(asyncio.to_thread(self._start, command))
            try:
                child = await asyncio.shield(starting)
            except asyncio.CancelledError:
                # Once it has been started it is found by its marker, and killed.
                await asyncio.wait({starting}, timeout=_START_WITHIN_S)
                raise
            return self._expect(child)

    def _expect(self, child: subprocess.Popen[bytes]) -> asyncio.Future[tuple[int, float]]:
        leader = tree.process(child.pid)
        assert leader is not None, "a child that nobody has waited for stays in /proc"
        self.leader, self.members = leader, {child.pid: leader}
        if self._first_signal is not None:
            self.signal_leader(self._first_signal)
            self._first_signal = None
        return self._children.expect(child.pid)

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        sink, self._stream = self._pump.attach(self.log)
        self._started = time.monotonic()
        try:
            # A group and session of its own: a signal to it reaches all that did not leave it, and none else.
            child = subprocess.Popen(
                command.argv,
                env=command.env,
                pass_fds=command.pass_fds,
                cwd=self._private_dir,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        finally:
            os.close(sink)
        child.returncode = 0  # Waited for elsewhere: keeps Popen from complaining that it was not.
        return child

    def _target(self, values: Values) -> Path | int | None:
        """What is asked whether the process is ready: a Unix socket, or a port."""
        probe = self.spec.ready
        if probe is None or probe.kind == "notify":
            return None
        target = values.fill(probe.target)
        if probe.kind == "http":
            return self._private_dir / target
        return int(target) if target.isdigit() else values.ports[target]

    def _seen(self) -> Mapping[int, tree.Proc]:
        self.look(self._table.recent())
        return self.members

    def look(self, table: Mapping[int, tree.Proc]) -> None:
        """Takes note of what this life consists of now; called often, as an orphan no longer shows whose it is."""
        known = {pid for pid, proc in self.members.items() if pid in table and table[pid].start == proc.start}
        if self.leader is not None:
            known.update(pid for pid, proc in table.items() if proc.session == self.leader.pid)
        # What lost its parents between two looks has become a child of this process.
        adopted = {pid: proc for pid, proc in table.items() if proc.parent == os.getpid() and pid not in known}
        known.update(proc.pid for proc in tree.marked(self._marker, adopted))
        known.update(proc.pid for proc in tree.descendants(known, table))
        self.members = {pid: table[pid] for pid in known}

    def signal_leader(self, signum: int) -> None:
        """Sends a signal to the main process only; to one that is just being started, once it is there."""
        if self.leader is not None:
            tree.send([self.leader], signum)
        else:
            self._first_signal = signum

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to the process group, and to what has left it once the main process is gone; after `grace_s`,
        SIGKILL to everything. Returns when nothing is left.
        """
        if self.leader is None:
            return
        if self._watch is not None:
            self._watch.stopping = True
        leader = self.leader.pid
        self._ask_to_end([proc for proc in self._living() if proc.group == leader])
        asked: set[int] = set()
        deadline = time.monotonic() + grace_s
        while (living := self._living()) and time.monotonic() < deadline:
            if leader not in self.members or self.members[leader].zombie:
                self._ask_to_end([proc for proc in living if proc.pid not in asked])
                asked.update(proc.pid for proc in living)
            await asyncio.sleep(0.05)
        await self.kill()

    def _ask_to_end(self, procs: list[tree.Proc]) -> None:
        tree.send(procs, signal.SIGTERM)
        # A stopped process would sleep through the grace.
        tree.send(procs, signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL to everything of this life, until nothing is left or five seconds have passed."""
        deadline = time.monotonic() + 5
        while (living := self._living()) and time.monotonic() < deadline:
            tree.send(living, signal.SIGKILL)
            await asyncio.sleep(0.02)

    def _living(self) -> list[tree.Proc]:
        self.look(self._table.recent())
        return [proc for proc in self.members.values() if not proc.zombie]

    async def _end(self, status: int, cpu_seconds: float, killed_for: str) -> End:
        code = os.waitstatus_to_exitcode(status)
        seconds = round(time.monotonic() - self._started, 3)
        if self._stream is not None:
            # Its last words; an orphan may hold the pipe open for longer.
            await asyncio.to_thread(self._stream.ended.wait, 0.3)
        name = signal.Signals(-code).name if code < 0 else None
        cause = killed_for or self.said.said.failure
        if not cause and (code or self.spec.kind == "service"):
            cause = await asyncio.to_thread(self._cause, name)
        return End(None if code < 0 else code, None if killed_for else name, cause, seconds, round(cpu_seconds, 3))

    def _cause(self, killed_by: str | None) -> str:
        stream = self._stream
        text = cause_from_log(self.log, stream.unwritten if stream is not None else b"")
        if stream is not None and stream.lost:
            text += f" ({stream.lost} bytes of its output found no place in the log: {stream.trouble})"
        if killed_by == "SIGKILL":
            return "from outside, or by the kernel for lack of memory" + (f"; last words: {text}" if text else "")
        return text

    def _on_said(self, field: str) -> None:
        said = self.said.said
        if field == "status":
            # A trainer may say it many times a second; a reader needs the last one, now and then.
            if self._status_due is None:
                loop = asyncio.get_running_loop()
                since = loop.time() - self._status_told if said.ready else _STATUS_EVERY_S
                self._status_due = loop.call_later(max(_STATUS_AFTER_S, _STATUS_EVERY_S - since), self._report_status)
        elif field == "saving":
            self._report("saving" if said.saving else "saved")
        elif field == "failure":
            self._report("complained", cause=said.failure)

    def _report_status(self) -> None:
        self._status_due, self._status_told = None, asyncio.get_running_loop().time()
        self._report("status", text=self.said.said.status)
