"""Preference pairs and raw documents → token ids, by the same rules as conversations (encode.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import Config, Message, UserError
from preprocessing.encode import Messages, end_of_turn, token_span
from preprocessing.faults import Fault, TooLong
from preprocessing.rendering import Conversation
from preprocessing.template import ChatTemplate, plain_conversation, render_conversation
from preprocessing.tokens import NONCHARACTERS, TextEncoder, encoder_of
from preprocessing.truncation import shorten

# {"prompt_ids", "chosen_ids", "rejected_ids": list[int], "truncated": bool, "whole_length": int}; the length is that of
# prompt and longer answer before they were cut
Pair = dict[str, Any]


def encode_pair(pair: Conversation, template: ChatTemplate, tokenizer: Any, config: Config) -> Pair | Message:
    """The token ids of a prompt and two answers to it, or the reason why there are none.

    `pair`: {"messages": [... the prompt], "chosen": message, "rejected": message, ("tools")}. Prompt and answer are
    together what `encode` makes of the whole conversation, up to the end of the last turn; a token that holds the
    end of the prompt and the start of an answer belongs to both answers. Where the longer one does not fit into
    cutoff_len tokens, turns of the prompt are left out, the oldest first, then both sides are cut as truncation.py
    says, both answers at the same length; an answer that was cut has no end of its turn.
    """
    encoder = encoder_of(tokenizer, template.text)
    writer = _PairWriter(pair.get("tools"), template, encoder, config.enable_thinking)
    try:
        prompt, answers = _plain_pair(pair)
        encoded = _joined(*(writer.encode(prompt, answer) for answer in answers))
        length = len(encoded["prompt_ids"]) + max(len(encoded["chosen_ids"]), len(encoded["rejected_ids"]))
        if encoded["chosen_ids"] == encoded["rejected_ids"]:
            raise Fault("chosen and rejected are the same answer")
        if length > config.cutoff_len:
            if config.overlong != "truncate":
                raise Fault(
                    TooLong(
                        "it has {tokens:,} tokens, more than cutoff_len={cutoff_len}",
                        tokens=length,
                        cutoff_len=config.cutoff_len,
                    )
                )
            encoded = _shortened_pair(prompt, answers, writer, config.cutoff_len)
        return {**encoded, "whole_length": length}
    except Fault as fault:
        return fault.message


def _plain_pair(pair: Conversation) -> tuple[Messages, list[dict[str, Any]]]:
    """The prompt's messages and the two answers, with contents that are strings; raises Fault for an empty answer."""
    messages = plain_conversation({"messages": [*pair["messages"], pair["chosen"], pair["rejected"]]})["messages"]
    for kind, answer in zip(("chosen", "rejected"), messages[-2:], strict=True):
        if answer["role"] != "assistant":
            raise Fault("{kind} is a message of the {role}, not of the assistant", kind=kind, role=answer["role"])
        if not answer["content"].strip() and not answer.get("tool_calls"):
            raise Fault("{kind} is empty", kind=kind)
    return messages[:-2], messages[-2:]


@dataclass(frozen=True)
class _Encoded:
    """Ids up to the end of the answer; the answer starts at `start`, the end of its turn at `turn_end`."""

    ids: list[int]
    start: int
    turn_end: int


@dataclass(frozen=True)
class _PairWriter:
    """Renders and encodes a prompt with one of its answers."""

    tools: list[dict[str, Any]] | None
    template: ChatTemplate
    encoder: TextEncoder
    thinking: bool

    def encode(self, prompt: Messages, answer: dict[str, Any]) -> _Encoded:
        whole = {"messages": [*prompt, answer], "tools": self.tools}
        rendered = render_conversation(self.template, whole, self.encoder, self.thinking)
        encoding = self.encoder.encode([rendered.text], rendered.escaped)[0]
        ids = self.encoder.ids(encoding, rendered.text, rendered.escaped)
        if not rendered.spans:
            raise Fault("nothing of it would be learned: it has no answer")
        start, stop = rendered.spans[-1]
        first, end = token_span(encoding, start, stop, len(rendered.text))
        turn_end, _ = token_span(encoding, end_of_turn(rendered, start, stop, self.encoder), stop, len(rendered.text))
        return _Encoded(ids[:end], first, turn_end)


def _joined(chosen: _Encoded, rejected: _Encoded) -> Pair:
    """The two as a pair with one prompt; raises Fault where the template writes different prompts."""
    start = min(chosen.start, rejected.start)
    if chosen.ids[:start] != rejected.ids[:start]:
        raise Fault("the chat template writes different prompts for chosen and rejected; set template to one that fits")
    return {
        "prompt_ids": chosen.ids[:start],
        "chosen_ids": chosen.ids[start:],
        "rejected_ids": rejected.ids[start:],
        "truncated": False,
    }


def _shortened_pair(prompt: Messages, answers: list[dict[str, Any]], writer: _PairWriter, cutoff_len: int) -> Pair:
    """The pair in at most `cutoff_len` tokens; raises Fault where the answers would be equal."""

    def measure(messages: Messages) -> tuple[None, range]:
        return None, range(len(writer.encode(messages[:-1], messages[-1]).ids))

    token_starts = writer.encoder.token_starts
    longer = max(answers, key=lambda answer: len(writer.encode(prompt, answer).ids))
    kept, cut, _, _ = shorten([*prompt, longer], measure, token_starts, cutoff_len)
    most = None if cut[-1] is kept[-1] else len(token_starts(cut[-1]["content"]))
    encoded = []
    for answer in answers:
        starts = token_starts(answer["content"])
        if most is None or len(starts) <= most:
            encoded.append(writer.encode(cut[:-1], answer))
            continue
        part = {**answer, "content": answer["content"][: starts[most]]}
        if "</think>" in answer["content"] and "</think>" not in part["content"] and not writer.template.tagged:
            raise Fault(
                "its thoughts alone are too long, and the tokenizer's own chat template cannot show a part of them"
            )
        whole = writer.encode(cut[:-1], part)
        encoded.append(_Encoded(whole.ids[: whole.turn_end], whole.start, whole.turn_end))
    pair = _joined(*encoded)
    space = cutoff_len - len(pair["prompt_ids"])
    pair |= {name: pair[name][:space] for name in ("chosen_ids", "rejected_ids")} | {"truncated": True}
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise Fault(
            "cut to cutoff_len={cutoff_len}, chosen and rejected are the same; raise cutoff_len", cutoff_len=cutoff_len
        )
    return pair


def encode_documents(texts: list[str], tokenizer: Any, cutoff_len: int) -> list[list[dict[str, Any]] | Message]:
    """For each raw text its samples, or the reason why there are none: every token is learned.

    An end of sequence follows each document, and the tokenizer's start of sequence precedes it where the tokenizer
    itself puts one. What looks like a control token stays text. A document of more than `cutoff_len` tokens becomes
    several samples of about equal length. Raises UserError where the tokenizer has no end of sequence.
    """
    encoder = encoder_of(tokenizer, "")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "this model's tokenizer has no end-of-sequence token (eos_token in tokenizer_config.json), which has "
            "to follow each document"
        )
    begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    results: list[Any] = []
    for text in texts:
        try:
            ids = [*begin, *_document_ids(text, encoder), tokenizer.eos_token_id]
        except Fault as fault:
            results.append(fault.message)
            continue
        parts = -(-len(ids) // cutoff_len)
        size = -(-len(ids) // parts)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        results.append([_whole_sample(piece) for piece in pieces])
    return results


def _whole_sample(ids: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "labels": list(ids), "truncated": False, "whole_length": len(ids)}


def _document_ids(text: str, encoder: TextEncoder) -> list[int]:
    if not text.strip():
        raise Fault("it has no text")
    escaped = encoder.has_lookalikes({"messages": [{"content": text}]})
    if escaped and NONCHARACTERS.search(text):
        raise Fault("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them")
    return encoder.ids(encoder.encode([text], escaped)[0], text, escaped)
