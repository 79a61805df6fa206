"""What the predictions amount to: metrics.json and tables."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import Message
from evaluation.data import GENERAL
from evaluation.job import Evaluation
from evaluation.predict import predictions_file, read_predictions, read_state
from evaluation.tasks import TASKS, EvalDataset
from preprocessing.data_report import format_table
from runs.files import write_json
from runs.metric_names import METRICS
from runs.redaction import typed_command


def write_results(evaluation: Evaluation, data: EvalDataset) -> dict[str, Any]:
    """Writes metrics.json of a dataset, for all models that predicted the same rows; returns it."""
    rows, state = evaluation.encoded(data), read_state(data)
    predictions = {
        label: lines
        for label in sorted(state, key=lambda label: (label != "base", label not in ("trained", "model"), label))
        if state[label]["rows"] == rows.fingerprint
        and len(lines := read_predictions(predictions_file(data, label))) == len(rows.items)
    }
    measured = data.task.measure(data, predictions, evaluation.tokenizer)
    for label in predictions:
        measured["models"][label] |= {key: state[label][key] for key in ("model", "seconds", "dtype")}
    found = {
        "dataset": data.name,
        "task": data.task.name,
        "rows": len(rows.items),
        "left_out": data.left_out,
        "labels": list(data.task.labels),
        "positive": data.task.labels[1] if len(data.task.labels) == 2 else None,
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
    main, names = TASKS[task].columns(models)
    titles = [title for name in main for title in (METRICS[name].head if name in METRICS else name, "95 %")]
    table = [[str(Message("model")), *titles, *(METRICS[name].head for name in names)]]
    for label, figures in models.items():
        cells = [cell for name in main for cell in (f"{figures[name]:.3f}", _interval(figures[f"{name}_interval"]))]
        table.append([label, *cells, *("-" if figures[name] is None else f"{figures[name]:.3f}" for name in names)])
    return table


def _interval(interval: list[float], form: str = ".3f", joint: str = "-") -> str:
    return joint.join(format(end, form) for end in interval)


def describe_difference(pair: dict[str, Any]) -> Message:
    """A difference of accuracies (metrics.paired)."""
    low, high = pair["difference_interval"]
    text = "accuracy {difference:+.3f} ({low:+.3f} to {high:+.3f}), McNemar's p {p:.2g}"
    return Message(text, difference=pair["difference"], low=low, high=high, p=pair["mcnemar_p"])


def forgetting(models: dict[str, Any]) -> list[Message]:
    """Warns of each model whose perplexity on general knowledge is above the base's, beyond both intervals."""
    base = models.get("base")
    return [
        Message(
            "note: {model} forgot general knowledge: perplexity {before:.1f} before, {now:.1f} now; mix some into the "
            "data (dataset: ...,general), or train less",
            model=label,
            before=base["perplexity"],
            now=figures["perplexity"],
        )
        for label, figures in models.items()
        if base and figures["perplexity_interval"][0] > base["perplexity_interval"][1]
    ]
