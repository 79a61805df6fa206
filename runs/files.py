"""Reading and writing files: JSON, hashes, files and folders that appear complete or not at all; space on the disk."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
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
        raise UserError("there is no {file}; copy or make {folder} again", file=path, folder=path.parent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that has to be there, such as config.json; raises UserError where it is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise _broken(path, type(content).__name__)
    return content


def _broken(path: Path, problem: str) -> UserError:
    text = "{file} cannot be read as JSON ({problem}); copy or make {folder} again"
    return UserError(text, file=path, problem=problem, folder=path.parent)


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
def unfinished(place: Path) -> Iterator[Path]:
    """An empty folder beside `place` for what is to take its place; what is left of it at the end is removed.

    Its process holds the kernel's lock on it, by which others tell it from what a killed process left. The number of
    the process would not do: in a container every start may have the same.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    made = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    made.mkdir()
    lock = _lock(made)
    folder = made.rename(made.with_name(f"{made.name}.tmp"))  # locked before others can take it for left
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(place: Path, others: bool = False) -> None:
    """Removes what killed processes left beside `place` of their attempts to let it appear; with `others` also what
    they left beside other places there."""
    name = "*" if others else glob.escape(place.name)
    for left in place.parent.glob(f".{name}.*.tmp"):
        process = left.suffixes[-2].removeprefix(".")
        if left.is_dir() and not left.is_symlink():
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        elif process.isdecimal() and not is_alive(int(process)):
            with suppress(OSError):  # another user's: it only takes space
                left.unlink()


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the lock of a folder; None where another process holds it, or the file system has
    no locks."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # removed by another process, or another user's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place once the block has ended without an error."""
    with unfinished(folder) as beside:
        yield beside
        old = beside.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(beside, folder)
        finally:
            shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Space on the disk: looked at before the work, and told in one sentence where it runs out all the same


def existing_folder(path: Path) -> Path:
    """The nearest folder of a path that exists: the disk that the path will be on."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_free_space(path: Path, needed: int) -> None:
    """Raises UserError where the disk of `path` has not `needed` bytes free."""
    if _free_space(path) < needed:
        raise _disk_full(path, needed)


class ChildFailed(UserError):
    """A program that was started has failed; its disk may be full."""


def _free_space(path: Path) -> int:
    return shutil.disk_usage(existing_folder(path)).free


def _disk_full(path: Path, needed: int) -> UserError:
    text = "{folder} has {free:.2f} GB of free disk space, {needed:.2f} GB are needed; free some, or use another disk"
    return UserError(text, folder=existing_folder(path), needed=needed / 1e9, free=_free_space(path) / 1e9)


@contextmanager
def on_disk_full(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left on device" within the block into a UserError with the needed and the free bytes."""
    from safetensors import SafetensorError

    try:
        yield
    except (ChildFailed, RuntimeError, SafetensorError):  # a child's failure; words of torch and safetensors
        if _free_space(path) > min(needed // 10, 1 << 26):
            raise
        raise _disk_full(path, needed) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(path, needed) from None
