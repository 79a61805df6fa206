"""Conversations → token ids and labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from common import Config, Message
from preprocessing.faults import Fault, TooLong
from preprocessing.rendering import Conversation, Span
from preprocessing.template import ChatTemplate, Rendered, plain_conversation, render_conversation
from preprocessing.tokens import NONCHARACTERS, TextEncoder, encoder_of
from preprocessing.truncation import Messages, no_space, shorten

# {"input_ids": list[int], "labels": list[int], "truncated": bool, "whole_length": int, "left_out": Counter}
Sample = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A conversation as text and as tokens."""

    rendered: Rendered
    encoding: Any  # of the tokenizers library
    encoder: TextEncoder

    def __len__(self) -> int:
        return len(self.encoding)

    @property
    def spans(self) -> list[Span]:
        """Where the answers stand in the text."""
        return self.rendered.spans

    def ids(self) -> list[int]:
        """The token ids; raises Fault where text that looks like a control token became one."""
        return self.encoder.ids(self.encoding, self.rendered.text, self.rendered.escaped)

    def tokens(self, start: int, stop: int) -> Span:
        """The tokens [first, end) that hold characters [start, stop); one that straddles `start` is inside.

        Nothing straddles `stop`: a control token ends there.
        """
        first = self._token_from(start, stop)
        return first, max(first, self._token_from(stop, len(self.rendered.text)))

    def _token_from(self, position: int, stop: int) -> int:
        """The first token that holds a character of [position, stop); where there is none, the one after it."""
        for at in range(position, stop):  # a character without a token is rare: some normalizers drop some
            token = self.encoding.char_to_token(at)
            if token is not None:
                return token
        return len(self)

    def end_of_turn(self, span: Span) -> Span:
        """The tokens of the control token that ends an answer."""
        start, stop = span
        answer = self.rendered.text[start:stop]
        if self.rendered.escaped:
            end = max((match.start() for match in NONCHARACTERS.finditer(answer)), default=None)
        else:
            end = self.encoder.last_control(answer)
        return self.tokens(stop if end is None else start + end, stop)


@dataclass(frozen=True)
class Writer:
    """Writes conversations with one template and tokenizer."""

    template: ChatTemplate
    encoder: TextEncoder
    thinking: bool

    def write(self, conversation: Conversation) -> Written:
        """One conversation; raises Fault where the template refuses it."""
        rendered = render_conversation(self.template, conversation, self.encoder, self.thinking)
        return Written(rendered, self.encoder.encode([rendered.text], rendered.escaped)[0], self.encoder)

    def write_all(self, conversations: list[Conversation]) -> list[Written | Message]:
        """Conversations, or why the template refuses them; tokenized together, which is faster."""
        results: list[Any] = []
        for conversation in conversations:
            try:
                results.append(render_conversation(self.template, conversation, self.encoder, self.thinking))
            except Fault as fault:
                results.append(fault.message)
        for escaped in (False, True):
            chosen = [i for i, r in enumerate(results) if isinstance(r, Rendered) and r.escaped is escaped]
            encodings = self.encoder.encode([results[i].text for i in chosen], escaped) if chosen else []
            for i, encoding in zip(chosen, encodings, strict=True):
                results[i] = Written(results[i], encoding, self.encoder)
        return results


def writer_of(template: ChatTemplate, tokenizer: Any, config: Config) -> Writer:
    return Writer(template, encoder_of(tokenizer, template.text), config.enable_thinking)


def too_long(tokens: int, cutoff_len: int) -> TooLong:
    """Why a sample is none."""
    return TooLong("it has {tokens:,} tokens, more than cutoff_len={cutoff_len}", tokens=tokens, cutoff_len=cutoff_len)


def encode(
    conversations: list[Conversation], template: ChatTemplate, tokenizer: Any, config: Config
) -> list[Sample | Message]:
    """A sample for each conversation, or the reason why there is none.

    Learned (label = id, elsewhere -100) are the assistant's text and the token that ends its turn: of every turn, of
    the last one (mask_history), or everything (train_on_prompt); never an answer with "learned": False. A conversation
    longer than cutoff_len tokens is cut (overlong "truncate", see truncation.py) or becomes a reason. `left_out` of a
    sample counts its answers of which the template renders a part only: "thoughts", "words_beside_call".
    """
    writer = writer_of(template, tokenizer, config)
    results: list[Sample | Message] = []
    for conversation, written in zip(conversations, writer.write_all(conversations), strict=True):
        try:
            results.append(written if isinstance(written, Message) else _sample(conversation, written, writer, config))
        except Fault as fault:
            results.append(fault.message)
    return results


def _sample(conversation: Conversation, written: Written, writer: Writer, config: Config) -> Sample:
    """The sample of one conversation, cut if it is too long."""
    messages, whole = conversation["messages"], written
    cut: list[int] = []
    if len(whole) > config.cutoff_len:
        if config.overlong != "truncate":
            raise Fault(too_long(len(whole), config.cutoff_len))
        messages, written, cut = _shortened(plain_conversation(conversation), writer, config.cutoff_len)
    ids = written.ids()
    labels = list(ids) if config.train_on_prompt else [-100] * len(ids)

    def learn(tokens: Span, learned: bool) -> None:
        first, end = tokens
        labels[first:end] = ids[first:end] if learned else [-100] * (end - first)

    for span in written.spans[-1:] if config.mask_history else written.spans:
        learn(written.tokens(*span), True)
    for span in _masked_spans(messages, written):
        learn(written.tokens(*span), False)
    for number in cut:  # a cut answer must not teach to stop there
        learn(written.end_of_turn(written.spans[number]), False)
    if max(labels, default=-100) == -100:
        raise no_space(config.cutoff_len, len(ids)) if written is not whole else no_answer()
    left_out = _left_out(conversation["messages"], whole.rendered)
    facts = {"truncated": written is not whole, "whole_length": len(whole), "left_out": left_out}
    return {"input_ids": ids, "labels": labels, **facts}


def no_answer() -> Fault:
    return Fault("nothing of it would be learned: it has no answer")


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


def _masked_spans(messages: Messages, written: Written) -> list[Span]:
    """The spans of the answers that the data marks with "learned": False (a weight of 0)."""
    learned = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    if all(learned):
        return []
    _check_count(written, len(learned))
    return [span for span, is_learned in zip(written.spans, learned, strict=True) if not is_learned]


def _check_count(written: Written, answers: int) -> None:
    """Raises Fault where the template does not show a part for each answer."""
    if len(written.spans) != answers:
        raise Fault(
            "it must be cut or has an answer of weight 0, and the chat template does not show which part belongs "
            "to which answer; set template to one that fits"
        )


def _shortened(conversation: Conversation, writer: Writer, cutoff_len: int) -> tuple[Messages, Written, list[int]]:
    """The messages that are kept, what is written of them in `cutoff_len` tokens, and the cut answers' numbers."""

    def write(messages: Messages) -> Written:
        return writer.write({**conversation, "messages": messages})

    whole, kept, written = shorten(conversation["messages"], write, writer.encoder.token_starts, cutoff_len)
    answers = [(old, new) for old, new in zip(whole, kept, strict=True) if old["role"] == "assistant"]
    for old, new in answers:
        check_thoughts(old, new, writer.template)
    cut = [number for number, (old, new) in enumerate(answers) if new is not old]
    if cut:
        _check_count(written, len(answers))
    return whole, written, cut


def check_thoughts(whole: dict[str, Any], cut: dict[str, Any], template: ChatTemplate) -> None:
    """Raises Fault where an answer is cut in its thoughts and the template cannot write such a part."""
    if "</think>" in whole["content"] and "</think>" not in cut["content"] and not template.tagged:
        raise Fault("its thoughts alone are too long, and the tokenizer's own chat template cannot show a part of them")
