"""A dataset row reaches the agent with the trainer's sampling and the rollout's tag, and otherwise as it was."""

from __future__ import annotations

import json

import pytest

from hpc_gym.protocol.messages import Sampling
from hpc_gym.protocol.trajectory import REPLICA_GONE
from hpc_gym.rollout.runs import BadRow, Row, both_reasons

ROW = {
    "responses_create_params": {
        "input": [{"role": "user", "content": "h\u00e9"}],
        "temperature": 0.2,
        "top_p": 0.9,
        "metadata": {"note": "kept", "extra_body": '{"min_p": 0.1}'},
    },
    "ground_truth": [{"huge": 123456789012345678901234567890}],
    "id": 7,
}


def test_sampling_is_overridden_and_the_tag_is_put_in() -> None:
    row = Row(json.dumps(ROW).encode(), Sampling(temperature=1.0, max_output_tokens=64))
    body = json.loads(row.body("TAG"))
    params = body.pop("responses_create_params")
    assert json.loads(params["metadata"].pop("extra_body")) == {"min_p": 0.1, "hpc_gym_rollout": "TAG"}
    assert params == {
        "input": [{"role": "user", "content": "h\u00e9"}],
        "temperature": 1.0,
        "top_p": 0.9,
        "max_output_tokens": 64,
        "metadata": {"note": "kept"},
    }
    assert body == {"ground_truth": ROW["ground_truth"], "id": 7}
    assert b"TAG" not in row.body("other")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no row of NeMo Gym"),
        (b"[]", "no row of NeMo Gym"),
        (b"{}", "has no 'responses_create_params'"),
        (b'{"responses_create_params": 5}', "no row of NeMo Gym"),
        (b'{"responses_create_params": {"metadata": 5}}', "no row of NeMo Gym"),
        (b'{"responses_create_params": {"metadata": {"extra_body": "{"}}}', "no row of NeMo Gym"),
    ],
)
def test_what_is_no_row_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        Row(data, Sampling())


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        ("deadline: 5 s", "deadline: 5 s", "deadline: 5 s"),
        ("agent_error: 500", "deadline: 5 s", "agent_error: 500 (attempt 2: deadline: 5 s)"),
        ("vllm_error: 500", "weights_stale: 3", "weights_stale: 3 (attempt 1: vllm_error: 500)"),
        ("replica_lost: gone", "weights_stale: 3", "weights_stale: 3 (attempt 1: replica_lost: gone)"),
    ],
)
def test_the_reason_of_two_attempts_begins_with_a_replica_that_is_gone(first: str, last: str, told: str) -> None:
    assert both_reasons(first, last, 2) == told
    assert told.startswith(REPLICA_GONE) is last.startswith(REPLICA_GONE)
