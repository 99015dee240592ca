"""TRL's `rollout_func`: draws become rollouts on the rollout nodes, trajectories become TRL's columns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from hpc_gym.data.draw import Mixture
from hpc_gym.data.rows import Rows
from hpc_gym.plan.plan import DataSource, Plan
from hpc_gym.plan.plan import Sampling as PlannedSampling
from hpc_gym.protocol.alive import saying_alive
from hpc_gym.protocol.client import RolloutClient
from hpc_gym.protocol.messages import RolloutRequest, Sampling
from hpc_gym.protocol.notify import notify
from hpc_gym.protocol.trajectory import REPLICA_GONE, Outcome, Trajectory
from hpc_gym.training.stopping import StopRequested, StopSignal

if TYPE_CHECKING:  # it imports torch, which this module does not need
    from hpc_gym.training.ranks import Ranks


class NoRollouts(RuntimeError):
    """There is nothing to train on; the text says why."""


@dataclass(frozen=True)
class RolloutStatistics:
    """What rollouts were, over all ranks."""

    rollouts: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    """Tokens that the policy generated."""
    turns: int = 0
    seconds: float = 0.0
    """From the request to the last trajectory, on the rank that waited longest."""

    def __add__(self, other: RolloutStatistics) -> RolloutStatistics:
        return RolloutStatistics(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Draws:
    """The numbers of the draws that a step trained on, over all ranks, the last included: with the seed they say which
    rows these were.
    """

    first: int
    last: int

    def __or__(self, other: Draws | None) -> Draws:
        return self if other is None else Draws(min(self.first, other.first), max(self.last, other.last))


class TrainingRows:
    """The run's data order: which row the draw with a number is."""

    def __init__(self, plan: Plan) -> None:
        self._sources = plan.training.sources
        self._mixture = Mixture([s.weight for s in self._sources], [s.rows for s in self._sources], plan.seed)
        self._rows = [_open(source) for source in self._sources]
        self._sampling = request_sampling(plan.training.sampling)

    def request(self, draw: int) -> RolloutRequest:
        """A rollout of the row of that draw; all rollouts of a draw are one group."""
        drawn = self._mixture.draw(draw)
        return RolloutRequest(
            environment=self._sources[drawn.source].environment,
            row=self._rows[drawn.source][drawn.row],
            group=draw,
            sampling=self._sampling,
        )


def _open(source: DataSource) -> Rows:
    rows = Rows(source.path)
    if len(rows) != source.rows:
        raise NoRollouts(
            f"{source.path} has {len(rows)} rows, but had {source.rows} when the run was planned: "
            "the data order would change"
        )
    return rows


def request_sampling(sampling: PlannedSampling) -> Sampling:
    """The Plan's sampling as it goes to a rollout server."""
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_output_tokens=sampling.max_output_tokens,
        tool_choice=sampling.tool_choice,
    )


class RolloutRunner:
    """Runs batches of rollouts for all ranks together: current weights, agreement to stop, signs of life."""

    def __init__(
        self,
        client: RolloutClient,
        ranks: Ranks,
        stop: StopSignal,
        push: Callable[[], None],
        rounds: int = 5,
        patience_s: float = 0.0,
    ):
        """`patience_s`: for so long a server may hang before its supervisor starts it again."""
        self._client = client
        self._ranks = ranks
        self._stop = stop
        self._push = push
        self._rounds = rounds
        self._patience_s = patience_s

    def run(self, requests: Sequence[RolloutRequest], weight_version: int, what: str) -> list[Trajectory]:
        """This rank's trajectories, in order. All ranks call it together, some perhaps without requests.

        Rollouts whose replica died, or that found none with these weights, are asked for again after all ranks have
        sent the weights once more; so are all of them, while a server may hang that nobody has noticed yet, when every
        one missed its deadline. Raises StopRequested on all ranks when one was asked to stop; the rollouts in flight
        are dropped.
        """
        found: dict[int, Trajectory] = {}
        began, lost = time.monotonic(), 0
        while True:
            missing = [index for index in range(len(requests)) if index not in found]
            try:
                with self._stop.interruptible():
                    answers = self._ask([requests[index] for index in missing], weight_version, what)
            except StopRequested:
                # The other ranks wait for rollouts too: theirs come back at once, failed, and all meet below.
                self._client.abort()
                answers = []
            found.update(
                (index, answer) for index, answer in zip(missing, answers, strict=False) if not _replica_gone(answer)
            )
            stopping, stale, seconds = self._ranks.maximum(
                [float(self._stop.requested), float(any(map(_replica_gone, answers))), time.monotonic() - began]
            )
            if stopping:
                raise StopRequested
            if stale:
                lost += 1
                if lost == self._rounds:
                    raise NoRollouts(
                        f"vLLM replicas died or lost their weights {lost} times in a row during one batch of rollouts: "
                        "see vLLM's logs"
                    )
                self._push()
            elif seconds < self._patience_s and self._all_missed_their_deadline(found.values()):
                if self._ranks.is_first:
                    print(f"{what}: every rollout missed its deadline; a server may hang: asking again", flush=True)
                found.clear()
            else:
                return [found[index] for index in range(len(requests))]

    def _all_missed_their_deadline(self, answers: Collection[Trajectory]) -> bool:
        missed = sum(each.outcome is Outcome.FAILED and each.reason.startswith("deadline") for each in answers)
        of_all, all_missed = self._ranks.total([len(answers), missed])
        return of_all == all_missed > 0

    def _ask(self, requests: Sequence[RolloutRequest], weight_version: int, what: str) -> list[Trajectory]:
        if not requests:
            return []
        said = 0.0

        def progress(finished: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= 1.0:
                said = time.monotonic()
                notify(STATUS=f"{what}: rollouts {finished}/{total}")

        with saying_alive():  # the client gives up a server that is silent, and every rollout has a deadline
            return self._client.run(requests, weight_version=weight_version, on_progress=progress)


def _replica_gone(trajectory: Trajectory) -> bool:
    return trajectory.outcome is Outcome.FAILED and trajectory.reason.startswith(REPLICA_GONE)


class RolloutFunction:
    """What TRL calls on every rank, with this rank's part of the prompts: the draws' numbers as text."""

    def __init__(self, runner: RolloutRunner, rows: TrainingRows, ranks: Ranks) -> None:
        self._runner = runner
        self._rows = rows
        self._ranks = ranks
        self.statistics = RolloutStatistics()
        """Of all batches since it was last reset: a step may ask for several."""
        self.draws: Draws | None = None
        """The same."""

    def reset(self) -> None:
        """A new step begins."""
        self.statistics, self.draws = RolloutStatistics(), None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        started = time.monotonic()
        step = int(trainer.state.global_step)
        self.draws = self._drawn([int(prompt) for prompt in prompts]) | self.draws
        requests = [self._rows.request(int(prompt)) for prompt in prompts]
        trajectories = self._runner.run(requests, step, f"step {step + 1}/{trainer.state.max_steps}")
        counted = self._count(trajectories, time.monotonic() - started)
        self.statistics += counted
        if counted.failed == counted.rollouts:
            reasons = sorted({trajectory.reason for trajectory in trajectories})
            raise NoRollouts(f"every rollout of step {step + 1} failed: {'; '.join(reasons[:3])}")
        for trajectory in trajectories:
            if trajectory.outcome is Outcome.FAILED:
                print(f"step {step + 1}: a rollout failed and is left out: {trajectory.reason}", flush=True)
        return columns(trajectories, [request.environment for request in requests], trainer.pad_token_id)

    def _drawn(self, draws: Sequence[int]) -> Draws:
        minus_first, last = self._ranks.maximum([-min(draws), max(draws)])
        return Draws(-int(minus_first), int(last))

    def _count(self, trajectories: Sequence[Trajectory], seconds: float) -> RolloutStatistics:
        rollouts, failed, truncated, tokens, turns = self._ranks.total(
            [
                len(trajectories),
                sum(trajectory.outcome is Outcome.FAILED for trajectory in trajectories),
                sum(trajectory.outcome is Outcome.TRUNCATED for trajectory in trajectories),
                sum(int(trajectory.policy_mask.sum()) for trajectory in trajectories),
                sum(trajectory.turns for trajectory in trajectories),
            ]
        )
        longest = self._ranks.maximum([seconds])[0]
        return RolloutStatistics(int(rollouts), int(failed), int(truncated), int(tokens), int(turns), longest)


def columns(trajectories: Sequence[Trajectory], environments: Sequence[str], padding_id: int) -> dict[str, Any]:
    """Trajectories as the columns TRL's `rollout_func` returns, and two more that reach the reward functions.

    A failed rollout has no tokens worth training on and no reward. TRL needs at least one completion token in every
    row, so it gets one that `env_mask` takes out of the loss; its reward is None, never 0.
    """
    rows = [_row(trajectory, padding_id) for trajectory in trajectories]
    return {
        "prompt_ids": [row[0] for row in rows],
        "completion_ids": [row[1] for row in rows],
        "logprobs": [row[2] for row in rows],
        "env_mask": [row[3] for row in rows],
        "environment_name": list(environments),
        "environment_reward": [_reward(trajectory) for trajectory in trajectories],
    }


def _row(trajectory: Trajectory, padding_id: int) -> tuple[list[int], list[int], list[float], list[int]]:
    prompt = trajectory.prompt_ids.tolist() or [padding_id]
    if trajectory.outcome is Outcome.FAILED or not len(trajectory.completion_ids):
        return prompt, [padding_id], [math.nan], [0]
    return (
        prompt,
        trajectory.completion_ids.tolist(),
        trajectory.logprobs.tolist(),
        trajectory.policy_mask.tolist(),
    )


def _reward(trajectory: Trajectory) -> float | None:
    if trajectory.outcome is Outcome.FAILED or math.isnan(trajectory.reward):
        return None
    return float(trajectory.reward)
