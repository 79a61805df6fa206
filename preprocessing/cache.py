"""Samples in a folder of the cache: found again by what they depend on, and whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, UserError
from preprocessing.registry import Entry
from runs.files import remove_leftovers, unfinished

if TYPE_CHECKING:
    from preprocessing.template import ChatTemplate

# Raise it whenever the same rows give other samples, facts or reports than before: what older versions cached is made
# anew then.
FORMAT = 2
SETTINGS = ("cutoff_len", "overlong", "mask_history", "train_on_prompt", "enable_thinking", "default_system", "name")
SETTINGS += ("author", "max_samples")


def cache_folder(
    entry: Entry, content: list[dict[str, Any]], config: Config, template: ChatTemplate, tokenizer: Any
) -> Path:
    """Where the samples of a dataset are kept: named by content, registry, template, tokenizer and settings."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = (*SETTINGS, "max_completion_length") if entry.stage == "grpo" else SETTINGS
    facts = [
        FORMAT,
        content,
        {name: str(value) for name, value in dataclasses.asdict(entry).items()},
        template.text,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
        {name: getattr(config, name) for name in settings},
        config.seed if entry.num_samples else None,
        [tokenizers.__version__, transformers.__version__],
    ]
    return common.CACHE / "data" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def is_whole(folder: Path) -> bool:
    """Whether the files of a cache folder can be read and belong together: a power cut or a full disk may cut them."""
    import numpy as np
    import pyarrow as pa

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with pa.memory_map(str(folder / "samples.arrow")) as file:
            rows = {pa.ipc.open_stream(file).read_all().num_rows}  # mapped, not read
        rows.add(len(np.load(folder / "facts.npy")))
    except (OSError, ValueError, EOFError):  # Arrow's and JSON's are ValueErrors
        return False
    return rows == {report["conversations"]}


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its place at the end unless it has no report.json.

    Others may read there at the same time, or write the same samples: no file is ever missing, nor half of one there.
    """
    remove_leftovers(folder, others=True)
    try:
        with unfinished(folder) as beside:
            yield beside
            if (beside / "report.json").exists():
                _place(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            "the disk of {folder} is full; free some space, or set ONECARD_CACHE", folder=folder.parent
        ) from None


def _place(beside: Path, folder: Path) -> None:
    """Moves finished samples to their place: the folder where there is none, else each file over the one there."""
    for file in beside.iterdir():  # else a power cut may leave the name without the content
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    try:
        os.replace(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for file in beside.iterdir():
            os.replace(file, folder / file.name)
