"""What vLLM is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_gym.rollout.vllm import unconstrained

SAMPLING = {"temperature": 1.0, "structured_outputs": {"structural_tag": "{}"}}


@pytest.mark.parametrize(
    "request_", [{}, {"tool_choice": "auto", "parallel_tool_calls": False}, {"response_format": {"type": "text"}}]
)
def test_a_policy_that_may_say_anything_is_not_held_to_a_grammar(request_: dict[str, Any]) -> None:
    assert unconstrained(SAMPLING, request_) == {"temperature": 1.0}


@pytest.mark.parametrize(
    "request_",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_a_row_that_asks_for_a_grammar_gets_it(request_: dict[str, Any]) -> None:
    assert unconstrained(SAMPLING, request_) == SAMPLING
