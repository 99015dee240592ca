"""Turn t+1's prompt begins with turn t's prompt and generated ids, whatever the template does; then comes its text."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from chat_templates import TEMPLATES, LocalVllm, Template, decode, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_gym.rollout import splice
from hpc_gym.rollout.chat import canonical, end_of
from hpc_gym.rollout.conversation import Conversation
from hpc_gym.rollout.prompts import Prompts
from hpc_gym.rollout.replicas import Replica
from hpc_gym.rollout.vllm import Choice, Logprobs, TokenLogprob, Vllm, WeightSpan

MARK = "SENTINEL"
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["<|end|>", "\n<|end|>\n<|start|>assistant\n", "e\u0301\u200d", "</think>", " \n ", "\ufffd", "42."]
    ),
)
ids = st.lists(st.integers(4, 400), min_size=1, max_size=12)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    """What the policy generated, how it ended, and what the environment says next."""
    return {
        "ids": draw(ids),
        "end": draw(st.sampled_from(["stop", "stop", "cut", "other stop"])),
        "call": draw(st.booleans()),
        "argument": draw(texts),
        "reply": draw(st.lists(texts, min_size=1, max_size=2)),
    }


def conversation() -> Conversation:
    return Conversation("tag", Replica(Vllm("vllm-0", "/nowhere")), "", 0, 1e9)


def message_of(turn: dict[str, Any], number: int) -> dict[str, Any]:
    if not turn["call"]:
        return {"role": "assistant", "content": tokenizer().decode(turn["ids"])}
    function = {"name": "look", "arguments": json.dumps({"a": turn["argument"]})}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": f"call{number:05d}", "function": function}]}


def stop_token(template: Template, turn: dict[str, Any]) -> list[int]:
    text = template.call_stop if turn["call"] else template.stop
    if turn["end"] == "cut":
        return []
    return [tokenizer().token_to_id("<|pad|>" if turn["end"] == "other stop" else text)]


def take_turn(talk: Conversation, prompt: list[int], generated: list[int], stopped: bool) -> None:
    talk.add_turn(
        prompt,
        Choice(
            generated,
            Logprobs([TokenLogprob(-1.0)] * len(generated)),
            "stop" if stopped else "length",
            weight_versions=[WeightSpan("default", 0, len(generated))],
        ),
    )


def expected_text(template: Template, messages: list[Any], at: int, turn: dict[str, Any]) -> str:
    """What the template writes behind the turn at position `at`, read off a rendering with a mark in its place."""
    call = turn["call"] and turn["end"] != "cut" and turn["end"] != "other stop"
    function = {"name": "look", "arguments": json.dumps({"a": MARK})}
    marked: dict[str, Any] = {"role": "assistant", "content": MARK}
    if call:
        marked = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]}
    text = template.text([*messages[:at], marked, *messages[at + 1 :]])
    rest = text.split(MARK, 1)[1]
    if call:
        if template.name == "never closes":
            marked = {"role": "assistant", "content": MARK}
            return template.text([*messages[:at], marked, *messages[at + 1 :]]).split(MARK, 1)[1]
        rest = rest.removeprefix(template.call_syntax)
    stop = template.call_stop if turn["call"] else template.stop
    if turn["end"] == "stop" and stop in (template.call_end if turn["call"] else template.end):
        rest = rest.split(stop, 1)[1]
    return rest


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(begin=texts, drawn=st.lists(turns(), min_size=1, max_size=4))
def test_a_prompt_begins_with_all_that_was_said(template: Template, begin: str, drawn: list[dict[str, Any]]) -> None:
    async def talk_through() -> None:
        vllm, prompts, talk = LocalVllm(template), Prompts(), conversation()
        messages: list[dict[str, Any]] = [{"role": "user", "content": begin}]
        request = {"messages": messages}
        prompt = (await prompts.first(vllm, request, 1)).token_ids  # type: ignore[arg-type]
        talk.first_messages = 1
        for number, turn in enumerate(drawn):
            stop = stop_token(template, turn)
            take_turn(talk, prompt, turn["ids"] + stop, bool(stop))
            before = list(talk.tokens)
            at = len(messages)
            messages.append(message_of(turn, number))
            talk.history = canonical(messages)
            role = "tool" if turn["call"] else "user"
            messages += [{"role": role, "content": text, "tool_call_id": f"call{number:05d}"} for text in turn["reply"]]
            end = end_of(talk.history, messages)
            assert end is not None
            prompt = (await prompts.following(vllm, request, talk, end, 1)).token_ids  # type: ignore[arg-type]
            assert prompt[: len(before)] == before
            if messages[at].get("tool_calls") or messages[at]["content"]:
                assert decode(prompt[len(before) :]) == expected_text(template, messages, at, turn)

    asyncio.run(talk_through())


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_without_the_splice_the_same_conversation_diverges(template: Template) -> None:
    """Ids that the tokenizer itself would not have chosen for this text: one by one instead of merged."""
    single = [tokenizer().token_to_id(letter) for letter in "answer"] + [tokenizer().token_to_id("<|end|>")]
    messages = [{"role": "user", "content": "one"}]

    async def both() -> tuple[list[int], list[int]]:
        vllm, prompts, talk = LocalVllm(template), Prompts(), conversation()
        first = (await prompts.first(vllm, {"messages": messages}, 1)).token_ids  # type: ignore[arg-type]
        take_turn(talk, first, single, True)
        talk.first_messages = 1
        going_on = {
            "messages": [*messages, {"role": "assistant", "content": "answer"}, {"role": "user", "content": "x"}]
        }
        exact = (await prompts.following(vllm, going_on, talk, 2, 1)).token_ids  # type: ignore[arg-type]
        again = (await prompts.first(vllm, going_on, 1)).token_ids  # type: ignore[arg-type]
        return exact, again

    exact, again = asyncio.run(both())
    assert again[: len(exact)] != exact
    assert decode(exact).endswith("<|start|>user\nx<|end|>\n<|start|>assistant\n")


def test_rollouts_that_differ_in_the_policys_words_only_share_renderings() -> None:
    async def render_siblings() -> int:
        vllm, prompts = LocalVllm(TEMPLATES[0]), Prompts()
        for words in ("one", "two", "three"):
            talk = conversation()
            request = {"messages": [{"role": "user", "content": "x"}]}
            first = (await prompts.first(vllm, request, 1)).token_ids  # type: ignore[arg-type]
            take_turn(talk, first, [tokenizer().token_to_id("<|end|>")], True)
            talk.first_messages = 1
            said = {"role": "assistant", "content": words}
            request = {"messages": [*request["messages"], said, {"role": "user", "content": "y"}]}
            await prompts.following(vllm, request, talk, 2, 1)  # type: ignore[arg-type]
        return vllm.calls

    assert asyncio.run(render_siblings()) == 4


def test_a_turn_costs_one_rendering_once_the_template_is_known() -> None:
    async def talk_on() -> list[int]:
        vllm, prompts, talk = LocalVllm(TEMPLATES[0]), Prompts(), conversation()
        messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        prompt = (await prompts.first(vllm, {"messages": messages}, 1)).token_ids  # type: ignore[arg-type]
        talk.first_messages = 1
        calls = []
        for number in range(4):
            take_turn(talk, prompt, [tokenizer().token_to_id("<|end|>")], True)
            messages += [{"role": "assistant", "content": "a"}, {"role": "user", "content": str(number)}]
            end, before = len(messages) - 1, vllm.calls
            request = {"messages": messages}
            prompt = (await prompts.following(vllm, request, talk, end, 1)).token_ids  # type: ignore[arg-type]
            assert decode(prompt).endswith(f"<|start|>user\n{number}<|end|>\n<|start|>assistant\n")
            calls.append(vllm.calls - before)
        return calls

    assert asyncio.run(talk_on()) == [3, 1, 1, 1]


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_a_mark_is_found_when_it_is_the_only_one(rendering: list[int], mark: list[int]) -> None:
    size = len(mark)
    places = [at for at in range(len(rendering) - size + 1) if rendering[at : at + size] == mark]
    expected = rendering[places[0] + size :] if len(places) == 1 else None
    assert splice.behind_mark(rendering, mark) == expected


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_common_suffix_is_the_longest(first: list[int], second: list[int]) -> None:
    suffix = splice.common_suffix(first, second)
    length = len(suffix)
    assert first[len(first) - length :] == suffix == second[len(second) - length :]
    assert length == min(len(first), len(second)) or first[-length - 1] != second[-length - 1]


def test_a_template_that_hides_what_was_said_is_refused() -> None:
    with pytest.raises(splice.SpliceError, match="without its contents"):
        splice.behind([1, 2], [1, 2])
