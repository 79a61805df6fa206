"""How likely given texts are to a model: preference accuracy of pairs of answers, perplexity of documents.

A scorer is one of scoring.py. `Sample`: {"input_ids": [...], "labels": [...]}, -100 where a token does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation import metrics, scoring

Sample = dict[str, list[int]]
Loss = tuple[float, int]  # the sum of -log p over the tokens that count, in nats, and how many these are


def batched_losses(scorer: Any, samples: Sequence[Sample]) -> list[Loss]:
    """The loss of every sample, in their order; computed in batches that fit into the memory."""
    found: dict[int, Loss] = {}
    for batch in scoring.batches([len(sample["input_ids"]) for sample in samples], scorer.tokens):
        found |= zip(batch, scorer.losses([samples[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(samples))]


def score_pairs(scorer: Any, pairs: Sequence[tuple[Sample, Sample]]) -> list[tuple[Loss, Loss]]:
    """The losses of the chosen and of the rejected answer of each pair; only the answers' tokens must have labels."""
    losses = batched_losses(scorer, [sample for pair in pairs for sample in pair])
    return list(zip(losses[::2], losses[1::2], strict=True))


def preferred(pair: tuple[Loss, Loss], *, per_token: bool = False) -> str:
    """Which answer of a pair is likelier: "chosen", "rejected", or "neither" of two that are equally likely.

    By log p of the whole answer, as DPO compares them, or `per_token`, as SimPO and ORPO do: a whole answer is the less
    likely the longer it is.
    """
    chosen, rejected = (nats / max(tokens, 1) if per_token else nats for nats, tokens in pair)
    return "neither" if chosen == rejected else "chosen" if chosen < rejected else "rejected"


def preference_figures(pairs: Sequence[tuple[Loss, Loss]]) -> dict[str, Any]:
    """The share of pairs whose chosen answer is likelier, with Wilson's 95 % interval, by both ways of `preferred`.

    `margin`: the mean of log p(chosen) - log p(rejected), in nats. Two models are compared on the same pairs by
    `metrics.paired(["chosen"] * n, preferred of the first, preferred of the second)`.
    """
    found: dict[str, Any] = {"rows": len(pairs)}
    for name, per_token in (("preference_accuracy", False), ("preference_accuracy_per_token", True)):
        right = sum(preferred(pair, per_token=per_token) == "chosen" for pair in pairs)
        found |= {name: right / len(pairs), f"{name}_interval": metrics.wilson(right, len(pairs))}
    return found | {"margin": sum(rejected - chosen for (chosen, _), (rejected, _) in pairs) / len(pairs)}


def document_windows(ids: Sequence[int], length: int) -> list[Sample]:
    """A document as samples of at most `length` tokens, in which every token but the first counts exactly once.

    Each sample after the first begins with half a window of what came before, which does not count.
    """
    stride = max(1, length // 2)
    windows = [{"input_ids": list(ids[:length]), "labels": [-100, *ids[1:length]]}]
    for end in range(length, len(ids), stride):
        start, last = max(0, end + stride - length), min(end + stride, len(ids))
        labels = [-100] * (end - start) + list(ids[end:last])
        windows.append({"input_ids": list(ids[start:last]), "labels": labels})
    return windows
