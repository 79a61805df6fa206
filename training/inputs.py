"""What a training is made of besides its settings: data, model, tokenizer, chat template.

run.json records a hash of each; a run that goes on compares them with what is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Message

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate

HASHED_WHOLE = 64 << 20  # bytes up to which a file is hashed whole; of a larger one, BLOCKS of BLOCK bytes
BLOCK, BLOCKS = 1 << 16, 64
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def describe_inputs(model: Path, template: ChatTemplate, data: TrainingData) -> dict[str, dict[str, str]]:
    """Kind of input → name → hash. Kinds are "data", "conversations", "model", "tokenizer" and "template"."""
    files = [item for part in ("datasets", "eval_datasets") for entry in data.report[part] for item in entry["files"]]
    weights = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    tokenizer = [model / name for name in TOKENIZER_FILES if (model / name).is_file()]
    return {
        "data": {item["path"]: item.get("sha256") or item["fingerprint"] for item in files},
        "conversations": {"": hashlib.sha256(data.contents.tobytes()).hexdigest()},
        "model": {file.name: fingerprint(file) for file in weights},
        "tokenizer": {file.name: fingerprint(file) for file in tokenizer},
        "template": {template.name: hashlib.sha256(template.text.encode()).hexdigest()},
    }


def fingerprint(file: Path) -> str:
    """The SHA-256 of a file's size and content; of a large file, of evenly spread blocks (hashing 16 GB takes a
    minute, and another training changes all of a model's weights)."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(file, "rb") as opened:
        if size <= HASHED_WHOLE:
            while block := opened.read(1 << 22):
                found.update(block)
        else:
            for number in range(BLOCKS):
                opened.seek(number * (size - BLOCK) // (BLOCKS - 1))
                found.update(opened.read(BLOCK))
    return found.hexdigest()


def find_changes(then: dict[str, Any], now: dict[str, Any]) -> list[Message]:
    """The inputs that differ from those that a run was begun with."""
    changes = [
        message
        for kind in now
        if kind != "conversations"
        for message in _changes_of(kind, then.get(kind, {}), now[kind])
    ]
    if not changes and then.get("conversations", {}) != now["conversations"]:  # no file says why they differ
        changes = [Message("the same files give other conversations; has dataset_info.json changed?")]
    return changes


def _changes_of(kind: str, then: dict[str, str], now: dict[str, str]) -> Iterator[Message]:
    if kind == "data" and sorted(then.values()) == sorted(now.values()):  # a file may have moved
        return
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if before is None:
            yield Message("{kind}: {name} is new", kind=kind, name=name)
        elif after is None:
            yield Message("{kind}: {name} is gone", kind=kind, name=name)
        else:
            yield Message(
                "{kind}: {name} has changed (SHA-256 {then}… then, {now}… now)",
                kind=kind,
                name=name,
                then=before[:12],
                now=after[:12],
            )
