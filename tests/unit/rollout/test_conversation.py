"""The record of a rollout gives arrays that fit together, and refuses what does not."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from hpc_gym.protocol.trajectory import Outcome
from hpc_gym.rollout.conversation import Conversation, NotContiguous, StaleWeights, versions_of
from hpc_gym.rollout.replicas import Replica
from hpc_gym.rollout.vllm import Choice, Logprobs, TokenLogprob, Vllm, WeightSpan


def conversation(weight_version: int = 0) -> Conversation:
    return Conversation("tag", Replica(Vllm("vllm-0", "/nowhere")), "", weight_version, 0.0)


def choice(ids: list[int], spans: list[WeightSpan] | None = None, finish: str = "stop") -> Choice:
    logprobs = Logprobs([TokenLogprob(-float(token)) for token in ids])
    return Choice(ids, logprobs, finish, weight_versions=spans or [WeightSpan("default", 0, len(ids))])


def test_two_turns_become_arrays() -> None:
    talk = conversation()
    talk.add_turn([1, 2], choice([3, 4]))
    talk.add_turn([1, 2, 3, 4, 5, 6], choice([7], [WeightSpan("12", 0, 1)]))
    found = talk.trajectory(5, Outcome.OK, reward=1.0)
    assert (found.index, found.turns, found.reward) == (5, 2, 1.0)
    assert found.prompt_ids.tolist() == [1, 2]
    assert found.completion_ids.tolist() == [3, 4, 5, 6, 7]
    assert found.policy_mask.tolist() == [1, 1, 0, 0, 1]
    assert found.weight_versions.tolist() == [0, 0, -1, -1, 12]
    np.testing.assert_array_equal(found.logprobs, np.array([-3, -4, np.nan, np.nan, -7], np.float32))


def test_a_prompt_that_does_not_go_on_is_a_bug() -> None:
    talk = conversation()
    talk.add_turn([1, 2], choice([3]))
    with pytest.raises(NotContiguous, match="turn 2 does not begin with the 3 tokens before it"):
        talk.add_turn([1, 2, 9, 4], choice([5]))


@pytest.mark.parametrize("logprobs", [None, Logprobs(None), Logprobs([TokenLogprob(-1.0)])])
def test_missing_log_probabilities_are_refused(logprobs: Logprobs | None) -> None:
    with pytest.raises(ValueError, match="log-probability"):
        conversation().add_turn([1], Choice([2, 3], logprobs, "stop", weight_versions=[WeightSpan("1", 0, 2)]))


def test_older_weights_than_wanted_are_refused() -> None:
    with pytest.raises(StaleWeights, match="weights 0, not 4"):
        conversation(weight_version=4).add_turn([1], choice([2]))
    conversation(weight_version=4).add_turn([1], choice([2], [WeightSpan("4", 0, 1)]))


@pytest.mark.parametrize(
    "spans",
    [None, [], [WeightSpan("1", 0, 1)], [WeightSpan("1", 1, 3)], [WeightSpan("1", 0, 1), WeightSpan("2", 2, 3)]],
)
def test_weight_versions_must_cover_every_token(spans: list[WeightSpan] | None) -> None:
    with pytest.raises(ValueError, match="weight versions"):
        versions_of(spans, 3)


@pytest.mark.parametrize(
    ("finish", "reason", "stop_id"), [("stop", None, 3), ("stop", 3, 3), ("stop", "END", None), ("length", None, None)]
)
def test_only_a_stop_token_counts_as_the_end(finish: str, reason: int | str | None, stop_id: int | None) -> None:
    talk = conversation()
    done = choice([2, 3], finish=finish)
    done.stop_reason = reason
    talk.add_turn([1], done)
    assert talk.stop_id == stop_id


async def test_the_first_failure_counts_and_stops_what_runs() -> None:
    talk = conversation()
    running = asyncio.ensure_future(asyncio.sleep(100))
    talk.tasks.add(running)
    talk.fail("first: a")
    talk.fail("second: b")
    assert (talk.failure, talk.ended.is_set()) == ("first: a", True)
    with pytest.raises(asyncio.CancelledError):
        await running
