"""The rows of a dataset, from files of several types or from a hub; nothing heavy is imported for JSON and CSV.

A row is a dict, the bytes of a line of JSON, or a Fault; rows are numbered from 1 in each file. A new file type is one
function and one line in READERS.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Message, UserError
from preprocessing.faults import Fault, json_problem
from preprocessing.registry import EXTENSIONS, Entry
from runs import network
from runs.files import sha256

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
NumberedRows = Iterator[tuple[int, Any]]  # row number, row

BATCH = 512  # rows of Parquet and Arrow read at a time


@dataclass
class Source:
    """The rows of one entry, readable again and again, and what their content is known by."""

    entry: Entry
    content: list[dict[str, Any]]  # a file's path, bytes and sha256; or a hub's dataset and its fingerprint
    read: Callable[[], Iterator[tuple[str, int, Any]]]  # file, row number, row


def open_source(entry: Entry, *, hashed: bool = True) -> Source:
    """Where the rows of an entry come from; raises UserError when a hub does not have them."""
    if not entry.hub:
        content = [
            {"path": str(file), "bytes": file.stat().st_size} | ({"sha256": sha256(file)} if hashed else {})
            for file in entry.files
        ]
        return Source(
            entry,
            content,
            lambda: ((str(f), n, row) for f in entry.files for n, row in read_rows(f, entry.stage)),
        )
    table = _fetch(entry)
    content = [{"path": entry.repository, "bytes": table.data.nbytes, "fingerprint": table._fingerprint}]
    arrow = table.with_format("arrow")
    return Source(
        entry, content, lambda: ((entry.repository, n, row) for n, row in _numbered(arrow.iter(batch_size=BATCH)))
    )


def _fetch(entry: Entry) -> datasets.Dataset:
    """A dataset of the Hugging Face hub (HF_ENDPOINT is honoured) or of ModelScope."""
    import datasets

    network.check_environment()
    options = {"data_dir": entry.folder, "split": entry.split}
    place = "ModelScope" if entry.hub == "ms" else os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        if entry.hub == "hf":
            return datasets.load_dataset(entry.repository, entry.subset, **options)
        from modelscope import MsDataset

        table = MsDataset.load(entry.repository, subset_name=entry.subset, **options)
        return table.to_hf_dataset() if isinstance(table, MsDataset) else table
    except ImportError:
        if entry.hub == "hf":
            raise
        raise UserError(
            "dataset '{name}' is on ModelScope, whose package is not installed: pip install modelscope", name=entry.name
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        problem = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(
            "dataset '{name}' ({repository}, split {split}) could not be fetched from {place}: {problem}; check "
            "name, split and network, or set HF_ENDPOINT to a mirror",
            name=entry.name,
            repository=entry.repository,
            split=entry.split,
            place=place,
            problem=problem,
        ) from None


def chosen_rows(source: Source, config: Config, notes: set[Message]) -> Iterator[tuple[str, int, Any]]:
    """The rows that num_samples (drawn at random, again where there are too few) and max_samples leave."""
    rows = source.read()
    if source.entry.num_samples:
        import numpy as np

        total = sum(1 for _ in source.read())
        wanted = np.zeros(total, int)
        if total:
            rng = np.random.default_rng(config.seed)
            wanted = np.bincount(rng.permutation(total)[: source.entry.num_samples], minlength=total)
            if missing := max(0, source.entry.num_samples - total):
                wanted += np.bincount(rng.integers(0, total, missing), minlength=total)
                notes.add(
                    Message(
                        "num_samples asks for {wanted:,} of {total:,} rows; {repeated:,} are drawn again",
                        wanted=source.entry.num_samples,
                        total=total,
                        repeated=missing,
                    )
                )
        rows = (row for index, row in enumerate(source.read()) for _ in range(wanted[index]))
    if config.max_samples:
        rows = itertools.chain(itertools.islice(rows, config.max_samples), _note_rest(rows, config.max_samples, notes))
    return rows


def _note_rest(rows: Iterator[Any], limit: int, notes: set[Message]) -> Iterator[Any]:
    """No rows; a note where max_samples left some out. A generator: it must not look before the others are through."""
    if next(rows, None) is not None:
        notes.add(Message("max_samples: only the first {rows:,} rows are used", rows=limit))
    yield from ()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_rows(path: Path, stage: str = "sft") -> NumberedRows:
    """The rows of a file one by one, in little memory. Rows of JSON lines are numbered by line and still bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        return iter(
            [(1, Fault("the file cannot be read ({problem})", problem=error.strerror or str(error), final=True))]
        )
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return iter([(1, Fault("the file is UTF-16 (its byte-order mark says so); save it as UTF-8", final=True))])
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    kind = EXTENSIONS[path.suffix.lower()]
    if kind == "txt" and not text.startswith((b"{", b"[")):
        return (
            _text_rows(path)
            if stage == "pt"
            else iter(
                [
                    (
                        1,
                        Fault(
                            "plain text has no questions and answers; stage: pt learns raw text, for other "
                            "stages a .txt must hold "
                            "rows as JSON lines",
                            final=True,
                        ),
                    )
                ]
            )
        )
    if kind in ("json", "txt") and text.startswith(b"{") and _spreads_objects(path):
        return iter(
            [
                (
                    1,
                    Fault(
                        "an object of the file goes over several lines; it must be a list [...] of rows, or one "
                        "object a line",
                        final=True,
                    ),
                )
            ]
        )
    if kind == "txt" or (kind == "json" and not text.startswith(b"[")):
        kind = "list" if text.startswith(b"[") else "lines"
    elif kind == "json":
        kind = "list"
    return READERS[kind](path)


def _text_rows(path: Path) -> NumberedRows:
    """The documents of a text file: its lines, or, where empty lines separate them, its blocks of lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            apart = any(line.isspace() for line in file)
            file.seek(0)
            block: list[str] = []
            first = 1
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    first = first if block else number
                    block.append(line)
                if block and (line.isspace() or not apart):
                    yield first, {"text": "".join(block).strip("\n")}
                    block = []
            if block:
                yield first, {"text": "".join(block).strip("\n")}
    except UnicodeDecodeError:
        yield 1, not_utf8(path)


def _lines(path: Path) -> NumberedRows:
    """The lines of a file of JSON lines, as bytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace() and line:
                yield number, line


def _spreads_objects(path: Path, enough: int = 1 << 24) -> bool:
    """Whether the first object of a file of JSON goes on after its first line, as far as its beginning tells."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if not line.isspace()), "")
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
        raise Fault(
            "line {line}, byte {byte} is not UTF-8; save the file as UTF-8", line=number, byte=error.start + 1
        ) from None
    except json.JSONDecodeError as error:
        if line.startswith(codecs.BOM_UTF8):
            raise Fault("line {line} starts with a byte-order mark (BOM); delete it", line=number) from None
        raise Fault(
            "broken JSON at line {line}, column {column}: {problem}",
            line=number,
            column=error.colno,
            problem=json_problem(error),
        ) from None
    except RecursionError:
        raise Fault("is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise Fault(
            "broken JSON at line {line}, column {column}: {problem}", line=number, column=1, problem=str(error)
        ) from None


_SPACE = re.compile(r"[ \t\r\n]*")


class _JsonList:
    """The rows of a file that is one JSON list, read `chunk` characters at a time: memory does not grow with it."""

    def __init__(self, file: Any, chunk: int, longest: int) -> None:
        self.file, self.chunk, self.longest = file, chunk, longest
        self.text, self.at = "", 0  # what is in memory, and how much of it is read
        self.line, self.column = 1, 1  # of text[0]
        self.decode = json.JSONDecoder().raw_decode

    def rows(self) -> NumberedRows:
        self.next_character()
        self.at += 1  # the opening bracket
        if self.next_character() == "]":
            self.at += 1
            yield from self.nothing_after(1)
            return
        number = 1
        while True:
            row = self.row()
            yield number, row
            if isinstance(row, Fault):
                return
            number += 1
            separator = self.next_character()
            if separator not in (",", "]") or not separator:
                yield number, self.broken("Expecting ',' or ']'", self.at)
                return
            self.at += 1
            if separator == "]":
                yield from self.nothing_after(number)
                return

    def nothing_after(self, number: int) -> NumberedRows:
        if self.next_character():
            yield number, self.broken("text after the end of the list", self.at)

    def row(self) -> Any:
        """The next row, or a Fault."""
        self.next_character()
        while True:
            try:
                row, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at < self.longest and self.read_more():
                    continue  # the row goes on in the next chunk
                at_end = error.pos >= len(self.text)
                position = max(self.at, len(self.text.rstrip()) - 1) if at_end else error.pos
                return self.broken(json_problem(error), position)
            except ValueError as error:  # a number of more digits than Python reads
                return self.broken(str(error), self.at)
            if end == len(self.text) and self.read_more():
                continue
            self.at = end
            return row

    def read_more(self) -> bool:
        """Drops what is read and appends a chunk; False at the end of the file."""
        added = self.file.read(self.chunk)
        if added:
            newlines = self.text.count("\n", 0, self.at)
            self.column = self.at - self.text.rfind("\n", 0, self.at) if newlines else self.column + self.at
            self.line += newlines
            self.text, self.at = self.text[self.at :] + added, 0
        return bool(added)

    def next_character(self) -> str:
        """The next character that is no space, or an empty string; moves there."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.read_more():
                return self.text[self.at : self.at + 1]

    def broken(self, problem: str | Message, position: int) -> Fault:
        newlines = self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position) if newlines else self.column + position
        return Fault(
            "broken JSON at line {line}, column {column}: {problem}; nothing after it can be read",
            line=self.line + newlines,
            column=column,
            problem=problem,
            final=True,
        )


def _list_rows(path: Path, chunk: int = 1 << 20, longest: int = 1 << 26) -> NumberedRows:
    """The rows of one JSON list; one of more than `longest` characters is a Fault."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in _JsonList(file, chunk, longest).rows():
                yield number, row
    except UnicodeDecodeError:
        yield number + 1, not_utf8(path)
    except RecursionError:
        yield number + 1, Fault("is nested too deeply", final=True)


def not_utf8(path: Path) -> Fault:
    """The fault of a file that is not UTF-8: the first line and byte that are not."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return Fault(
                    "line {line}, byte {byte} is not UTF-8; save the file as UTF-8",
                    line=number,
                    byte=error.start + 1,
                    final=True,
                )
    return Fault("line {line}, byte {byte} is not UTF-8; save the file as UTF-8", line=1, byte=1, final=True)


def _csv_rows(path: Path) -> NumberedRows:
    csv.field_size_limit(1 << 30)
    number = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if fault := _header_fault(header):
                yield 1, fault
                return
            for values in reader:
                if not values:
                    continue  # an empty line
                number += 1
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                else:
                    yield (
                        number,
                        Fault(
                            "line {line}: {values} value{values:plural} for {columns} column{columns:plural}",
                            line=reader.line_num,
                            values=len(values),
                            columns=len(header),
                        ),
                    )
        except csv.Error as error:
            yield (
                number + 1,
                Fault("line {line}: broken CSV ({problem})", line=reader.line_num, problem=str(error), final=True),
            )
        except UnicodeDecodeError:
            yield number + 1, not_utf8(path)


def _header_fault(header: list[str]) -> Fault | None:
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        return Fault("the header has the column '{column}' more than once; rename one", column=twice[0], final=True)
    separator = next((sign for sign in (";", "\t", "|") if len(header) == 1 and sign in header[0]), None)
    if separator:
        shown = "tab" if separator == "\t" else separator
        return Fault(
            "the header is a single column, '{header}': its values seem to be separated by '{separator}'; save the "
            "file with commas",
            header=header[0][:80],
            separator=shown,
            final=True,
        )
    return None


def _numbered(batches: Iterable[Any]) -> NumberedRows:
    """The rows of Arrow batches, without the nulls inside their columns: Arrow gives every object the keys of all."""
    rows = (row for batch in batches for row in batch.to_pylist())
    return enumerate(({column: _without_nulls(value) for column, value in row.items()} for row in rows), 1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for number, row in _numbered(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH)):
            yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield (
            number + 1,
            Fault(
                "the file cannot be read as {type} ({problem})", type="Parquet", problem=_first_line(error), final=True
            ),
        )


def _arrow_rows(path: Path) -> NumberedRows:
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)  # what `datasets` writes
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                reader = map(file.get_batch, range(file.num_record_batches))
            for number, row in _numbered(map(_validated, reader)):
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield (
            number + 1,
            Fault(
                "the file cannot be read as {type} ({problem})", type="Arrow", problem=_first_line(error), final=True
            ),
        )


def _validated(batch: Any) -> Any:
    """The batch itself; raises ArrowInvalid for one that is damaged, reading which would end the process."""
    batch.validate(full=True)
    return batch


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    "lines": _lines,
    "list": _list_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
