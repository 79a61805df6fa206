"""LoRA+: the B matrices of an adapter learn at a higher rate."""

from __future__ import annotations

from typing import Any


def split_learning_rates(groups: list[dict[str, Any]], names: dict[Any, str], ratio: float) -> None:
    """Splits an optimizer's parameter groups: the B matrices of LoRA learn at `ratio` times the rate of the others.

    LoRA+ (https://arxiv.org/abs/2402.12354). The groups of the other parameters stay in front: their rate is logged.
    """
    faster = []
    for group in groups:
        of_b = [parameter for parameter in group["params"] if "lora_B" in names.get(parameter, "")]
        if of_b:
            chosen = set(of_b)
            group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
            faster.append({**group, "params": of_b, "lr": group["lr"] * ratio})
    groups[:] = [group for group in [*groups, *faster] if group["params"]]
