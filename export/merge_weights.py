"""An adapter, the base model's tensors on the disk, and what the one does to the other, tensor by tensor.

Nothing here loads a model: a base's files are streamed, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError
from runs.adapter import (
    EMBEDDINGS,
    HEADS,
    MULTIMODAL,
    OTHER_BASE,
    Adapter,
    Update,
    check_replacement,
    find_updates,
    language_config,
)
from runs.files import write_json
from runs.weights import DTYPES, SIZES, Tensor, digest, pack, read_rows

if TYPE_CHECKING:
    import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what becomes of each of the base's tensors


@dataclass(frozen=True)
class Piece:
    """One tensor of the merged model: its name and type, where its values come from, what is added to them."""

    name: str
    dtype: str
    source: Tensor
    update: Update | None

    @property
    def size(self) -> int:
        """Bytes in the merged file."""
        return self.source.count * SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """All pieces in the order of the base's files, and what the merge changes in config.json."""

    pieces: list[Piece]
    untied: bool  # the output layer no longer equals the embedding
    vocabulary: int | None  # rows of the embedding

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size for piece in self.pieces)


def make_plan(base: dict[str, Tensor], config: dict[str, Any], adapter: Adapter, export_dtype: str | None) -> Plan:
    """Gives every tensor of the adapter its place; raises UserError, by name, where one has none.

    `base` and `config` are the base's tensors and config.json.
    """
    base = dict(base)

    def place(target: str) -> str:
        """The base's name of a tensor; some checkpoints leave out the first word ("transformer.")."""
        return target if target in base or (short := target.partition(".")[2]) not in base else short

    modules = {place(f"{module}.weight"): module for module in adapter.parts}
    copied: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for target in adapter.whole:
        tensor, is_copy = adapter.replacement(target)
        (copied if is_copy else own)[place(target)] = tensor
    embedding = next((name for name in base if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in (*base, *modules, *copied, *own) if name.endswith(HEADS)), "lm_head.weight")
    untied = False
    if embedding and language_config(config).get("tie_word_embeddings", head not in base):
        # one tensor in the base; it stays one unless the adapter changes its two uses differently
        if {embedding, head} <= own.keys() and digest(own[embedding]) != digest(own[head]):
            raise UserError(
                f"{adapter.file} has {embedding} and {head} with different values, which are one tensor in the base; "
                + OTHER_BASE
            )
        own[head] = own[embedding] = own.get(embedding, own.get(head, base[embedding]))
        ends = [digest(copied[name]) if name in copied else name in modules for name in (embedding, head)]
        untied = ends[0] != ends[1] or True in ends
        base[head] = base[embedding]
        if not untied:
            for tensors in (base, own, copied):
                tensors.pop(head, None)

    sources = {**base, **own, **copied}
    missing = [name for name in (*own, *copied) if name not in base] + [name for name in modules if name not in sources]
    if missing:
        mend = MULTIMODAL if language_config(config) is not config else OTHER_BASE
        raise UserError(f"{adapter.file} changes {missing[0]}, which the base has not; {mend}")
    for name, tensor in {**own, **copied}.items():
        check_replacement(adapter, name, tensor, base[name])
    rows = {sources[name].shape[0] for name in (embedding, head) if name in sources}
    if len(rows) > 1:
        raise UserError(f"{adapter.file} has {embedding} and {head} of different lengths; merge it with peft")
    updates = find_updates(adapter, modules, sources, place)
    if strays := [name for name in adapter.tensors if adapter.used[name] != 1]:
        raise UserError(f"{adapter.file}: {strays[0]} was used {adapter.used[strays[0]]} times; merge it with peft")
    wanted = DTYPES[export_dtype] if export_dtype else None
    pieces = [Piece(n, out_dtype(n, base[n], wanted), tensor, updates.get(n)) for n, tensor in sources.items()]
    return Plan(pieces, untied, rows.pop() if rows else None)


def out_dtype(name: str, tensor: Tensor, wanted: str | None) -> str:
    """The type in which a tensor of the base is written; raises UserError for a quantized or unknown one."""
    if tensor.dtype in DTYPES.values():
        return wanted or tensor.dtype
    if tensor.dtype in SIZES and tensor.dtype != "F64":
        return tensor.dtype  # whole numbers are tables, not weights
    raise UserError(f"{tensor.file}: {name} is stored as {tensor.dtype}; give model_name_or_path=the 16-bit model")


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic: in float32, in blocks that fit into a core's cache, cast once

BLOCK = 1 << 17  # elements


LARGEST = {"F32": 3.4028234e38, "BF16": 3.3895313e38, "F16": 65504.0}


def write_piece(piece: Piece, file: int, start: int) -> int:
    """Computes a piece and writes it into the open file at `start`; returns its bytes."""
    if piece.update is None and piece.dtype == piece.source.dtype:
        copy(piece.source, file, start)
        return piece.size
    rows = piece.source.shape[0] if piece.source.shape else 1
    step = max(1, BLOCK // max(1, piece.source.count // max(rows, 1)))
    change = Change(piece.update, piece.source) if piece.update else None
    for first in range(0, rows, step):
        last = min(rows, first + step)
        values = read_rows(piece.source, first, last)
        if change:
            change.apply(values, first, last)
        if not max(values.max(), -values.min()) <= LARGEST[piece.dtype]:  # a NaN compares false
            raise UserError(
                f"{piece.name} has values that are no numbers, or too large for {piece.dtype}, once merged; "
                "export_dtype=bfloat16 has room for large ones, else the adapter is broken: train with a lower rate"
            )
        packed = pack(values, piece.dtype)
        start += os.pwrite(file, packed.data, start)
    return piece.size


class Change:
    """An Update with its matrices read, as float32."""

    def __init__(self, update: Update, source: Tensor) -> None:
        import numpy as np

        self.left = read_rows(update.left)
        self.right = np.ones((1, 1), np.float32) if update.right is None else read_rows(update.right)
        if update.turned:
            self.left, self.right = np.ascontiguousarray(self.left.T), np.ascontiguousarray(self.right.T)
        self.left *= np.float32(update.scale)
        self.magnitude = self.columns = None
        if update.magnitude is not None:
            self.magnitude = read_rows(update.magnitude)  # (outputs, 1)
            if update.turned:  # an output's weights are a column, over all blocks
                self.columns = self.magnitude.T / self.column_lengths(source)

    def column_lengths(self, source: Tensor) -> np.ndarray:
        """Length of each column of the changed weight (1 x columns)."""
        import numpy as np

        squares = np.zeros((1, source.shape[1]))
        step = max(1, BLOCK // source.shape[1])
        for first in range(0, source.shape[0], step):
            last = min(source.shape[0], first + step)
            values = read_rows(source, first, last)
            values += self.left[first:last] @ self.right
            squares += np.square(values).sum(axis=0, dtype=np.float64)
        return np.sqrt(squares).astype(np.float32)

    def apply(self, values: np.ndarray, first: int, last: int) -> None:
        """Changes rows `first` to `last` of the weight in place."""
        import numpy as np

        values += self.left[first:last] @ self.right
        if self.columns is not None:
            values *= self.columns
        elif self.magnitude is not None:
            values *= self.magnitude[first:last] / np.linalg.norm(values, axis=1, keepdims=True)


def copy(tensor: Tensor, file: int, start: int) -> None:
    """Copies a tensor's bytes into the open file at `start`."""
    with open(tensor.file, "rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = stream.read(min(left, 1 << 22))
            start += os.pwrite(file, chunk, start)
            left -= len(chunk)


def write_shards(plan: Plan, folder: Path, largest: int) -> None:
    """Writes all pieces into files of at most `largest` bytes (or one tensor), and an index where there are several."""
    from tqdm import tqdm

    shards: list[list[Piece]] = [[]]
    for piece in plan.pieces:
        if shards[-1] and sum(p.size for p in shards[-1]) + piece.size > largest:
            shards.append([])
        shards[-1].append(piece)
    weight_map = {}
    with tqdm(total=plan.size, desc="merge", unit="B", unit_scale=True, file=sys.stderr) as bar:
        for number, pieces in enumerate(shards, 1):
            one = len(shards) == 1
            name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update({piece.name: name for piece in pieces})
            write_shard(pieces, folder / name, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_shard(pieces: list[Piece], path: Path, bar: Any) -> None:
    """Writes one safetensors file, several pieces at a time."""
    pieces = sorted(pieces, key=lambda piece: -SIZES[piece.dtype])  # keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += piece.size
        entry = {"dtype": piece.dtype, "shape": piece.source.shape, "data_offsets": [starts[-1], end]}
        header[piece.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        offset = 8 + len(text)
        tasks = [
            pool.submit(write_piece, piece, stream.fileno(), offset + start)
            for piece, start in zip(pieces, starts, strict=True)
        ]
        try:
            for task in tasks:
                bar.update(task.result())
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(stream.fileno())
