"""What the training steps of a run add up to: the pace of the last ones, and a curve of the rewards of all."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Step = Mapping[str, Any]
"""A line of metrics.jsonl."""

_RECENT = 20
_REWARD = "reward/"


@dataclass(frozen=True)
class Pace:
    """Over the last steps of the last attempt that trained; None: not known (yet)."""

    step_s: float | None = None
    tokens_per_s: float | None = None
    failed_share: float | None = None
    waiting_share: float | None = None


@dataclass
class StepHistory:
    """The steps taken so far. After a resume steps come again: what comes later counts."""

    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=_RECENT + 1))
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First and last step of each attempt that trained."""
    _rewards: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def take(self, line: Step) -> None:
        """Adds one line; one that is not of a step changes nothing."""
        step, moment = line.get("step"), line.get("time")
        if not isinstance(step, int) or not isinstance(moment, int | float):
            return
        self.recent.append(line)
        attempt = int(line.get("attempt", 1))
        self.spans[attempt] = (min(step, self.spans.get(attempt, (step, 0))[0]), step)
        for name, reward in rewards(line).items():
            points = self._rewards.setdefault(name, [])
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, reward))

    @property
    def last(self) -> Step:
        """The newest line; empty before the first."""
        return self.recent[-1] if self.recent else {}

    def curves(self, points: int = 60) -> dict[str, tuple[float, ...]]:
        """Per environment its mean reward over the training so far, in at most so many equal parts."""
        return {
            name: _in_parts([reward for _, reward in found], points) for name, found in sorted(self._rewards.items())
        }

    def pace(self) -> Pace:
        attempt = self.last.get("attempt")
        steps = [step for step in self.recent if step.get("attempt") == attempt]
        seconds = [b["time"] - a["time"] for a, b in pairwise(steps)]
        seconds = seconds or [step["step_seconds"] for step in steps if "step_seconds" in step]
        counted = steps[1:] or steps
        total = sum(seconds)
        if total <= 0:
            return Pace()
        rollouts = sum(step.get("rollouts", 0) for step in counted)
        return Pace(
            step_s=statistics.median(seconds),
            tokens_per_s=sum(step.get("tokens", 0) for step in counted) / total,
            failed_share=sum(step.get("failed", 0) for step in counted) / rollouts if rollouts else None,
            waiting_share=min(1.0, sum(step.get("rollout_seconds", 0) for step in counted) / total),
        )


def rewards(step: Step) -> dict[str, float]:
    """Mean reward per environment of one step, for those that had rows in it."""
    return {key.removeprefix(_REWARD): float(step[key]) for key in sorted(step) if key.startswith(_REWARD)}


def _in_parts(values: Sequence[float], parts: int) -> tuple[float, ...]:
    """Means of at most `parts` stretches of nearly equal length, in order."""
    parts = min(parts, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else []
    return tuple(statistics.fmean(values[start:end]) for start, end in pairwise(edges))
