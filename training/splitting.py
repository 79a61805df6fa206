"""Micro-batches: as many tokens of an optimizer step at once as the recipe allows, and fewer where memory runs out.

Any split is the same: the loss is normalised by the learned tokens of the whole optimizer step (of preferences: by the
rows of the whole micro-batch), and no sample sees another, so losses and gradients of the pieces add up.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common import Message, UserError
from training import packing

# (batch, limit) → the batch in pieces of at most `limit` tokens each, or of one sample
Divide = Callable[[dict[str, Any], int], list[dict[str, Any]]]


def pieces(batch: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """A flat batch in as few pieces as its samples fill (packing.pack), the one with the longest sample first."""
    lengths = batch["packed_seq_lengths"].tolist()
    found = packing.pack(np.asarray(lengths), limit)
    return [batch] if len(found) == 1 else [_chosen(batch, members) for members in found]


def whole(batch: dict[str, Any], _: int) -> list[dict[str, Any]]:
    """A batch of one of several processes, which must all have as many forward passes."""
    return [batch]


def _chosen(batch: dict[str, Any], members: list[int]) -> dict[str, Any]:
    """Some samples of a flat batch, as a flat batch."""
    lengths = batch["packed_seq_lengths"].tolist()
    by_sample = {name: tensor.split(lengths, 1) for name, tensor in batch.items() if name != "packed_seq_lengths"}
    chosen = {name: torch.cat([samples[member] for member in members], 1) for name, samples in by_sample.items()}
    return {**chosen, "packed_seq_lengths": batch["packed_seq_lengths"][members]}


def pieces_of_rows(batch: dict[str, Any], limit: int, of_pairs: bool = False) -> list[dict[str, Any]]:
    """A padded batch cut between two rows, or two pairs (first all chosen, then all rejected); padding counts."""
    count = len(batch["input_ids"]) // (1 + of_pairs)
    if count == 1 or batch["input_ids"].numel() <= limit:
        return [batch]
    found = []
    for part in (slice(0, count // 2), slice(count // 2, count)):
        rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
        rows = torch.cat([side[part] for side in rows.split(count)])
        width = int(batch["attention_mask"][rows].sum(1).max())
        half = {name: tensor[rows] if tensor.ndim == 1 else tensor[rows, :width] for name, tensor in batch.items()}
        found += pieces_of_rows(half, limit, of_pairs)
    return found


class Splitter:
    """Runs a step on the pieces of a batch, smaller ones where memory runs out; what did not fit is not tried again."""

    def __init__(self, settings: list[str], divide: Divide = pieces, limit: int | None = None) -> None:
        self.settings = settings  # what to change where a single sample does not fit
        self.divide = divide
        self.limit = limit  # tokens

    def run(self, batch: dict[str, Any], step: Callable[[dict[str, Any]], Any]) -> Any:
        """The sum of what `step` returns for the pieces. Raises UserError where a single sample does not fit."""
        left, total = [batch] if self.limit is None else self.divide(batch, self.limit), None
        while left:
            piece = left.pop(0)
            try:
                result = step(piece)
            except torch.OutOfMemoryError:
                result = None
            if result is not None:
                total = result if total is None else total + result
                continue
            gc.collect()  # outside of `except`, whose error holds the tensors of the step
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            left = self._split(piece) + left
        return total

    def _split(self, piece: dict[str, Any]) -> list[dict[str, Any]]:
        tokens = piece["input_ids"].numel()
        smaller = self.divide(piece, tokens // 2)
        if len(smaller) == 1:
            total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
            raise UserError(
                "out of memory: a batch of {tokens:,} tokens, which cannot be split, does not fit into the {total:.1f} "
                "GB of this GPU; try, one after the other: {settings}",
                tokens=tokens,
                total=total / 1e9,
                settings=self.settings,
            )
        self.limit = max(part["input_ids"].numel() for part in smaller)
        said = Message(
            "out of memory: a batch of {tokens:,} tokens is split from here on, to {limit:,}",
            tokens=tokens,
            limit=self.limit,
        )
        tqdm.write(str(said), file=sys.stderr)
        return smaller


def with_gradients_apart(parameters: list[Any], step: Callable[[], Any]) -> Any:
    """What `step` returns, which adds to the parameters' gradients, or raises and leaves them as they were."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        result = step()
    except torch.OutOfMemoryError:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        raise
    for parameter, gradient in zip(parameters, before, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad = gradient.add_(parameter.grad)
    return result
