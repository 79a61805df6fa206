"""The keys and values that a transformers model has computed for one row of a batch, and what rows have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MIN_SHARED = 16  # tokens in common from which copying keys and values is faster than computing them


@dataclass(eq=False)
class KVCache:
    """Token ids, and for each layer their keys and values (1 x heads x capacity x d)."""

    ids: list[int] = field(default_factory=list)
    keys: dict[int, Any] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    reserved: int = 0  # tokens that the row may come to

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for part in (self.keys, self.values) for t in part.values())

    def append(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Appends keys and values (1 x heads x new tokens x d) to a layer's; returns all that are valid."""
        import torch

        start, end = len(self.ids), len(self.ids) + key.shape[2]
        for part, new in ((self.keys, key), (self.values, value)):
            old = part.get(layer)
            if old is None or old.shape[2] < end:
                capacity = -(-max(end, start * 5 // 4) // 128) * 128
                part[layer] = torch.empty(*new.shape[:2], capacity, new.shape[3], dtype=new.dtype, device=new.device)
                if old is not None:
                    part[layer][:, :, :start] = old[:, :, :start]
            part[layer][:, :, start:end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def prefix(self, length: int) -> KVCache:
        """A copy of its first `length` tokens."""
        copied = ({i: t[:, :, :length].clone() for i, t in part.items()} for part in (self.keys, self.values))
        return KVCache(self.ids[:length], *copied)


def common_prefix(some: list[int], others: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


def free_memory(device: Any) -> int:
    """Bytes that keys and values may take."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // 2
