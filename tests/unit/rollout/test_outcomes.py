"""A verifier's answer gives a reward and numbers, or a reason; only failures of infrastructure are tried again."""

from __future__ import annotations

import json

import pytest

from hpc_gym.rollout.outcomes import Failed, read_verdict, worth_retrying


def test_numbers_at_the_top_are_read_and_the_rest_is_skipped() -> None:
    answer = {
        "responses_create_params": {"input": [{"content": "reward", "reward": 7}]},
        "response": {"output": [1, 2], "usage": {"reward": 3}},
        "reward": 0.5,
        "score": -1e-3,
        "solved": True,
        "name": "5",
        "nothing": None,
    }
    assert read_verdict(json.dumps(answer).encode()) == (0.5, {"score": -1e-3, "solved": 1.0})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"reward": null}', "but null"),
        (b'{"score": 1}', "but nothing"),
        (b'{"reward": "1"}', 'but "1"'),
        (b'{"reward": 1e999}', "but 1e999"),
        (b'{"reward": NaN}', "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"", "no JSON object"),
    ],
)
def test_without_a_finite_reward_the_rollout_failed(body: bytes, words: str) -> None:
    with pytest.raises(Failed, match=words) as caught:
        read_verdict(body)
    assert caught.value.reason.startswith("no_reward: ")
    assert not worth_retrying(caught.value.reason)


def test_what_may_pass_is_tried_again() -> None:
    assert worth_retrying("agent_error: the agent answered 500: ...")
    assert worth_retrying("replica_lost: vllm-0 was restarted")
    assert not worth_retrying("weights_stale: weights 8 are wanted")
    assert not worth_retrying("history_rewritten: the agent changed or dropped earlier messages")
    assert not worth_retrying("deadline: the rollout was not done within 60 s")


def test_what_the_judge_suffers_from_explains_a_failure_that_it_may_be_behind() -> None:
    trouble = "the judge refused the key"
    silent = Failed("deadline: the rollout was not done within 900 s").explained(trouble)
    assert silent.reason == f"deadline: {trouble}; the rollout was not done within 900 s"
    assert silent.explained(trouble) is silent, "once is enough"
    for reason in ("replica_lost: vllm-0 was restarted", "no_reward: but null"):
        assert Failed(reason).explained(trouble).reason == reason
    assert Failed("agent_error: the agent answered 500").explained("").reason == "agent_error: the agent answered 500"
