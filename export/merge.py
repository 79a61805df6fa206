"""Merging: an adapter's updates are added to the weights of its base, a tensor at a time.

No model is loaded: the base's files are read while the merged ones are written, so memory holds one tensor.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError
from runs.adapter import Adapter, Places, Update, find_places, language_config
from runs.base_tensors import ExpertPart, is_tied, view_as_in_memory
from runs.files import write_json
from runs.weights import DTYPES, SIZES, Tensor, read_tensor, same_values

if TYPE_CHECKING:
    import torch


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

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


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
        base = {**base, places.head: base[view.stored.get(places.embedding, places.embedding)]}
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
        dtype = output_dtype(original, wanted)
        tensors.append(OutputTensor(name, dtype, sources.get(name, original), update, part))
    return Plan(tensors, untied, places.vocabulary)


def _are_untied(places: Places) -> bool:
    """Whether the adapter changes the two uses of a tied embedding differently."""
    ends = (places.embedding, places.head)
    replaced = {**places.own, **places.copied}
    if any(name in places.updates for name in ends) or (ends[0] in replaced) != (ends[1] in replaced):
        return True
    return ends[0] in replaced and not same_values(*(replaced[name] for name in ends))


def output_dtype(tensor: Tensor, wanted: str | None) -> str:
    """The type in which a tensor of the base is written; raises UserError for a quantized or unknown one."""
    if tensor.dtype in DTYPES.values():
        return wanted or tensor.dtype
    if tensor.dtype in SIZES and tensor.dtype != "F64":
        return tensor.dtype  # whole numbers are tables, not weights
    raise UserError(
        "{file} is quantized ({dtype}); set model_name_or_path to the 16-bit model",
        file=tensor.file,
        dtype=tensor.dtype,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The tensors, computed in float32 and rounded once


@dataclass
class Survival:
    """How much of the adapter's product arrives in rounded weights, summed over samples of their rows.

    The share is the projection of what the weights moved by on what they should move by: sum(moved * wanted) over
    sum(wanted²), 1.0 where nothing is lost; None where nothing is rounded.
    """

    arrived: float = 0.0
    wanted: float = 0.0

    @property
    def share(self) -> float | None:
        return self.arrived / self.wanted if self.wanted else None

    def add(self, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        wanted = (exact - before).flatten()
        self.arrived += wanted.dot((rounded.float() - before).flatten()).item()
        self.wanted += wanted.dot(wanted).item()


SAMPLED = 16  # of so many rows one tells how much of the adapter survives the rounding


def merged_values(tensor: OutputTensor, survival: Survival) -> torch.Tensor:
    """The values of a tensor of the merged model, in its type."""
    import torch

    stored = read_tensor(tensor.source)
    if tensor.update is None and tensor.dtype == tensor.source.dtype:
        return stored
    dtype = next(name for name, short in DTYPES.items() if short == tensor.dtype)
    exact = stored.to(torch.float32, copy=True)  # what the library returns is the mapped file
    if tensor.update:
        before = exact[::SAMPLED].clone()
        add_update(exact, tensor.update, tensor.part)
    rounded = exact.to(getattr(torch, dtype))
    if not torch.stack(rounded.aminmax()).isfinite().all():  # NaN is both
        raise UserError(
            "{tensor} would hold NaN or values too large for {dtype}; try export_dtype=bfloat16, or train with a lower "
            "learning_rate",
            tensor=tensor.name,
            dtype=dtype,
        )
    if tensor.update and rounded.dtype != torch.float32:
        survival.add(before, exact[::SAMPLED], rounded[::SAMPLED])
    return rounded


def add_update(weight: torch.Tensor, update: Update, part: ExpertPart | None = None) -> None:
    """Adds an update to a float32 weight in place. `part`: the weight is this part of a tensor of all experts."""
    if update.experts:
        for expert in range(update.experts) if part is None else (part.expert,):
            b, a = _expert_factors(update, expert)
            rows, first = (weight, part.first) if part else (weight[expert], 0)
            rows.addmm_(b[first : first + len(rows)], a, alpha=update.scale)
        return
    b = read_tensor(update.b).float()
    if update.a is None:
        weight.add_(b, alpha=update.scale)
        return
    a = read_tensor(update.a).float()
    weight.addmm_(*((a.T, b.T) if update.transposed else (b, a)), alpha=update.scale)
    if update.magnitude is not None:
        magnitude = read_tensor(update.magnitude).float().flatten()
        inputs = 0 if update.transposed else 1
        weight.mul_((magnitude / weight.norm(dim=inputs)).unsqueeze(inputs))


def _expert_factors(update: Update, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of one expert's update, in the order in which its weight is stored."""
    a, b = _all_expert_factors(update)
    return (a[expert].T, b[expert].T) if update.transposed else (b[expert], a[expert])


@functools.lru_cache(maxsize=4)  # experts that are stored one by one ask for it again and again
def _all_expert_factors(update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """`a` as (experts, rank, inputs), `b` as (experts, outputs, rank); in the file a rank's experts are neighbours."""
    a, b = read_tensor(update.a).float(), read_tensor(update.b).float()
    return (
        a.reshape(update.experts, -1, a.shape[1]),
        b.reshape(b.shape[0], -1, update.experts).permute(2, 0, 1).contiguous(),
    )


def write_shards(plan: Plan, folder: Path, largest: int) -> Survival:
    """Writes all tensors into files of at most `largest` bytes (or one tensor), with an index for several files."""
    from tqdm import tqdm

    shards: list[list[OutputTensor]] = [[]]
    size, survival = 0, Survival()
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
            write_shard(tensors, survival, folder / name, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return survival


def write_shard(tensors: list[OutputTensor], survival: Survival, path: Path, bar: Any) -> None:
    """Writes one safetensors file. The library's own writer wants all tensors of a file in memory."""
    import torch

    tensors = sorted(tensors, key=lambda tensor: -SIZES[tensor.dtype])  # keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.source.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(merged_values(tensor, survival).flatten().view(torch.uint8).numpy())
            bar.update(tensor.size)
        stream.flush()
        os.fsync(stream.fileno())
