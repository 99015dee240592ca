"""The coordinator: registry of endpoints, heartbeats, event log, and the decision how the attempt ends.

It runs beside the supervisor of node rank 0, which talks to it over TCP like all the others. Messages are JSON objects
with a `type`:

* to the coordinator: `heartbeat`, `endpoints`, `event`, `ended` (a task ended well), `complained`, `failed`,
  `saving`, `signal`, `unfit`, `unreachable` (another node, from this one), `restart` (of what lives together),
  `released`;
* from it: `heartbeat`, `ask` (for a heartbeat at once), `endpoints` (of all nodes), `restart` (as it came),
  `checkpoint` (tasks save and stop), `stop`, `end` (the outcome).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import time
from pathlib import Path

from hpc_gym.node import attempt as attempts
from hpc_gym.node.channel import LONGEST, Channel, Message, accept
from hpc_gym.node.context import NodeContext
from hpc_gym.node.job_signals import JobSignals
from hpc_gym.node.journal import Journal
from hpc_gym.node.peers import Peer, Peers
from hpc_gym.node.reach import culprit
from hpc_gym.node.stall import StepWatch
from hpc_gym.node.time_limit import TimeLimit
from hpc_gym.node.verdict import Task, Verdict
from hpc_gym.protocol.attempt import STOPPED_AT_CHECKPOINT, Failure, Outcome

DECIDED = "decided.json"
"""File in the private directory of the coordinator's node: the outcome, as soon as it is decided."""
JOIN_WITHIN_S = 120.0
"""From the coordinator's start until every node's supervisor has reported."""
_LOOK_AT_STEPS_S = 1.0
_WRITE_WITHIN_S = 5.0
"""How long the outcome is kept from the nodes while a file system hangs."""
_EVIDENCE_WITHIN_S = 40.0
_OTHERS_MAY_TELL_S = 3.0
"""From the first connection between nodes that fails: who is at fault is seen from all that do."""
_ROLLOUTS = re.compile(r"rollouts \d+/\d+")
_ASKING_MAY_TAKE_S = 5.0
_SETTLE_S = 0.5
"""After the first failure: a rank that lost its peer is often faster to report than the one that died."""
_SETTLE_COLLATERAL_S = 1.5
"""As much longer, while all say that a peer is gone: the one that failed may still be in its teardown."""


class Coordinator:
    """`run` serves until the attempt has ended on every node and its outcome is written."""

    def __init__(self, context: NodeContext) -> None:
        plan = context.plan
        self._plan = plan
        self._attempt = context.attempt
        self._token = context.secrets.token
        self._directory = context.attempt_dir
        self._private_dir = context.private_dir
        self._journal = Journal(self._directory / "events.jsonl")
        self._peers = Peers(plan.nodes, context.hosts)
        self._saving: set[Task] = set()
        tasks = frozenset((n.rank, p.name) for n in plan.nodes for p in n.processes if p.kind == "task")
        self._verdict = Verdict(tasks)
        self._changed = asyncio.Event()
        self._seen: set[str] = set()
        self._broken: list[tuple[int, int, str]] = []
        """Ranks of which one does not reach the other, and why."""
        self._started = time.monotonic()
        self._first_cause = 0.0
        self._serving: set[asyncio.Task[None]] = set()
        self._without_evidence: set[int] = set()
        """Nodes that are asked what stalls."""
        self._without_supervisor: set[str] = set()
        """Nodes whose task has ended: nothing comes from there any more."""
        self._steps = StepWatch(Path(plan.run_dir) / "metrics.jsonl", self._attempt, plan.supervision)
        self._rollouts: dict[Task, str] = {}
        """How many of its rollouts each rank said were back."""
        self._overdue: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        """How much time is left for a checkpoint."""
        self._time_limit = TimeLimit(plan, os.environ.get("HPC_GYM_JOB_ID", ""))
        self._signals = JobSignals(plan, self._attempt, self._verdict, self._checkpoint, self._changed.set)

    async def run(self, host: str, port: int) -> Outcome:
        """Serves on `host:port`. Raises OSError when the port is taken."""
        server = await asyncio.start_server(self._serve, host, port, limit=LONGEST)
        watch = asyncio.create_task(self._watch(), name="heartbeats")
        steps = asyncio.create_task(self._watch_steps(), name="steps")
        limit = asyncio.create_task(self._watch_time_limit(), name="time limit")
        try:
            outcome = None
            while outcome is None:
                await self._until(lambda: self._verdict.outcome() is not None)
                self._first_cause = time.monotonic()
                outcome = await self._settle()
            await self._let_checkpoint_finish(outcome)
            await self._stop(outcome)
            outcome = await self._conclude(outcome)
            await asyncio.gather(*(peer.channel.close() for peer in self._peers))
            if self._plan.launch.kind == "slurm" and outcome.kind in ("completed", "failed"):
                # The job script does it too, unless it has been killed.
                await asyncio.to_thread(attempts.end, Path(self._plan.run_dir))
        finally:
            watch.cancel()
            steps.cancel()
            limit.cancel()
            server.close()
            for task in list(self._serving):
                task.cancel()
            await asyncio.to_thread(self._journal.close)
        return outcome

    async def _until(self, condition: object, within_s: float | None = None) -> bool:
        """Waits until `condition()` holds, which is asked after every message; False when the time is over."""
        assert callable(condition)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        return bool(condition())

    async def _settle(self) -> Outcome | None:
        """Waits a moment for the true first cause and, where something failed, until every node was heard since or is
        lost. A node that crashes takes its connections with it at once: the others fail of it, with whatever error they
        have for that, long before it counts as silent. None when it turned out meanwhile that tasks are to stop at a
        checkpoint.
        """
        verdict = self._verdict
        if not verdict.finished():
            await self._until(lambda: bool(verdict.cancelled), _SETTLE_S)
        asked_at = time.monotonic()
        self._peers.tell({"type": "ask"})

        def more_may_come() -> bool:
            if verdict.cancelled or verdict.finished() or not (verdict.failures or verdict.lost):
                return False
            lost = {failure.node for failure, _ in verdict.lost}
            unheard = self._peers.silent_since(asked_at, lost)
            alone = verdict.only_collateral() and not lost
            return unheard or (alone and time.monotonic() < asked_at + _SETTLE_COLLATERAL_S)

        while more_may_come():
            await self._until(lambda: not more_may_come(), 0.25)
        return verdict.outcome()

    async def _let_checkpoint_finish(self, outcome: Outcome) -> None:
        limit = self._plan.supervision.checkpoint_grace_s
        if outcome.kind == "cancelled":
            limit = min(limit, self._plan.supervision.stop_within_s)
        if self._verdict.overdue:
            limit = 0.0  # Slurm kills what does not stop now
        await self._until(lambda: not self._saving, limit)

    async def _stop(self, outcome: Outcome) -> None:
        reason = outcome.sentence()
        self._record("stopping", reason=reason)
        with contextlib.suppress(OSError):
            # For the guardian: should this process be killed now, that is not why the attempt ended.
            (self._private_dir / DECIDED).write_text(outcome.to_json())
        self._peers.order({"type": "stop", "reason": reason})
        await self._until(self._released, self._plan.supervision.stop_within_s)

    def _released(self) -> bool:
        return self._peers.all_released({failure.node for failure, _ in self._verdict.lost} | self._without_supervisor)

    async def _conclude(self, outcome: Outcome) -> Outcome:
        """Writes the outcome and tells it to all; returns what was written, by whomever."""
        seconds = round(time.monotonic() - self._first_cause, 3)
        writing = asyncio.create_task(asyncio.to_thread(self._write, outcome))
        await asyncio.wait({writing}, timeout=_WRITE_WITHIN_S)
        if writing.done() and writing.exception() is None:
            outcome = writing.result()
        self._record("outcome", kind=outcome.kind, sentence=outcome.sentence(), seconds=seconds)
        if not writing.done():
            print(f"{self._directory}: the file system hangs; the outcome is still being written", flush=True)
        elif (error := writing.exception()) is not None:
            print(f"the outcome could not be written to {self._directory}: {error}", flush=True)
        self._peers.tell({"type": "end", "outcome": outcome.to_json()})
        return outcome

    def _write(self, outcome: Outcome) -> Outcome:
        # The job script wrote one where it knew better: srun was killed, and all tasks with it.
        if (known := Outcome.read(self._directory)) is not None:
            return known
        outcome.write(self._plan.run_dir, self._directory)
        return outcome

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        current = asyncio.current_task()
        assert current is not None
        self._serving.add(current)
        with contextlib.suppress(asyncio.CancelledError):
            if (accepted := await accept(reader, writer, self._token, self._seen)) is not None:
                channel, hello = accepted
                await (self._hear_guardian(channel) if hello.get("guardian") else self._hear(channel, hello))
        self._serving.discard(current)
        writer.close()

    async def _hear(self, channel: Channel, hello: Message) -> None:
        peer = self._peers.join(channel, hello)
        self._record("joined", rank=peer.rank, host=peer.host, address=hello["address"], pid=hello["pid"])
        while (message := await channel.receive()) is not None:
            peer.last_heard = time.monotonic()
            self._take(peer, message)
            self._changed.set()
        peer.connected = False
        self._changed.set()

    async def _hear_guardian(self, channel: Channel) -> None:
        """A guardian reports only that its supervisor has died; the batch script, only the signals it got."""
        while (message := await channel.receive()) is not None:
            if message.get("type") in ("failed", "lost"):
                failure = Failure(**message["failure"])
                if message["type"] == "failed":
                    self._fail(failure)
                else:
                    rank = self._give_up(failure, str(message["host"]))
                    self._record("silent", rank=rank, cause=failure.cause)
                # It has killed what was left of its node.
                self._peers.release(failure.node)
            elif message.get("type") == "task_ended":
                self._take_end_of_task(Failure(**message["failure"]))
            elif message.get("type") == "signal":
                self._signals.take(str(message["signal"]))
        self._changed.set()

    def _take_end_of_task(self, failure: Failure) -> None:
        """srun has ended, or says that the task of a node has. Where its supervisor lives, that one tells of it."""
        if failure.process != "supervisor":
            self._fail(failure)
            return
        rank = next(node.rank for node in self._plan.nodes if node.name == failure.node)
        if self._peers.connected(rank):
            return
        self._peers.release(failure.node)
        self._without_supervisor.add(failure.node)
        if rank not in self._peers and failure.exit_code is not None:
            # Nobody killed it: the node lacks what its supervisor needs to begin.
            self._lose(rank, f"not fit for the job: {failure.cause or 'its task ended before it could begin'}", "unfit")
            return
        told = (*self._verdict.failures, *(lost for lost, _ in self._verdict.lost))
        if failure.node not in {each.node for each in told}:
            self._fail(failure)

    def _take(self, peer: Peer, message: Message) -> None:
        kind = message.get("type")
        task = (peer.rank, str(message.get("process", "")))
        if kind == "heartbeat":
            peer.channel.send({"type": "heartbeat"})
        elif kind == "endpoints":
            self._peers.publish(peer, message["endpoints"])
        elif kind == "event":
            event = message["event"]
            self._journal.write(event)
            if event.get("event") == "status":
                self._take_status((peer.rank, str(event.get("process", ""))), str(event.get("text", "")))
        elif kind == "ended":
            self._verdict.ended[task] = int(message["exit_code"])
            self._saving.discard(task)
            if message["exit_code"] == STOPPED_AT_CHECKPOINT:
                self._checkpoint("a task stopped at a checkpoint")
        elif kind == "failed":
            self._fail(Failure(**message["failure"]), task)
        elif kind == "complained":
            self._verdict.complaints.append(Failure(**message["failure"]))
        elif kind == "saving":
            (self._saving.add if message["saving"] else self._saving.discard)(task)
            if not self._saving:
                self._time_limit.saved()
        elif kind == "signal":
            self._signals.take(str(message["signal"]))
        elif kind == "restart":
            self._peers.order(message)
        elif kind == "evidence":
            self._without_evidence.discard(peer.rank)
        elif kind == "unfit":
            self._lose(peer.rank, f"not fit for the job: {message['cause']}", "unfit")
        elif kind == "unreachable":
            self._broken.append((peer.rank, int(message["of"]), str(message["cause"])))
            if len(self._broken) == 1:
                asyncio.get_running_loop().call_later(_OTHERS_MAY_TELL_S, self._lose_unreachable)
        elif kind == "released":
            peer.released = True
            self._record("released", rank=peer.rank, seconds=message["seconds"])

    def _take_status(self, task: Task, text: str) -> None:
        if (found := _ROLLOUTS.search(text)) is not None and self._rollouts.get(task) != found[0]:
            self._rollouts[task] = found[0]
            self._steps.rollout_came_back()

    def _fail(self, failure: Failure, task: Task | None = None) -> None:
        if failure in self._verdict.failures:
            return
        self._verdict.failures.append(failure)
        # A checkpoint that several ranks write together is lost with one of them: nothing to wait for.
        names = {self._plan.nodes[rank].name for rank, _ in self._saving}
        if task in self._saving or (failure.process == "supervisor" and failure.node in names):
            self._saving.clear()

    def _checkpoint(self, reason: str, within_s: float | None = None) -> None:
        """Orders tasks to save and stop within `within_s`; by default, within what the time limit leaves. Once they
        were told, only `within_s` counts: there may be less time than it seemed.
        """
        if not self._verdict.checkpoint:
            self._verdict.checkpoint = reason
            self._peers.order({"type": "checkpoint"})
        elif within_s is None:
            return
        supervision = self._plan.supervision
        asks = within_s is None and self._plan.launch.kind == "slurm"
        if within_s is None:
            within_s = supervision.time_limit_margin_s - supervision.stop_within_s
        allowed = max(_ASKING_MAY_TAKE_S if asks else 1.0, within_s)
        if any(rank not in self._peers for rank, _ in self._verdict.tasks):
            # Ranks that are not all there have nothing to save.
            allowed, asks = 0.0, False
        self._allow(allowed)
        if asks:
            self._asking = asyncio.create_task(self._allow_what_is_left(), name="time left")

    async def _allow_what_is_left(self) -> None:
        self._allow(await self._time_limit.allows())

    def _allow(self, seconds: float) -> None:
        """For the checkpoint that tasks write; what was said last counts."""
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = asyncio.get_running_loop().call_later(seconds, self._checkpoint_overdue)

    def _checkpoint_overdue(self) -> None:
        self._verdict.overdue = True
        self._changed.set()

    async def _watch(self) -> None:
        """Notices nodes that fall silent or never come."""
        supervision = self._plan.supervision
        every, looked = supervision.heartbeat_s / 2, time.monotonic()
        while True:
            await asyncio.sleep(every)
            now = time.monotonic()
            if now - looked > every + 1.0:
                # This process itself was held up: what others sent meanwhile is still to be read.
                for peer in self._peers:
                    peer.last_heard = max(peer.last_heard, now - supervision.heartbeat_s)
            looked = now
            for peer in self._peers:
                if not peer.released and now - peer.last_heard > supervision.node_silent_s:
                    self._lose(peer.rank, f"no heartbeat for {now - peer.last_heard:.0f} s")
            if now - self._started > JOIN_WITHIN_S:
                for node in self._peers.missing():
                    self._lose(node.rank, f"its supervisor did not report within {JOIN_WITHIN_S:g} s")
            self._changed.set()

    async def _watch_steps(self) -> None:
        """Notices that training does not move, keeps the evidence, and ends the attempt."""
        silence = ""
        while not silence or self._saving:
            await asyncio.sleep(_LOOK_AT_STEPS_S)
            silence = await asyncio.to_thread(self._steps.silence)
        self._record("stalled", cause=silence)
        self._without_evidence = {peer.rank for peer in self._peers if peer.connected}
        self._peers.tell({"type": "stalled"})
        await self._until(lambda: not self._without_evidence, _EVIDENCE_WITHIN_S)
        self._verdict.stalled = self._stalled(silence)
        self._verdict.stalled_requeues = self._plan.supervision.on_stall == "requeue"
        self._changed.set()

    async def _watch_time_limit(self) -> None:
        """Stops at a checkpoint where Slurm's own notice would come too late for a save as slow as earlier ones."""
        if self._plan.launch.kind == "slurm":
            seconds = await self._time_limit.comes_too_soon()
            takes = f"the time limit is near, and a checkpoint has taken {self._time_limit.longest:.0f} s"
            self._checkpoint(takes, seconds)

    def _stalled(self, silence: str) -> Failure:
        node = next((node for node in self._plan.nodes if node.role == "train"), self._plan.nodes[0])
        cause = f"{silence}; stacks, metrics and last lines of every process are kept"
        log = str(self._directory / "stall")
        return Failure(node.role, node.name, "all ranks", cause, log, self._attempt, time.time())

    def _lose(self, rank: int, cause: str, event: str = "silent") -> None:
        node = self._plan.nodes[rank]
        if any(failure.node == node.name for failure, _ in self._verdict.lost):
            return
        host = self._peers.host(rank)
        where = f"host {host}: {cause}" if host else cause
        log = str(self._directory / "events.jsonl")
        self._give_up(Failure(node.role, node.name, "supervisor", where, log, self._attempt, time.time()), host)
        self._record(event, rank=rank, cause=cause)

    def _give_up(self, failure: Failure, host: str) -> int:
        """The job goes on without this node, as the next attempt. Returns its rank."""
        rank = next(node.rank for node in self._plan.nodes if node.name == failure.node)
        self._verdict.lost.append((failure, host))
        self._peers.give_up(rank)
        if any(task[0] == rank for task in self._saving):
            self._saving.clear()
        return rank

    def _lose_unreachable(self) -> None:
        """The node that most of the broken connections have in common is the bad one."""
        rank = culprit([(source, target) for source, target, _ in self._broken])
        cause = next(cause for source, target, cause in self._broken if rank in (source, target))
        self._lose(rank, f"not fit for the job: {cause}", "unfit")
        self._changed.set()

    def _record(self, event: str, rank: int = 0, **fields: object) -> None:
        node = self._plan.nodes[rank]
        self._journal.write(
            {"time": time.time(), "attempt": self._attempt, "node": node.name, "role": node.role, "process": ""}
            | {"event": event, **fields}
        )


def failure_message(process: str, failure: Failure) -> Message:
    """The message by which a supervisor or its guardian reports a failure."""
    return {"type": "failed", "process": process, "failure": dataclasses.asdict(failure)}
