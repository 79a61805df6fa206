"""Attention over flat batches on a CPU: causal within each sample, by the boundaries in `packed_seq_lengths`.

To be imported after Unsloth, since it imports torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

ATTENTION = "sample_sdpa"  # the name under which `sample_attention` is registered
BLOCK = 128  # queries at a time


def register_sample_attention() -> str:
    """Makes `sample_attention` known to transformers; returns the name to give as `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, sample_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask_for_flat_batches)
    return ATTENTION


def _no_mask_for_flat_batches(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' own mask, except that flat batches (which have no attention mask) need none."""
    from transformers.masking_utils import sdpa_mask

    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


class Block(NamedTuple):
    """Queries `start` to `end` of a flat row; they see keys `first` to `end`, from `masked` on by what `mask` adds."""

    first: int
    start: int
    end: int
    masked: int
    mask: torch.Tensor  # end - start × end - masked: 0 or -inf


@lru_cache(maxsize=4)  # all layers of a model ask for the same one or two
def blocks_of(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype) -> list[Block]:
    """A row of samples of these lengths in blocks of queries. A token sees the last `window` ones of its sample."""
    places, blocks = torch.arange(sum(lengths)), []
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(torch.tensor(lengths))
    if window is not None:
        firsts = torch.maximum(firsts, places - (window - 1))
    for start in range(0, len(places), BLOCK):
        end, first = min(start + BLOCK, len(places)), int(firsts[start])
        masked = start if firsts[end - 1] == first else first  # all queries see all earlier keys, or not
        keys, queries = places[masked:end], places[start:end, None]
        hidden = (keys > queries) | (keys < firsts[start:end, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        blocks.append(Block(first, start, end, masked, mask))
    return blocks


class BlockwiseAttention(torch.autograd.Function):
    """softmax(Q Kᵀ) V by plain products, a block of queries at a time, in the tensors' type; softmax sums in float32.

    Shapes: Q heads × T × d, already scaled; K and V key-value heads × T × d. It keeps nothing but its inputs: the
    backward pass computes a block's shares again. PyTorch's CPU kernel multiplies float32 in its backward pass, at a
    third of the speed of plain products.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, blocks: list[Block]) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks = blocks
        result = torch.empty_like(query)
        for block in blocks:
            shares = _shares(_rows(query, block, len(key)), key, block)
            mean = torch.bmm(shares, value[:, block.first : block.end])
            result[:, block.start : block.end] = mean.view(len(query), -1, query.shape[-1])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))  # sums over blocks
        for block in ctx.blocks:
            seen = slice(block.first, block.end)
            asked, wanted = (_rows(x, block, len(key)) for x in (query, gradient))
            shares = _shares(asked, key, block)
            of_value[:, seen] += torch.bmm(shares.transpose(1, 2), wanted)
            of_shares = torch.bmm(wanted, value[:, seen].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), asked)
            own = torch.bmm(of_scores, key[:, seen])
            of_query[:, block.start : block.end] = own.view(len(query), -1, query.shape[-1])
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


def _rows(x: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """The block's rows of heads × T × d: groups × rows × d, where heads that share keys stand below each other."""
    return x[:, block.start : block.end].reshape(groups, -1, x.shape[-1])


def _shares(queries: torch.Tensor, key: torch.Tensor, block: Block) -> torch.Tensor:
    """The softmax of a block's scores: groups × rows × keys."""
    scores = torch.bmm(queries, key[:, block.first : block.end].transpose(1, 2))
    scores.view(-1, len(block.mask), scores.shape[-1])[..., block.masked - block.first :].add_(block.mask)
    return torch.softmax(scores, -1)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    lengths: list[int],
    window: int | None,
) -> torch.Tensor:
    """BlockwiseAttention in autocast's type. Shapes as for scaled_dot_product_attention: 1 × heads × T × d."""
    dtype = torch.get_autocast_dtype("cpu")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    blocks = blocks_of(tuple(lengths), window, dtype)
    return BlockwiseAttention.apply(*(x[0].to(dtype) for x in (query, key, value)), blocks)[None]


def sample_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_seq_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a flat batch; other batches go to transformers' own.

    `query` is 1 × heads × T × d, `key` and `value` 1 × key-value heads × T × d. Returns 1 × T × heads × d. A block mask
    over the whole row would cost T² where this costs the sum of the samples' squares.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_seq_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = packed_seq_lengths.tolist()
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not dropout:
        result = blockwise_attention(query, key, value, scaling, lengths, sliding_window)
        return result.transpose(1, 2).contiguous(), None
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        band = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            places = torch.arange(q.shape[2], device=q.device)
            distance = places[:, None] - places[None, :]
            band = (distance >= 0) & (distance < sliding_window)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
            )
        )
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return result.transpose(1, 2).contiguous(), None
