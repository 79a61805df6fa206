"""LoRA layers on a CPU: few operations beside the frozen product, and in bfloat16 one rounding.

PEFT computes `base(x)`, which autocast rounds to bfloat16, adds the adapter's product to that and rounds again. While
an adapter is young its product is smaller than half a unit in the last place of the base's, and most of it is rounded
away (docs/log.md). Here the adapter's product is computed first, and the base's is accumulated onto it by one matrix
product (`addmm_`), whose sums are float32.

Autograd would multiply the thin matrices of an adapter in orders that a CPU is slow at, and scale and add whole
outputs; `LoraProduct` writes the same gradients out. In float32 the frozen products go to oneDNN, which multiplies
them an eighth faster than MKL on an AMD processor; on Intel's own MKL is the faster one. To be imported after Unsloth,
since it imports torch.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear

CPU_INFO = Path("/proc/cpuinfo")
IS_INTEL = CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text(encoding="utf-8", errors="replace")
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not IS_INTEL


def speed_up(model: torch.nn.Module) -> int:
    """Gives the plain LoRA layers over `torch.nn.Linear` in `model` the forward below; returns how many there are.

    All other layers stay PEFT's.
    """
    layers = _plain_layers(model)
    for layer in layers:
        layer.base_layer.weight.requires_grad_(False)
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
    """Whether all that learns in a layer are the two matrices of a plain adapter (see `lora_bias`)."""
    biases = [layer.base_layer.bias, *(half.bias for half in layer.lora_B.values())]
    has_learning_bias = any(bias is not None and bias.requires_grad for bias in biases)
    return type(layer.base_layer) is torch.nn.Linear and not layer.lora_variant and not has_learning_bias


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's Linear.forward, x: (..., in) → (..., out), by LoraProduct where one plain adapter is active."""
    active = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(active) != 1:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = active
    dropped = self.lora_dropout[name](x)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    dropped = None if dropped is x else dropped.reshape(-1, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    result = LoraProduct.apply(rows, dropped, base.weight, base.bias, a, b, self.scaling[name])
    return result.reshape(*x.shape[:-1], -1)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: T × in, weight: out × in → T × out."""
    if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


class LoraProduct(torch.autograd.Function):
    """x Wᵀ + bias + scaling · d Aᵀ Bᵀ for a frozen W, where d is x or what dropout left of it.

    Computed in autocast's type where autocast is on, else in x's. Shapes: x, d T × in; W out × in; A r × in; B out × r.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            given = x.dtype
            x, weight, low_a, low_b = (tensor.to(dtype) for tensor in (x, weight, a, b))
            entering = x if dropped is None else dropped.to(dtype)
            low = linear(entering, low_a) * scaling  # T × r
            if dtype == torch.float32:
                result = linear(x, weight).addmm_(low, low_b.t())
            else:
                result = (low @ low_b.t()).addmm_(x, weight.t())
            if bias is not None:
                result += bias.to(dtype)
        ctx.save_for_backward(entering, low, weight, low_a, low_b)
        ctx.scaling, ctx.types, ctx.has_dropout = scaling, (given, a.dtype, b.dtype), dropped is not None
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        entering, low, weight, a, b = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        low_gradient = (gradient @ b) * ctx.scaling  # T × r
        of_a = (low_gradient.t() @ entering).to(a_type)
        of_b = (low.t() @ gradient).t().to(b_type)
        if ctx.has_dropout:
            of_x, of_dropped = linear(gradient, weight.t()).to(x_type), (low_gradient @ a).to(x_type)
        elif gradient.dtype == torch.float32:
            of_x, of_dropped = linear(gradient, weight.t()).addmm_(low_gradient, a), None
        else:
            of_x, of_dropped = (low_gradient @ a).addmm_(gradient, weight).to(x_type), None
        return of_x, of_dropped, None, None, of_a, of_b, None
