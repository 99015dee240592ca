"""When tasks must begin to save before the job's time limit.

Slurm itself says it `supervision.time_limit_margin_s` before (`--signal`), a time that was chosen before anybody knew
how long a checkpoint takes. The trainer notes that in each one, so a margin that is too short shows in time.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from hpc_gym.node import scontrol
from hpc_gym.plan.plan import Plan

_SLOWER = 1.5
"""The next save may take so much longer than the slowest so far: then all nodes of all jobs save at their limit."""
_UNTIL_THE_END_S = 5.0
"""What is left between the end of a stop and the limit."""
_ASK_AGAIN_S = 60.0
"""A time limit may be changed while the job runs."""


def longest_save(run_dir: Path) -> float:
    """Seconds that the slowest of the run's checkpoints took, those of earlier attempts included; 0 before any."""
    seconds = [0.0]
    for marker in (run_dir / "checkpoints").glob("checkpoint-*/complete.json"):
        try:
            seconds.append(float(json.loads(marker.read_text()).get("seconds", 0.0)))
        except (OSError, ValueError, AttributeError):
            continue  # it is being removed, or was torn
    return max(seconds)


class TimeLimit:
    """The time limit of a job on Slurm, as a save sees it."""

    def __init__(self, plan: Plan, job_id: str) -> None:
        self._run_dir = Path(plan.run_dir)
        self._job_id = job_id
        self._supervision = plan.supervision
        self._saved = asyncio.Event()
        self.longest = 0.0
        """Seconds of the slowest save known."""

    def saved(self) -> None:
        """Another checkpoint was written."""
        self._saved.set()

    async def comes_too_soon(self) -> float:
        """Returns when tasks must begin to save though Slurm has not said so yet: the seconds they have for it. Never,
        where `time_limit_margin_s` is enough.
        """
        while True:
            self._saved.clear()
            self.longest = await asyncio.to_thread(longest_save, self._run_dir)
            wanted = self.wanted()
            pause: float | None = None
            if wanted > self._supervision.time_limit_margin_s:
                left = await asyncio.to_thread(scontrol.time_left, self._job_id)
                if left <= wanted:
                    return max(1.0, left - self._supervision.stop_within_s - _UNTIL_THE_END_S)
                pause = min(left - wanted, _ASK_AGAIN_S)
            try:
                async with asyncio.timeout(pause):
                    await self._saved.wait()
            except TimeoutError:
                continue

    async def allows(self) -> float:
        """Seconds that a save which has begun may take: Slurm's notice may come a minute before its time."""
        supervision = self._supervision
        left = await asyncio.to_thread(scontrol.time_left, self._job_id)
        usual = supervision.time_limit_margin_s - supervision.stop_within_s
        enough = max(usual, _SLOWER * self.longest, supervision.checkpoint_grace_s)
        return max(1.0, min(enough, left - supervision.stop_within_s - _UNTIL_THE_END_S))

    def wanted(self) -> float:
        """Seconds from the beginning of a save to the limit that are enough for all that comes."""
        return _SLOWER * self.longest + self._supervision.stop_within_s + _UNTIL_THE_END_S if self.longest else 0.0
