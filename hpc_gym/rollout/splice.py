"""Token-exact continuation: the next turn's prompt is the last turn's exact ids, then what the chat template puts
after them.

Rendering a conversation again tokenizes what the policy said from its text, and that need not give the ids that the
policy generated: the template may strip or add a newline, and generated ids are often not the tokenizer's own. So the
ids that exist are kept, and only the template's text behind a turn is taken from a rendering. To find where that text
begins, the turn's message is replaced by two stand-ins that differ from each other, and both conversations are
rendered: what their ids have in common at the end is the template's doing alone. Neither the policy's words nor the
rest of the history can disturb this, be it the literal text of an end-of-turn token, thoughts that the template drops,
or Unicode that does not survive a round trip.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class SpliceError(ValueError):
    """The chat template's renderings cannot be told apart at the end of a turn."""


def common_suffix(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The longest list of ids that both end with."""
    length = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        length += 1
    return list(first[len(first) - length :])


def behind(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """What the template puts behind a message: two renderings that differ in that message only, compared from their
    ends.

    Raises SpliceError when the renderings are equal, that is, when the template does not show the message at all.
    """
    suffix = common_suffix(first, second)
    if len(suffix) == min(len(first), len(second)):
        raise SpliceError("the chat template renders an assistant message without its contents")
    return suffix


def behind_mark(rendering: Sequence[int], mark: Sequence[int]) -> list[int] | None:
    """What follows the ids `mark` in a rendering; None unless they occur in it exactly once.

    Once two stand-ins were compared, the ids that the first one ends with mark the place in every later rendering.
    """
    text, wanted = array("i", rendering), array("i", mark).tobytes()
    data = text.tobytes()
    places = []
    place = data.find(wanted)
    while place >= 0:
        if place % text.itemsize == 0:
            places.append(place // text.itemsize)
        place = data.find(wanted, place + 1)
    return list(rendering[places[0] + len(mark) :]) if len(places) == 1 and mark else None


def after_turn(rest: Sequence[int], closing: Sequence[int], stop_id: int | None) -> list[int] | None:
    """What is still missing in the prompt after the ids of a turn.

    `rest` is what the template puts behind the message where the conversation goes on, `closing` where it ends with
    the message; both may begin with text that belongs to the turn itself (the end of a tool call). `stop_id` is the
    token that ended the generation and is the last of the turn's ids; None where the generation was cut, or ended
    without such a token.

    A template closes a turn with the stop token, perhaps after a newline: then the rest follows it. None when the
    closing has no such token: then only a rendering tells where the turn's own text ends.
    """
    if stop_id is None or stop_id not in closing:
        return None
    end = list(closing).index(stop_id) + 1
    if list(rest[:end]) == list(closing[:end]):
        return list(rest[end:])
    if stop_id in rest[: len(closing)]:
        return list(rest[list(rest).index(stop_id) + 1 :])
    return None
