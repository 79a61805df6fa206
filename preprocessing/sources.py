"""The rows of a dataset, from files of several types or from a hub; nothing heavy is imported for JSON and CSV.

A row is a dict, or a Fault where it cannot be read; rows are numbered from 1 in each file. A new file type is one
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
from preprocessing.faults import Fault, json_problem, no_key_twice
from preprocessing.registry import EXTENSIONS, Entry
from runs import network
from runs.files import sha256

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
NumberedRow = tuple[str, int, Any]  # file, row number, row
RowsOfFile = Iterator[tuple[int, Any]]  # row number, row

BATCH = 512  # rows of Parquet and Arrow read at a time
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Source:
    """The rows of one entry, readable again and again."""

    entry: Entry
    table: datasets.Dataset | None = None  # of a hub

    @property
    def content(self) -> list[dict[str, Any]]:
        """What the content is known by: each file's path, bytes and sha256; or a hub's dataset and its fingerprint."""
        if self.table is None:
            return [
                {"path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)} for file in self.entry.files
            ]
        # There is no public name for the fingerprint of a table.
        facts = {"bytes": self.table.data.nbytes, "fingerprint": self.table._fingerprint}
        return [{"path": self.entry.repository, **facts}]

    def read(self) -> Iterator[NumberedRow]:
        """All rows; in place of one that cannot be read a Fault."""
        if self.table is None:
            return ((str(file), *row) for file in self.entry.files for row in read_rows(file, self.entry.stage))
        batches = self.table.with_format("arrow").iter(batch_size=BATCH)
        return ((self.entry.repository, *row) for row in _numbered(batches))

    def first_rows(self) -> list[Any]:
        return [row for _, _, row in itertools.islice(self.read(), 100)]

    def chosen_rows(self, config: Config, notes: set[Message]) -> Iterator[NumberedRow]:
        """The rows that num_samples (drawn at random, again where there are too few) and max_samples leave."""
        rows = self.read()
        if self.entry.num_samples:
            wanted = _drawn(sum(1 for _ in self.read()), self.entry.num_samples, config.seed, notes)
            rows = (row for index, row in enumerate(rows) for _ in range(wanted[index]))
        for count, row in enumerate(rows):
            if config.max_samples and count == config.max_samples:
                notes.add(Message("max_samples: only the first {rows:,} rows are used", rows=config.max_samples))
                return
            yield row


def open_source(entry: Entry) -> Source:
    """Where the rows of an entry come from; raises UserError when a hub does not have them."""
    return Source(entry, _fetch(entry) if entry.hub else None)


def _fetch(entry: Entry) -> datasets.Dataset:
    """A dataset of the Hugging Face hub (HF_ENDPOINT is honoured) or of ModelScope."""
    import datasets

    network.check_environment()
    options = {"data_dir": entry.folder, "split": entry.split}
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
        raise UserError(
            "dataset {repository}, split {split}, could not be fetched from {place}: {problem}; check name, split and "
            "network, or set HF_ENDPOINT to a mirror",
            repository=entry.repository,
            split=entry.split,
            place="ModelScope" if entry.hub == "ms" else os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            problem=_first_line(error).rstrip("."),
        ) from None


def _drawn(total: int, asked: int, seed: int, notes: set[Message]) -> list[int]:
    """How often each of `total` rows is used."""
    import numpy as np

    rng = np.random.default_rng(seed)
    wanted = np.bincount(rng.permutation(total)[:asked], minlength=total)
    if asked > total > 0:
        wanted += np.bincount(rng.integers(0, total, asked - total), minlength=total)
        notes.add(Message("num_samples={wanted:,} of {total:,} rows: some are repeated", wanted=asked, total=total))
    return wanted.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_rows(path: Path, stage: str = "sft") -> RowsOfFile:
    """The rows of a file one by one; rows of JSON lines are numbered by line.

    In place of a row that is wrong stands a Fault; one that is `final` ends the file.
    """
    number = 0
    try:
        for number, row in _rows_by_type(path, stage):
            yield number, row
        return
    except Fault as fault:
        last = fault
    except UnicodeDecodeError:
        last = not_utf8(path)
    except RecursionError:
        last = Fault("is nested too deeply")
    except OSError as error:
        last = Fault("the file cannot be read ({problem})", problem=error.strerror or str(error))
    last.final = True
    yield number + 1, last


def _rows_by_type(path: Path, stage: str) -> RowsOfFile:
    """The rows of a file by its name and beginning; raises Fault where no row after those can be read."""
    with open(path, "rb") as file:
        start = file.read(4096)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    kind = EXTENSIONS[path.suffix.lower()]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Fault("the file is UTF-16 (its byte-order mark says so); save it as UTF-8")
    if kind == "txt" and not text.startswith((b"{", b"[")):
        if stage != "pt":
            raise Fault("plain text has no questions and answers; only stage: pt trains on it")
        return _text_rows(path)
    if kind not in ("json", "txt"):
        return READERS[kind](path)
    if text.startswith(b"["):
        return _list_rows(path)
    if _spreads_objects(path):
        raise Fault("an object goes over several lines; write a list [...] of rows, or one object a line")
    return _lines(path)


def _text_rows(path: Path) -> RowsOfFile:
    """The documents of a text file: its lines, or, where empty lines separate them, its blocks of lines."""
    with open(path, encoding="utf-8-sig") as file:
        apart = any(line.isspace() for line in file)
        file.seek(0)
        block: list[str] = []
        first = 1
        for number, line in enumerate(itertools.chain(file, ["\n"]), 1):
            if not line.isspace():
                first = first if block else number
                block.append(line)
            if block and (line.isspace() or not apart):
                yield first, {"text": "".join(block).strip("\n")}
                block = []


def _lines(path: Path) -> RowsOfFile:
    """The rows of a file of JSON lines."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                yield number, _parse_line(line, number)


def _spreads_objects(path: Path) -> bool:
    """Whether the first object of a file of JSON goes on after its first line, as far as its beginning tells."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read(1 << 24).lstrip()
    try:
        return "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return text.partition("\n")[0].strip() == "{"


def _parse_line(line: bytes, number: int) -> Any:
    """The row of a line of JSON, or a Fault with line and column."""
    try:
        text = line.decode("utf-8").rstrip()  # else a fault at the end would lie on a line of its own
        return json.loads(text, object_pairs_hook=no_key_twice)
    except Fault as fault:
        return fault
    except UnicodeDecodeError as error:
        return Fault("line {line}, byte {byte} is not UTF-8; save the file as UTF-8", line=number, byte=error.start + 1)
    except json.JSONDecodeError as error:
        if line.startswith(codecs.BOM_UTF8):
            return Fault("line {line} starts with a byte-order mark (BOM); delete it", line=number)
        return _broken(number, error.colno, json_problem(error))
    except RecursionError:
        return Fault("is nested too deeply")
    except ValueError as error:  # a number of more digits than Python reads
        return _broken(number, 1, str(error))


def _broken(line: int, column: int, problem: str | Message) -> Fault:
    return Fault("broken JSON at line {line}, column {column}: {problem}", line=line, column=column, problem=problem)


def _list_rows(path: Path) -> RowsOfFile:
    """The rows of one JSON list, whose text is in memory as a whole, its rows one by one."""
    text = path.read_bytes().decode("utf-8-sig")

    def skip_space(position: int) -> int:
        return _SPACE.match(text, position).end()

    def broken(position: int, problem: str | Message) -> Fault:
        return _broken(text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position), problem)

    decode, skip = json.JSONDecoder(object_pairs_hook=no_key_twice).raw_decode, json.JSONDecoder().raw_decode
    at = skip_space(skip_space(0) + 1)  # behind the opening bracket
    number, sign = 0, text[at : at + 1]
    while sign != "]":
        try:
            row, at = decode(text, at)
        except Fault as fault:
            row, at = fault, skip(text, at)[1]
        except json.JSONDecodeError as error:
            raise broken(error.pos, json_problem(error)) from None
        except ValueError as error:  # a number of more digits than Python reads
            raise broken(at, str(error)) from None
        yield (number := number + 1), row
        at = skip_space(at)
        sign = text[at : at + 1]
        if sign == ",":
            at = skip_space(at + 1)
        elif sign != "]":
            raise broken(at, "Expecting ',' or ']'")
    if (end := skip_space(at + 1)) < len(text):
        raise broken(end, Message("text after the end of the list"))


def not_utf8(path: Path) -> Fault:
    """The fault of a file that is not UTF-8: the first line and byte that are not."""
    place = {"line": 1, "byte": 1}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = {"line": number, "byte": error.start + 1}
                break
    return Fault("line {line}, byte {byte} is not UTF-8; save the file as UTF-8", **place)


def _csv_rows(path: Path) -> RowsOfFile:
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _check_header(header)
            for number, values in enumerate(filter(None, reader), 1):  # without empty lines
                row: Any = dict(zip(header, values, strict=False))
                if len(values) != len(header):
                    counts = {"values": len(values), "columns": len(header)}
                    row = Fault("line {line}: {values} values for {columns} columns", line=reader.line_num, **counts)
                yield number, row
        except csv.Error as error:
            raise Fault("line {line}: broken CSV ({problem})", line=reader.line_num, problem=str(error)) from None


def _check_header(header: list[str]) -> None:
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise Fault("the header has the column '{column}' more than once; rename one", column=twice[0])
    if len(header) == 1 and (sign := next((sign for sign in (";", "\t", "|") if sign in header[0]), None)):
        sign = "tab" if sign == "\t" else sign
        raise Fault("the columns are separated by '{separator}'; save the file with commas", separator=sign)


def _numbered(batches: Iterable[Any]) -> RowsOfFile:
    """The rows of Arrow batches, without the nulls inside their columns: Arrow gives every object the keys of all."""
    rows = (row for batch in batches for row in batch.to_pylist())
    return enumerate(({column: _without_nulls(value) for column, value in row.items()} for row in rows), 1)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _table_rows(path: Path) -> RowsOfFile:
    """The rows of a Parquet or Arrow file."""
    import pyarrow

    batches, name = (_parquet, "Parquet") if path.suffix.lower() == ".parquet" else (_arrow, "Arrow")
    try:
        yield from _numbered(batches(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Fault("the file cannot be read as {type} ({problem})", type=name, problem=_first_line(error)) from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH)


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)  # what `datasets` writes
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            reader = map(file.get_batch, range(file.num_record_batches))
        for batch in reader:
            batch.validate(full=True)  # raises ArrowInvalid for a damaged one, reading which would end the process
            yield batch


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


READERS: dict[str, Callable[[Path], RowsOfFile]] = {"csv": _csv_rows, "parquet": _table_rows, "arrow": _table_rows}
