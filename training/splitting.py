"""A micro-batch that does not fit into the card's memory is trained in pieces, which is the same.

The loss is normalised by the learned tokens of the whole optimizer step (of preferences: by the rows of the whole
micro-batch), and no sample sees another: losses and gradients of the pieces add up to those of the micro-batch.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from common import Message, UserError

Cut = Callable[[dict[str, Any]], list[dict[str, Any]]]  # a batch in two, or itself where it cannot be cut


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat batch cut between two samples, as near to the middle of its tokens as that goes; itself if it has one."""
    lengths = batch["packed_seq_lengths"].tolist()
    if len(lengths) == 1:
        return [batch]
    total, ends = sum(lengths), torch.tensor(lengths).cumsum(0).tolist()
    samples = min(range(1, len(lengths)), key=lambda n: abs(2 * ends[n - 1] - total))
    at = ends[samples - 1]
    left, right = {}, {}
    for name, tensor in batch.items():
        by_sample = name == "packed_seq_lengths"
        left[name] = tensor[:samples] if by_sample else tensor[:, :at]
        right[name] = tensor[samples:] if by_sample else tensor[:, at:]
    return [left, right]


def halves_of_rows(batch: dict[str, Any], of_pairs: bool = False) -> list[dict[str, Any]]:
    """A padded batch cut between two rows, or two pairs (first all chosen, then all rejected); itself if it has one."""
    count = len(batch["input_ids"]) // (1 + of_pairs)
    if count == 1:
        return [batch]
    found = []
    for part in (slice(0, count // 2), slice(count // 2, count)):
        rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
        rows = torch.cat([side[part] for side in rows.split(count)])
        width = int(batch["attention_mask"][rows].sum(1).max())
        found.append(
            {name: tensor[rows] if tensor.ndim == 1 else tensor[rows, :width] for name, tensor in batch.items()}
        )
    return found


def pieces(batch: dict[str, Any], limit: int | None, cut: Cut = halves) -> list[dict[str, Any]]:
    """`batch` in pieces of at most `limit` tokens each, padding included, or of one sample."""
    if limit is None or batch["input_ids"].numel() <= limit:
        return [batch]
    parts = cut(batch)
    return parts if len(parts) == 1 else [piece for part in parts for piece in pieces(part, limit, cut)]


class Splitter:
    """Runs a step on a batch, in halves where memory runs out; what did not fit is not tried again in this run."""

    def __init__(self, settings: list[str], cut: Cut = halves) -> None:
        self.settings = settings  # what to change where a single sample does not fit
        self.cut = cut
        self.limit: int | None = None  # tokens

    def run(self, batch: dict[str, Any], step: Callable[[dict[str, Any]], Any]) -> Any:
        """The sum of what `step` returns for the pieces. Raises UserError where a single sample does not fit."""
        left, total = pieces(batch, self.limit, self.cut), None
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
        cut, tokens = self.cut(piece), piece["input_ids"].numel()
        if len(cut) == 1:
            total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
            raise UserError("sample_does_not_fit", tokens=tokens, total=total / 1e9, settings=self.settings)
        self.limit = max(half["input_ids"].numel() for half in cut)
        tqdm.write(str(Message("micro_batch_split", tokens=tokens, limit=self.limit)), file=sys.stderr)
        return cut


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
