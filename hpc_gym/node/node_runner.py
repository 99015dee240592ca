"""The node runner: runs the processes of one node of the plan, from the first to the last."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback
from typing import Any

from hpc_gym.node import tree
from hpc_gym.node.bonds import Bonds
from hpc_gym.node.channel import Message, Refused
from hpc_gym.node.children import Children
from hpc_gym.node.commands import command
from hpc_gym.node.context import NodeContext, host_name
from hpc_gym.node.coordinator import Coordinator, failure_message
from hpc_gym.node.endpoints import Endpoints
from hpc_gym.node.left_behind import SHARED_MEMORY_RECORD
from hpc_gym.node.link import Link
from hpc_gym.node.log_pump import LogPump
from hpc_gym.node.placeholders import wanted_endpoints
from hpc_gym.node.precheck import full, unfit
from hpc_gym.node.process import End, ManagedProcess
from hpc_gym.node.reach import Reach
from hpc_gym.node.shared_memory import SharedMemory
from hpc_gym.node.signals import STOP_SIGNALS
from hpc_gym.node.stall import keep_evidence
from hpc_gym.plan.plan import Process
from hpc_gym.protocol.attempt import STOPPED_AT_CHECKPOINT, Failure, Outcome

_LOOK_EVERY_S = 1.0
_CHECKS_MAY_TAKE_S = 30.0
"""nvidia-smi may hang where it cannot even be killed."""
_COORDINATOR_MAY_TAKE_S = 2.0
"""From a signal that ends the job until it has been told of it."""


class NodeRunner:
    """Invariant: when `run` returns, nothing that this node started is alive, and nothing of it is left in /dev/shm."""

    def __init__(self, context: NodeContext) -> None:
        self._context = context
        self._pump = LogPump()
        self._table = tree.ProcessTable()
        self._shared_memory = SharedMemory(context.private_dir / SHARED_MEMORY_RECORD)
        self._endpoints = Endpoints(context)
        self._children = Children()
        self._stopping = asyncio.Event()
        self._saving = False
        """Tasks were told to stop at a checkpoint."""
        self._evidence: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._processes = [self._managed(spec) for spec in context.node.processes]
        hello = {
            "rank": context.node.rank,
            "host": host_name(),
            "address": context.address,
            "pid": os.getpid(),
        }
        self._link = Link(*context.coordinator, context.secrets.token, hello, context.plan.supervision, self._take)
        self._bonds = Bonds(self._processes, self._link.send)
        self._reach = Reach(context)

    async def run(self) -> Outcome:
        """Runs the node until the coordinator has said how the attempt ended, or is gone."""
        self._handle_signals()
        self._link.send({"type": "endpoints", "endpoints": self._endpoints.open() | self._reach.open()})
        coordinator = self._coordinate()
        link = asyncio.create_task(self._keep_link(), name="link")
        look = asyncio.create_task(self._look(), name="look")
        processes = self._processes if await self._is_fit() else []
        keepers = [asyncio.create_task(self._keep_or_fail(each), name=each.spec.name) for each in processes]
        reach = asyncio.create_task(self._check_reach(), name="reach")
        await self._stopping.wait()
        reach.cancel()
        stopped = time.monotonic()
        await self._release(keepers)
        look.cancel()
        self._link.send({"type": "released", "seconds": round(time.monotonic() - stopped, 3)})
        outcome = await self._outcome()
        if coordinator is not None:
            await asyncio.wait({coordinator}, timeout=5)
        link.cancel()
        return outcome

    async def _is_fit(self) -> bool:
        """Whether this node may start its processes; where not, the coordinator ends the attempt."""
        if self._context.plan.launch.kind == "local":
            return True
        began = time.monotonic()
        node, log = self._context.node, str(self._context.attempt_dir)
        if cause := await asyncio.to_thread(full, self._context):
            # Not this node's fault: without it, the next attempt would find the same.
            self._link.send(failure_message("supervisor", self._failure("supervisor", node.role, cause, log)))
        elif cause := await self._unfit():
            self._link.send({"type": "unfit", "cause": cause})
        else:
            self._report(None, "checked", seconds=round(time.monotonic() - began, 3))
        return not cause

    async def _unfit(self) -> str:
        """Why this node is not fit. Nothing is started yet, so nobody is kept from being waited for meanwhile: the exit
        code of what is asked would be taken from whoever asks.
        """
        with self._children.starting():
            asked = asyncio.create_task(asyncio.to_thread(unfit, self._context))
            done, _ = await asyncio.wait({asked}, timeout=_CHECKS_MAY_TAKE_S)
            return asked.result() if done else f"its checks did not end within {_CHECKS_MAY_TAKE_S:g} s"

    async def _check_reach(self) -> None:
        """Beside the start of the programs, which loading keeps busy for longer."""
        if self._context.plan.launch.kind == "local":
            return

        def broken(rank: int, cause: str) -> None:
            self._link.send({"type": "unreachable", "of": rank, "cause": cause})

        await self._reach.check(broken, lambda found: self._report(None, "reached", **found))

    def _coordinate(self) -> asyncio.Task[Outcome] | None:
        context = self._context
        if context.node.rank != 0:
            return None
        coordinator = Coordinator(context)
        task = asyncio.create_task(coordinator.run(*context.coordinator), name="coordinator")

        def ended(done: asyncio.Task[Outcome]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                self._give_up(f"the coordinator failed: {error}")

        task.add_done_callback(ended)
        return task

    async def _keep_link(self) -> None:
        try:
            reason = await self._link.run()
        except Refused as error:
            reason = str(error)
        self._give_up(reason)

    def _give_up(self, cause: str) -> None:
        """Ends this node without the coordinator."""
        if not self._ended.done():
            log = str(self._context.log(self._context.node.role, "supervisor"))
            self._ended.set_result(
                Outcome("failed", failure=self._failure("supervisor", self._context.node.role, cause, log))
            )
        self._stopping.set()

    async def _outcome(self) -> Outcome:
        limit = self._context.plan.supervision.stop_within_s + 5
        await asyncio.wait({self._ended}, timeout=limit)
        if not self._ended.done():
            self._give_up(f"the coordinator did not end the attempt within {limit:g} s")
        return self._ended.result()

    def _take(self, message: Message) -> None:
        kind = message.get("type")
        if kind == "endpoints":
            self._endpoints.learn(message["endpoints"])
            self._reach.learn(message["endpoints"])
        elif kind == "checkpoint":
            self._saving = True
            for process in self._processes:
                if process.spec.kind == "task":
                    process.signal_leader(signal.SIGUSR2)
        elif kind == "restart":
            self._bonds.take(message)
        elif kind == "stalled":
            self._evidence = asyncio.create_task(self._keep_evidence(), name="evidence")
        elif kind == "stop":
            self._stopping.set()
        elif kind == "end":
            if not self._ended.done():
                self._ended.set_result(Outcome.from_json(message["outcome"]))
            self._stopping.set()

    async def _keep_evidence(self) -> None:
        context = self._context
        await keep_evidence(self._processes, context.private_dir, context.attempt_dir / "stall")
        self._link.send({"type": "evidence"})

    async def _keep_or_fail(self, process: ManagedProcess) -> None:
        try:
            await self._keep(process)
        except Exception as error:
            # Whatever it is, nobody watches this process any more.
            traceback.print_exc()
            self._fail(process, End(None, None, f"its supervisor failed: {type(error).__name__}: {error}", 0.0), 0)

    async def _keep(self, process: ManagedProcess) -> None:
        """Runs the lives of one process."""
        spec, restarts = process.spec, 0
        while not self._stopping.is_set():
            try:
                await self._endpoints.known(wanted_endpoints(spec, self._endpoints.names))
                values = self._endpoints.values
                run = await asyncio.to_thread(command, self._context, spec, values)
                if self._saving and spec.kind == "task":
                    # It has nothing to save yet.
                    self._link.send({"type": "ended", "process": spec.name, "exit_code": STOPPED_AT_CHECKPOINT})
                    return
                self._bonds.begin(process)
                end = await process.live(run, values, restarts)
            except (OSError, KeyError) as error:
                end = End(None, None, f"it could not be started: {_sentence(error)}", 0.0)
            if self._stopping.is_set():
                return
            self._report(spec, "exited", exit_code=end.exit_code, signal=end.signal, seconds=end.seconds,
                         cpu_seconds=end.cpu_seconds)  # fmt: skip
            if spec.kind == "task" and end.exit_code in (0, STOPPED_AT_CHECKPOINT):
                self._link.send({"type": "ended", "process": spec.name, "exit_code": end.exit_code})
                return
            if restarts >= spec.restarts:
                self._fail(process, end, restarts)
                return
            delay = 0.0 if restarts == 0 else min(10.0, 2.0**restarts)
            restarts += 1
            self._bonds.restart(process)
            self._report(spec, "restarting", restarts=restarts, delay=delay, cause=_what(end))
            await process.kill()
            await asyncio.sleep(delay)

    def _fail(self, process: ManagedProcess, end: End, restarts: int) -> None:
        spec = process.spec
        cause = end.cause
        if end.exit_code == 0:
            cause = "a service must live as long as the job does" + (f"; last words: {cause}" if cause else "")
        if restarts:
            cause += f" (after {restarts} restart{'s' if restarts > 1 else ''})"
        failure = self._failure(spec.name, spec.role, cause, str(process.log), end)
        self._report(spec, "failed", exit_code=end.exit_code, signal=end.signal, cause=cause, log=failure.log)
        self._link.send(failure_message(spec.name, failure))

    def _failure(self, process: str, role: str, cause: str, log: str, end: End | None = None) -> Failure:
        code, killed_by = (end.exit_code, end.signal) if end else (None, None)
        name = self._context.node.name
        return Failure(role, name, process, cause, log, self._context.attempt, time.time(), code, killed_by)

    def _managed(self, spec: Process) -> ManagedProcess:
        context = self._context

        def report(event: str, **fields: Any) -> None:
            if event in ("saving", "saved"):
                self._link.send({"type": "saving", "process": spec.name, "saving": event == "saving"})
            elif event == "complained" and spec.kind == "task":
                complaint = self._failure(spec.name, spec.role, fields["cause"], str(context.log(spec.role, spec.name)))
                self._link.send({**failure_message(spec.name, complaint), "type": "complained"})
            self._report(spec, event, **fields)

        return ManagedProcess(
            spec,
            log=context.log(spec.role, spec.name),
            marker=context.process_marker(spec.name),
            private_dir=context.private_dir,
            pump=self._pump,
            table=self._table,
            children=self._children,
            report=report,
        )

    def _report(self, spec: Process | None, event: str, **fields: Any) -> None:
        """Tells of a process; without one, of the node itself."""
        context = self._context
        head = {"time": time.time(), "attempt": context.attempt, "node": context.node.name}
        head |= {"role": spec.role if spec else context.node.role, "process": spec.name if spec else "", "event": event}
        self._link.send({"type": "event", "event": head | fields})

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._children.reap)
        for signum in STOP_SIGNALS:
            loop.add_signal_handler(signum, self._on_signal, signum.name)
        loop.add_signal_handler(signal.SIGHUP, self._lose_guardian)
        # Blocked until now, so that none came too early: see `hpc_gym.node.guardian`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [*STOP_SIGNALS, signal.SIGHUP])

    def _on_signal(self, name: str) -> None:
        self._link.send({"type": "signal", "signal": name})
        if name in ("SIGTERM", "SIGINT"):
            # Slurm's SIGKILL follows after KillWait: too soon to wait for a coordinator that never came, or is gone.
            asyncio.get_running_loop().call_later(_COORDINATOR_MAY_TAKE_S, self._end_alone, name)

    def _end_alone(self, name: str) -> None:
        if not self._link.stands:
            self._give_up(f"it received {name}, and the coordinator cannot be reached")

    def _lose_guardian(self) -> None:
        node, log = self._context.node, str(self._context.log(self._context.node.role, "supervisor"))
        failure = self._failure("supervisor", node.role, "its guardian, the task that started it, was killed", log)
        self._link.send(failure_message("supervisor", failure))

    async def _look(self) -> None:
        """Keeps track of what belongs to whom, as long as it can still be seen."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._look_now()

    def _look_now(self) -> None:
        table = self._table.recent()
        for process in self._processes:
            process.look(table)
        self._shared_memory.look(tree.descendants([os.getpid()], table))

    async def _release(self, keepers: list[asyncio.Task[None]]) -> None:
        """Stops everything; nothing is left when it returns."""
        self._look_now()
        allowed = max(1.0, self._context.plan.supervision.stop_within_s - 4.0)
        await asyncio.gather(*(each.stop(min(each.spec.stop_grace_s, allowed)) for each in self._processes))
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        if left := await tree.kill_all_async(self._context.marker, frozenset(), 3.0):
            print(f"{self._context.node.name}: processes that do not die: {left}", flush=True)
        self._shared_memory.remove()
        for process in self._processes:
            process.said.close()
        self._endpoints.close()
        self._reach.close()
        await asyncio.to_thread(self._pump.close)


def _what(end: End) -> str:
    if end.signal is not None:
        what = f"killed by {end.signal}"
    elif end.exit_code is not None:
        what = f"exit code {end.exit_code}"
    else:
        return end.cause
    return f"{what}: {end.cause}" if end.cause else what


def _sentence(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the plan declares no port or endpoint named {error}"
    return str(error)
