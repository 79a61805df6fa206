"""What is answered in OpenAI's forms: a reply as it grows, log-probabilities, token counts."""

from __future__ import annotations

import codecs
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.engine import Engine, TokenLogprob
from inference.scheduler import Event
from inference.tool_calls import Call, CallReader

LEAST_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


@dataclass(frozen=True)
class ToolCall:
    """A call of a reply; `index` counts the reply's calls, `arguments` is JSON text."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass
class Choice:
    """One of the replies to a request, as it grows."""

    index: int
    reader: CallReader | None = None
    single: bool = False  # one call at most
    prefix: str = ""  # the prompt, where it is echoed
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0  # characters of the tokens whose log-probabilities were sent
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def satisfied(self) -> bool:
        """Whether it has all that was asked for before the model ends it."""
        return self.single and bool(self.calls)

    def take(self, event: Event, reason: str | None) -> list[str | ToolCall]:
        """The parts that an event adds; `reason` is how the reply ended, if it did."""
        self.logprobs += event.logprobs
        parts: list[str | Call] = [event.text] if event.text else []
        if self.reader:
            parts = self.reader.feed(event.text) + (self.reader.end() if event.end else [])
        added: list[str | ToolCall] = []
        for part in parts:
            if self.satisfied:
                break
            if isinstance(part, str):
                self.text += part
                added.append(part)
            else:
                self.calls.append(ToolCall(len(self.calls), call_id(), part.name, part.arguments))
                added.append(self.calls[-1])
        if self.satisfied:
            self.finish_reason = "tool_calls"
        elif event.end:
            self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return added


def call_id() -> str:
    """Nine letters and digits, as Mistral's template wants them."""
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(9))


def chat_message(choice: Choice) -> dict[str, Any]:
    """A complete reply of a chat."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]
        message |= {"content": choice.text.strip() or None, "tool_calls": calls}
    return message


def chat_deltas(parts: Sequence[str | ToolCall]) -> list[dict[str, Any]]:
    """What parts of a reply are in a streamed chat; a call is its head and its arguments."""
    deltas: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            deltas.append({"content": part})
        else:
            head = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
            deltas.append({"tool_calls": [{"index": part.index, **head}]})
            deltas.append({"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]})
    return deltas


def token_logprobs(tokens: Sequence[TokenLogprob], engine: Engine) -> list[dict[str, Any]]:
    """Log-probabilities of a reply's tokens; the end of the turn is no part of the text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = engine.token_bytes(token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}

    return [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}
        for token in tokens
        if token.id not in engine.stop_ids
    ]


def completion_logprobs(tokens: Sequence[TokenLogprob], engine: Engine, choice: Choice) -> dict[str, Any]:
    """The older form of /v1/completions, for the next `tokens` of a choice."""
    form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if token.id in engine.stop_ids:
            continue
        spelled = engine.token_bytes(token.id)
        form["tokens"].append(_token_name(spelled))
        form["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
        top = {_token_name(engine.token_bytes(i)): max(value, LEAST_LOGPROB) for i, value in token.top}
        form["top_logprobs"].append(top)
        form["text_offset"].append(len(choice.prefix) + choice.offset)
        choice.offset += len(choice.decoder.decode(spelled))
    return form


def _token_name(spelled: bytes) -> str:
    """A token as the older form names it; a part of a character by its bytes."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
