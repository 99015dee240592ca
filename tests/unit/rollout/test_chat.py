"""Which earlier messages are the policy's, after NeMo Gym converted them to Responses items and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hpc_gym.rollout.chat import canonical, end_of, with_stand_in

USER = {"role": "user", "content": "add 1"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": '{"n": 1, "m": 2}'}}
SAID = {"role": "assistant", "content": "<think>hm</think>yes", "reasoning": "hm", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "1", "tool_call_id": "call00000"}
HISTORY = canonical([USER, SAID])


@pytest.mark.parametrize(
    "returned",
    [
        SAID,
        {"role": "assistant", "content": "yes", "tool_calls": [CALL]},
        SAID | {"content": [{"type": "text", "text": "yes"}]},
        SAID | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"m":2,"n":1}'}}]},
    ],
)
def test_what_the_conversion_changes_is_no_rewriting(returned: dict[str, Any]) -> None:
    assert end_of(HISTORY, [USER, returned, TOOL]) == 2


@pytest.mark.parametrize(
    "messages",
    [
        [USER, TOOL],
        [USER],
        [TOOL, SAID],
        [USER | {"content": "add 2"}, SAID, TOOL],
        [USER, SAID | {"content": "no"}, TOOL],
        [USER, SAID | {"tool_calls": []}, TOOL],
        [USER, SAID | {"tool_calls": [CALL, CALL]}, TOOL],
        [USER, SAID | {"tool_calls": [CALL | {"id": "other"}]}, TOOL],
        [USER, SAID | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"n": 2}'}}]}, TOOL],
        [USER, SAID, {"role": "assistant", "content": "and more"}],
    ],
)
def test_what_an_agent_changes_is(messages: list[Any]) -> None:
    assert end_of(HISTORY, messages) is None


def test_merged_and_dropped_assistant_messages_are_recognized() -> None:
    """Two turns in a row come back as one message; a turn without words does not come back at all."""
    one, two = {"role": "assistant", "content": "one "}, {"role": "assistant", "content": "two"}
    assert end_of(canonical([USER, one, two]), [USER, {"role": "assistant", "content": "one two"}, TOOL]) == 2
    assert end_of(canonical([USER, {"role": "assistant", "content": ""}]), [USER, TOOL]) == 1
    assert end_of(canonical([USER, one]), [USER, one, {"role": "assistant", "content": None}, TOOL]) == 3


def test_stand_ins_keep_ids_and_names_and_leave_the_messages_alone() -> None:
    messages = [USER, SAID, TOOL, {"role": "assistant", "content": "2"}, USER]
    before = copy.deepcopy(messages)
    changed = with_stand_in(messages, 1, 4, "b")
    assert messages == before
    assert [message["role"] for message in changed] == [message["role"] for message in messages]
    assert changed[1]["tool_calls"][0]["id"] == "call00000"
    assert changed[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": "a"}'}
    assert changed[3] == {"role": "assistant", "content": "b"}
    assert with_stand_in([USER, TOOL], 1, 1, "b")[1] == {"role": "assistant", "content": "b"}
