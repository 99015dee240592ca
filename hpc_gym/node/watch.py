"""Watches one life of a process: whether it gets ready, and whether it goes on living up to that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hpc_gym.node import tree
from hpc_gym.node.causes import cause_from_log
from hpc_gym.node.notifications import Notifications
from hpc_gym.node.readiness import ANSWER_WITHIN_S, Answer, ask_gym, ask_http, refuses, watchdog_overdue
from hpc_gym.plan.plan import Process

_PROBE_EVERY_S = 0.25
_LOOK_EVERY_S = 1.0
"""Between two looks at what shows without a probe."""
_CLOSED_FOR_S = 3.0
"""How long a server may take to end once it has closed its socket. vLLM whose engine has died waits for its clients to
hang up, and they for its answer.
"""
_EXIT_AFTER_FAILURE_S = 5.0
"""How long a process that said X_FAILURE may take to exit: teardown of NCCL or a profiler can hang for ever."""


class Watch:
    """`run` ends when the process must be considered hung."""

    def __init__(
        self,
        spec: Process,
        said: Notifications,
        log: Path,
        target: Path | int | None,
        members: Callable[[], Mapping[int, tree.Proc]],
        report: Callable[..., None],
    ) -> None:
        """`target`: the Unix socket or the port that `spec.ready` asks. `members`: what the life consists of now."""
        self.stopping = False
        """What dies or closes its socket now was asked to."""
        self._spec = spec
        self._said = said
        self._log = log
        self._target = target
        self._members = members
        self._report = report
        self._started = self._last_alive = time.monotonic()
        self._ready_at = 0.0 if spec.ready is not None else self._started
        self._closed_since = 0.0
        self._servers: Mapping[int, str] = {}
        self._last_text = ""

    async def run(self) -> str:
        """Returns why the process must be considered hung."""
        next_probe = 0.0
        while True:
            every = max(_PROBE_EVERY_S, self._spec.alive_within_s / 10) if self._ready_at else _PROBE_EVERY_S
            pause, slept_at = min(every, _LOOK_EVERY_S), time.monotonic()
            await asyncio.sleep(pause)
            if time.monotonic() - slept_at > pause + 1.0:
                # This process itself was held up (stopped, swapped out): signs of life are still to be read.
                self._last_alive = time.monotonic()
                continue
            if self.stopping:
                continue
            if over := await self._over():
                return over
            if time.monotonic() < next_probe:
                continue
            next_probe = time.monotonic() + every - _PROBE_EVERY_S
            if hung := self._judge(await self._ask()):
                return hung

    async def _over(self) -> str:
        """Why it is over without a doubt, though its main process lives."""
        said = self._said.said
        if said.failure and time.monotonic() - said.failed_at > _EXIT_AFTER_FAILURE_S:
            return said.failure
        if dead := self._dead_servers():
            return f"its server {', '.join(dead)} has died"
        closed = bool(self._ready_at) and isinstance(self._target, Path) and refuses(self._target)
        self._closed_since = (self._closed_since or time.monotonic()) if closed else 0.0
        if closed and time.monotonic() - self._closed_since > _CLOSED_FOR_S:
            cause = await asyncio.to_thread(cause_from_log, self._log)
            return f"it closed its socket and does not end: {cause}"
        return ""

    def _dead_servers(self) -> list[str]:
        """NeMo Gym looks only once a minute whether its servers live; rollouts wait meanwhile."""
        if not self._servers:
            return []
        members = self._members()
        dead = [pid for pid in self._servers if pid not in members or members[pid].zombie]
        return [f"{self._servers[pid]} (pid {pid})" for pid in dead]

    async def _ask(self) -> Answer:
        probe = self._spec.ready
        if probe is None or probe.kind == "notify":
            return Answer(self._said.said.ready)
        if self._ready_at and not self._spec.alive_within_s:
            return Answer(True, servers=self._servers)
        if isinstance(self._target, Path):
            return await ask_http(self._target, probe.path or "/health", self._patience())
        assert self._target is not None
        return await ask_gym(self._target, self._members)

    def _patience(self) -> float:
        """Seconds that an answer may take. vLLM's engine answers between two of its steps, which may be long."""
        limit = self._spec.alive_within_s
        if not self._ready_at or not limit:
            return ANSWER_WITHIN_S
        return max(ANSWER_WITHIN_S, min(limit / 3, self._last_alive + limit - time.monotonic()))

    def _judge(self, answer: Answer) -> str:
        """Takes an answer in; why the process is hung, "" while it is not."""
        now, said = time.monotonic(), self._said.said
        if answer.alive:
            self._last_alive, self._servers = now, answer.servers
        if self._ready_at:
            return self._hung(answer, self._ready_at)
        if answer.alive:
            self._ready_at = now
            used = round(tree.cpu_seconds(set(self._members())), 2)
            self._report("ready", seconds=round(now - self._started, 3), cpu_seconds=used)
        elif (limit := self._spec.ready_within_s) and now - self._started > limit:
            detail = answer.text or said.status
            return f"not ready within {limit:g} s" + (f": {detail}" if detail else "")
        elif said.last_watchdog and (hung := self._hung(answer, said.last_watchdog)):
            return hung
        elif answer.text and answer.text != self._last_text:
            self._last_text = answer.text
            self._report("progress", text=answer.text)
        return ""

    def _hung(self, answer: Answer, since: float) -> str:
        limit = self._spec.alive_within_s
        if not limit:
            return ""
        if self._spec.ready is None or self._spec.ready.kind == "notify":
            return watchdog_overdue(self._said.said, since, limit)
        # While it takes in weights vLLM's engine answers nobody, but says that it goes on.
        silent = time.monotonic() - max(self._last_alive, self._said.said.last_watchdog)
        return (
            f"hung: no good answer for {silent:.0f} s (allowed: {limit:g} s): {answer.text}" if silent > limit else ""
        )
