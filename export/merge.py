"""What an adapter does to its base, tensor by tensor, written while it is computed.

Nothing here loads a model: a base's files are streamed, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError
from runs.adapter import Adapter, Places, Update, find_places, language_config
from runs.base_tensors import ExpertPart, is_tied, view_as_in_memory
from runs.files import write_json
from runs.weights import DTYPES, SIZES, Tensor, digest, pack, read_rows, unpack

if TYPE_CHECKING:
    import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what becomes of each of the base's tensors


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged model: its name and type, where its values come from, what is added to them."""

    name: str
    dtype: str
    source: Tensor
    update: Update | None
    part: ExpertPart | None = None

    @property
    def size(self) -> int:
        """Bytes in the merged file."""
        return self.source.count * SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """All tensors in the order of the base's files, and what the merge changes in config.json."""

    tensors: list[OutputTensor]
    untied: bool  # the output layer no longer equals the embedding
    vocabulary: int | None  # rows of the embedding
    survival: Survival

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass
class Survival:
    """How much of the adapter's product arrives in rounded weights, summed while they are written.

    The share is the projection of what the weights moved by on what they should move by: sum(moved * wanted) over
    sum(wanted²), 1.0 where nothing is lost.
    """

    arrived: float = 0.0
    wanted: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def share(self) -> float | None:
        return self.arrived / self.wanted if self.wanted else None

    def add(self, wanted: np.ndarray, moved: np.ndarray) -> None:
        """Counts a block of a weight, both as float32."""
        import numpy as np

        arrived, all_of_it = float(np.vdot(moved, wanted)), float(np.vdot(wanted, wanted))
        with self.lock:
            self.arrived += arrived
            self.wanted += all_of_it


def make_plan(base: dict[str, Tensor], config: dict[str, Any], adapter: Adapter, export_dtype: str | None) -> Plan:
    """Gives every tensor of the adapter its place; raises UserError, by name, where one has none.

    `base` and `config` are the base's tensors and config.json.
    """
    view = view_as_in_memory(base, adapter)
    tied = is_tied(base, config)
    places = find_places(adapter, view.shapes, tied=tied, multimodal=language_config(config) is not config)
    sources = {view.stored.get(name, name): tensor for name, tensor in {**places.own, **places.copied}.items()}
    untied = False
    if tied and places.embedding:
        base = {**base, places.head: base[places.embedding]}
        untied = _are_untied(places)
        if not untied:
            base.pop(places.head)
            sources.pop(places.head, None)
    updates = {view.stored.get(name, name): update for name, update in places.updates.items()}
    wanted = DTYPES[export_dtype] if export_dtype else None
    tensors = []
    for name, original in base.items():
        update, part = updates.get(name), None
        if name in view.parts:
            whole, part = view.parts[name]
            update = places.updates.get(whole)
        dtype = output_dtype(name, original, wanted)
        tensors.append(OutputTensor(name, dtype, sources.get(name, original), update, part))
    return Plan(tensors, untied, places.vocabulary, Survival())


def _are_untied(places: Places) -> bool:
    """Whether the adapter changes the two uses of a tied embedding differently."""
    ends = (places.embedding, places.head)
    replaced = {**places.own, **places.copied}
    first, second = (digest(replaced[name]) if name in replaced else None for name in ends)
    return first != second or any(name in places.updates for name in ends)


def output_dtype(name: str, tensor: Tensor, wanted: str | None) -> str:
    """The type in which a tensor of the base is written; raises UserError for a quantized or unknown one."""
    if tensor.dtype in DTYPES.values():
        return wanted or tensor.dtype
    if tensor.dtype in SIZES and tensor.dtype != "F64":
        return tensor.dtype  # whole numbers are tables, not weights
    raise UserError(
        "{file}: {tensor} is stored as {dtype}; give model_name_or_path=the 16-bit model",
        file=tensor.file,
        tensor=name,
        dtype=tensor.dtype,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic: in float32, in blocks that fit into a core's cache, cast once

BLOCK = 1 << 17  # elements
SAMPLED = 16  # of so many rows one tells how much of the adapter survives the rounding
LARGEST = {"F32": 3.4028234e38, "BF16": 3.3895313e38, "F16": 65504.0}


def write_tensor(tensor: OutputTensor, survival: Survival, file: int, start: int) -> int:
    """Computes a tensor and writes it into the open file at `start`; returns its bytes."""
    if tensor.update is None and tensor.dtype == tensor.source.dtype:
        copy(tensor.source, file, start)
        return tensor.size
    rows = tensor.source.shape[0] if tensor.source.shape else 1
    step = max(1, BLOCK // max(1, tensor.source.count // max(rows, 1)))
    change = make_change(tensor) if tensor.update else None
    for first in range(0, rows, step):
        last = min(rows, first + step)
        values = read_rows(tensor.source, first, last)
        sample = 1 + (last - first) // SAMPLED if change and tensor.dtype != "F32" else 0
        before = values[:sample].copy()
        if change:
            change.apply(values, first, last)
        if not max(values.max(), -values.min()) <= LARGEST[tensor.dtype]:  # a NaN compares false
            raise UserError(
                "{tensor} has values that are no numbers, or too large for {dtype}, once merged; "
                "export_dtype=bfloat16 holds larger ones, else the adapter is broken: train with a lower learning "
                "rate",
                tensor=tensor.name,
                dtype=tensor.dtype,
            )
        packed = pack(values, tensor.dtype)
        if sample:
            survival.add(values[:sample] - before, unpack(packed[:sample], tensor.dtype) - before)
        start = write_at(file, packed.data.cast("B"), start)
    return tensor.size


def make_change(tensor: OutputTensor) -> Change | ExpertChange:
    if not tensor.update.experts:
        return Change(tensor.update, tensor.source)
    return ExpertChange(tensor.update, tensor.source.shape, tensor.part)


class Change:
    """An Update with its matrices read, as float32."""

    def __init__(self, update: Update, source: Tensor) -> None:
        import numpy as np

        self.left = read_rows(update.left)
        self.right = np.ones((1, 1), np.float32) if update.right is None else read_rows(update.right)
        if update.transposed:
            self.left, self.right = np.ascontiguousarray(self.left.T), np.ascontiguousarray(self.right.T)
        self.left *= np.float32(update.scale)
        self.magnitude = self.columns = None
        if update.magnitude is not None:
            self.magnitude = read_rows(update.magnitude)  # (outputs, 1)
            if update.transposed:  # an output's weights are a column, over all blocks
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


class ExpertChange:
    """The update of experts: of one that is a tensor of its own (`part`), or of all in one tensor of `shape`."""

    def __init__(self, update: Update, shape: tuple[int, ...], part: ExpertPart | None) -> None:
        self.update, self.shape, self.part = update, shape, part

    def factors(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows x rank) and (rank x columns) of one expert, scaled."""
        import numpy as np

        update = self.update
        b, a = (update.right, update.left) if update.transposed else (update.left, update.right)
        left, right = outputs_by_expert(b, update.experts)[expert], read_expert_inputs(a, update.experts, expert)
        if update.transposed:
            left, right = right.T, left.T
        return left * np.float32(update.scale), right

    def apply(self, values: np.ndarray, first: int, last: int) -> None:
        """Changes rows `first` to `last` in place: of one expert's weight, or the weights of so many experts."""
        if self.part:
            left, right = self.factors(self.part.expert)
            values += left[self.part.first + first : self.part.first + last] @ right
            return
        for row, expert in enumerate(range(first, last)):
            left, right = self.factors(expert)
            values[row] += (left @ right).reshape(-1)


@functools.lru_cache(maxsize=4)
def outputs_by_expert(b: Tensor, experts: int) -> np.ndarray:
    """lora_B (outputs, rank x experts), where the experts of a rank stand together, as (experts, outputs, rank)."""
    import numpy as np

    values = read_rows(b)
    return np.ascontiguousarray(values.reshape(values.shape[0], -1, experts).transpose(2, 0, 1))


def read_expert_inputs(a: Tensor, experts: int, expert: int) -> np.ndarray:
    """lora_A (experts x rank, inputs) of one expert: (rank, inputs)."""
    rank = a.shape[0] // experts
    return read_rows(a, expert * rank, (expert + 1) * rank)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_at(file: int, data: bytes | memoryview, start: int) -> int:
    """Writes all of `data` into the open file at `start`, in parts if need be; returns where it ends."""
    while data:
        written = os.pwrite(file, data, start)
        start += written
        data = data[written:]
    return start


def copy(tensor: Tensor, file: int, start: int) -> None:
    """Copies a tensor's bytes into the open file at `start`."""
    with open(tensor.file, "rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = stream.read(min(left, 1 << 22))
            if not chunk:
                raise UserError(
                    "{file} is not a complete safetensors file ({error}); fetch or train it again",
                    file=tensor.file,
                    error="it became shorter",
                )
            start = write_at(file, chunk, start)
            left -= len(chunk)


def write_shards(plan: Plan, folder: Path, largest: int) -> None:
    """Writes all tensors into files of at most `largest` bytes (or one tensor), with an index for several files."""
    from tqdm import tqdm

    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in plan.tensors:
        if shards[-1] and size + tensor.size > largest:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    weight_map = {}
    with tqdm(total=plan.size, desc="merge", unit="B", unit_scale=True, file=sys.stderr) as bar:
        for number, tensors in enumerate(shards, 1):
            one = len(shards) == 1
            name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update({tensor.name: name for tensor in tensors})
            write_shard(tensors, plan.survival, folder / name, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_shard(tensors: list[OutputTensor], survival: Survival, path: Path, bar: Any) -> None:
    """Writes one safetensors file, several tensors at a time."""
    tensors = sorted(tensors, key=lambda tensor: -SIZES[tensor.dtype])  # keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += tensor.size
        entry = {"dtype": tensor.dtype, "shape": tensor.source.shape, "data_offsets": [starts[-1], end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        offset = 8 + len(text)
        tasks = [
            pool.submit(write_tensor, tensor, survival, stream.fileno(), offset + start)
            for tensor, start in zip(tensors, starts, strict=True)
        ]
        try:
            for task in tasks:
                bar.update(task.result())
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(stream.fileno())
