"""Attention of a flat batch in bfloat16 on a CPU is that of float64, up to bfloat16's rounding."""

from __future__ import annotations

import pytest


def exact(query, key, value, lengths: list[int], scaling: float | None, window: int | None):
    """Attention of each sample alone, in float64."""
    import torch

    parts = []
    for q, k, v in zip(*(x.double().split(lengths, 2) for x in (query, key, value)), strict=True):
        places = torch.arange(q.shape[2])
        distance = places[:, None] - places[None, :]
        seen = (distance >= 0) & (distance < (window or len(places)))
        attention = torch.nn.functional.scaled_dot_product_attention
        parts.append(attention(q, k, v, attn_mask=seen, enable_gqa=True, scale=scaling))
    return torch.cat(parts, 2)


@pytest.mark.parametrize(
    ("lengths", "scaling", "window"),
    [
        ([1], None, None),
        ([129], 0.3, None),
        ([300], None, None),
        ([7, 128, 1, 40, 290, 3], None, None),
        ([300, 20], None, 50),
        ([300, 20], None, 1000),
    ],
)
def test_outputs_and_gradients_are_those_of_each_sample_alone(lengths, scaling, window):
    import torch

    from training.attention import blockwise_attention

    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, sum(lengths), 16, requires_grad=True) for heads in (6, 2, 2)]
    expected = exact(*tensors, lengths, scaling, window)
    with torch.autocast("cpu", torch.bfloat16):
        output = blockwise_attention(*tensors, scaling, lengths, window)
    assert output.shape == expected.shape
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    found = torch.autograd.grad((output.double() * weights).sum(), tensors)
    for one, other in zip([output, *found], [expected, *wanted], strict=True):
        assert float((one - other).norm()) <= 0.02 * float(other.norm()) + 1e-6


def test_masks_of_a_long_sample_are_small():
    import torch

    from training.attention import BLOCK, blocks_of

    blocks = blocks_of((20_000,), None, torch.bfloat16)
    assert sum(block.mask.numel() for block in blocks) <= 20_000 * BLOCK
