"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs.process import has_ended


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it appears whole or not at all: beside, flushed, renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON, Chinese kept readable."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left beside `folder` of their attempts to let it appear."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.???.*.tmp"):
        if has_ended(int(path.suffixes[-2][1:])):
            shutil.rmtree(path)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place once the block has ended without an error.

    What a killed process left of an earlier attempt is removed.
    """
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
