"""Rows → what the other stages train on: documents (pt), pairs of answers (dpo), answers judged good or bad (kto).

A document is {"text": str}. A pair is {"messages": [... the prompt], "chosen": message, "rejected": message,
("tools")}; a judged answer is a conversation with "good": bool.
"""

from __future__ import annotations

import json
import re
from typing import Any

from common import Config
from preprocessing.faults import Fault
from preprocessing.rows import (
    Conversation,
    Layout,
    Row,
    add_system,
    check_order,
    column_value,
    fill_in,
    filled_text,
    note_row,
    prompt_messages,
    read_message,
    to_conversation,
    tools_of,
)

HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")  # how Anthropic's HH data writes turns


def to_document(row: Any, layout: Layout, _: Config) -> Conversation:
    """A row of text as a document; raises Fault with what is wrong."""
    note_row(row, layout)
    return {"text": filled_text(column_value(row, layout, "prompt"), layout.columns["prompt"])}


def to_pair(row: Any, layout: Layout, config: Config) -> Conversation:
    """A row as a prompt with a chosen and a rejected answer; raises Fault with what is wrong."""
    note_row(row, layout)
    given = [_answer_value(row, layout, kind) for kind in ("chosen", "rejected")]
    prompts: list[list[Row]] = []
    answers: list[Row] = []
    for kind, value in zip(("chosen", "rejected"), given, strict=True):
        messages = _answer_messages(value, layout, kind)
        if messages[-1]["role"] != "assistant":
            raise Fault("{kind} is a message of the {role}, not of the assistant", kind=kind, role=messages[-1]["role"])
        prompts.append(messages[:-1])
        answers.append(messages[-1])
    prompt = prompts[0] or prompt_messages(row, layout)
    if prompts[0] != prompts[1]:
        raise Fault("chosen and rejected are conversations that differ before their last answer")
    if answers[0] == answers[1]:
        raise Fault("chosen and rejected are the same answer")
    if prompt and prompt[-1]["role"] == "assistant":
        raise Fault("the prompt ends with an answer; it must end with what is answered")
    if not prompt:
        raise Fault("the conversation is empty")
    prompt = list(prompt)
    add_system(prompt, row, layout, config)
    for answer in answers:
        check_order([*prompt, answer])
    fill_in([*prompt, *answers], layout, config)
    tools = tools_of(row, layout)
    pair = {"messages": prompt, "chosen": answers[0], "rejected": answers[1]}
    return pair | ({"tools": tools} if tools else {})


def to_judged(row: Any, layout: Layout, config: Config) -> Conversation:
    """A row as a conversation whose last answer is good or bad; raises Fault with what is wrong."""
    note_row(row, layout)
    good = column_value(row, layout, "kto_tag")
    if good not in (True, False) or isinstance(good, float):
        raise Fault(
            "{column} is {value}; it must be true (a good answer) or false (a bad one)",
            column=layout.columns["kto_tag"],
            value=json.dumps(good)[:40],
        )
    if isinstance(row.get(layout.columns.get("prompt")), list):  # TRL's conversational form
        messages = prompt_messages(row, layout)
        messages += _answer_messages(column_value(row, layout, "response"), layout, "response")
        add_system(messages, row, layout, config)
        check_order(messages)
        fill_in(messages, layout, config)
        return {"messages": messages, "good": bool(good)}
    return {**to_conversation(row, layout, config), "good": bool(good)}


def _answer_value(row: Row, layout: Layout, kind: str) -> Any:
    """What stands in a row as its chosen or rejected answer; raises Fault where the row is no pair."""
    if layout.columns.get(kind) not in row and kind not in layout.named:
        raise Fault(
            "is no pair of answers: stage: dpo needs the columns chosen and rejected; it has {columns}",
            columns=list(row),
        )
    return column_value(row, layout, kind)


def _answer_messages(value: Any, layout: Layout, kind: str) -> list[Row]:
    """An answer (text, or a message), or a whole conversation that ends with it (messages, or HH's text)."""
    if isinstance(value, dict):
        return [read_message(value, layout, 1)]
    if isinstance(value, list):
        if not value:
            raise Fault("{where} is empty", where=kind)
        return [read_message(message, layout, number) for number, message in enumerate(value, 1)]
    text = filled_text(value, layout.columns.get(kind) or kind)
    if text.startswith("\n\nHuman:"):
        turns = HH_TURN.split(text)[1:]
        roles = ("user" if name == "Human" else "assistant" for name in turns[::2])
        return [{"role": role, "content": content} for role, content in zip(roles, turns[1::2], strict=True)]
    return [{"role": "assistant", "content": text}]
