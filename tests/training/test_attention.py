"""Attention of a flat batch in bfloat16 on a CPU is that of float64, up to bfloat16's rounding."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_blockwise_attention_is_causal_attention(length: int, scaling: float | None):
    import torch

    from training.attention import blockwise_attention

    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (6, 2, 2)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in tensors), is_causal=True, enable_gqa=True, scale=scaling
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = blockwise_attention(*tensors, scaling)
    assert output.shape == expected.shape
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    found = torch.autograd.grad((output.double() * weights).sum(), tensors)
    for one, other in zip([output, *found], [expected, *wanted], strict=True):
        assert float((one - other).norm()) <= 0.02 * float(other.norm()) + 1e-6


def test_samples_of_a_flat_batch_do_not_see_each_other_in_bfloat16():
    import torch

    from training.attention import sample_attention

    torch.manual_seed(0)
    lengths = torch.tensor([5, 40, 1030, 3], dtype=torch.int32)  # below and above the length of the blockwise form
    query, key, value = (torch.randn(1, heads, int(lengths.sum()), 16) for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        together, _ = sample_attention(None, query, key, value, None, packed_seq_lengths=lengths)
        start = 0
        for length in lengths.tolist():
            parts = [x[:, :, start : start + length] for x in (query, key, value)]
            alone, _ = sample_attention(None, *parts, None, packed_seq_lengths=torch.tensor([length]))
            assert torch.equal(together[:, start : start + length], alone)
            start += length
