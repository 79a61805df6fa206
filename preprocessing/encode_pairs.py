"""Preference pairs → token ids, by the same rules as conversations (encode.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import Config, Message
from preprocessing.encode import Sample, Writer, Written, check_thoughts, no_answer, too_long, writer_of
from preprocessing.faults import Fault
from preprocessing.rendering import Conversation
from preprocessing.template import ChatTemplate, plain_conversation
from preprocessing.truncation import Messages, shorten


@dataclass(frozen=True)
class _Answered:
    """The ids of a prompt and an answer to it, which starts at `start`; `turn_end`: where the end of its turn is."""

    ids: list[int]
    start: int
    turn_end: int


def encode_pair(pair: Conversation, template: ChatTemplate, tokenizer: Any, config: Config) -> Sample | Message:
    """{"prompt_ids", "chosen_ids", "rejected_ids", "truncated", "whole_length"} of a pair, or why there are none.

    `pair`: {"messages": [... the prompt], "chosen": message, "rejected": message, ("tools")}. Prompt and answer are
    together what `encode` makes of the whole conversation, up to the end of the last turn; a token that holds the
    end of the prompt and the start of an answer belongs to both answers. Where the longer one does not fit into
    cutoff_len tokens, turns of the prompt are left out, the oldest first, then both sides are cut as truncation.py
    says, both answers at the same length; an answer that was cut has no end of its turn. `whole_length` is that of the
    prompt and the longer answer before they were cut.
    """
    writer, tools = writer_of(template, tokenizer, config), pair.get("tools")
    try:
        messages = plain_conversation({"messages": [*pair["messages"], pair["chosen"], pair["rejected"]]})["messages"]
        prompt, answers = messages[:-2], messages[-2:]
        written = [_answered(writer.write({"messages": [*prompt, answer], "tools": tools})) for answer in answers]
        encoded = _joined(*written)
        length = max(len(answered.ids) for answered in written)
        if encoded["chosen_ids"] == encoded["rejected_ids"]:
            raise Fault("chosen and rejected are the same answer")
        if length > config.cutoff_len:
            if config.overlong != "truncate":
                raise Fault(too_long(length, config.cutoff_len))
            encoded = _shortened(prompt, answers, tools, writer, config.cutoff_len)
        return {**encoded, "truncated": length > config.cutoff_len, "whole_length": length}
    except Fault as fault:
        return fault.message


def _answered(written: Written) -> _Answered:
    """What is written of a prompt and an answer, up to the end of its turn."""
    if not written.spans:
        raise no_answer()
    first, end = written.tokens(*written.spans[-1])
    return _Answered(written.ids()[:end], first, written.end_of_turn(written.spans[-1])[0])


def _joined(chosen: _Answered, rejected: _Answered) -> dict[str, list[int]]:
    """The two as a pair with one prompt; raises Fault where the template writes different prompts."""
    start = min(chosen.start, rejected.start)
    if chosen.ids[:start] != rejected.ids[:start]:
        raise Fault("the chat template writes different prompts for chosen and rejected; set template to one that fits")
    return {"prompt_ids": chosen.ids[:start], "chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}


def _shortened(
    prompt: Messages, answers: Messages, tools: Any, writer: Writer, cutoff_len: int
) -> dict[str, list[int]]:
    """The pair in at most `cutoff_len` tokens; raises Fault where the answers would be equal."""

    def answered(messages: Messages) -> _Answered:
        return _answered(writer.write({"messages": messages, "tools": tools}))

    def measure(messages: Messages) -> range:
        return range(len(answered(messages).ids))

    starts_of = writer.encoder.token_starts
    longer = max(answers, key=lambda answer: len(measure([*prompt, answer])))
    kept, cut, _ = shorten([*prompt, longer], measure, starts_of, cutoff_len)
    most = None if cut[-1] is kept[-1] else len(starts_of(cut[-1]["content"]))
    encoded = []
    for answer in answers:
        starts = starts_of(answer["content"])
        if most is None or len(starts) <= most:
            encoded.append(answered([*cut[:-1], answer]))
            continue
        part = {**answer, "content": answer["content"][: starts[most]]}
        check_thoughts(answer, part, writer.template)
        whole = answered([*cut[:-1], part])
        encoded.append(_Answered(whole.ids[: whole.turn_end], whole.start, whole.turn_end))
    pair = _joined(*encoded)
    space = cutoff_len - len(pair["prompt_ids"])
    pair |= {name: pair[name][:space] for name in ("chosen_ids", "rejected_ids")}
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise Fault(
            "cut to cutoff_len={cutoff_len}, chosen and rejected are the same; raise cutoff_len", cutoff_len=cutoff_len
        )
    return pair
