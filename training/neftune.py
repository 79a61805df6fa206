"""NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings while a model learns.

transformers' own takes a whole row for one sample, and would make the noise of a flat batch too small. Here each
token's noise is that of its sample: uniform, of at most alpha / sqrt(tokens x width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class EmbeddingNoise:
    """Adds noise to what the embedding of `model` puts out while it trains; `lengths` are those of the next batch."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None  # tokens of each sample, `packed_seq_lengths`
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """`output` (1 x T x width) with noise, or as it is outside of training."""
        import torch

        if not module.training:
            return output
        tokens = self.lengths.to(output.device)
        largest = self.alpha / (tokens * output.shape[-1]).sqrt()
        largest = largest.repeat_interleave(tokens)[None, :, None].to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * largest
