"""Rows → conversations, for each stage; nothing heavy is imported: faulty rows are told in under a second.

sft   {"messages": [{"role": "system|user|assistant|tool", "content": str, ("tool_calls"), ("learned": False)}, ...],
       ("tools": [...])}
pt    {"text": str}
dpo   {"messages": [... the prompt], "chosen": message, "rejected": message, ("tools")}
kto   a conversation of sft whose last answer is judged: "good": bool
grpo  {"messages": [... the prompt], "answer": str or None, "columns": those of the row, for the rewards, ("tools")}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from common import Config, UserError
from preprocessing.faults import Fault, RowFault
from preprocessing.layout import Fields, Layout, Row, find_layout
from preprocessing.messages import (
    alpaca_prompt,
    complete,
    filled_text,
    listed_messages,
    prompt_messages,
    read_message,
    read_messages,
)
from preprocessing.registry import PAIRS, Entry
from preprocessing.sources import Source

Conversation = dict[str, Any]

SMALL = 16 << 20  # bytes
KEPT = 6  # small data sets
HH_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")  # how Anthropic's HH data writes turns
# Names that TRL gives to a reward function itself.
GIVEN = ("prompt", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")


class ReadRow(NamedTuple):
    """A row as a conversation."""

    file: str
    row: int
    conversation: Conversation
    content: int  # its fingerprint


def is_small(entry: Entry) -> bool:
    """Whether the rows of an entry are checked before anything heavy is imported, and kept."""
    return bool(entry.files) and sum(file.stat().st_size for file in entry.files) <= SMALL


_kept: dict[str, tuple[Layout, list[ReadRow | RowFault]]] = {}  # by what was read of small files


def read_dataset(source: Source, config: Config) -> tuple[Layout, Iterable[ReadRow | RowFault]]:
    """The layout of a dataset, and what is read of each row, or why nothing is; do not change it: it may be kept.

    Raises UserError, at the end of the rows, where there are none, or none has a column that the registry names.
    """
    if not is_small(source.entry):
        layout = find_layout(source.entry, source.first_rows())
        return layout, _read_rows(source, layout, config)
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in source.entry.files]
    settings = (config.default_system, config.name, config.author, config.max_samples, config.train_on_prompt)
    key = repr((source.entry, stamps, settings, config.seed if source.entry.num_samples else None))
    if key not in _kept:
        layout = find_layout(source.entry, source.first_rows())
        while len(_kept) >= KEPT:
            del _kept[next(iter(_kept))]  # the oldest
        _kept[key] = layout, list(_read_rows(source, layout, config))
    return _kept[key]


def _read_rows(source: Source, layout: Layout, config: Config) -> Iterator[ReadRow | RowFault]:
    read = False
    for file, number, row in source.chosen_rows(config, layout.notes):
        read = True
        try:
            if isinstance(row, Fault):
                raise row
            conversation = _STAGES[layout.stage](layout.pick(row), layout, config)
            yield ReadRow(file, number, conversation, fingerprint(conversation))
        except Fault as fault:
            yield RowFault(file, number, fault.message, fault.final)
    if not read:
        raise UserError("dataset '{name}' holds no rows; give it some, or leave it out", name=source.entry.name)
    layout.check_columns()


def fingerprint(conversation: Conversation) -> int:
    """A 64-bit number of the content, equal for equal conversations; raises Fault for text that is no Unicode."""
    text = json.dumps(conversation, ensure_ascii=False, sort_keys=True)
    try:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    except UnicodeEncodeError as error:
        raise Fault(
            "holds half a character ({character}, a lone surrogate); delete it",
            character=ascii(error.object[error.start])[1:-1],
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def _to_document(fields: Fields, layout: Layout, _: Config) -> Conversation:
    return {"text": filled_text(fields["prompt"], layout.columns["prompt"])}


def _to_answered(fields: Fields, layout: Layout, config: Config) -> Conversation:
    if layout.formatting == "alpaca":
        response = filled_text(fields["response"], layout.columns["response"])
        messages = [*alpaca_prompt(fields), {"role": "assistant", "content": response}]
    else:
        messages = listed_messages(fields, layout)
    conversation = complete(messages, fields, layout, config)
    if not config.train_on_prompt and not any(m.get("learned", m["role"] == "assistant") for m in messages):
        raise Fault("all its answers have the weight 0, so nothing of it would be learned")
    return conversation


def _to_pair(fields: Fields, layout: Layout, config: Config) -> Conversation:
    prompts, answers = zip(*(_split_answer(fields, layout, kind) for kind in PAIRS), strict=True)
    if prompts[0] != prompts[1]:
        raise Fault("chosen and rejected are conversations that differ before their last answer")
    if answers[0] == answers[1]:
        raise Fault("chosen and rejected are the same answer")
    prompt = prompts[0] or prompt_messages(fields, layout)
    return complete(prompt, fields, layout, config, answers) | dict(zip(PAIRS, answers, strict=True))


def _to_judged(fields: Fields, layout: Layout, config: Config) -> Conversation:
    good = fields["kto_tag"]
    if good not in (True, False) or isinstance(good, float):
        raise Fault(
            "{column} is {value}; it must be true (a good answer) or false (a bad one)",
            column=layout.columns["kto_tag"],
            value=json.dumps(good)[:40],
        )
    if not isinstance(fields.get("prompt"), list):
        return _to_answered(fields, layout, config) | {"good": bool(good)}
    messages = [*prompt_messages(fields, layout), *_answer_messages(fields["response"], layout, "response")]
    return complete(messages, fields, layout, config) | {"good": bool(good)}


def _to_prompt(fields: Fields, layout: Layout, config: Config) -> Conversation:
    if layout.formatting == "alpaca":
        messages, answer = prompt_messages(fields, layout), _answer_text(fields.get("response"))
    else:
        messages, answer = listed_messages(fields, layout), None
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
    reply = {"role": "assistant", "content": "-" if answer is None else answer}
    prompt = complete(messages, fields, layout, config, [reply])
    layout.used.update(fields.row)  # the reward functions are given all columns
    columns = {name: value for name, value in fields.row.items() if name not in GIVEN}
    return prompt | {
        "answer": None if answer is None else reply["content"],
        "columns": json.loads(json.dumps(columns, default=str)),  # a date of a parquet file becomes text
    }


_STAGES = {"sft": _to_answered, "pt": _to_document, "dpo": _to_pair, "kto": _to_judged, "grpo": _to_prompt}


def _split_answer(fields: Fields, layout: Layout, kind: str) -> tuple[list[Row], Row]:
    """The prompt in the column chosen or rejected, if there is one, and the answer."""
    if kind not in fields and kind not in layout.named:
        raise Fault(
            "is no pair of answers: stage: dpo needs the columns chosen and rejected; it has {columns}",
            columns=list(fields.row),
        )
    *prompt, answer = _answer_messages(fields[kind], layout, kind)
    if answer["role"] != "assistant":
        raise Fault("{kind} is a message of the {role}, not of the assistant", kind=kind, role=answer["role"])
    return prompt, answer


def _answer_messages(value: Any, layout: Layout, kind: str) -> list[Row]:
    """An answer (text, or a message), or a whole conversation that ends with it (messages, or HH's text)."""
    if isinstance(value, dict):
        return [read_message(value, layout, 1)]
    if isinstance(value, list):
        if not value:
            raise Fault("{where} is empty", where=kind)
        return read_messages(value, layout)
    text = filled_text(value, layout.columns.get(kind) or kind)
    if text.startswith("\n\nHuman:"):
        turns = HH_TURN.split(text)[1:]
        roles = ("user" if name == "Human" else "assistant" for name in turns[::2])
        return [{"role": role, "content": content} for role, content in zip(roles, turns[1::2], strict=True)]
    return [{"role": "assistant", "content": text}]


def _answer_text(value: Any) -> str | None:
    """An answer as text: a number as JSON has it, of messages the last one's content; None where empty."""
    if value in (None, "", []):
        return None
    if isinstance(value, list) and value and isinstance(value[-1], dict) and isinstance(value[-1].get("content"), str):
        return value[-1]["content"]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
