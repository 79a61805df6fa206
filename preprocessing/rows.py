"""Rows → conversations. A new format is one function and one line in FORMATS and SHAPES.

A conversation is {"messages": [{"role": "system|user|assistant|tool", "content": str, ("tool_calls": [...]),
("learned": False)}, ...], ("tools": [...])}. Nothing heavy is imported: faulty rows are told in under a second.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from common import Config, Message, UserError, nearest_word
from preprocessing.faults import Fault
from preprocessing.registry import MEDIA, PAIRS, TEXT_COLUMNS, Entry, refuse_other_data

Row = dict[str, Any]
Conversation = dict[str, Any]

# What a row looks like that needs no registry: the columns it must have → its formatting and columns.
SHAPES: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {
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
FOLLOWS = {"start": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
WEIGHTS = ("weight", "loss", "loss_weight")  # of a message: OpenAI's, ms-swift's, LLaMA-Factory v1's
MESSAGE_KEYS = {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}
MESSAGE_KEYS |= {"reasoning_content", *WEIGHTS}
PROMPTS = ("prompt", "instruction", "question")  # the columns in which a prompt without answer may stand (grpo)
ANSWERS = ("answer", "solution", "label", "output", "response", "completion")  # and one beside it that is its answer
TEXTS = ("text", "prompt", "instruction", "content")  # the columns in which documents may stand
TEMPLATE_MARKS = ("name", "author")  # {{name}} and {{author}} in the text become these settings


@dataclass
class Layout:
    """How the rows of one dataset are laid out, and what was noticed while they were read (from `notes` on)."""

    formatting: str
    columns: dict[str, str | None]  # what is read → the column it stands in
    named: frozenset[str]  # those of `columns` that the registry names
    tags: dict[str, str]
    roles: dict[str, str]
    registered: bool
    stage: str = "sft"
    notes: set[Message] = field(default_factory=set)
    filled: Counter[str] = field(default_factory=Counter)  # TEMPLATE_MARKS → rows in which they were filled in
    masked: int = 0  # answers of weight 0
    used: set[str] = field(default_factory=set)  # columns that were read
    seen: set[str] = field(default_factory=set)  # columns that some row has

    def value(self, row: Row, kind: str) -> Any:
        """What stands in the column of `kind`; None where there is none or it is empty."""
        column = self.columns.get(kind)
        if not column:
            return None
        self.used.add(column)
        found = row.get(column)
        if found is None or found == "" or found == []:
            return None
        if self.registered and kind not in self.named and (self.named or kind in ("history", "system", "tools")):
            self.notes.add(
                Message(
                    "column '{column}' is used as {kind}, though dataset_info.json does not name it (LLaMA-Factory "
                    'would leave it out); to leave it out, write "{kind}": null under columns',
                    column=column,
                    kind=kind,
                )
            )
        return found

    def blank(self) -> Layout:
        """The same layout, with nothing noticed yet."""
        return Layout(self.formatting, self.columns, self.named, self.tags, self.roles, self.registered, self.stage)

    def add(self, other: Layout) -> None:
        """Adds what `other` noticed in some of the rows."""
        self.notes |= other.notes
        self.filled += other.filled
        self.masked += other.masked
        self.used |= other.used
        self.seen |= other.seen

    def all_notes(self, config: Config) -> list[Message]:
        """What was noticed, in a stable order."""
        counted = [
            Message(
                "{mark} becomes '{value}' in {rows:,} row{rows:plural} ({setting}: \"\" would leave it)",
                mark="{{" + name + "}}",
                setting=name,
                value=getattr(config, name),
                rows=rows,
            )
            for name, rows in sorted(self.filled.items())
        ]
        masked = (
            [Message("{count:,} answer{count:plural} of weight 0: read, not learned", count=self.masked)]
            if self.masked
            else []
        )
        return sorted(self.notes, key=repr) + counted + masked


# ---------------------------------------------------------------------------------------------------------------------
# The layout of a dataset


def shape_of(row: Row) -> tuple[str, dict[str, str]] | None:
    """The formatting and columns of a row that needs no registry, or None."""
    return next((shape for keys, shape in SHAPES.items() if all(key in row for key in keys)), None)


def find_layout(entry: Entry, first: Row) -> Layout:
    """The layout of an entry's rows: what the registry says, and the first row where it says nothing.

    Raises UserError where the rows have no known shape.
    """
    formatting, columns = entry.formatting, dict(entry.columns)
    notes = set(entry.notes)
    if entry.stage == "pt":
        return _text_layout(entry, first)
    if formatting is None and "messages" in columns:
        formatting = "sharegpt"
    if formatting is None and not columns:
        shape = (preference_shape(first) if entry.stage == "dpo" else None) or shape_of(first)
        shape = shape or (prompt_shape(first) if entry.stage == "grpo" else None)
        if shape is None and not entry.registered:
            _refuse_unknown_shape(entry.name, first, entry.stage)
        if shape:
            formatting, columns = shape[0], dict(shape[1])
            if entry.registered and shape != ("alpaca", {}):
                notes.add(
                    Message("dataset_info.json names no formatting; its rows are {formatting}", formatting=formatting)
                )
    formatting = formatting or "alpaca"
    alone = entry.stage == "sft" and formatting == "alpaca" and set(columns) == {"prompt"}
    if first and alone and TEXT_COLUMNS["response"] not in first:
        raise UserError(
            "dataset '{name}' is text without answers (pre-training); this kit trains on answers: name their "
            "column as response under columns in dataset_info.json, or take another dataset",
            name=entry.name,
        )
    if formatting == "openai" and entry.formatting:
        notes.add(
            Message("no 'detailed thinking off' is put into the system message (LLaMA-Factory does for openai data)")
        )
    named = frozenset(entry.columns) if entry.registered else frozenset()
    roles = ROLES | {entry.tags[tag]: role for tag, role in TAGGED.items() if entry.tags.get(tag)}
    full = _all_columns(formatting, columns, first)
    if entry.stage in ("dpo", "kto"):
        full = (
            {kind: kind for kind in (*PAIRS, "kto_tag")}
            | {"kto_tag": "label" if "label" in first else "kto_tag"}
            | full
        )
        full |= {kind: columns[kind] for kind in (*PAIRS, "kto_tag") if columns.get(kind)}
    return Layout(formatting, full, named, entry.tags, roles, entry.registered, entry.stage, notes=notes)


def _text_layout(entry: Entry, first: Row) -> Layout:
    """The layout of documents: the column that the registry calls prompt, else the first of TEXTS that a row has.

    Raises UserError where a file has none of them.
    """
    column = entry.columns.get("prompt") or next((name for name in TEXTS if name in first), None)
    if first and column is None:
        raise UserError(
            "{name} has the columns {columns}; stage: pt reads one of {wanted}, or the one that dataset_info.json "
            "names as prompt",
            name=entry.name,
            columns=list(map(str, first)),
            wanted=list(TEXTS),
        )
    named = frozenset({"prompt"}) if entry.columns.get("prompt") else frozenset()
    columns = {"prompt": column or TEXTS[0]}
    return Layout("text", columns, named, {}, ROLES, entry.registered, "pt", notes=set(entry.notes))


def prompt_shape(row: Row) -> tuple[str, dict[str, str]] | None:
    """The formatting and columns of a row with a prompt and perhaps an answer, or None."""
    column = next((name for name in PROMPTS if name in row), None)
    answer = next((name for name in ANSWERS if name in row), ANSWERS[0])  # other rows may have one
    return ("alpaca", {"prompt": column, "response": answer}) if column else None


def preference_shape(row: Row) -> tuple[str, dict[str, str]] | None:
    """The formatting and columns of preference data that needs no registry (TRL's, UltraFeedback's, HH's), or None."""
    column = "prompt" if "prompt" in row else "instruction" if "instruction" in row else None
    if "conversations" in row or ("messages" in row and isinstance(row.get("chosen"), dict)):  # the prompt
        return None
    is_pair = all(name in row for name in PAIRS)
    return ("alpaca", {"prompt": column} if column else {}) if is_pair else None


def _all_columns(formatting: str, columns: dict[str, str | None], first: Row) -> dict[str, str | None]:
    """The columns that are named, and the usual ones beside them."""
    if formatting == "alpaca":
        wanted = TEXT_COLUMNS
    else:
        usual = ("conversations", "messages") if formatting == "sharegpt" else ("messages", "conversations")
        present = next((name for name in usual if name in first), usual[0])
        wanted = {"messages": present, "system": "system", "tools": "tools"}
    taken = {name for name in columns.values() if name}
    full = {kind: columns.get(kind, None if default in taken else default) for kind, default in wanted.items()}
    return full | {kind: None for kind in columns if columns[kind] is None}


def _refuse_unknown_shape(name: str, row: Row, stage: str) -> None:
    """Raises UserError with what the rows of a file are, if that can be told, else with their columns."""
    try:
        refuse_other_data(kinds_of(row), stage)
    except Fault as fault:
        raise UserError("dataset '{name}' {reason}", name=name, reason=fault.message) from None
    have = [str(column) for column in row]
    plain = {column: column.strip("\ufeff ").lower() for column in have}
    if shape_of(dict.fromkeys(plain.values())):
        wrong = [column for column in have if plain[column] != column]
        raise UserError(
            "dataset '{name}': it has the columns {found}; rename them to {wanted} (no capitals, no spaces), or "
            "name them under columns in dataset_info.json",
            name=name,
            found=wrong,
            wanted=[plain[column] for column in wrong],
        )
    raise UserError(
        "dataset '{name}': its rows have the columns {columns}, which is no known format of stage: {stage}. Known "
        "rows:\n"
        "  {shapes:lines}\n"
        "or register it in dataset_info.json, where `columns` says which column is what",
        name=name,
        columns=have or ["-"],
        stage=stage,
        shapes=list(SHAPES_SHOWN[stage]),
    )


def kinds_of(row: Row) -> Iterable[str]:
    """What of other kinds of data than questions and answers a row holds, as refuse_other_data takes it."""
    yield from (kind for kind in MEDIA if row.get(kind))
    if all(name in row for name in PAIRS) or all(f"{name}_messages" in row for name in PAIRS):
        yield from PAIRS
    if isinstance(row.get("kto_tag"), bool) or ("completion" in row and isinstance(row.get("label"), bool)):
        yield "kto_tag"


def check_columns(layout: Layout, name: str, rows: int) -> None:
    """Called when all rows were read: notes columns that are missing or not used.

    Raises UserError for a column of the registry that no row has and that is probably misspelt.
    """
    for kind in sorted(layout.named):
        column = layout.columns.get(kind)
        if rows and column and column not in layout.seen:
            near = nearest_word(column, map(str, layout.seen - layout.used))
            if near:
                raise UserError(
                    "dataset '{name}': dataset_info.json names the column '{column}' as {kind}, which no row "
                    "has{near:suggestion}; correct it there",
                    name=name,
                    kind=kind,
                    column=column,
                    near=near,
                )
            layout.notes.add(
                Message(
                    "no row has the column '{column}' that dataset_info.json names as {kind}", column=column, kind=kind
                )
            )
    if unused := sorted(map(str, layout.seen - layout.used)):
        layout.notes.add(Message("columns that are not used: {columns}", columns=unused))


# ---------------------------------------------------------------------------------------------------------------------
# Values


def text_value(value: Any, where: Message | str) -> str:
    """`value` if it is text; raises Fault that says what it is instead. `where` names it."""
    if isinstance(value, str):
        return value
    if value is None:
        raise Fault("{where} is null", where=where)
    if isinstance(value, bool | int | float):
        raise Fault('{where} is {value}, which is not text; write "{value}"', where=where, value=json.dumps(value))
    if isinstance(value, list):
        raise Fault("{where} is a list, not text", where=where)
    raise Fault("{where} is an object, not text", where=where)


def filled_text(value: Any, where: Message | str) -> str:
    """`value` if it is text with more than spaces; else raises Fault."""
    if not text_value(value, where).strip():
        raise Fault("{where} is empty", where=where)
    return value


def column_value(row: Row, layout: Layout, kind: str) -> Any:
    """The value of a column that must be there; raises Fault with the nearest one."""
    column = layout.columns.get(kind)
    if column is None:
        raise Fault("dataset_info.json names no column for the {kind}", kind=kind)
    if column not in row:
        names = [str(name) for name in row]
        raise Fault(
            "has no column '{column}'{near:suggestion}; it has {columns}",
            column=column,
            near=nearest_word(column, names),
            columns=names or ["-"],
        )
    layout.used.add(column)
    return row[column]


def json_value(value: Any, where: Message | str) -> Any:
    """`value`, read as JSON where it is text; raises Fault where that is broken."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Fault(
            "{where} is broken JSON at column {column}: {problem}", where=where, column=error.colno, problem=error.msg
        ) from None
    except (RecursionError, ValueError):
        raise Fault("is nested too deeply") from None


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def from_alpaca(row: Row, layout: Layout) -> list[Row]:
    """`alpaca_prompt`, and the response as the answer."""
    response = column_value(row, layout, "response")
    prompt = alpaca_prompt(row, layout)
    return [*prompt, {"role": "assistant", "content": filled_text(response, layout.columns["response"])}]


def alpaca_prompt(row: Row, layout: Layout) -> list[Row]:
    """instruction and input as the question; history: pairs of earlier questions and answers."""
    messages = []
    history = json_value(layout.value(row, "history"), "history") or []
    if not isinstance(history, list):
        raise Fault("history is not a list of [question, answer] pairs")
    for index, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Fault("item {item} of history is no pair; it must be [question, answer]", item=index)
        question, answer = (
            Message("the question in item {item} of history", item=index),
            Message("the answer in item {item} of history", item=index),
        )
        messages.append({"role": "user", "content": filled_text(pair[0], question)})
        messages.append({"role": "assistant", "content": filled_text(pair[1], answer)})
    parts = [column_value(row, layout, "prompt"), layout.value(row, "query")]
    prompts = [layout.columns["prompt"], layout.columns["query"]]
    question = "\n".join(
        text_value(part, name) for part, name in zip(parts, prompts, strict=True) if part not in (None, "")
    )
    if not question.strip():
        raise Fault("the question is empty ({columns})", columns=list(filter(None, prompts)))
    return [*messages, {"role": "user", "content": question}]


def from_messages(row: Row, layout: Layout) -> list[Row]:
    """sharegpt, openai and LLaMA-Factory v1: a list of messages with a role and a content.

    Tool calls are JSON text, `tool_calls`, or parts of the content.
    """
    column = layout.columns["messages"]
    given = json_value(column_value(row, layout, "messages"), column)
    if given is None:
        raise Fault("{where} is null", where=column)
    if not isinstance(given, list):
        raise Fault("{column} is not a list of messages", column=column)
    if not given:
        raise Fault("the conversation is empty")
    return [read_message(message, layout, number) for number, message in enumerate(given, 1)]


def read_message(message: Any, layout: Layout, number: int) -> Row:
    """One message in the kit's form; `number` counts from 1."""
    if not isinstance(message, dict):
        raise Fault("message {number} is not an object with a role and a content", number=number)
    role_key = layout.tags.get("role_tag") or ("role" if "role" in message else "from")
    usual = "content" if "content" in message or ("value" not in message and role_key == "role") else "value"
    content_key = layout.tags.get("content_tag") or usual
    if role_key not in message:
        raise Fault(
            "message {number} has no '{key}'{near:suggestion}",
            number=number,
            key=role_key,
            near=nearest_word(role_key, map(str, message)),
        )
    role = layout.roles.get(message[role_key]) if isinstance(message[role_key], str) else None
    if role is None:
        raise Fault(
            "message {number} has the unknown role '{role}'; known are {known}",
            number=number,
            role=str(message[role_key])[:60],
            known=list(layout.roles),
        )
    for key in message.keys() - MESSAGE_KEYS - {role_key, content_key}:
        layout.notes.add(Message("messages have a '{key}', which is not used", key=str(key)))
    if role == "system" and layout.tags and not layout.tags.get("system_tag"):
        layout.notes.add(
            Message(
                "tags name no system_tag; messages of the role 'system' are system messages all the same "
                "(LLaMA-Factory would leave out their rows)"
            )
        )
    made = _make_message(role, _without_parts(message, content_key, number), content_key, number)
    if not _is_learned(message, number) and made["role"] == "assistant":
        made["learned"] = False
        layout.masked += 1
    return made


def _is_learned(message: Row, number: int) -> bool:
    """What a message says of its weight in the loss: 0 or false, else 1 or true, the default."""
    for key in WEIGHTS:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise Fault(
                "message {number} has {key}: {value}; it must be 1 (learned) or 0 (read only)",
                number=number,
                key=key,
                value=json.dumps(value)[:40],
            )
        if value is not None:
            return bool(value)
    return True


def _without_parts(message: Row, content_key: str, number: int) -> Row:
    """The message with a content that is a list of parts (OpenAI's, LLaMA-Factory v1's) as text, calls and thoughts."""
    parts = message.get(content_key)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) and "type" in p for p in parts):
        return message
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part["type"]
        value = part.get("text", part.get("value")) if kind == "text" else part.get("value")
        if kind == "text":
            texts.append(text_value(value, Message("a part of message {number}", number=number)))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(text_value(value, Message("a part of message {number}", number=number)))
        elif kind in ("tool_call", "tool_calls"):
            found = json_value(value, Message("the tool call (message {number})", number=number))
            calls += found if isinstance(found, list) else [found]
        else:
            raise Fault(
                "message {number} has a part of type '{type}'; this kit trains on text",
                number=number,
                type=str(kind)[:60],
            )
    more: Row = {"tool_calls": calls} if calls else {}
    if thoughts:
        more["reasoning_content"] = "\n".join(thoughts)
    return {**message, content_key: "".join(texts), **more}


def _make_message(role: str, message: Row, content_key: str, number: int) -> Row:
    """A message of plain text or tool calls in the kit's form."""
    calls = message.get("tool_calls") or message.get("function_call")
    if content_key not in message and not calls:
        near = nearest_word(content_key, map(str, message))
        raise Fault("message {number} has no '{key}'{near:suggestion}", number=number, key=content_key, near=near)
    content = message.get(content_key)
    where = Message("message {number}", number=number)
    if role == "assistant" and calls:
        made = {"role": role, "content": text_value(content or "", where), "tool_calls": _calls(calls, number)}
    elif role == "call":
        thought, _, calls = text_value(content, where).rpartition("</think>")
        thought = thought + "</think>" if thought else ""
        made = {"role": "assistant", "content": thought, "tool_calls": _calls(calls, number)}
    elif role == "assistant":
        made = {"role": role, "content": filled_text(content, Message("the answer (message {number})", number=number))}
    elif role == "tool":
        shown = json.dumps(content, ensure_ascii=False) if isinstance(content, dict | list) else content
        made = {
            "role": role,
            "content": text_value(shown, Message("the tool's result (message {number})", number=number)),
        }
        made |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    else:
        made = {"role": role, "content": (text_value if role == "system" else filled_text)(content, where)}
    if made["role"] == "assistant" and isinstance(message.get("reasoning_content"), str):
        made["reasoning_content"] = message["reasoning_content"]
    return made


def _calls(given: Any, number: int) -> list[Row]:
    """Tool calls in OpenAI's form, arguments as an object."""
    given = json_value(given, Message("the tool call (message {number})", number=number))
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault('the tool call (message {number}) is not {{"name": ..., "arguments": {{...}}}}', number=number)
        arguments = json_value(
            function.get("arguments") or {}, Message("the arguments of the tool call (message {number})", number=number)
        )
        if not isinstance(arguments, dict):
            raise Fault("the arguments of the tool call (message {number}) are no object", number=number)
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def tools_of(row: Row, layout: Layout) -> list[Row]:
    """The tools of a row in OpenAI's form; LLaMA-Factory's bare functions are wrapped."""
    given = json_value(layout.value(row, "tools"), "tools") or []
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Fault("tools is not a list of objects")
    tools = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in given
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise Fault("tools has one without a name")
    return tools


def check_order(messages: list[Row]) -> None:
    """A user's message, then an answer, and so on; tool results follow an answer; the last message is an answer."""
    before = "start"
    for index, message in enumerate(messages, 1):
        role = message["role"]
        if index == 1 and role == "system":
            continue
        if role not in FOLLOWS[before]:
            if before == "start":
                raise Fault(
                    "wrong role order: message 1 has the role {role}; a conversation starts with the user", role=role
                )
            raise Fault(
                "wrong role order: message {number} of role {role} follows one of role {before}",
                number=index,
                role=role,
                before=before,
            )
        before = role
    if before == "start":
        raise Fault("the conversation is empty")
    if before != "assistant":
        raise Fault(
            "wrong role order: the last message has the role {role}; the assistant's answer is missing", role=before
        )


FORMATS: dict[str, Callable[[Row, Layout], list[Row]]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_messages,
    "openai": from_messages,
}


def fill_in(messages: list[Row], layout: Layout, config: Config) -> None:
    """Puts name and author for {{name}} and {{author}}, unless they are empty: a row may be about such marks."""
    marked = [message for message in messages if "{{" in message["content"]]
    for setting in TEMPLATE_MARKS:
        mark, word = f"{{{{{setting}}}}}", getattr(config, setting)
        found = [message for message in marked if mark in message["content"]]
        if found and word:
            layout.filled[setting] += 1
            for message in found:
                message["content"] = message["content"].replace(mark, word)


def note_row(row: Any, layout: Layout) -> None:
    """Notes the columns of a row; raises Fault where it is no object, or its data is of another stage."""
    if not isinstance(row, dict):
        raise Fault("is {value}, not an object with columns", value=json.dumps(row, ensure_ascii=False)[:40])
    layout.seen.update(row)
    if not layout.named:  # else the registry says which columns are meant
        refuse_other_data(kinds_of(row), layout.stage)


def prompt_messages(row: Row, layout: Layout) -> list[Row]:
    """The prompt of a row whose answer stands beside it: its messages, or the columns of a question."""
    if layout.formatting != "alpaca":
        return from_messages(row, layout)
    value = row.get(layout.columns.get("prompt"))
    if isinstance(value, list):  # TRL's conversational form
        layout.used.add(layout.columns["prompt"])
        messages = json_value(value, layout.columns["prompt"])
        return [read_message(message, layout, number) for number, message in enumerate(messages, 1)]
    return alpaca_prompt(row, layout)


def to_conversation(row: Any, layout: Layout, config: Config) -> Conversation:
    """A row as a conversation, with {{name}} and {{author}} filled in; raises Fault with what is wrong."""
    note_row(row, layout)
    messages = FORMATS[layout.formatting](row, layout)
    add_system(messages, row, layout, config)
    check_order(messages)
    if not config.train_on_prompt and not any(m.get("learned", m["role"] == "assistant") for m in messages):
        raise Fault("all its answers have the weight 0, so nothing of it would be learned")
    fill_in(messages, layout, config)
    tools = tools_of(row, layout)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def add_system(messages: list[Row], row: Row, layout: Layout, config: Config) -> None:
    """Puts the system message of the row, or the default one, in front where there is none."""
    if messages[0]["role"] == "system":
        return
    system = layout.value(row, "system")
    system = config.default_system if system is None else text_value(system, Message("the system message"))
    if system:
        messages.insert(0, {"role": "system", "content": system})


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
