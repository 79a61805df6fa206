"""Rows → prompts that are answered and rewarded (grpo): any row of stage sft, and rows without an answer.

A prompt is {"messages": [... what is answered], "answer": str or None, "columns": {...}, ("tools")}: the answer is that
of the row, `columns` are the row's own, for the reward functions.
"""

from __future__ import annotations

import json
from typing import Any

from common import Config
from preprocessing.faults import Fault
from preprocessing.rows import (
    Conversation,
    Layout,
    Row,
    add_system,
    check_order,
    fill_in,
    from_messages,
    note_row,
    prompt_messages,
    tools_of,
)

# Names that TRL gives to a reward function itself.
GIVEN = ("prompt", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")


def to_prompt(row: Any, layout: Layout, config: Config) -> Conversation:
    """A row as a prompt with its answer, where it has one; raises Fault with what is wrong."""
    note_row(row, layout)
    messages, answer = _messages(row, layout)
    if not messages:
        raise Fault("the conversation is empty")
    add_system(messages, row, layout, config)
    reply = {"role": "assistant", "content": "-" if answer is None else answer}
    check_order([*messages, reply])
    fill_in([*messages, reply], layout, config)
    layout.used.update(row)  # the reward functions are given all columns
    columns = {name: value for name, value in row.items() if name not in GIVEN}
    prompt = {
        "messages": messages,
        "answer": None if answer is None else reply["content"],
        "columns": json.loads(json.dumps(columns, default=str)),  # a date of a parquet file becomes text
    }
    tools = tools_of(row, layout)
    return prompt | ({"tools": tools} if tools else {})


def _messages(row: Row, layout: Layout) -> tuple[list[Row], str | None]:
    """What is answered, and the text of the answer."""
    if layout.formatting != "alpaca":
        messages = from_messages(row, layout)
        has_answer = messages[-1]["role"] == "assistant"
        return (messages[:-1], messages[-1]["content"]) if has_answer else (messages, None)
    return prompt_messages(row, layout), _answer_text(layout.value(row, "response"))


def _answer_text(value: Any) -> str | None:
    """An answer as text: a number as JSON has it, of a list of messages the last one's content."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and isinstance(value[-1].get("content"), str):
        return value[-1]["content"]
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
