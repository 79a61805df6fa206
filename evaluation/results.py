"""What the predictions amount to: metrics.json and tables."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import Message
from evaluation import metrics
from evaluation.data import GENERAL, EvalDataset
from evaluation.job import Job, encoded, tokenizer_of
from evaluation.predict import predictions_file, read_predictions, read_state
from evaluation.rewarded import measure_rewards
from evaluation.stages import measure_documents, measure_judged, measure_pairs
from preprocessing.data_report import format_table
from runs.files import write_json
from runs.metric_names import METRICS
from runs.redaction import typed_command

Predictions = dict[str, list[dict[str, Any]]]  # the lines of predictions.jsonl, by model

# The columns of the table of each task; the first stands with its interval.
COLUMNS = {
    "classification": (
        ("accuracy",),
        ("balanced_accuracy", "precision", "recall", "f1", "roc_auc", "average_precision", "tpr_at_fpr_10"),
        ("tpr_at_fpr_1", "brier", "ece"),
    ),
    "text": (("exact_match",), ("bleu", "chrf", "rouge1", "rouge2", "rougeL"), ("loss", "perplexity")),
    "loss": ((), ("loss", "perplexity"), ()),
    "documents": (("perplexity",), ("loss",), ()),
    "pairs": (("preference_accuracy",), ("preference_accuracy_per_token",), ("margin",)),
    "judged": ((), ("roc_auc",), ()),
}


def write_results(job: Job, data: EvalDataset) -> dict[str, Any]:
    """Writes metrics.json of a dataset, for all models that predicted the same rows; returns it."""
    rows, state = encoded(job, data), read_state(data)
    predictions = {
        label: lines
        for label in sorted(state, key=lambda label: (label != "base", label not in ("trained", "model"), label))
        if state[label]["rows"] == rows.fingerprint
        and len(lines := read_predictions(predictions_file(data, label))) == len(rows.rows)
    }
    if data.task == "rewarded":
        measured = measure_rewards(job.config, data, predictions, tokenizer_of(job)[0])
        measured["samples"] = side_by_side(predictions)
    else:
        measured = MEASURES[data.task](data, predictions)
    for label in predictions:
        measured["models"][label] |= {key: state[label][key] for key in ("model", "seconds", "dtype")}
    found = {
        "dataset": data.name,
        "task": data.task,
        "rows": len(rows.rows),
        "left_out": data.left_out,
        "labels": list(data.labels),
        "positive": data.labels[1] if len(data.labels) == 2 else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": typed_command(),
        **measured,
    }
    write_json(data.folder / "metrics.json", found)  # last: where it is, everything is
    return found


def describe_results(found: dict[str, Any], folder: Path) -> str:
    """The content of a metrics.json as text: the table, the differences, and whether something was forgotten."""
    lines = ["", str(Message("{name}: {rows:,} rows", name=found["dataset"], rows=found["rows"]))]
    lines.append(format_table(figures_table(found["task"], found["models"])))
    lines += [f"{name}: {describe_difference(pair)}" for name, pair in found.get("paired", {}).items()]
    lines += [
        f"{name}: {function} {pair['difference']:+.3f} ({_interval(pair['difference_interval'], '+.3f', ' to ')})"
        for name, pairs in found.get("rewards", {}).items()
        for function, pair in pairs.items()
    ]
    if found["dataset"] == GENERAL and found["task"] != "classification":
        lines += map(str, forgetting(found["models"]))
    return "\n".join([*lines, str(Message("all of it: {folder}", folder=folder))])


def figures_table(task: str, models: dict[str, Any]) -> list[list[str]]:
    """The figures, a row for each model."""
    main, *others = COLUMNS[task] if task in COLUMNS else (_reward_columns(models), ())
    names = [name for group in others for name in group]
    titles = [title for name in main for title in (METRICS[name].head if name in METRICS else name, "95 %")]
    table = [[str(Message("model")), *titles, *(METRICS[name].head for name in names)]]
    for label, figures in models.items():
        cells = [cell for name in main for cell in (f"{figures[name]:.3f}", _interval(figures[f"{name}_interval"]))]
        table.append([label, *cells, *("-" if figures[name] is None else f"{figures[name]:.3f}" for name in names)])
    return table


def _reward_columns(models: dict[str, Any]) -> tuple[str, ...]:
    """The reward and those by function, as they stand in a metrics.json."""
    figures = next(iter(models.values()), {})
    return tuple(name for name in figures if name.startswith("reward") and not name.endswith("_interval"))


def _interval(interval: list[float], form: str = ".3f", joint: str = "-") -> str:
    return joint.join(format(end, form) for end in interval)


def describe_difference(pair: dict[str, Any]) -> Message:
    """A difference of accuracies (metrics.paired)."""
    low, high = pair["difference_interval"]
    return Message(
        "accuracy {difference:+.3f} ({low:+.3f} to {high:+.3f}), McNemar's p {p:.2g}",
        difference=pair["difference"],
        low=low,
        high=high,
        p=pair["mcnemar_p"],
    )


def forgetting(models: dict[str, Any]) -> list[Message]:
    """Warns of each model whose perplexity on general knowledge is above the base's, beyond both intervals."""
    base = models.get("base")
    return [
        Message(
            "note: {model} forgot general knowledge: perplexity {before:.1f} before, {now:.1f} now; mix some into your "
            "data\n"
            "(dataset: ...,general), or train less",
            model=label,
            before=base["perplexity"],
            now=figures["perplexity"],
        )
        for label, figures in models.items()
        if base and figures["perplexity_interval"][0] > base["perplexity_interval"][1]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a task


def measure_choices(data: EvalDataset, predictions: Predictions) -> dict[str, Any]:
    """The figures of every model, of a majority vote, and how each differs from the base."""
    import numpy as np

    truth = [line["label"] for line in next(iter(predictions.values()))]
    shares = {"majority vote": metrics.majority(data.trained_answers, truth, data.labels)}
    for label, lines in predictions.items():
        shares[label] = np.array([[line["probabilities"][name] for name in data.labels] for line in lines])
    models = {label: metrics.classification(truth, p, data.labels) for label, p in shares.items()}
    for label, lines in predictions.items():
        models[label]["mass"] = float(np.mean([line["mass"] for line in lines]))
    chosen = {label: [data.labels[i] for i in p.argmax(1)] for label, p in shares.items()}
    pairs = [(a, b) for b in predictions for a in ("majority vote", "base") if a in chosen and a != b and b != "base"]
    paired = {f"{b} - {a}": metrics.paired(truth, chosen[a], chosen[b]) for a, b in pairs}
    return {"models": models, "paired": paired}


def measure_texts(_: EvalDataset, predictions: Predictions) -> dict[str, Any]:
    """The figures of every model's own texts and of the likelihood of the reference texts, and ten samples."""
    models = {
        label: metrics.texts([line["prediction"] for line in lines], [line["label"] for line in lines])
        | metrics.perplexity([(line["nats"], line["tokens"]) for line in lines])
        for label, lines in predictions.items()
    }
    return {"models": models, "samples": side_by_side(predictions)}


def side_by_side(predictions: Predictions, count: int = 10) -> list[dict[str, Any]]:
    """Rows spread evenly over the data, with what every model predicts."""
    first = next(iter(predictions.values()))
    positions = sorted({i * len(first) // min(count, len(first)) for i in range(min(count, len(first)))})
    return [
        {key: first[i][key] for key in ("row", "prompt", "label")}
        | {"predictions": {label: lines[i]["prediction"] for label, lines in predictions.items()}}
        for i in positions
    ]


MEASURES = {"classification": measure_choices, "text": measure_texts, "loss": measure_documents}  # by task
MEASURES |= {"documents": measure_documents, "pairs": measure_pairs, "judged": measure_judged}
