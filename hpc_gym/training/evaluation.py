"""Evaluation on held-out rows, through the same rollout servers, with the weights of the moment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_gym.data.rows import Rows
from hpc_gym.plan.plan import Evaluation, Plan
from hpc_gym.protocol.messages import RolloutRequest
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.training.metrics import Recorder
from hpc_gym.training.rollouts import RolloutRunner, request_sampling

if TYPE_CHECKING:  # it imports torch, which this module does not need
    from hpc_gym.training.ranks import Ranks


class Evaluator:
    """Runs the Plan's evaluations. All ranks call it together: rank 0 asks for the rollouts and writes the result."""

    def __init__(self, plan: Plan, runner: RolloutRunner, ranks: Ranks, recorder: Recorder | None) -> None:
        self.settings: Evaluation = plan.training.evaluation
        self._runner = runner
        self._ranks = ranks
        self._recorder = recorder
        self._requests: list[RolloutRequest] = _requests(self.settings) if ranks.is_first else []

    def wanted(self, step: int, when: str) -> bool:
        """Whether the Plan asks for that evaluation (`before`, `after` or `step`) and no earlier attempt has done
        it.
        """
        settings = self.settings
        planned = {
            "before": settings.at_start,
            "after": settings.at_end,
            "step": settings.every > 0 and step > 0 and step % settings.every == 0,
        }[when]
        if not planned or not settings.sources:
            return False
        done = self._recorder is not None and self._recorder.evaluated(step, when)
        return not self._ranks.any(done)

    def run(self, step: int, when: str) -> None:
        """Evaluates the weights that vLLM has, which must be those after `step` steps. Raises StopRequested."""
        started = time.monotonic()
        trajectories = self._runner.run(self._requests, step, f"evaluation {when}, step {step}")
        if self._recorder is None:
            return
        self._recorder.evaluation(
            {
                "step": step,
                "when": when,
                "rewards": row_rewards(self.settings, trajectories),
                "num_rollouts": self.settings.num_rollouts,
                "failed": sum(trajectory.outcome is Outcome.FAILED for trajectory in trajectories),
                "truncated": sum(trajectory.outcome is Outcome.TRUNCATED for trajectory in trajectories),
                "seconds": time.monotonic() - started,
            }
        )


def row_rewards(settings: Evaluation, trajectories: Sequence[Trajectory]) -> dict[str, list[float | None]]:
    """Per environment one reward per row, in the order of the rows: the mean of those of its rollouts that did not
    fail, None when all failed. So two evaluations of the same rows can be compared row by row.
    """
    found: dict[str, list[float | None]] = {source.environment: [] for source in settings.sources}
    position = 0
    for source in settings.sources:
        for _ in range(source.rows):
            rollouts = trajectories[position : position + settings.num_rollouts]
            rewards = [rollout.reward for rollout in rollouts if rollout.outcome is not Outcome.FAILED]
            found[source.environment].append(sum(rewards) / len(rewards) if rewards else None)
            position += settings.num_rollouts
    return found


def _requests(settings: Evaluation) -> list[RolloutRequest]:
    sampling = request_sampling(settings.sampling)
    requests: list[RolloutRequest] = []
    for source in settings.sources:
        rows = Rows(source.path)
        for number in range(source.rows):
            for _ in range(settings.num_rollouts):
                requests.append(
                    RolloutRequest(
                        environment=source.environment, row=rows[number], group=len(requests), sampling=sampling
                    )
                )
    return requests
