"""Layers between the matrix products on a CPU: fewer operations, and less kept for the backward pass.

Autograd keeps an input for each operation; here a norm keeps its input alone, and a SwiGLU its two. To be imported
after Unsloth, since it imports torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch


def speed_up(model: torch.nn.Module) -> int:
    """Gives the modules of `model` that compute one of the two functions below that function; returns how many do.

    A module is taken for one by what it computes, once for each class. Others stay as they are.
    """
    replaced, computes = 0, {}
    for module in model.modules():
        forward = _norm if _has_norm(module) else _gated if _has_gate(module) else None
        kind = type(module)
        if forward and kind not in computes:
            computes[kind] = _computes(module, forward)
        if forward and computes[kind]:
            module.forward = types.MethodType(forward, module)
            replaced += 1
    return replaced


def _has_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.ndim == 1 and weight.dtype == torch.float32
    return plain and not weight.requires_grad and isinstance(getattr(module, "variance_epsilon", None), float)


def _has_gate(module: Any) -> bool:
    linear = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(getattr(layer, "in_features", None), int) for layer in linear)


def _computes(module: Any, forward: Any) -> bool:
    """Whether `forward` gives what the module gives, for a few rows of numbers."""
    inputs = module.weight.shape[0] if forward is _norm else module.gate_proj.in_features
    x = torch.linspace(-3, 3, 2 * inputs).sin().view(1, 2, inputs)
    was_training = module.training
    module.eval()  # without dropout
    with torch.no_grad():
        same = torch.allclose(forward(module, x), type(module).forward(module, x), rtol=1e-5, atol=1e-6)
    module.train(was_training)
    return same


def _norm(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or x.dtype != torch.float32:
        return type(self).forward(self, x, *args, **kwargs)
    return RmsNorm.apply(x, self.weight, self.variance_epsilon)


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


class RmsNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + epsilon) over the last dimension, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        weighted = gradient * weight
        along = (weighted * x).mean(-1, keepdim=True) * inverse.pow(3)  # what the norm takes out, in x's direction
        return weighted.mul_(inverse).addcmul_(x, along, value=-1), None, None


class SwiGlu(torch.autograd.Function):
    """silu(gate) · up. The backward pass computes silu(gate) again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_up = torch.nn.functional.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), of_up


def remember_modules(model: torch.nn.Module) -> None:
    """Keeps the lists of a model's modules and parameters, which do not change while it trains.

    transformers and accelerate walk over all modules five times a step (train, zero_grad, parameters, modules), which
    takes 30 of the 450 ms of a short step of a small model.
    """
    modules, parameters, train = list(model.modules()), list(model.parameters()), model.train

    def in_mode(mode: bool = True) -> torch.nn.Module:
        return model if all(module.training == mode for module in modules) else train(mode)

    def all_parameters(recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        return iter(parameters) if recurse else torch.nn.Module.parameters(model, recurse=False)

    model.train, model.parameters, model.modules = in_mode, all_parameters, lambda: iter(modules)
