"""A base model's tensors as an adapter knows them: by their names and shapes in memory, from its files' headers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs.adapter import HEADS, Adapter, find_places, language_config
from runs.files import read_object
from runs.weights import Tensor, read_tensors


@dataclass(frozen=True)
class ExpertPart:
    """Where experts are stored one by one: the expert of a weight, and its first row in the tensor of all experts."""

    expert: int
    first: int


# Experts stand one by one on the disk and as one tensor in memory, where an adapter is trained.
# (see transformers/conversion_mapping.py: "qwen2_moe" and what is like it, and "mixtral")
EXPERT = re.compile(r"(.+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
SECOND = {"up_proj", "w3"}  # the lower half of gate_up_proj


@dataclass(frozen=True)
class MemoryView:
    """A base's tensors by their names and shapes in memory.

    `stored` has the names on the disk of those that are only called otherwise, `parts` for each tensor of one expert
    the name of the whole in memory, and its part.
    """

    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str] = field(default_factory=dict)
    parts: dict[str, tuple[str, ExpertPart]] = field(default_factory=dict)


def view_as_in_memory(base: dict[str, Tensor], adapter: Adapter) -> MemoryView:
    """The base as the adapter was trained on it: as on the disk, except for the prefix of the language model in one
    that also sees, and for experts that are one tensor in memory."""
    names = names_in_memory(base, adapter)  # by those on the disk
    view = MemoryView({names[name]: tensor.shape for name, tensor in base.items()})
    view.stored.update({memory: name for name, memory in names.items() if memory != name})
    singles = {name: match for name in base if (match := EXPERT.fullmatch(names[name]))}
    if not singles or any(re.search(r"\.experts\.\d+\.", module) for module in adapter.parts):
        return view
    counts: dict[str, int] = {}
    for name, (prefix, _, number, projection) in ((n, match.groups()) for n, match in singles.items()):
        whole = f"{prefix}mlp.experts.{FUSED.get(projection, 'down_proj')}"
        rows, columns = view.shapes.pop(names[name])
        view.stored.pop(names[name], None)
        view.parts[name] = whole, ExpertPart(int(number), rows if projection in SECOND else 0)
        counts[whole] = max(counts.get(whole, 0), int(number) + 1)
        view.shapes[whole] = (counts[whole], 2 * rows if whole.endswith("gate_up_proj") else rows, columns)
    for name in [name for name in view.shapes if ".block_sparse_moe." in name]:
        memory = name.replace(".block_sparse_moe.", ".mlp.")
        view.shapes[memory] = view.shapes.pop(name)
        view.stored[memory] = view.stored.pop(name, name)
    return view


def names_in_memory(base: dict[str, Tensor], adapter: Adapter) -> dict[str, str]:
    """Name on the disk → name in memory. The language model of one that also sees stands under another prefix there:
    that of its embedding on the disk, and that of the adapter's layers in memory; its output layer is `lm_head`."""
    same = {name: name for name in base}
    embeddings = [name for name in base if name.endswith("embed_tokens.weight")]
    prefixes = {module.partition("layers.")[0] for module in adapter.parts if "layers." in module}
    if len(embeddings) != 1 or len(prefixes) != 1 or all(f"{module}.weight" in base for module in adapter.parts):
        return same
    disk, (memory,) = embeddings[0].removesuffix("embed_tokens.weight"), prefixes
    return {
        name: memory + name.removeprefix(disk)
        if name.startswith(disk)
        else ("lm_head.weight" if name.endswith(".lm_head.weight") else name)
        for name in base
    }


def is_tied(base: dict[str, Tensor], config: dict[str, Any]) -> bool:
    """Whether the output layer is the embedding; `config` is config.json."""
    untied = any(name.endswith(HEADS) for name in base)
    return bool(language_config(config).get("tie_word_embeddings", not untied))


def check_fits(adapter_folder: Path, base_folder: Path) -> None:
    """Raises UserError where a tensor of an adapter has no place, shape or rank in a base; reads headers only.

    What cannot be told from the files is left to the loading: other kinds of adapters, and bases that are quantized or
    have other names on the disk than in memory (multimodal ones).
    """
    adapter, config = Adapter(adapter_folder), read_object(base_folder / "config.json")
    if adapter.unsupported or "quantization_config" in config or language_config(config) is not config:
        return
    base = read_tensors(base_folder)
    find_places(adapter, view_as_in_memory(base, adapter).shapes, tied=is_tied(base, config), merging=False)
