"""What a CPU needs beside Unsloth: LoRA layers that round once, and attention that keeps the samples of a flat batch
apart. To be imported after Unsloth, since it imports torch.

PEFT computes `base(x)`, which autocast rounds to bfloat16, adds the adapter's product to that and rounds again. While
an adapter is young its product is smaller than half a unit in the last place of the base's, and most of it is rounded
away (docs/log.md). Here the adapter's product comes first, and the base's is accumulated onto it by one matrix product
(`addmm_`), whose sums are float32.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear

from training import packing

ATTENTION = "sample_sdpa"  # the name under which `sample_attention` is registered


def round_once(model: torch.nn.Module) -> int:
    """Gives the plain LoRA layers over `torch.nn.Linear` in `model` the forward below; returns how many there are.

    All other layers stay PEFT's.
    """
    layers = _plain_layers(model)
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def store_in_bfloat16(model: Any) -> None:
    """Stores the frozen weights of these layers and of the output layer in bfloat16.

    It is what autocast would make of them at every product: half the memory, and no casts.
    """
    for linear in [*(layer.base_layer for layer in _plain_layers(model)), model.get_output_embeddings()]:
        if type(linear) is torch.nn.Linear:  # not changed in place: the embeddings may share the weight
            linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)


def _plain_layers(model: torch.nn.Module) -> list[Linear]:
    return [module for module in model.modules() if type(module) is Linear and _is_plain(module)]


def _is_plain(layer: Linear) -> bool:
    """Whether the only trained weights of a layer are the two matrices of a plain adapter (see `lora_bias`)."""
    biases = [layer.base_layer.bias, *(half.bias for half in layer.lora_B.values())]
    trains_bias = any(bias is not None and bias.requires_grad for bias in biases)
    return type(layer.base_layer) is torch.nn.Linear and not layer.lora_variant and not trains_bias


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's Linear.forward, x: (..., in) → (..., out), in autocast's type where one plain adapter is active."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(active) != 1:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = active
    base, device = self.base_layer, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    dropped = self.lora_dropout[name](rows)
    with torch.autocast(device, enabled=False):
        low = (dropped @ self.lora_A[name].weight.to(dtype).t()) * self.scaling[name]  # T × r
        result = (low @ self.lora_B[name].weight.to(dtype).t()).addmm_(rows, base.weight.to(dtype).t())
        if base.bias is not None:
            result += base.bias.to(dtype)
    return result.reshape(*x.shape[:-1], -1)


def use_sample_attention(model: Any) -> bool:
    """Lets a loaded model keep the samples of a flat batch apart; False, and nothing changed, where it would not."""
    own, alone = model.config._attn_implementation, packing.logits_alone(model)
    try:
        model.set_attn_implementation(register_sample_attention())
    except ValueError:  # it has no attention that can be chosen
        return False
    if not packing.keeps_apart(model, alone):
        model.set_attn_implementation(own)
        return False
    return True


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
