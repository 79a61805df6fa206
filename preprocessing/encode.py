"""Conversations → token ids and labels."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common import Config, Message
from preprocessing.answer_spans import Span
from preprocessing.faults import Fault, TooLong
from preprocessing.rendering import Conversation
from preprocessing.template import ChatTemplate, Rendered, plain_conversation, render_conversation
from preprocessing.tokens import NONCHARACTERS, TextEncoder, encoder_of
from preprocessing.truncation import shorten

# {"input_ids": list[int], "labels": list[int], "truncated": bool, "whole_length": int, "left_out": Counter}
Sample = dict[str, Any]
Messages = list[dict[str, Any]]


def encode(
    conversations: list[Conversation], template: ChatTemplate, tokenizer: Any, config: Config
) -> list[Sample | Message]:
    """A sample for each conversation, or the reason why there is none.

    Learned (label = id, elsewhere -100) are the assistant's text and the token that ends its turn: of every turn, of
    the last one (mask_history), or everything (train_on_prompt); never an answer with "learned": False. A conversation
    longer than cutoff_len tokens is cut (overlong "truncate", see truncation.py) or becomes a reason. `left_out` of a
    sample counts its answers of which the template renders a part only: "thoughts", "words_beside_call".
    """
    encoder = encoder_of(tokenizer, template.text)
    results: list[Any] = []
    for conversation in conversations:
        try:
            results.append(render_conversation(template, conversation, encoder, config.enable_thinking))
        except Fault as fault:
            results.append(fault.message)
    for escaped in (False, True):
        chosen = [i for i, r in enumerate(results) if isinstance(r, Rendered) and r.escaped is escaped]
        if chosen:
            encodings = encoder.encode([results[i].text for i in chosen], escaped)
            for i, encoding in zip(chosen, encodings, strict=True):
                try:
                    left_out = _left_out(conversations[i]["messages"], results[i])
                    results[i] = _sample(conversations[i], template, encoder, config, results[i], encoding)
                    results[i]["left_out"] = left_out
                except Fault as fault:
                    results[i] = fault.message
    return results


def _left_out(messages: Messages, rendered: Rendered) -> Counter[str]:
    """How many answers lack thoughts, or the sentence beside a tool call, in what is learned of them."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(len(answer) > 2 or "</think>" in (answer.get("content") or "") for answer in answers):
        return Counter()
    learned = [rendered.text[start:stop] for start, stop in rendered.spans]
    if len(learned) != len(answers):  # an own template that leaves empty answers out, or tags several parts of each
        learned = ["".join(learned)] * len(answers)
    left_out: Counter[str] = Counter()
    for answer, text in zip(answers, learned, strict=True):
        before, _, sentence = (answer.get("content") or "").rpartition("</think>")
        thoughts = answer.get("reasoning_content") or before.rpartition("<think>")[2]
        left_out["thoughts"] += thoughts.strip() not in text
        left_out["words_beside_call"] += bool(answer.get("tool_calls")) and sentence.strip() not in text
    return +left_out


def _sample(
    conversation: Conversation,
    template: ChatTemplate,
    encoder: TextEncoder,
    config: Config,
    rendered: Rendered,
    encoding: Any,
) -> Sample:
    """The sample of one rendered and encoded conversation, cut if it is too long."""
    truncated, cut, whole_length, messages = False, frozenset(), len(encoding), conversation["messages"]
    if whole_length > config.cutoff_len:
        if config.overlong != "truncate":
            raise Fault(
                TooLong(
                    "it has {tokens:,} tokens, more than cutoff_len={cutoff_len}",
                    tokens=len(encoding),
                    cutoff_len=config.cutoff_len,
                )
            )
        truncated = True
        messages, rendered, encoding, cut = _shortened(plain_conversation(conversation), template, encoder, config)
    ids = encoder.ids(encoding, rendered.text, rendered.escaped)
    labels = list(ids) if config.train_on_prompt else [-100] * len(ids)

    def learn(start: int, stop: int, learned: bool) -> None:
        first, end = token_span(encoding, start, stop, len(rendered.text))
        labels[first:end] = ids[first:end] if learned else [-100] * (end - first)

    for start, stop in rendered.spans[-1:] if config.mask_history else rendered.spans:
        learn(start, stop, True)
    for start, stop in _masked_spans(messages, rendered):
        learn(start, stop, False)
    for number in cut:  # a cut answer must not teach to stop there
        start, stop = rendered.spans[number]
        learn(end_of_turn(rendered, start, stop, encoder), stop, False)
    if max(labels, default=-100) == -100:
        if truncated:
            raise Fault(
                "cutoff_len={cutoff_len} leaves no space for its answer: the template, the tools and the beginning "
                "of the question alone take {tokens} tokens; raise cutoff_len",
                cutoff_len=config.cutoff_len,
                tokens=len(ids),
            )
        raise Fault("nothing of it would be learned: it has no answer")
    return {"input_ids": ids, "labels": labels, "truncated": truncated, "whole_length": whole_length}


def _masked_spans(messages: Messages, rendered: Rendered) -> list[Span]:
    """The spans of the answers that the data marks with "learned": False (a weight of 0)."""
    learned = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    if all(learned):
        return []
    if len(learned) != len(rendered.spans):
        raise Fault(
            "it must be cut or has an answer of weight 0, and the chat template does not show which part belongs "
            "to which answer; set template to one that fits"
        )
    return [span for span, is_learned in zip(rendered.spans, learned, strict=True) if not is_learned]


def token_span(encoding: Any, start: int, stop: int, length: int) -> Span:
    """The tokens [first, end) that hold characters [start, stop); one that straddles `start` is inside.

    Nothing straddles `stop`: a control token ends there.
    """
    first = _token_from(encoding, start, stop)
    return first, max(first, _token_from(encoding, stop, length))


def _token_from(encoding: Any, position: int, stop: int) -> int:
    """The first token that holds a character of [position, stop); where there is none, the one after it."""
    for at in range(position, stop):  # a character without a token is rare: some normalizers drop some
        token = encoding.char_to_token(at)
        if token is not None:
            return token
    return len(encoding)


def end_of_turn(rendered: Rendered, start: int, stop: int, encoder: TextEncoder) -> int:
    """Where the control token that ends the answer [start, stop) starts."""
    answer = rendered.text[start:stop]
    if rendered.escaped:
        names = [m.start() for m in NONCHARACTERS.finditer(answer)]
        return start + names[-1] if names else stop
    end = encoder.last_control(answer)
    return stop if end is None else start + end


def _shortened(
    conversation: Conversation, template: ChatTemplate, encoder: TextEncoder, config: Config
) -> tuple[Messages, Rendered, Any, frozenset[int]]:
    """The messages that are kept, rendered and encoded in `cutoff_len` tokens, and the numbers of the cut answers."""

    def measure(messages: Messages) -> tuple[Rendered, Any]:
        rendered = render_conversation(
            template, {**conversation, "messages": messages}, encoder, config.enable_thinking
        )
        return rendered, encoder.encode([rendered.text], rendered.escaped)[0]

    whole, kept, rendered, encoding = shorten(
        conversation["messages"], measure, encoder.token_starts, config.cutoff_len
    )
    answers = [i for i, message in enumerate(whole) if message["role"] == "assistant"]
    cut = frozenset(number for number, i in enumerate(answers) if kept[i] is not whole[i])
    open_ended = any("</think>" in whole[i]["content"] and "</think>" not in kept[i]["content"] for i in answers)
    if open_ended and not template.tagged:
        raise Fault("its thoughts alone are too long, and the tokenizer's own chat template cannot show a part of them")
    if cut and len(rendered.spans) != len(answers):
        raise Fault(
            "it must be cut or has an answer of weight 0, and the chat template does not show which part belongs "
            "to which answer; set template to one that fits"
        )
    return whole, rendered, encoding, cut
