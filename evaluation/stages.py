"""Data of stages other than sft: documents (perplexity), pairs (the likelier answer), answers judged good or bad."""

from __future__ import annotations

from typing import Any

from common import Config, UserError
from evaluation import metrics
from evaluation.data import EvalDataset, answer_of
from evaluation.encode import Encoded, encode_single, usable_rows
from evaluation.likelihood import batched_losses, document_windows, preference_figures, preferred, score_pairs
from preprocessing.encode_stages import encode_batch

STAGES = {"documents": "pt", "pairs": "dpo", "judged": "kto"}  # by task


def encode_rows(data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> Encoded:
    """The rows of a dataset as its stage trains them; a document is not cut but read in windows of `cutoff_len`."""
    stage = STAGES[data.task]
    if stage == "pt":
        documents = encode_batch(stage, data.rows, config, template, tokenizer)
        kept = usable_rows(data, documents)
        samples = []
        for i in kept:
            ids = [token for sample in documents[i] for token in sample["input_ids"]]
            samples.append({"input_ids": ids, "labels": document_windows(ids, config.cutoff_len)})
        return Encoded(kept, [[] for _ in kept], [], samples, [""] * len(kept))
    kept, found = encode_single(stage, data, config, tokenizer, template)
    names = ("chosen_ids", "rejected_ids") if stage == "dpo" else ("completion_ids",)
    samples = []
    for encoded in found:
        first, *second = (_sample(encoded["prompt_ids"], encoded[name]) for name in names)
        samples.append(first | ({"rejected": second[0]} if second else {}))
    labels = [answer_of(data.rows[i]) if stage == "dpo" else "good" if data.rows[i]["good"] else "bad" for i in kept]
    return Encoded(kept, [encoded["prompt_ids"] for encoded in found], [], samples, labels)


def _sample(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def score_rows(data: EvalDataset, rows: Encoded, positions: list[int], scorer: Any) -> list[dict[str, Any]]:
    """What predictions.jsonl says of documents, pairs or judged answers: nats and tokens."""
    samples = [rows.samples[i] for i in positions]
    if data.task == "pairs":
        pairs = score_pairs(scorer, [(sample, sample["rejected"]) for sample in samples])
        return [{"prediction": preferred(pair), "chosen": pair[0], "rejected": pair[1]} for pair in pairs]
    if data.task == "judged":
        return [{"nats": nats, "tokens": tokens} for nats, tokens in batched_losses(scorer, samples)]
    losses = iter(batched_losses(scorer, [window for sample in samples for window in sample["labels"]]))
    sums = [[sum(part) for part in zip(*(next(losses) for _ in sample["labels"]), strict=True)] for sample in samples]
    return [{"nats": nats, "tokens": tokens} for nats, tokens in sums]


def measure_documents(_: EvalDataset, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Loss and perplexity of every model."""
    pairs = {label: [(line["nats"], line["tokens"]) for line in lines] for label, lines in predictions.items()}
    return {"models": {label: {"rows": len(pairs[label])} | metrics.perplexity(pairs[label]) for label in pairs}}


def measure_pairs(_: EvalDataset, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Preference accuracy of every model, and how each differs from the base on the same pairs."""
    pairs = {name: [(line["chosen"], line["rejected"]) for line in lines] for name, lines in predictions.items()}
    models = {name: preference_figures(pairs[name]) for name in pairs}
    chosen = {name: [line["prediction"] for line in lines] for name, lines in predictions.items()}
    paired = metrics.against_base(chosen, lambda base, own: metrics.paired(["chosen"] * len(own), base, own))
    return {"models": models, "paired": paired}


def measure_judged(data: EvalDataset, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How well the likelihood of an answer, per token, tells good from bad ones (area under the ROC curve).

    Raises UserError where all answers are of one kind.
    """
    from sklearn.metrics import roc_auc_score

    models = {}
    for name, lines in predictions.items():
        good = [line["label"] == "good" for line in lines]
        if all(good) or not any(good):
            raise UserError(
                "{dataset}: all answers are good, or all are bad: there is nothing to tell apart", dataset=data.name
            )
        likelihoods = [-line["nats"] / line["tokens"] for line in lines]
        models[name] = {"rows": len(lines), "roc_auc": float(roc_auc_score(good, likelihoods))}
    return {"models": models}
