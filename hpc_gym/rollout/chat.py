"""Chat conversations as NeMo Gym sends them back: which earlier messages are the policy's, and were they left as they
were.

NeMo Gym keeps a conversation as Responses API items and converts it to chat messages again for every turn. Read in
nemo-gym 0.4.0 (`nemo_gym/responses_converter.py`, `responses_api_models/vllm_model/app.py`), what survives is: text,
tool calls with id, name and arguments, and their order. What does not: empty assistant messages (dropped),
neighbouring assistant messages (merged into one), `<think>` blocks (moved to `reasoning`, or dropped), empty against
missing content. Comparing entries ignores just that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

Message = Mapping[str, Any]

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


class Entry(NamedTuple):
    """A message, or several neighbouring assistant messages, in the form in which two conversations are compared."""

    role: str
    content: str
    tool_calls: tuple[tuple[str, str, str], ...] = ()
    """Id, name and arguments of each."""
    tool_call_id: str = ""


def canonical(messages: Sequence[Message]) -> list[Entry]:
    """The entries of a conversation; assistant messages without contents are left out."""
    entries: list[Entry] = []
    for message in messages:
        entry = _entry(message)
        if entry.role != "assistant":
            entries.append(entry)
        elif not entry.content and not entry.tool_calls:
            continue
        elif entries and entries[-1].role == "assistant":
            last = entries[-1]
            entries[-1] = Entry("assistant", last.content + entry.content, last.tool_calls + entry.tool_calls)
        else:
            entries.append(entry)
    return entries


def _entry(message: Message) -> Entry:
    role = str(message.get("role", ""))
    content = _text(message.get("content"))
    if role != "assistant":
        return Entry(role, content, (), str(message.get("tool_call_id") or ""))
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        calls.append((str(call.get("id")), str(function.get("name")), _same_json(function.get("arguments"))))
    return Entry(role, _THOUGHTS.sub("", content), tuple(calls))


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return msgspec.json.encode(content, order="deterministic").decode()


def _same_json(arguments: Any) -> str:
    """Arguments in one spelling; text that is no JSON stays as it is."""
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except (msgspec.DecodeError, UnicodeEncodeError):
        return str(arguments)
    return msgspec.json.encode(value, order="deterministic").decode()


def end_of(history: Sequence[Entry], messages: Sequence[Message]) -> int | None:
    """How many of `messages` make up `history`, which ends with the policy's last turn; None when they do not begin
    with it.

    Empty assistant messages directly behind are counted in.
    """
    if canonical(messages)[: len(history)] != list(history):
        return None
    found = None
    for end in range(len(messages) + 1):
        role = messages[end - 1].get("role") if end else None
        if role == "assistant" or found is None:
            if len(history) <= end and canonical(messages[:end]) == list(history):
                found = end
        else:
            break
    return found


def with_stand_in(
    messages: Sequence[Message], first: int, end: int, word: str, *, text_only: bool = False
) -> list[Message]:
    """The conversation with what the policy said replaced, for `splice.behind`: the last turn before `end` says `word`.

    `first`: where the first prompt ends and the policy's messages begin. Earlier turns say "a": the template's text
    behind the last turn does not depend on them, and conversations that differ in nothing else share their rendering.
    Turns with tool calls keep ids and names, with `word` in the arguments of the last one; with `text_only` the last
    turn has none.
    """
    start = end
    while start > first and messages[start - 1].get("role") == "assistant":
        start -= 1
    calls = [call for message in messages[start:end] for call in message.get("tool_calls") or ()]
    earlier = [
        _stand_in(message.get("tool_calls") or (), "a") if message.get("role") == "assistant" else message
        for message in messages[first:start]
    ]
    return [*messages[:first], *earlier, _stand_in(() if text_only else calls, word), *messages[end:]]


def _stand_in(calls: Sequence[Message], word: str) -> Message:
    if not calls:
        return {"role": "assistant", "content": word}
    words = ["a"] * (len(calls) - 1) + [word]
    stand_ins = [
        {
            "id": call.get("id"),
            "type": "function",
            "function": {"name": (call.get("function") or {}).get("name"), "arguments": f'{{"a": "{each}"}}'},
        }
        for call, each in zip(calls, words, strict=True)
    ]
    return {"role": "assistant", "content": None, "tool_calls": stand_ins}
