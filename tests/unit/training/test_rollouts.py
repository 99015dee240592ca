"""Trajectories become TRL's columns; stale weights and a request to stop are settled by all ranks together."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from hpc_gym.plan.plan import DataSource, Evaluation, Sampling
from hpc_gym.protocol.messages import RolloutRequest
from hpc_gym.protocol.messages import Sampling as RequestSampling
from hpc_gym.protocol.trajectory import Outcome, Trajectory
from hpc_gym.training.evaluation import row_rewards
from hpc_gym.training.rollouts import NoRollouts, RolloutRunner, columns
from hpc_gym.training.stopping import StopRequested, StopSignal

TURNS = Trajectory(
    index=0,
    outcome=Outcome.OK,
    prompt_ids=np.array([5, 6], np.int32),
    completion_ids=np.array([7, 8, 9, 10], np.int32),
    policy_mask=np.array([1, 0, 0, 1], np.uint8),
    logprobs=np.array([-0.5, math.nan, math.nan, -0.25], np.float32),
    weight_versions=np.array([3, -1, -1, 3], np.int32),
    reward=0.75,
)
FAILED = dataclasses.replace(TURNS, outcome=Outcome.FAILED, reason="gym is gone", reward=math.nan)
NEVER_BEGAN = Trajectory(index=0, outcome=Outcome.FAILED, reason="no server")
STALE = Trajectory(index=0, outcome=Outcome.FAILED, reason="weights_stale: weights 3 are wanted, vllm-0 is starting")
LOST = dataclasses.replace(STALE, reason="replica_lost: vllm-0 was restarted (attempt 2: weights_stale: weights 3 ...)")


def test_what_the_environment_said_is_masked() -> None:
    found = columns([TURNS], ["sudoku"], padding_id=0)
    assert found["prompt_ids"] == [[5, 6]]
    assert found["completion_ids"] == [[7, 8, 9, 10]]
    assert found["env_mask"] == [[1, 0, 0, 1]]
    assert found["logprobs"][0][0] == -0.5 and math.isnan(found["logprobs"][0][1])
    assert found["environment_name"] == ["sudoku"] and found["environment_reward"] == [0.75]


@pytest.mark.parametrize("failed", [FAILED, NEVER_BEGAN])
def test_a_failed_rollout_is_one_masked_token_without_a_reward(failed: Trajectory) -> None:
    found = columns([TURNS, failed], ["sudoku", "sudoku"], padding_id=0)
    assert len(found["prompt_ids"][1]) >= 1
    assert (found["completion_ids"][1], found["env_mask"][1], found["environment_reward"][1]) == ([0], [0], None)


def test_a_truncated_rollout_keeps_its_reward() -> None:
    truncated = dataclasses.replace(TURNS, outcome=Outcome.TRUNCATED, reward=0.0)
    found = columns([truncated], ["sudoku"], padding_id=0)
    assert found["environment_reward"] == [0.0] and found["env_mask"] == [[1, 0, 0, 1]]


def test_evaluation_gives_one_reward_per_row_in_order() -> None:
    sampling = Sampling(1.0, 1.0, 16)
    sources = (DataSource("sudoku", "s.jsonl", 1.0, 2), DataSource("mail", "m.jsonl", 1.0, 1))
    settings = Evaluation(sources, True, True, 0, sampling, num_rollouts=2)
    rewards: list[float | None] = [1.0, 0.0, 0.5, None, None, None]
    trajectories = [FAILED if reward is None else dataclasses.replace(TURNS, reward=reward) for reward in rewards]
    assert row_rewards(settings, trajectories) == {"sudoku": [0.5, 0.5], "mail": [None]}


class OneRank:
    """A run of a single rank: what it says is what all say."""

    is_first = True

    def maximum(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    total = maximum


class Answers:
    """Answers each request for rollouts with the next list; a callable is called first."""

    def __init__(self, *answers: list[Trajectory] | Callable[[], None]) -> None:
        self._answers = list(answers)
        self.asked: list[int] = []
        self.aborted = 0

    def run(self, requests: Sequence[RolloutRequest], **_: Any) -> list[Trajectory]:
        self.asked.append(len(requests))
        answer = self._answers.pop(0)
        if callable(answer):
            answer()
            return []
        return answer

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = signal.getsignal(signal.SIGUSR2)
    yield StopSignal()
    signal.signal(signal.SIGUSR2, before)


REQUESTS = [RolloutRequest(environment="e", row=b"{}", group=n, sampling=RequestSampling()) for n in range(3)]


def runner(answers: Answers, stop: StopSignal, push: Callable[[], None]) -> RolloutRunner:
    return RolloutRunner(answers, OneRank(), stop, push, rounds=3)  # type: ignore[arg-type]


def test_only_those_without_a_replica_are_asked_for_again_after_a_push(stop: StopSignal) -> None:
    pushes: list[int] = []
    answers = Answers([TURNS, LOST, FAILED], [STALE], [TURNS])
    found = runner(answers, stop, lambda: pushes.append(1)).run(REQUESTS, 3, "step 4")
    assert found == [TURNS, TURNS, FAILED]
    assert (answers.asked, len(pushes)) == ([3, 1, 1], 2)


def test_replicas_that_never_keep_their_weights_end_the_run(stop: StopSignal) -> None:
    answers = Answers([STALE] * 3, [STALE] * 3, [STALE] * 3)
    with pytest.raises(NoRollouts, match="lost their weights 3 times in a row"):
        runner(answers, stop, lambda: None).run(REQUESTS, 3, "step 4")


LATE = dataclasses.replace(FAILED, reason="deadline: the rollout was not done within 60 s")


def test_while_a_server_may_hang_a_batch_that_missed_its_deadline_is_asked_for_again(stop: StopSignal) -> None:
    answers = Answers([LATE] * 3, [LATE] * 3, [TURNS, LATE, FAILED])
    patient = RolloutRunner(answers, OneRank(), stop, lambda: None, patience_s=60.0)  # type: ignore[arg-type]
    assert patient.run(REQUESTS, 3, "step 4") == [TURNS, LATE, FAILED]
    assert answers.asked == [3, 3, 3]
    assert runner(Answers([LATE] * 3), stop, lambda: None).run(REQUESTS, 3, "step 4") == [LATE] * 3


def test_a_request_to_stop_drops_the_rollouts_in_flight(stop: StopSignal) -> None:
    answers = Answers(lambda: signal.raise_signal(signal.SIGUSR2))
    with pytest.raises(StopRequested):
        runner(answers, stop, lambda: None).run(REQUESTS, 3, "step 4")
    assert answers.aborted == 1
