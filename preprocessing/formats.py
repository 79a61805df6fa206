"""Registry entry or file → rows → conversations. Imports nothing heavy: faulty rows are told in under a second.

A conversation is {"messages": [{"role": "system|user|assistant|tool", "content": str, ("tool_calls": [...])}, ...],
("tools": [...])}. A new format is one function and one line in FORMATS; a new file type one reader in `read_rows`.
dataset.py is the door to this; other scripts import that.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Config, UserError, nearest

Row = dict[str, Any]
Conversation = dict[str, Any]

BATCH = 512  # rows of Parquet and Arrow read at a time


class Fault(Exception):
    """Why a row cannot be used. `final`: what follows it in the file cannot be read either."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


# ---------------------------------------------------------------------------------------------------------------------
# The registry: dataset_info.json as LLaMA-Factory defines it

KEYS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting", "ranking")
KEYS += ("subset", "split", "folder", "num_samples", "columns", "tags")
TEXT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
TEXT_COLUMNS |= {"system": "system", "tools": "tools"}
OTHER_COLUMNS = {
    "images": "has images; this kit trains text",
    "videos": "has videos; this kit trains text",
    "audios": "has audio; this kit trains text",
    "chosen": "is preference data (chosen and rejected answers); this kit trains on answers alone",
    "rejected": "is preference data (chosen and rejected answers); this kit trains on answers alone",
    "kto_tag": "is preference data (KTO: answers marked good or bad); this kit trains on answers alone",
}
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
EXTENSIONS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "txt"}


@dataclass(frozen=True)
class Entry:
    """One dataset that a run uses."""

    name: str
    files: tuple[Path, ...] = ()  # where it is on the disk; else:
    hub: str = ""  # "hf" or "ms"
    repository: str = ""  # its name there
    formatting: str | None = None  # alpaca, sharegpt, openai; None: told from the rows
    columns: dict[str, str | None] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    registered: bool = True

    @property
    def size(self) -> int:
        """Bytes on the disk; 0 for a dataset of a hub."""
        return sum(file.stat().st_size for file in self.files)


def find_entries(names: Iterable[str], dataset_dir: str) -> list[Entry]:
    """The entries of `names`, each a name of the registry or a path; raises UserError with all that is wrong."""
    folder = Path(dataset_dir)
    registry = _read_registry(folder / "dataset_info.json")
    entries, faults = [], []
    for name in names:
        try:
            entries.append(_registered(name, registry[name], folder) if name in registry else _path(name, folder))
        except KeyError:
            known = [*registry, *(p.name for p in folder.glob("*") if p.suffix in EXTENSIONS)]
            near = nearest(name, known) or (f"; it has {', '.join([*registry][:20])}" if registry else "")
            faults.append(f"there is no dataset {name!r} in {folder / 'dataset_info.json'} and no such file{near}")
        except Fault as fault:
            faults.append(f"dataset {name!r} {fault}")
    if faults:
        raise UserError("\n  ".join(faults) + "\nmend dataset_info.json, or name other datasets with dataset=...")
    return entries


def _read_registry(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from None
    if not isinstance(registry, dict):
        raise UserError(f"{path} must hold an object: a name and a description for each dataset")
    return registry


def _registered(name: str, description: Any, folder: Path) -> Entry:
    if not isinstance(description, dict):
        raise Fault("is not described by an object in dataset_info.json")
    columns, tags = description.get("columns") or {}, description.get("tags") or {}
    for kind, given, known in (
        ("key", description, KEYS),
        ("column", columns, (*TEXT_COLUMNS, "messages", *OTHER_COLUMNS)),
        ("tag", tags, TAGS),
    ):
        if not isinstance(given, dict):
            raise Fault(f"has {kind}s that are no object in dataset_info.json")
        for key in set(given) - set(known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if near or kind != "key":  # older and other registries have keys of their own
                meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise Fault(f"has the unknown {kind} {key!r} in dataset_info.json ({meant})")
    for column, reason in OTHER_COLUMNS.items():
        if columns.get(column):
            raise Fault(reason)
    if description.get("ranking"):
        raise Fault(OTHER_COLUMNS["chosen"])
    formatting = description.get("formatting")
    if formatting not in (None, "alpaca", "sharegpt", "openai"):
        raise Fault(f"has formatting {formatting!r}; it must be alpaca, sharegpt or openai")
    count = description.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise Fault(f"has num_samples {count!r}; it must be a whole number above 0")
    entry = Entry(
        name,
        formatting=formatting,
        columns=columns,
        tags=tags,
        subset=description.get("subset"),
        split=description.get("split") or "train",
        folder=description.get("folder"),
        num_samples=count,
    )
    modelscope = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y")
    hf, ms = description.get("hf_hub_url"), description.get("ms_hub_url")
    if ms and (modelscope or not hf):
        return dataclasses.replace(entry, hub="ms", repository=ms)
    if hf:
        return dataclasses.replace(entry, hub="hf", repository=hf)
    if not description.get("file_name"):
        other = next((key for key in ("om_hub_url", "script_url", "cloud_file_name") if description.get(key)), None)
        raise Fault(
            f"is only at a {other}, which this kit does not read; download its files" if other else "names no file_name"
        )
    return dataclasses.replace(entry, files=_data_files(folder / description["file_name"]))


def _path(name: str, folder: Path) -> Entry:
    """The entry of a file or folder without registry; raises KeyError where there is none."""
    found = next((path for path in (Path(name), folder / name) if path.exists()), None)
    if found is None:
        raise KeyError(name)
    return Entry(name, files=_data_files(found), registered=False)


def _data_files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
        kinds = sorted({EXTENSIONS[p.suffix.lower()] for p in files})
        if len(kinds) != 1:
            what = f"files of several types ({', '.join(kinds)})" if kinds else "no data files"
            raise Fault(
                f"is the folder {path}, which holds {what}; it needs files of one type: {', '.join(EXTENSIONS)}"
            )
        return tuple(files)
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.glob("*")))
        raise Fault(f"is in {path}, which does not exist{near}")
    if path.suffix.lower() not in EXTENSIONS:
        raise Fault(f"is in {path}, whose type is unknown; known are {', '.join(EXTENSIONS)}")
    return (path,)


# ---------------------------------------------------------------------------------------------------------------------
# Rows: a reader a file type yields (row number from 1, row); a row is a dict, the bytes of a line of JSON, or a Fault


def read_rows(path: Path) -> Iterator[tuple[int, Row | bytes | Fault]]:
    """The rows of a file one by one, in little memory. Rows of JSON lines are numbered by line and still bytes."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return iter([(1, Fault("the file is UTF-16 (its BOM says so); save it as UTF-8", final=True))])
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    kind = EXTENSIONS[path.suffix.lower()]
    if kind == "txt" and not text.startswith((b"{", b"[")):
        reason = (
            "plain text has no questions and answers; a .txt may hold rows as JSON lines, other text cannot be used"
        )
        return iter([(1, Fault(reason, final=True))])
    if kind in ("json", "txt") and text.startswith(b"{") and _spreads_objects(path):
        reason = "an object of the file goes over several lines; it must be a list [...] of rows, or one object a line"
        return iter([(1, Fault(reason, final=True))])
    if kind in ("json", "txt"):
        return _array_rows(path) if text.startswith(b"[") else _line_rows(path)
    return {"csv": _csv_rows, "parquet": _parquet_rows, "arrow": _arrow_rows}[kind](path)


def _line_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace() and line:
                yield number, line


def _spreads_objects(path: Path, enough: int = 1 << 24) -> bool:
    """Whether the first object of a file of JSON goes on after its first line, as far as its beginning tells."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = next(line for line in file if not line.isspace())
        try:
            json.loads(first)
            return False
        except RecursionError:
            return False
        except ValueError:
            text = first + file.read(enough)
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[1] > len(first.strip())
    except (ValueError, RecursionError):
        return first.strip() == "{"


def parse_line(line: bytes, number: int) -> Any:
    """The row of a line of JSON; raises Fault with line and column."""
    try:
        return json.loads(line.decode("utf-8").rstrip())  # else a fault at the end would lie on a line of its own
    except UnicodeDecodeError as error:
        raise Fault(f"line {number}, byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if line.startswith(codecs.BOM_UTF8):
            raise Fault(f"line {number} starts with a byte-order mark (BOM); delete it") from None
        raise Fault(f"broken JSON at line {number}, column {error.colno}: {error.msg.removesuffix(' at')}") from None
    except RecursionError:
        raise Fault(f"line {number} is nested too deeply") from None


_SPACE = re.compile(r"[ \t\r\n]*")


def _array_rows(path: Path, chunk: int = 1 << 20, longest: int = 1 << 26) -> Iterator[tuple[int, Row | Fault]]:
    """The rows of one JSON list, `chunk` characters at a time: memory does not grow with the file."""
    decode = json.JSONDecoder().raw_decode
    text, at, line, column = "", 0, 1, 1  # line and column of text[0]
    with open(path, encoding="utf-8-sig", newline="") as file:

        def more() -> bool:
            """Drops what is read and appends a chunk; False at the end of the file."""
            nonlocal text, at, line, column
            added = file.read(chunk)
            if added:
                newlines = text.count("\n", 0, at)
                line, column = line + newlines, at - text.rfind("\n", 0, at) if newlines else column + at
                text, at = text[at:] + added, 0
            return bool(added)

        def skip_space() -> str:
            """The next character that is no space, or an empty string."""
            nonlocal at
            while (at := _SPACE.match(text, at).end()) == len(text) and more():
                pass
            return text[at : at + 1]

        def broken(message: str, position: int) -> Fault:
            newlines = text.count("\n", 0, position)
            where = position - text.rfind("\n", 0, position) if newlines else column + position
            reason = f"broken JSON at line {line + newlines}, column {where}: {message.removesuffix(' at')}"
            return Fault(f"{reason}; nothing after it can be read", final=True)

        number = 1
        try:
            skip_space()
            at += 1  # the opening bracket
            if skip_space() == "]":
                return
            while True:
                skip_space()
                try:
                    row, end = decode(text, at)
                except json.JSONDecodeError as error:
                    if len(text) - at < longest and more():
                        continue  # the row goes on in the next chunk
                    position = error.pos if error.pos < len(text) else max(at, len(text.rstrip()) - 1)
                    yield number, broken(error.msg, position)
                    return
                if end == len(text) and more():
                    continue
                at = end
                yield number, row
                number += 1
                separator = skip_space()
                if separator not in (",", "]") or not separator:
                    yield number, broken("Expecting ',' or ']'", at)
                    return
                at += 1
                if separator == "]":
                    break
            if skip_space():
                yield number, broken("text after the end of the list", at)
        except UnicodeDecodeError:
            yield number, Fault(f"{not_utf8(path)}; save the file as UTF-8", final=True)
        except RecursionError:
            yield number, Fault("is nested too deeply", final=True)


def not_utf8(path: Path) -> str:
    """Where a file stops being UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1} is not UTF-8"
    return "the file is not UTF-8"


def _csv_rows(path: Path) -> Iterator[tuple[int, Row | Fault]]:
    csv.field_size_limit(1 << 30)
    number = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                yield 1, Fault(f"the header has the column {twice[0]!r} more than once; rename one", final=True)
                return
            for values in reader:
                if not values:
                    continue  # an empty line
                number += 1
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                else:
                    yield number, Fault(f"line {reader.line_num}: {len(values)} values for {len(header)} columns")
        except csv.Error as error:
            yield number + 1, Fault(f"line {reader.line_num}: broken CSV ({error})", final=True)
        except UnicodeDecodeError:
            yield number + 1, Fault(f"{not_utf8(path)}; save the file as CSV in UTF-8", final=True)


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    """The rows of Arrow batches, without the nulls inside their columns: Arrow gives every object the keys of all."""
    rows = (row for batch in batches for row in batch.to_pylist())
    return enumerate(({column: _without_nulls(value) for column, value in row.items()} for row in rows), 1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | Fault]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from numbered(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH))
    except pyarrow.ArrowInvalid as error:
        yield 1, Fault(f"the file is no Parquet file ({error})", final=True)


def _arrow_rows(path: Path) -> Iterator[tuple[int, Row | Fault]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            try:
                reader = pyarrow.ipc.open_stream(source)  # what `datasets` writes
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                reader = map(file.get_batch, range(file.num_record_batches))
            yield from numbered(reader)
        except pyarrow.ArrowInvalid as error:
            yield 1, Fault(f"the file is no Arrow file ({error})", final=True)


# ---------------------------------------------------------------------------------------------------------------------
# Formats: a row → a conversation. A new format is one function and one line in FORMATS and SHAPES.

# What a row looks like that needs no registry: the columns it must have → its formatting and columns.
SHAPES: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {
    ("instruction", "output"): ("alpaca", {}),
    ("messages",): ("openai", {"messages": "messages"}),
    ("conversations",): ("sharegpt", {"messages": "conversations"}),
    ("prompt", "completion"): ("alpaca", {"prompt": "prompt", "response": "completion"}),
    ("prompt", "response"): ("alpaca", {"prompt": "prompt", "response": "response"}),
    ("question", "answer"): ("alpaca", {"prompt": "question", "response": "answer"}),
}
SHAPES_SHOWN = (
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    '{"prompt": "...", "completion": "..."}',
)
# What the values of a message's role mean; an entry's tags come on top. "call" is an assistant's tool call as JSON.
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
ROLES |= {"developer": "system", "tool": "tool", "observation": "tool", "function": "tool", "function_call": "call"}
TAGGED = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "call"}
TAGGED |= {"system_tag": "system"}
FOLLOWS = {"start": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


@dataclass
class Layout:
    """How the rows of one dataset are laid out, and what was remarkable about them (from `notes` on)."""

    formatting: str
    columns: dict[str, str | None]  # what is read → the column it stands in
    named: frozenset[str]  # those of `columns` that the registry names
    tags: dict[str, str]
    roles: dict[str, str]
    registered: bool
    notes: set[str] = field(default_factory=set)
    counted: Counter[str] = field(default_factory=Counter)  # notes that end with a number
    used: set[str] = field(default_factory=set)  # columns that were read
    seen: set[str] = field(default_factory=set)  # columns that some row has

    def value(self, row: Row, what: str) -> Any:
        """What stands in the column of `what`, None where there is none; strings of JSON lists are read."""
        column = self.columns.get(what)
        if not column:
            return None
        self.used.add(column)
        found = row.get(column)
        if found is None or found == "" or found == []:
            return None
        if self.registered and what not in self.named and (self.named or what in ("history", "system", "tools")):
            self.notes.add(
                f"column '{column}' is used as {what}, though dataset_info.json does not name it (LLaMA-Factory would "
                f'leave it out); to leave it out, write "{what}": null under columns'
            )
        return found


def shape_of(row: Row) -> tuple[str, dict[str, str]] | None:
    """The formatting and columns of a row that needs no registry, or None."""
    return next((shape for keys, shape in SHAPES.items() if all(key in row for key in keys)), None)


def find_layout(entry: Entry, first: Row) -> Layout:
    """The layout of an entry's rows: what the registry says, and the first row where it says nothing."""
    formatting, columns = entry.formatting, dict(entry.columns)
    notes = set()
    if formatting is None and "messages" in columns:
        formatting = "sharegpt"
    if formatting is None and not columns:
        shape = shape_of(first)
        if shape is None and not entry.registered:
            raise UserError(
                f"dataset {entry.name!r}: its rows have the columns {', '.join(map(str, first)) or '(none)'}, which is "
                "no known format. Known rows:\n  " + "\n  ".join(SHAPES_SHOWN) + "\nor register it in "
                "dataset_info.json, where `columns` says which column is what."
            )
        if shape:
            formatting, told = shape
            if entry.registered and shape != ("alpaca", {}):
                notes.add(f"dataset_info.json names no formatting; its rows are {formatting}")
            columns = dict(told)
    formatting = formatting or "alpaca"
    if first and formatting == "alpaca" and set(columns) == {"prompt"} and TEXT_COLUMNS["response"] not in first:
        raise UserError(
            f"dataset {entry.name!r} is text without answers (pre-training); this kit trains on answers: name their "
            "column as response under columns in dataset_info.json, or take another dataset"
        )
    if formatting == "openai" and entry.formatting:
        notes.add("no 'detailed thinking off' is put into the system message (LLaMA-Factory does for openai data)")
    named = frozenset(columns) if entry.registered else frozenset()
    if formatting == "alpaca":
        wanted = TEXT_COLUMNS
    else:
        usual = ("conversations", "messages") if formatting == "sharegpt" else ("messages", "conversations")
        present = next((name for name in usual if name in first), usual[0])
        wanted = {"messages": present, "system": "system", "tools": "tools"}
    taken = {name for name in columns.values() if name}
    full = {what: columns.get(what, None if default in taken else default) for what, default in wanted.items()}
    full |= {what: columns[what] for what in columns if columns[what] is None}
    roles = ROLES | {entry.tags[tag]: role for tag, role in TAGGED.items() if entry.tags.get(tag)}
    return Layout(formatting, full, named, entry.tags, roles, entry.registered, notes=notes)


def _text(value: Any, what: str) -> str:
    """`value` if it is text; raises Fault that says what it is instead."""
    if isinstance(value, str):
        return value
    if value is None:
        raise Fault(f"{what} is null")
    if isinstance(value, bool | int | float):
        shown = json.dumps(value)
        raise Fault(
            f'{what} is {"a truth value" if isinstance(value, bool) else "a number"} ({shown}); write "{shown}"'
        )
    raise Fault(f"{what} is {'a list' if isinstance(value, list) else 'an object'}, not text")


def _answer(value: Any, what: str) -> str:
    if not _text(value, what).strip():
        raise Fault(f"{what} is empty")
    return value


def _column(row: Row, layout: Layout, what: str) -> Any:
    """The value of a column that must be there; raises Fault with the nearest one."""
    column = layout.columns.get(what)
    if column is None:
        raise Fault(f"dataset_info.json names no column for the {what}")
    if column not in row:
        raise Fault(f"has no column '{column}'{nearest(column, row)}; it has {', '.join(map(str, row)) or 'none'}")
    layout.used.add(column)
    return row[column]


def _json(value: Any, what: str) -> Any:
    """`value`, read as JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Fault(f"{what} is broken JSON at column {error.colno}: {error.msg}") from None


def from_alpaca(row: Row, layout: Layout) -> list[Row]:
    """instruction, input → the question; output → the answer; history: pairs of earlier questions and answers."""
    messages = []
    history = _json(layout.value(row, "history"), "history") or []
    if not isinstance(history, list):
        raise Fault("history is not a list of [question, answer] pairs")
    for index, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            size = f"{len(pair)} items" if isinstance(pair, list | tuple) else "no list"
            raise Fault(f"item {index} of history has {size}; it must be [question, answer]".replace("has no", "is no"))
        messages.append({"role": "user", "content": _answer(pair[0], f"the question in item {index} of history")})
        messages.append({"role": "assistant", "content": _answer(pair[1], f"the answer in item {index} of history")})
    response = _column(row, layout, "response")
    parts = [_column(row, layout, "prompt"), layout.value(row, "query")]
    prompts = [layout.columns["prompt"], layout.columns["query"]]
    question = "\n".join(_text(part, name) for part, name in zip(parts, prompts, strict=True) if part not in (None, ""))
    if not question.strip():
        raise Fault(f"the question is empty ({' and '.join(filter(None, prompts))})")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _answer(response, layout.columns["response"])})
    return messages


_MESSAGE_KEYS = {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}
_MESSAGE_KEYS |= {"reasoning_content"}


def from_messages(row: Row, layout: Layout) -> list[Row]:
    """sharegpt and openai: a list of messages with a role and a content, tool calls as JSON text or as tool_calls."""
    given = _json(_column(row, layout, "messages"), layout.columns["messages"])
    if not isinstance(given, list):
        raise Fault(f"{layout.columns['messages']} is {'null' if given is None else 'not a list'}")
    if not given:
        raise Fault("the conversation is empty")
    messages = []
    for index, message in enumerate(given, 1):
        where = f"message {index}"
        if not isinstance(message, dict):
            raise Fault(f"{where} is not an object with a role and a content")
        role_key = layout.tags.get("role_tag") or ("role" if "role" in message else "from")
        usual = "content" if "content" in message or ("value" not in message and role_key == "role") else "value"
        content_key = layout.tags.get("content_tag") or usual
        if role_key not in message:
            raise Fault(f"{where} has no '{role_key}'{nearest(role_key, message)}")
        role = layout.roles.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            known = ", ".join(layout.roles)
            raise Fault(f"{where} has the unknown role {message[role_key]!r}; known are {known}")
        if unknown := message.keys() - _MESSAGE_KEYS - {role_key, content_key}:
            layout.notes.update(f"messages have a {key!r}, which is not used" for key in unknown)
        messages.append(_message(role, message, content_key, where))
        if role == "system" and layout.tags and not layout.tags.get("system_tag"):
            layout.notes.add(
                "tags name no system_tag; messages of the role 'system' are system messages all the same "
                "(LLaMA-Factory would leave out their rows)"
            )
    return messages


def _message(role: str, message: Row, content_key: str, where: str) -> Row:
    """One message in the kit's form."""
    calls = message.get("tool_calls") or message.get("function_call")
    if content_key not in message and not calls:
        raise Fault(f"{where} has no '{content_key}'{nearest(content_key, message)}")
    content = message.get(content_key)
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        for part in content:  # OpenAI's content parts
            if part["type"] != "text":
                raise Fault(f"{where} has a part of type {part['type']!r}; this kit trains text")
        content = "".join(_text(part.get("text"), f"a part of {where}") for part in content)
    if role == "assistant" and calls:
        made = {"role": role, "content": _text(content or "", where), "tool_calls": _calls(calls, where)}
    elif role == "call":
        thought, _, calls = _text(content, where).rpartition("</think>")
        thought = thought + "</think>" if thought else ""
        made = {"role": "assistant", "content": thought, "tool_calls": _calls(calls, where)}
    elif role == "assistant":
        made = {"role": role, "content": _answer(content, f"the answer ({where})")}
    elif role == "tool":
        shown = json.dumps(content, ensure_ascii=False) if isinstance(content, dict | list) else content
        made = {"role": role, "content": _text(shown, f"the tool's result ({where})")}
        made |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    else:
        made = {"role": role, "content": (_text if role == "system" else _answer)(content, where)}
    if role == "assistant" and isinstance(message.get("reasoning_content"), str):
        made["reasoning_content"] = message["reasoning_content"]
    return made


def _calls(given: Any, where: str) -> list[Row]:
    """Tool calls in OpenAI's form, arguments as an object."""
    given = _json(given, f"the tool call ({where})")
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault(f'the tool call ({where}) is not {{"name": ..., "arguments": {{...}}}}')
        arguments = _json(function.get("arguments") or {}, f"the arguments of the tool call ({where})")
        if not isinstance(arguments, dict):
            raise Fault(f"the arguments of the tool call ({where}) are no object")
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def _tools(row: Row, layout: Layout) -> list[Row]:
    """The tools of a row in OpenAI's form; LLaMA-Factory's bare functions are wrapped."""
    given = _json(layout.value(row, "tools"), "tools") or []
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Fault("tools is not a list of objects")
    tools = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in given
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise Fault("tools has one without a name")
    return tools


def _check_order(messages: list[Row]) -> None:
    """A user's message, then an answer, and so on; tool results follow an answer; the last message is an answer."""
    before = "start"
    for index, message in enumerate(messages, 1):
        role = message["role"]
        if index == 1 and role == "system":
            continue
        if role not in FOLLOWS[before]:
            after = "starts the conversation" if before == "start" else f"follows one of role {before}"
            raise Fault(f"wrong role order: message {index} of role {role} {after}")
        before = role
    if before == "start":
        raise Fault("the conversation is empty")
    if before != "assistant":
        raise Fault(f"wrong role order: the last message is of role {before}; the assistant's answer is missing")


FORMATS: dict[str, Callable[[Row, Layout], list[Row]]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_messages,
    "openai": from_messages,
}


def _fill_in(messages: list[Row], layout: Layout, config: Config) -> None:
    """Puts name and author for {{name}} and {{author}}, unless they are empty: a row may be about such marks."""
    marked = [message for message in messages if "{{" in message["content"]]
    for setting, word in (("name", config.name), ("author", config.author)):
        mark = f"{{{{{setting}}}}}"
        found = [message for message in marked if mark in message["content"]]
        if found and word:
            layout.counted[f'rows in which {mark} becomes {word!r} ({setting}: "" would leave it)'] += 1
            for message in found:
                message["content"] = message["content"].replace(mark, word)


def to_conversation(row: Any, layout: Layout, config: Config) -> Conversation:
    """A row as a conversation, with {{name}} and {{author}} filled in; raises Fault with what is wrong."""
    if not isinstance(row, dict):
        raise Fault(f"is {'a list' if isinstance(row, list) else json.dumps(row)[:40]}, not an object with columns")
    layout.seen.update(row)
    messages = FORMATS[layout.formatting](row, layout)
    if messages[0]["role"] != "system":
        system = layout.value(row, "system")
        system = config.default_system if system is None else _text(system, "the system message")
        if system:
            messages.insert(0, {"role": "system", "content": system})
    _check_order(messages)
    _fill_in(messages, layout, config)
    tools = _tools(row, layout)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def fingerprint(conversation: Conversation) -> int:
    """A 64-bit number of the content, equal for equal conversations; raises Fault for text that is no Unicode."""
    text = json.dumps(conversation, ensure_ascii=False, sort_keys=True)
    try:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    except UnicodeEncodeError as error:
        raise Fault(f"holds half a character ({error.object[error.start]!a}, a lone surrogate); delete it") from None
