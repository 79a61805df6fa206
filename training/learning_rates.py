"""Learning rates for parts of a model: LoRA+, and embeddings trained in full."""

from __future__ import annotations

from typing import Any


def split_learning_rates(
    groups: list[dict[str, Any]], names: dict[Any, str], *, ratio: float = 1.0, embedding_rate: float | None = None
) -> None:
    """Splits an optimizer's parameter groups by learning rate, in place; `names` has each parameter's name.

    LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices of LoRA, and vectors, get `ratio` times the rate of the
    others, as in PEFT's create_loraplus_optimizer. Embedding and output layer in modules_to_save get
    `embedding_rate`. The groups of the other parameters stay in front: their rate is logged.
    """
    usual: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for group in groups:
        by_rate: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            name = names.get(parameter, "")
            rate = group["lr"] * (ratio if "lora_B" in name or parameter.ndim == 1 else 1.0)
            if embedding_rate is not None and is_embedding(name):
                rate = embedding_rate
            by_rate.setdefault(rate, []).append(parameter)
        for rate, parameters in by_rate.items():
            (usual if rate == group["lr"] else own).append({**group, "params": parameters, "lr": rate})
    groups[:] = usual + own


def is_embedding(name: str) -> bool:
    """Whether a parameter is the embedding or the output layer, trained in full."""
    module, found, _ = name.partition(".modules_to_save.")
    return bool(found) and module.endswith(("embed_tokens", "lm_head"))
