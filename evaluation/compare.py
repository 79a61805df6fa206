"""Several runs: a list of all with their key figures, and what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
from common import Message, UserError
from evaluation import metrics
from evaluation.data import GENERAL
from evaluation.results import describe_difference, figures_table
from preprocessing.data_report import format_table, table_head
from runs import charts
from runs.files import read_json, read_jsonl
from runs.folder import is_run, read_run, run_config, run_folders, run_stage
from runs.metric_names import METRICS
from runs.process import is_alive

# The figure of an evaluation that says most, whatever the stage; others come only where those before it are missing.
KEY_FIGURES = ("accuracy", "exact_match", "reward", "preference_accuracy", "roc_auc", "perplexity")


def runs_table() -> list[list[str]]:
    """All runs, newest first: how they went and what they reached. Raises UserError where there is none."""
    rows = [table_head(Message("run|stage|status|steps|of|minutes|loss|eval_loss|measured on|figure"))]
    for folder in run_folders():
        run = read_run(folder) or {}
        minutes = f"{run['seconds'] / 60:.1f}" if run.get("seconds") else "-"
        losses = ["-" if run.get(key) is None else f"{run[key]:.4f}" for key in ("last_loss", "eval_loss")]
        steps = [str(run.get(key) or "-") for key in ("steps", "total_steps")]
        rows.append([str(folder), run_stage(folder), run_status(run), *steps, minutes, *losses, *key_figure(folder)])
    if len(rows) == 1:
        raise UserError("there is no run in {folder}/; train one: make train", folder=common.SAVES)
    return rows


def run_status(run: dict[str, Any]) -> str:
    """The status in a run.json; a run whose process was killed is interrupted, although it still says running."""
    if run.get("status") == "running" and not is_alive(run["pid"], run.get("created")):
        return "interrupted"
    return str(run.get("status", "-"))


def key_figure(folder: Path) -> tuple[str, str]:
    """The newest evaluation of a run's own model, or of what was made of it: its data, and the first of KEY_FIGURES.

    Dashes for none. General knowledge comes only where nothing else was evaluated.
    """
    files = list(folder.glob("eval/*/metrics.json"))
    files.sort(key=lambda file: (file.parent.name != GENERAL, file.stat().st_mtime), reverse=True)
    for found in map(read_json, files):
        models = {label: f for label, f in found["models"].items() if label not in ("majority vote", "base")}
        label = "trained" if "trained" in models else next(iter(models), None)
        of_model = "" if label == "trained" else f" ({label})"
        for key in KEY_FIGURES:
            if key in models.get(label, {}):
                return found["dataset"], f"{METRICS[key].head} {models[label][key]:.3f}{of_model}"
    return "-", "-"


def describe_two_runs(first: Path, second: Path) -> str:
    """Settings that differ, losses, figures side by side and the difference on the same rows; draws both losses."""
    for folder in (first, second):
        if not is_run(folder):
            raise UserError("{folder} is not a run folder; python evaluate.py --runs lists them", folder=folder)
    blocks = [format_table([["", str(first), str(second)], *_settings(first, second), *_facts(first, second)])]
    for file in sorted(first.glob("eval/*/metrics.json")):
        other = second / file.relative_to(first)
        if other.is_file():
            blocks.append(_describe_dataset(file, other, str(first), str(second)))
    picture = second / f"loss_beside_{first.resolve().name}.png"
    charts.draw_losses({str(folder): read_jsonl(folder / "trainer_log.jsonl") for folder in (first, second)}, picture)
    return "\n\n".join([*blocks, str(Message("both losses: {file}", file=picture))])


def _settings(*folders: Path) -> list[list[str]]:
    """A row for each setting that differs, output_dir aside."""
    configs = [run_config(folder) for folder in folders]
    rows = []
    for key in common.OPTIONS:
        values = [getattr(config, key) for config in configs]
        if values[0] != values[1] and key != "output_dir":
            rows.append([key, *(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)])
    return rows


def _facts(*folders: Path) -> list[list[str]]:
    """Steps, times and losses, a row each."""
    runs = [read_run(folder) or {} for folder in folders]
    keys = ("steps", "best_step", "seconds", "tokens", "last_loss", "eval_loss")
    return [[key, *(amount(run.get(key)) for run in runs)] for key in keys]


def amount(value: float | None) -> str:
    """A number in five digits, or all where it has more; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.5g}"


def _describe_dataset(first: Path, second: Path, *names: str) -> str:
    """The figures in two metrics.json, and the difference on the rows that both runs predicted."""
    found = [read_json(file) for file in (first, second)]
    title = found[0]["dataset"]
    same = all(found[0][key] == found[1][key] for key in ("task", "labels"))
    if not same or any("trained" not in part["models"] for part in found):
        return str(Message("{name}: not evaluated in the same way; evaluate both again", name=title))
    models = {name: part["models"]["trained"] for name, part in zip(names, found, strict=True)}
    text = f"{title}\n{format_table(figures_table(found[0]['task'], models))}"
    pair = paired_predictions(*(file.parent / "predictions.jsonl" for file in (first, second)))
    if pair is None:
        return text
    facts = {"one": names[1], "other": names[0], "rows": pair["rows"], "difference": describe_difference(pair)}
    return f"{text}\n{Message('{one} - {other} on {rows:,} rows of both: {difference}', **facts)}"


def paired_predictions(first: Path, second: Path) -> dict[str, Any] | None:
    """metrics.paired of two predictions.jsonl on the conversations that stand in both; None where none does."""
    lines = [
        {line["conversation"]: line for line in read_jsonl(file) if {"conversation", "prediction"} <= line.keys()}
        for file in (first, second)
    ]
    both = [key for key in lines[0] if key in lines[1]]
    if not both:
        return None
    predictions = ([part[key]["prediction"] for key in both] for part in lines)
    return metrics.paired([lines[0][key]["label"] for key in both], *predictions)
