"""Messages → the prompt after which a model answers, and the check that it holds all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from common import UserError
from preprocessing.faults import Fault
from preprocessing.rendering import LEARNED, render
from preprocessing.template import own_template_text, plain_conversation
from preprocessing.tokens import Marker, encoder_of

Messages = list[dict[str, Any]]


class UnsuitableMessages(UserError):
    """The chat template refuses the messages, or leaves one out."""


def prompt_ids(
    messages: Messages,
    tokenizer: Any,
    *,
    template_text: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool = True,
    continue_last: bool = False,
) -> list[int]:
    """The token ids after which a model answers `messages`, by the tokenizer's chat template or `template_text`.

    The same rule as in training: only the template's own control tokens are control tokens. With `continue_last` the
    last message is the beginning of the answer, and the prompt ends with its last letter. Raises UserError where the
    template refuses the messages, leaves one out, or writes no header for an answer (see `complete_prompt`).
    """
    text = template_text or own_template_text(tokenizer)
    encoder = encoder_of(tokenizer, text)
    try:
        conversation = plain_conversation({"messages": messages, "tools": tools})
        escaped = encoder.has_lookalikes(conversation)
        if escaped:
            conversation = encoder.escape(conversation)

        def write(some: Messages, header: bool) -> str:
            changed = {**conversation, "messages": some}
            rendered = render(text, changed, encoder.names, thinking=enable_thinking, prompt=header)
            return rendered.replace(LEARNED, "")

        marker, control = encoder.marker, encoder.control.search
        prompt = complete_prompt(conversation["messages"], write, marker, control, continue_last=continue_last)
        if not escaped:
            return tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt = encoder.unescape(prompt)
        return encoder.ids(encoder.encode([prompt], True)[0], prompt, True)
    except Fault as fault:
        raise UnsuitableMessages(
            "these messages cannot be put to the model: {reason}.\nChange them.", reason=fault.message
        ) from None


def complete_prompt(
    messages: Messages,
    write: Callable[[Messages, bool], str],
    marker: Marker,
    find_control: Callable[[str], Any],
    *,
    continue_last: bool = False,
) -> str:
    """The prompt for an answer to `messages`: the one check for every template and every engine.

    `write(messages, header)` renders messages, with the header of an answer where `header` is true; `find_control`
    finds a control token in what it wrote. Raises Fault where the text of a message is not in the prompt, and where
    the last message is the assistant's (or the system's) and only its end follows it: a model would begin to speak
    for somebody else there.
    """
    header = not continue_last
    prompt = write(messages, header)
    try:
        marked = write(marker.mark(messages), header)
    except Fault:  # a template that looks into a text, as for JSON
        marked = None
    ends = _ends_of_messages(messages, prompt, marked, marker)
    last = messages[-1]
    if continue_last:
        if last["role"] != "assistant" or last.get("tool_calls") or len(messages) - 1 not in ends:
            raise Fault("only a last message of the assistant that has text can be continued")
        return prompt[: ends[len(messages) - 1]]
    if last["role"] in ("assistant", "system") and (end := ends.get(len(messages) - 1)) is not None:
        rest = prompt[end:]
        control = find_control(rest)
        if not rest[control.end() if control else 0 :].strip():
            raise Fault(
                "the last message is the {role}'s, and the chat template opens no answer after it; end with a "
                "message of the user, or ask for that message to be continued",
                role=last["role"],
            )
    return prompt


def _ends_of_messages(messages: Messages, prompt: str, marked: str | None, marker: Marker) -> dict[int, int]:
    """Where the text of each message ends in the prompt; raises Fault where one is not in it.

    `marked` is the prompt of the marked messages, where there is one. Left out may be thoughts, and the text beside a
    tool call: these are dropped by the templates of many vendors.
    """
    last_marks = {number: at for number, _, at in marker.marks(marked or "")}
    ends = {}
    for number, message in enumerate(messages):
        if number in last_marks:
            if len(marked or "") == len(prompt):
                rest, end = marker.after_last_mark(message["content"]), last_marks[number] + 1
                ends[number] = end + len(rest) if prompt.startswith(rest, end) else end
            continue
        taken_apart = message["role"] == "tool" or message.get("tool_calls") or marked is None
        there = taken_apart and all(_occurs(text, prompt) for text in _parts(message))
        if not there and _must_occur(message, marker):
            raise Fault(
                "the chat template leaves message {number} ({role}) out; set template to one that fits",
                number=number + 1,
                role=message["role"],
            )
    return ends


def _must_occur(message: dict[str, Any], marker: Marker) -> bool:
    """Whether a message has text beside its thoughts."""
    return marker.has_text({**message, "content": message["content"].rpartition("</think>")[2]})


def _parts(message: dict[str, Any]) -> Iterator[str]:
    """What of a message has to stand in a prompt: of a tool's result in JSON its values, of tool calls their names."""
    if message.get("tool_calls"):
        yield from (call["function"]["name"] for call in message["tool_calls"])
        return
    try:
        yield from _strings(json.loads(message["content"]) if message["role"] == "tool" else message["content"])
    except json.JSONDecodeError:
        yield message["content"]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _occurs(text: str, prompt: str) -> bool:
    """Whether a text stands in the prompt, as it is or as JSON has it."""
    text = text.strip()
    return any(form in prompt for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]))
