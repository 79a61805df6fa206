"""Hashes of what a training is made of besides its settings: data, model, tokenizer, chat template.

run.json records them; a resumed run compares them with what is there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from common import Message

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate

HASHED_WHOLE = 64 << 20  # bytes up to which a file is hashed whole; of a larger one, BLOCKS of BLOCK bytes
BLOCK, BLOCKS = 1 << 16, 64
TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
Inputs = dict[str, dict[str, str]]  # kind ("data", "conversations", "model", "tokenizer", "template") → name → hash


def describe_inputs(model: Path, template: ChatTemplate, data: TrainingData) -> Inputs:
    """The hashes of all that a training is made of besides its settings."""
    files = [item for part in ("datasets", "eval_datasets") for entry in data.report[part] for item in entry["files"]]
    weights = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    tokenizer = [model / name for name in TOKENIZER if (model / name).is_file()]
    return {
        "data": {item["path"]: item.get("sha256") or item["fingerprint"] for item in files},
        "conversations": {"": hashlib.sha256(data.contents.tobytes()).hexdigest()},
        "model": {file.name: hash_file(file) for file in weights},
        "tokenizer": {file.name: hash_file(file) for file in tokenizer},
        "template": {template.name: hashlib.sha256(template.text.encode()).hexdigest()},
    }


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's size and content; of a large file, of evenly spread blocks (hashing 16 GB takes a
    minute, and another training changes all of a model's weights)."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    starts = [0] if size <= HASHED_WHOLE else [n * (size - BLOCK) // (BLOCKS - 1) for n in range(BLOCKS)]
    with open(file, "rb") as opened:
        for start in starts:
            opened.seek(start)
            found.update(opened.read(HASHED_WHOLE if size <= HASHED_WHOLE else BLOCK))
    return found.hexdigest()


def find_changes(then: Inputs, now: Inputs) -> list[Message]:
    """The inputs that differ from those that a run was begun with."""
    changes = []
    for kind in [kind for kind in now if kind != "conversations"]:
        before, after = then.get(kind, {}), now[kind]
        if kind == "data" and sorted(before.values()) == sorted(after.values()):  # a file may have moved
            continue
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        changes += [Message("{kind}: {name} has changed", kind=kind, name=name) for name in differing]
    if not changes and then.get("conversations", {}) != now["conversations"]:  # no file says why they differ
        changes = [Message("the same files give other conversations; has dataset_info.json changed?")]
    return changes
