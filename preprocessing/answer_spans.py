"""Where the assistant's turns stand in what a chat template without generation tags has rendered."""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass
from typing import Any

from preprocessing.faults import Fault
from preprocessing.rendering import Conversation, Span, render
from preprocessing.tokens import Marker, TextEncoder


def _uncertain() -> Fault:
    return Fault(
        "its answers cannot be told for certain in the tokenizer's own chat template; set template to one that fits"
    )


def find_answers(
    text: str, conversation: Conversation, rendered: str, encoder: TextEncoder, thinking: bool
) -> list[Span]:
    """The spans of the assistant's turns in `rendered`, by rendering once more with marked messages.

    Where both renderings differ, a marked message stands. A turn starts where the prompt for it would end and reaches
    through the template's closing. Raises Fault wherever that is not certain: no answer is better than a wrong mask.
    """
    messages, marker = conversation["messages"], encoder.marker
    marked = {**conversation, "messages": marker.mark(messages)}
    places = _marked_places(rendered, render(text, marked, encoder.names, thinking=thinking))
    for number, message in enumerate(messages):
        if message["role"] != "tool" and number not in places and marker.has_text(message):
            raise Fault(
                "the chat template leaves message {number} ({role}) out; set template to one that fits",
                number=number + 1,
                role=message["role"],
            )
    order = sorted(places, key=lambda i: places[i][0])
    starts = [places[i][0] for i in order]
    shape = _shape(text, encoder, thinking)
    spans, previous, before = [], -1, 0  # the message before, and where it ends
    for i, start, following in zip(order, starts, [*starts[1:], len(rendered)], strict=True):
        end = places[i][-1] + 1
        if start < before:
            raise _uncertain()
        if messages[i]["role"] == "assistant":
            opening = shape.openings.get(messages[i - 1]["role"]) if i > 0 else None
            if opening is None or (previous != i - 1 and marker.has_text(messages[i - 1])):
                raise _uncertain()
            first = _answer_start(rendered, (before, start), opening, previous == i - 1, encoder)
            closing = rendered.find(shape.closing, end, following)
            if closing < 0:
                raise _uncertain()
            end = closing + len(shape.closing)
            spans.append((first, end))
        else:
            end += _unmarked_end(marker.after_last_mark(messages[i]["content"]), rendered[end:])
        previous, before = i, end
    return spans


def _marked_places(rendered: str, marked: str) -> dict[int, list[int]]:
    """For each message with marks in `marked` their places; raises Fault if the renderings differ elsewhere."""
    places: dict[int, list[int]] = {}
    last, same = 0, len(marked) == len(rendered)
    for number, mark, at in Marker.marks(marked):
        if rendered[at : at + 1] != mark:
            same = same and marked[last:at] == rendered[last:at]
            places.setdefault(number, []).append(at)
            last = at + 1
    if not same or marked[last:] != rendered[last:]:
        raise _uncertain()
    return places


def _answer_start(rendered: str, between: Span, opening: str, adjoining: bool, encoder: TextEncoder) -> int:
    """Where an answer starts: behind what a prompt for it would end with.

    `between` reaches from the end of the message before to the answer's first letter; that message is the one that it
    answers if it is `adjoining` (an empty message leaves no trace). An answer may leave out the end of the opening if
    no control token is in that (thoughts that are not kept).
    """
    before, first_letter = between
    if not adjoining:
        at = rendered.rfind(opening, before, first_letter)
        if at < 0 or not opening.strip():
            raise _uncertain()
        return at + len(opening)
    common = _common_start(opening, rendered[before:first_letter], encoder.marker)
    if encoder.control.search(opening, len(common)) or (opening.strip() and not common.strip()):
        raise _uncertain()
    return before + len(common)


def _unmarked_end(rest: str, following: str) -> int:
    """How many characters of `rest`, the end of a message, stand at the start of `following`.

    They stand there as they are, as JSON has them (Llama 3.1's tool results), or without spaces at the end.
    """
    ends = (rest, json.dumps(rest, ensure_ascii=False)[1:-1], rest.rstrip(), "")
    return next(len(end) for end in ends if following.startswith(end))


@dataclass(frozen=True)
class _Shape:
    """What a template writes around answers: `closing` after each, `openings[role]` between a message and an answer."""

    closing: str
    openings: dict[str, str]


@functools.lru_cache(maxsize=64)
def _shape(text: str, encoder: TextEncoder, thinking: bool) -> _Shape:
    """The shape of a template, from conversations with known texts; raises Fault where it has no closing."""

    def turn(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": f"the words of {role}", **more}

    turns = [turn("user"), turn("assistant"), turn("user"), turn("assistant")]
    pieces = render(text, {"messages": turns}, encoder.names, thinking=thinking).split(turns[1]["content"])
    closing = _common_start(pieces[1], pieces[-1], encoder.marker).rstrip() if len(pieces) == 3 else ""
    eos = encoder.names.get("eos_token")
    if eos and eos in closing:  # Command R goes on with the start of the next turn
        closing = closing[: closing.index(eos) + len(eos)]
    if not encoder.control.search(closing):
        raise Fault("it does not end every answer with a control token")
    call = {"type": "function", "id": "call00001", "function": {"name": "call", "arguments": {}}}
    calling = turn("assistant", content="", tool_calls=[call])
    starts = {
        "user": [turn("user")],
        "system": [turn("system")],
        "tool": [turn("user"), calling, turn("tool", name="call", tool_call_id=call["id"])],
    }
    openings = {}
    for role, messages in starts.items():
        with contextlib.suppress(Fault):
            prompt = render(text, {"messages": messages}, encoder.names, thinking=thinking, prompt=True)
            _, content, opening = prompt.rpartition(messages[-1]["content"])
            if content:
                openings[role] = opening
    return _Shape(closing, openings)


def _common_start(one: str, other: str, marker: Marker) -> str:
    """The longest common start that ends inside no word, tag or added token."""
    for unit in marker.units.finditer(one):
        if not other.startswith(unit[0], unit.start()):
            return one[: unit.start()]
    return one
