"""Conversations → text, by the Jinja files of templates/ or the tokenizer's own chat template.

A template marks what is learned by `{% generation %} ... {% endgeneration %}`; the text and the end of each of the
assistant's turns stand inside. Everything about a template is in its file: the comment at its head names the control
tokens it needs, and one more template is one more file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from common import ROOT, Message, UserError, nearest_word
from preprocessing.answer_spans import find_answers
from preprocessing.faults import Fault
from preprocessing.rendering import (
    Conversation,
    Span,
    has_generation_tags,
    render_marked,
    template_variables,
    without_generation_tags,
)
from preprocessing.tokens import TURNS, TextEncoder, backend_of, encoder_of

TEMPLATES = ROOT / "templates"
OWN = "the tokenizer's own"  # the name of a template that is no file of templates/

_HEADER = re.compile(r"\{#.*?\btokens:(.*?)-?#\}", re.DOTALL)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that fits a tokenizer; `text` is Jinja with generation tags where it has any."""

    name: str  # of the file, or OWN
    text: str
    stop: tuple[str, ...]  # the control tokens that end an answer
    has_tools: bool

    @property
    def saved(self) -> str:
        """The same without generation tags, rendering the same: what is written as chat_template.jinja."""
        return without_generation_tags(self.text)

    @property
    def tagged(self) -> bool:
        """Whether the template itself says what is learned."""
        return has_generation_tags(self.text)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a template


def template_names() -> list[str]:
    """The names of templates/*.jinja."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def load_template(name: str | None, tokenizer: Any, stage: str = "sft") -> ChatTemplate:
    """The template `name` of templates/, or the tokenizer's own for None; stage pt needs none: an empty one then.

    Raises UserError for an unknown name, for control tokens that the tokenizer lacks, for a tokenizer without a
    template, and for an own template whose answers cannot be found in what it renders.
    """
    if name is None and stage == "pt" and not tokenizer.chat_template:
        return ChatTemplate(OWN, "", (), False)
    if name is None:
        return _checked(OWN, own_template_text(tokenizer), tokenizer)
    check_name(name)
    text = _file_text(name)
    if lacking := _lacking_tokens(text, tokenizer):
        raise UserError(
            "template {name} needs control tokens that this model's tokenizer lacks: {tokens}.\n{advice}",
            name=name,
            tokens=lacking,
            advice=_advice(tokenizer, named=True),
        )
    return _checked(name, text, tokenizer)


def check_name(name: str) -> None:
    """Raises UserError where no file of templates/ has that name."""
    if name not in (names := template_names()):
        raise UserError(
            "there is no template '{name}'{near:suggestion}; there are {names}",
            name=name,
            near=nearest_word(name, names),
            names=names,
        )


def own_template_text(tokenizer: Any) -> str:
    """The chat template of a tokenizer; raises UserError where it has none, or several and no default."""
    if not tokenizer.chat_template:
        raise UserError("this model's tokenizer has no chat template of its own.\n{advice}", advice=_advice(tokenizer))
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several, none of them called default
        raise UserError(
            "this model's tokenizer has several chat templates and no default.\n{advice}", advice=_advice(tokenizer)
        ) from None


def _file_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _advice(tokenizer: Any, named: bool = False) -> Message:
    """What to do about a template that does not fit, a `named` one or the tokenizer's own."""
    fitting = [name for name in template_names() if not _lacking_tokens(_file_text(name), tokenizer)]
    if named and tokenizer.chat_template:
        return Message(
            "Leave template out for the tokenizer's own, or use one that fits: {names}", names=fitting or ["-"]
        )
    if fitting:
        return Message("Use a template that fits: {names}", names=fitting)
    return Message("No file of templates/ fits it; write one for it, or use another model.")


def _lacking_tokens(text: str, tokenizer: Any) -> list[str]:
    """The control tokens of a template's header that the tokenizer does not read as one token each."""
    header = _HEADER.search(text)
    missing = []
    for token in header[1].split() if header else []:
        spelled = tokenizer.special_tokens_map.get(token) if token.endswith("_token") else token
        if not spelled or len(backend_of(tokenizer).encode(spelled, add_special_tokens=False).ids) != 1:
            missing.append(token)
    return missing


def _checked(name: str, text: str, tokenizer: Any) -> ChatTemplate:
    """The ChatTemplate of `text`; raises UserError where its answers are not found."""
    try:
        template = ChatTemplate(name, text, (), "tools" in template_variables(text))
        return replace(template, stop=(_end_of_answers(template, encoder_of(tokenizer, text)),))
    except Fault as fault:
        raise UserError(
            "the chat template ({template}) cannot be used: {reason}.\n{advice}",
            template=Message("the tokenizer's own") if name == OWN else name,
            reason=fault.message,
            advice=_advice(tokenizer, name != OWN),
        ) from None


def _end_of_answers(template: ChatTemplate, encoder: TextEncoder) -> str:
    """The control token that ends both answers of TURNS; raises Fault where there is none, or they are not found."""
    rendered = render_conversation(template, {"messages": TURNS}, encoder)
    ends = []
    for number, (start, stop) in enumerate(rendered.spans, 1):
        answer = rendered.text[start:stop]
        end = encoder.last_control(answer)
        if end is not None and f"assistant text {number}" in answer and "user text" not in answer:
            ends.append(answer[end:].strip())
    if len(ends) != 2 or ends[0] != ends[1] or ends[0] not in encoder.special:
        raise Fault("it does not end every answer with a control token")
    return ends[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


@dataclass
class Rendered:
    """A conversation as text, and the spans to learn (one an answer); `escaped`: control tokens have other names."""

    text: str
    spans: list[Span]
    escaped: bool


def render_conversation(
    template: ChatTemplate, conversation: Conversation, encoder: TextEncoder, thinking: bool = True
) -> Rendered:
    """A whole conversation; raises Fault where the template refuses it or would leave a part of it out."""
    conversation = plain_conversation(conversation)
    messages, tools = conversation["messages"], conversation.get("tools")
    if not template.has_tools and (tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)):
        raise Fault("it has tools, and the chat template has none")
    escaped = encoder.has_lookalikes(conversation)
    if escaped:
        conversation = encoder.escape(conversation)
    text, spans = render_marked(template.text, conversation, encoder.names, thinking, encoder.endings)
    if spans is None:
        spans = find_answers(template.text, conversation, text, encoder, thinking)
    return Rendered(encoder.unescape(text) if escaped else text, spans, escaped)


def plain_conversation(conversation: Conversation) -> Conversation:
    """The conversation with contents that are strings and arguments of calls that are not: copied only if needed.

    Raises Fault for other contents, and for arguments that are no JSON.
    """
    messages = conversation["messages"]
    if all(type(message.get("content")) is str and not message.get("tool_calls") for message in messages):
        return conversation
    messages = [{**message, "content": message.get("content") or ""} for message in messages]
    for message in messages:
        if not isinstance(message["content"], str):
            raise Fault("the content of a message is {kind}, not text", kind=type(message["content"]).__name__)
        if message.get("tool_calls"):
            message["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return {**conversation, "messages": messages}


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's form with its arguments as an object, which templates write as JSON themselves."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")  # many servers write "" for no arguments
        except json.JSONDecodeError as error:
            raise Fault("the arguments of a tool call are no JSON ({reason})", reason=str(error)) from None
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": function}
