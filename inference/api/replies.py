"""What is answered in OpenAI's forms: a reply as it grows, log-probabilities, token counts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.engine import Engine
from inference.reply import Reply
from inference.request import TokenLogprob
from inference.tools import Call

LEAST_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


@dataclass
class TextPosition:
    """Where in prompt and reply the next token of a reply begins."""

    offset: int  # characters
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


def chat_message(reply: Reply) -> dict[str, Any]:
    """A complete reply of a chat."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
        message |= {"content": reply.text.strip() or None, "tool_calls": calls}
    return message


def chat_deltas(parts: Sequence[str | Call]) -> list[dict[str, Any]]:
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


def completion_logprobs(tokens: Sequence[TokenLogprob], engine: Engine, position: TextPosition) -> dict[str, Any]:
    """The older form of /v1/completions, for the next `tokens` of a reply."""
    form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if token.id in engine.stop_ids:
            continue
        spelled = engine.token_bytes(token.id)
        form["tokens"].append(_token_name(spelled))
        form["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
        top = {_token_name(engine.token_bytes(i)): max(value, LEAST_LOGPROB) for i, value in token.top}
        form["top_logprobs"].append(top)
        form["text_offset"].append(position.offset)
        position.offset += len(position.decoder.decode(spelled))
    return form


def _token_name(spelled: bytes) -> str:
    """A token as the older form names it; a part of a character by its bytes."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
