"""Attention over flat batches on a CPU: causal within each sample, by the boundaries in `packed_seq_lengths`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "sample_sdpa"  # the name under which `sample_attention` is registered
BLOCK = 128  # queries of blockwise_attention at a time
BLOCKWISE_UP_TO = 1024  # tokens of a sample: beyond, PyTorch's kernel is as fast and needs less memory


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


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention by plain matrix products in bfloat16, a block of queries at a time; the softmax is float32.

    Shapes as for scaled_dot_product_attention: 1 × heads × T × d. PyTorch's CPU kernel multiplies float32 in its
    backward pass; up to about a thousand tokens this takes half its time, and keeps T² / 2 probabilities a head.
    """
    import torch

    query, key, value = (x[0].to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    (heads, length, width), groups = query.shape, key.shape[0]
    query = query * (width**-0.5 if scaling is None else scaling)
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        block = query[:, start:end].reshape(groups, -1, width)  # heads that share keys stand below each other
        scores = torch.bmm(block, key[:, :end].transpose(1, 2)).view(heads, end - start, end)
        future = torch.ones(end - start, end, dtype=torch.bool).triu(1 + start)
        shares = torch.softmax(scores.masked_fill(future, float("-inf")), -1, dtype=torch.float32).to(value.dtype)
        outputs.append(torch.bmm(shares.view(groups, -1, end), value[:, :end]).view(heads, end - start, width))
    return torch.cat(outputs, 1)[None]


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
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_seq_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = packed_seq_lengths.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = []
    blockwise = query.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not dropout
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if blockwise and q.shape[2] <= min(BLOCKWISE_UP_TO, sliding_window or BLOCKWISE_UP_TO):
            parts.append(blockwise_attention(q, k, v, scaling))
            continue
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
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None
