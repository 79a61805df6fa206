"""What an adapter adds to a weight of its base: read from the adapter's file and computed in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runs.weights import Tensor, read_tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Update:
    """What is added to a weight: `b @ a * scale`; for DoRA each output's weights get the length `magnitude` then.

    `a` is (rank, inputs) and `b` (outputs, rank). Without `a`, for a bias, `b` (outputs) itself is added. With
    `experts` the weight is (experts, outputs, inputs), `a` (experts * rank, inputs), `b` (outputs, rank * experts).
    """

    a: Tensor | None
    b: Tensor
    scale: float
    transposed: bool = (
        False  # the weight is stored as (inputs, outputs): an embedding, GPT-2's Conv1D, gpt-oss's experts
    )
    magnitude: Tensor | None = None
    experts: int = 0


@dataclass(frozen=True)
class ExpertPart:
    """Where experts are stored one by one: the expert of a weight, and its first row in the tensor of all experts."""

    expert: int
    first: int


def add_update(weight: torch.Tensor, update: Update, part: ExpertPart | None = None) -> None:
    """Adds an update to a float32 weight in place. `part`: the weight is this part of a tensor of all experts."""
    device = weight.device
    if update.experts:
        for expert in range(update.experts) if part is None else (part.expert,):
            b, a = _expert_factors(update, expert)
            if part:
                weight.addmm_(b[part.first : part.first + len(weight)].to(device), a.to(device), alpha=update.scale)
            else:
                weight[expert].addmm_(b.to(device), a.to(device), alpha=update.scale)
        return
    b = read_tensor(update.b).to(device).float()
    if update.a is None:
        weight.add_(b, alpha=update.scale)
        return
    a = read_tensor(update.a).to(device).float()
    weight.addmm_(*((a.T, b.T) if update.transposed else (b, a)), alpha=update.scale)
    if update.magnitude is not None:
        magnitude = read_tensor(update.magnitude).to(device).float().flatten()
        inputs = 0 if update.transposed else 1
        weight.mul_((magnitude / weight.norm(dim=inputs)).unsqueeze(inputs))


def _expert_factors(update: Update, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of one expert's update, in the order in which its weight is stored."""
    a, b = _all_expert_factors(update)
    return (a[expert].T, b[expert].T) if update.transposed else (b[expert], a[expert])


@functools.lru_cache(maxsize=4)  # experts that are stored one by one ask for it again and again
def _all_expert_factors(update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """`a` as (experts, rank, inputs), `b` as (experts, outputs, rank); in the file a rank's experts are neighbours."""
    a, b = read_tensor(update.a).float(), read_tensor(update.b).float()
    return (
        a.reshape(update.experts, -1, a.shape[1]),
        b.reshape(b.shape[0], -1, update.experts).permute(2, 0, 1).contiguous(),
    )
