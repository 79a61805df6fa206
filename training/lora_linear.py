"""LoRA layers whose adapter is not lost in bfloat16: its product and the base's are summed in float32, rounded once.

PEFT computes `base(x)`, which autocast rounds to bfloat16, adds the adapter's product to that and rounds again. While
an adapter is young its product is smaller than half a unit in the last place of the base's, and most of it is rounded
away (docs/log.md). Here the adapter's product is computed first, and the base's is accumulated onto it by one matrix
product (`torch.addmm`), whose sums are float32. The gradients are PEFT's.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def round_once(model: torch.nn.Module) -> int:
    """Gives the plain LoRA layers over `torch.nn.Linear` in `model` a forward that rounds once under autocast.

    The frozen weights of these layers are stored in bfloat16 from then on, which is what autocast would make of them at
    every product: half the memory and no casts. Returns the number of layers changed; all other layers stay PEFT's.
    """
    import torch
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if type(module) is Linear]
    layers = [layer for layer in layers if type(layer.base_layer) is torch.nn.Linear and not layer.lora_variant]
    for layer in layers:
        base = layer.base_layer
        base.weight.requires_grad_(False)
        base.weight.data = base.weight.data.to(torch.bfloat16)
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's Linear.forward, x: (..., in) → (..., out), with one rounding where one plain adapter is active."""
    import torch

    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(active) != 1 or not torch.is_autocast_enabled(x.device.type):
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = active
    base = self.base_layer
    own = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
    rows = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
    result = torch.addmm(own.reshape(-1, own.shape[-1]), rows, base.weight.t())
    if base.bias is not None:
        result = result + base.bias.to(result.dtype)
    return result.reshape(*x.shape[:-1], -1)
