"""Notices that a job lives but does not move, and keeps what tells why.

A rank that waits in a collective for ever, or a rollout that nobody answers, is no dead process: every probe is content
while the nodes are paid for. What must move is the training step, or the rollouts that it waits for.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from hpc_gym.node.causes import last_lines
from hpc_gym.node.process import ManagedProcess
from hpc_gym.node.readiness import get_text
from hpc_gym.plan.plan import Supervision
from hpc_gym.protocol.files import json_rows

_STEPS = 50
"""The median is that of so many steps."""
_FEWEST = 3
_LINES = 100
_DUMP_WITHIN_S = 15.0


class StepWatch:
    """Follows `metrics.jsonl`, and is told of rollouts. The trainer's clock times the steps, ours the silence."""

    def __init__(self, metrics: Path, attempt: int, supervision: Supervision) -> None:
        self._metrics = metrics
        self._attempt = attempt
        self._supervision = supervision
        self._read = 0
        self._times: deque[float] = deque(maxlen=_STEPS + 1)
        self._last_seen = 0.0
        self._done = False

    def rollout_came_back(self) -> None:
        """Also those of an evaluation."""
        self._last_seen = time.monotonic()

    def silence(self) -> str:
        """Why the job counts as stalled, "" while it does not: before the first rollout, and after the last step."""
        self._take_new_rows()
        limit = self._limit()
        silent = time.monotonic() - self._last_seen
        if limit is None or not self._last_seen or self._done or silent < limit:
            return ""
        median = f" (median of a step: {self._median():.1f} s)" if self._has_median() else ""
        return f"no training step and no rollout for {silent:.0f} s, {limit:.0f} s are allowed{median}"

    def _take_new_rows(self) -> None:
        try:
            with self._metrics.open("rb") as file:
                file.seek(self._read)
                rows = file.read()
        except OSError:
            return
        whole = rows[: rows.rfind(b"\n") + 1]
        self._read += len(whole)
        for row in json_rows(whole):
            if row.get("attempt") == self._attempt:
                self._times.append(float(row.get("time", time.time())))
                self._last_seen = time.monotonic()
                self._done = "max_steps" in row and row.get("step", 0) >= row["max_steps"]

    def _median(self) -> float:
        times = list(self._times)
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    def _has_median(self) -> bool:
        return len(self._times) >= _FEWEST

    def _limit(self) -> float | None:
        if not self._supervision.stall_factor:
            return None
        medians = self._supervision.stall_factor * self._median() if self._has_median() else 0.0
        return max(self._supervision.stall_at_least_s, medians)


async def keep_evidence(processes: Iterable[ManagedProcess], private_dir: Path, folder: Path) -> None:
    """Writes a file per process to `folder`: stacks of all its threads, vLLM's metrics, the last lines of its log."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    await asyncio.gather(*(_evidence(each, private_dir, folder) for each in processes))


async def _evidence(process: ManagedProcess, private_dir: Path, folder: Path) -> None:
    parts = [await _stacks(pid) for pid in sorted(process.members)]
    ready = process.spec.ready
    if ready is not None and ready.kind == "http":
        # The socket of a vLLM, which serves Prometheus metrics beside its probe.
        parts.append("/metrics\n" + await get_text(private_dir / Path(ready.target).name, "/metrics"))
    lines = await asyncio.to_thread(last_lines, process.log)
    parts.append(f"the last lines of {process.log}\n" + "\n".join(lines[-_LINES:]))
    await asyncio.to_thread((folder / process.log.name).write_text, "\n\n".join(parts) + "\n")


async def _stacks(pid: int) -> str:
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid", str(pid)]

    def run() -> str:
        # Not through asyncio: the supervisor reaps every child itself.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DUMP_WITHIN_S, check=False)
        return done.stdout + done.stderr

    try:
        return f"process {pid}\n{await asyncio.to_thread(run)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"process {pid}: py-spy: {error}"
