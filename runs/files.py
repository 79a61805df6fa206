"""Reading and writing files: JSON and JSON lines, hashes, files and folders that appear complete or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common import UserError
from runs.process import is_alive

_REQUIRED = object()


def read_json(path: Path, default: Any = _REQUIRED) -> Any:
    """The content of a JSON file; `default`, where one is given, if there is no file.

    Raises UserError where the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if default is not _REQUIRED:
            return default
        raise UserError("file_missing", file=path, folder=path.parent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("json_unreadable", file=path, problem=str(error), folder=path.parent) from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that has to be there, such as config.json; raises UserError where it is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("json_unreadable", file=path, problem=type(content).__name__, folder=path.parent)
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that this kit appends to; none where there is no file.

    Lines that are not complete, as a killed process leaves the last one, are left out.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return [line for line in map(_json_object, lines) if line is not None]


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """`write_text` of a JSON object a line."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Adds a JSON object a line at the end of a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def sha256(path: Path, start: int = 0, size: int = sys.maxsize, before: str = "") -> str:
    """The hex SHA-256 of `before` and at most `size` bytes of a file from `start` on."""
    found = hashlib.sha256(before.encode())
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(min(size, 1 << 22)):
            found.update(chunk)
            size -= len(chunk)
    return found.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it appears complete or not at all: beside, flushed, renamed."""
    with replacing(path) as beside, open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON, Chinese kept readable."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left beside `path` of their attempts to let it appear."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.suffixes[-2].removeprefix(".")
        if process.isdecimal() and not is_alive(int(process)):
            with suppress(OSError):  # another user's: it only takes space
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`: the file that is written there takes its place once the block has ended without an error.

    What a killed process left of an earlier attempt is removed.
    """
    remove_leftovers(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """`replacing` for a folder: an empty one, which is made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    beside, old = (folder.with_name(f".{folder.name}.{kind}.{os.getpid()}.tmp") for kind in ("new", "old"))
    beside.mkdir()
    try:
        yield beside
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
    finally:
        for path in (beside, old):
            shutil.rmtree(path, ignore_errors=True)
