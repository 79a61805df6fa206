"""How the rows of a dataset are laid out: settled once, by the registry and the first rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common import Config, Message, UserError, nearest_word
from preprocessing.faults import Fault
from preprocessing.registry import PAIRS, TEXT_COLUMNS, Entry, refuse_row

Row = dict[str, Any]
Shape = tuple[str, dict[str, str | None]]  # a formatting, and what is read → the column it stands in

# What a row looks like that needs no registry: the columns it must have → its shape.
SHAPES: dict[tuple[str, ...], Shape] = {
    ("instruction", "output"): ("alpaca", {}),
    ("messages",): ("openai", {"messages": "messages"}),
    ("conversations",): ("sharegpt", {"messages": "conversations"}),
    ("prompt", "completion"): ("alpaca", {"prompt": "prompt", "response": "completion"}),
    ("prompt", "response"): ("alpaca", {"prompt": "prompt", "response": "response"}),
    ("question", "answer"): ("alpaca", {"prompt": "question", "response": "answer"}),
}
ANSWERED_SHAPES = (
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    '{"prompt": "...", "completion": "..."}',
)
SHAPES_SHOWN = {  # stage → rows that an error shows as examples
    "sft": ANSWERED_SHAPES,
    "dpo": (
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        '{"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}',
        '{"conversations": [{"from": "human", "value": "..."}], "chosen": {"from": "gpt", "value": "..."}, '
        '"rejected": {"from": "gpt", "value": "..."}}',
    ),
    "kto": (
        '{"prompt": "...", "completion": "...", "label": true}',
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "label": true}',
    ),
    "grpo": ('{"prompt": "..."}', '{"prompt": "...", "answer": "..."}', *ANSWERED_SHAPES[:3]),
}
# What the values of a message's role mean; an entry's tags come on top. "call" is an assistant's tool call as JSON.
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
ROLES |= {"developer": "system", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "call"}
TAGGED = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "call"}
TAGGED |= {"system_tag": "system"}
PROMPTS = ("prompt", "instruction", "question")  # the columns in which a prompt without answer may stand (grpo)
ANSWERS = ("answer", "solution", "label", "output", "response", "completion")  # and those of its answer
OPTIONAL = ("query", "history", "system", "tools")  # what is read may be empty, or not there
TEXTS = ("text", "prompt", "instruction", "content")  # the columns in which documents may stand


@dataclass
class Layout:
    """How the rows of one dataset are laid out, and what was noticed while they were read (from `notes` on)."""

    name: str  # of the dataset
    stage: str
    formatting: str  # alpaca, sharegpt, openai; text (pt)
    columns: dict[str, str | None]  # what is read → the column it stands in
    named: frozenset[str]  # those of `columns` that the registry names
    registered: bool
    tags: dict[str, str]
    roles: dict[str, str]
    notes: set[Message]
    filled: Counter[str] = field(default_factory=Counter)  # name, author → rows in which they were filled in
    masked: int = 0  # answers of weight 0
    used: set[str] = field(default_factory=set)  # columns that were read
    seen: set[str] = field(default_factory=set)  # columns that some row has

    def pick(self, row: Any) -> Fields:
        """What is read of a row; raises Fault where it is no object, or its data is of another stage."""
        if not isinstance(row, dict):
            raise Fault("is {value}, not an object with columns", value=json.dumps(row, ensure_ascii=False)[:40])
        self.seen.update(row)
        if not self.named:  # else the registry says which columns are meant
            refuse_row(row, self.stage)
        fields = Fields(self, row)
        for kind, column in self.columns.items():
            if column in row:
                self.used.add(column)
                if kind not in OPTIONAL:
                    fields[kind] = row[column]
                elif row[column] not in (None, "", []):
                    fields[kind] = row[column]
                    if self.registered and kind not in self.named and (self.named or kind != "query"):
                        self._note_unnamed(kind, column)
        return fields

    def _note_unnamed(self, kind: str, column: str) -> None:
        self.notes.add(
            Message(
                "column '{column}' is used as {kind}, though dataset_info.json does not name it (unlike in "
                'LLaMA-Factory); to ignore it, write "{kind}": null under columns',
                column=column,
                kind=kind,
            )
        )

    def check_columns(self) -> None:
        """Called when all rows were read: notes columns that are missing or not used.

        Raises UserError for a column of the registry that no row has and that is probably misspelt.
        """
        for kind in sorted(self.named):
            column = self.columns.get(kind)
            if column and column not in self.seen:
                if near := nearest_word(column, map(str, self.seen - self.used)):
                    raise UserError(
                        "dataset '{name}': no row has the column '{column}' of dataset_info.json{near:suggestion}",
                        name=self.name,
                        column=column,
                        near=near,
                    )
                self.notes.add(
                    Message(
                        "no row has the column '{column}' that dataset_info.json names as {kind}",
                        column=column,
                        kind=kind,
                    )
                )
        if unused := sorted(map(str, self.seen - self.used)):
            self.notes.add(Message("columns that are not used: {columns}", columns=unused))

    def all_notes(self, config: Config) -> list[Message]:
        """What was noticed, in a stable order."""
        notes = sorted(self.notes, key=repr)
        for setting, rows in sorted(self.filled.items()):
            notes.append(
                Message(
                    "{mark} becomes '{value}' in {rows:,} row{rows:plural} (unless {setting}: \"\")",
                    mark="{{" + setting + "}}",
                    value=getattr(config, setting),
                    rows=rows,
                    setting=setting,
                )
            )
        if self.masked:
            notes.append(Message("{count:,} answer{count:plural} of weight 0: read, not learned", count=self.masked))
        return notes


class Fields(dict[str, Any]):
    """What is read of a row, by kind (prompt, response, messages, ...); raises Fault for one that is not there."""

    def __init__(self, layout: Layout, row: Row) -> None:
        super().__init__()
        self.columns, self.row = layout.columns, row

    def __missing__(self, kind: str) -> Any:
        column, names = self.columns.get(kind), [str(name) for name in self.row]
        if column is None:
            raise Fault("dataset_info.json names no column for the {kind}", kind=kind)
        raise Fault(
            "has no column '{column}'{near:suggestion}; it has {columns}",
            column=column,
            near=nearest_word(column, names),
            columns=names or ["-"],
        )


def find_layout(entry: Entry, rows: Iterable[Any]) -> Layout:
    """The layout of an entry: what the registry says; else the first of `rows` that has a known shape.

    Raises UserError where there are rows, and none has a known shape.
    """
    objects = [row for row in rows if isinstance(row, dict)]
    first = next((row for row in objects if shape_of(row, entry.stage)), objects[0] if objects else {})
    notes = set(entry.notes)
    named = frozenset(entry.columns)
    if entry.stage == "pt":
        formatting, columns = "text", {"prompt": _text_column(entry, first)}
        named = frozenset({"prompt"} if entry.columns.get("prompt") else ())
    else:
        formatting, columns = _formatting(entry, first, notes)
        columns = _all_columns(formatting, columns, first, entry.stage)
    roles = ROLES | {entry.tags[tag]: role for tag, role in TAGGED.items() if entry.tags.get(tag)}
    return Layout(entry.name, entry.stage, formatting, columns, named, entry.registered, entry.tags, roles, notes)


def shape_of(row: Row, stage: str) -> Shape | None:
    """The shape of a row that needs no registry, or None."""
    if stage == "dpo" and all(name in row for name in PAIRS):  # TRL's, UltraFeedback's, HH's
        has_prompt = "conversations" in row or ("messages" in row and isinstance(row["chosen"], dict))
        if not has_prompt:
            column = next((name for name in ("prompt", "instruction") if name in row), None)
            return "alpaca", {"prompt": column} if column else {}
    for columns, shape in SHAPES.items():
        if all(column in row for column in columns):
            return shape
    if stage == "grpo" and (prompt := next((name for name in PROMPTS if name in row), None)):
        answer = next((name for name in ANSWERS if name in row), ANSWERS[0])  # other rows may have one
        return "alpaca", {"prompt": prompt, "response": answer}
    return None


def _text_column(entry: Entry, first: Row) -> str:
    """The column of documents: what the registry calls prompt, else the first of TEXTS that a row has."""
    column = entry.columns.get("prompt") or next((name for name in TEXTS if name in first), None)
    if first and column is None:
        raise UserError(
            "dataset '{name}': its documents must be in one of the columns {wanted}, or in the one that "
            "dataset_info.json names as prompt",
            name=entry.name,
            wanted=list(TEXTS),
        )
    return column or TEXTS[0]


def _formatting(entry: Entry, first: Row, notes: set[Message]) -> Shape:
    """The formatting and columns that the registry names, or where it names none the row's shape."""
    formatting, columns = entry.formatting, dict(entry.columns)
    if formatting is None and "messages" in columns:
        formatting = "sharegpt"
    if formatting is None and not columns:
        if shape := shape_of(first, entry.stage):
            formatting, columns = shape
            if entry.registered and shape != ("alpaca", {}):
                notes.add(
                    Message("dataset_info.json names no formatting; its rows are {formatting}", formatting=formatting)
                )
        elif first and not entry.registered:
            raise _unknown_shape(entry.name, first, entry.stage)
    formatting = formatting or "alpaca"
    alone = entry.stage == "sft" and formatting == "alpaca" and set(columns) == {"prompt"}
    if first and alone and TEXT_COLUMNS["response"] not in first:
        raise UserError(
            "dataset '{name}' is text without answers; name the column of the answers as response in "
            "dataset_info.json, or train with stage: pt",
            name=entry.name,
        )
    if formatting == "openai" and entry.formatting:
        notes.add(
            Message("no 'detailed thinking off' is put into the system message (LLaMA-Factory does for openai data)")
        )
    return formatting, columns


def _all_columns(formatting: str, columns: dict[str, str | None], first: Row, stage: str) -> dict[str, str | None]:
    """The columns that are named, and the usual ones of the others."""
    if formatting == "alpaca":
        usual = TEXT_COLUMNS
    else:
        lists = ("conversations", "messages") if formatting == "sharegpt" else ("messages", "conversations")
        present = next((name for name in lists if name in first), lists[0])
        usual = {"messages": present, "system": "system", "tools": "tools"}
    if stage == "dpo":
        usual = {kind: column for kind, column in usual.items() if kind != "response"} | dict(
            zip(PAIRS, PAIRS, strict=True)
        )
    if stage == "kto":
        usual = usual | {"kto_tag": "label" if "label" in first else "kto_tag"}
    taken = {name for name in columns.values() if name}
    return {kind: columns.get(kind, None if column in taken else column) for kind, column in usual.items()}


def _unknown_shape(name: str, row: Row, stage: str) -> UserError:
    """What the rows of a file are, if that can be told, else their columns."""
    try:
        refuse_row(row, stage)
    except Fault as fault:
        return UserError("dataset '{name}' {reason}", name=name, reason=fault.message)
    have = [str(column) for column in row]
    plain = {column: column.strip("\ufeff ").lower() for column in have}
    if shape_of(dict.fromkeys(plain.values()), "sft"):
        wrong = [column for column in have if plain[column] != column]
        return UserError(
            "dataset '{name}' has the columns {found}; rename them to {wanted} (no capitals, no spaces)",
            name=name,
            found=wrong,
            wanted=[plain[column] for column in wrong],
        )
    return UserError(
        "dataset '{name}': its rows have the columns {columns}, no known format of stage: {stage}. Known rows:\n"
        "  {shapes:lines}\n"
        "or name the columns in dataset_info.json",
        name=name,
        columns=have or ["-"],
        stage=stage,
        shapes=list(SHAPES_SHOWN[stage]),
    )
