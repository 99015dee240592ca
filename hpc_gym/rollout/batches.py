"""Batches of rollouts under way: asked for in one request, answered as a stream of frames while they finish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from hpc_gym.protocol import codec
from hpc_gym.protocol.messages import RolloutBatch, Sampling
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.rollout.runs import BadRow, Rollouts, Row

log = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 3.0
GATHER_S = 0.02
"""Trajectories that finish within so long share a frame."""


class Batches:
    """Runs batches, and drops them when they are aborted or their client is gone."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._running: dict[str, list[asyncio.Task[Trajectory]]] = {}

    def prepare(self, batch: RolloutBatch) -> list[Row]:
        """Its rows, read. Raises BadRow naming the first that is wrong."""
        if len(batch.rows) != len(batch.indices):
            raise BadRow(f"the batch has {len(batch.rows)} rows and {len(batch.indices)} indices")
        if batch.id in self._running:
            raise BadRow(f"batch {batch.id} is already running")
        rows: dict[tuple[bytes, Sampling], Row] = {}
        found = []
        for request, index in zip(batch.rows, batch.indices, strict=True):
            key = (request.row, request.sampling)
            try:
                self._rollouts.environment(request.environment)
                if key not in rows:
                    rows[key] = Row(request.row, request.sampling)
            except BadRow as error:
                raise BadRow(f"row {index}: {error}") from None
            found.append(rows[key])
        return found

    async def run(self, batch: RolloutBatch, rows: Sequence[Row]) -> AsyncIterator[bytes]:
        """Frames with the batch's trajectories as they finish, and empty ones as signs of life.

        Closing the iterator, as happens when the client is gone, drops what is still running.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        log.info("batch %s: %d rollouts wanted with weights %d", batch.id, len(rows), batch.weight_version)
        tasks = [
            asyncio.ensure_future(self._rollouts.one(request, row, index, batch.weight_version))
            for request, row, index in zip(batch.rows, rows, batch.indices, strict=True)
        ]
        self._running[batch.id] = tasks
        index_of = dict(zip(tasks, batch.indices, strict=True))
        finished: asyncio.Queue[asyncio.Task[Trajectory]] = asyncio.Queue()
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
        counts = dict.fromkeys(Outcome, 0)
        missing = len(tasks)
        try:
            while missing:
                done = await _next(finished)
                trajectories = [_result(task, index_of[task]) for task in done]
                missing -= len(done)
                for trajectory in trajectories:
                    counts[trajectory.outcome] += 1
                yield codec.encode(trajectories)
            text = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
            log.info("batch %s: done in %.2f s: %s", batch.id, loop.time() - start, text)
        finally:
            del self._running[batch.id]
            if missing:
                log.warning("batch %s: its client is gone, %d rollouts dropped", batch.id, missing)
            for task in tasks:
                task.cancel()

    def abort(self, batch: str | None) -> int:
        """Drops the rollouts of one batch, or of all; they are answered as failed. The number that were running."""
        dropped = 0
        for name, tasks in self._running.items():
            if batch in (None, name):
                dropped += sum(task.cancel() for task in tasks)
        return dropped


async def _next(finished: asyncio.Queue[asyncio.Task[Trajectory]]) -> list[asyncio.Task[Trajectory]]:
    """What finished, after waiting a moment for more; nothing when it is time for a sign of life."""
    try:
        done = [await asyncio.wait_for(finished.get(), SIGN_OF_LIFE_S)]
    except TimeoutError:
        return []
    await asyncio.sleep(GATHER_S)
    while not finished.empty():
        done.append(finished.get_nowait())
    return done


def _result(task: asyncio.Task[Trajectory], index: int) -> Trajectory:
    if task.cancelled():
        return Trajectory(index, Outcome.FAILED, "aborted: the rollout was dropped on request")
    error = task.exception()
    if error is not None:
        log.error("rollout %d failed", index, exc_info=error)
        return Trajectory(index, Outcome.FAILED, f"internal_error: {error!r}")
    return task.result()
