"""The page Evaluate: evaluate.py for a run, its figures, pictures and predictions, base beside trained."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common import UserError
from web import jobs, theme, widgets
from web.pages import data as data_page
from web.pages import export as export_page
from web.pages import train as train_page
from web.widgets import Translate, address, link, table

SHOWN = 5  # predictions on a page
LONG = 600  # characters of a text that are shown of it
FIRST = ("majority vote", "base")  # these stand left of the trained model
LAST = ("seconds",)
TOLD = ("rows", "support", "curves")  # of these the heading tells, or a picture


def start(name: str | None, data: Sequence[str], base: bool, t: Translate) -> None:
    """Starts evaluate.py for a run; raises UserError where there is none."""
    if not name:
        raise UserError(t("No trained run yet. Train one first."))
    folder = widgets.run_folder(name)
    command = ["evaluate.py", str(folder), *([f"dataset={','.join(data)}"] if data else [])]
    widgets.start_script(train_page.job_folder(folder, "evaluate"), command + ([] if base else ["--no-base"]), t)


def evaluations(name: str | None) -> list[Path]:
    """The folders with figures of a run, newest first; what was forgotten comes after what was learned."""
    if not name:
        return []
    found = (widgets.run_folder(name) / "eval").glob("*/metrics.json")

    def rank(path: Path) -> tuple[bool, float]:
        return export_page.read_json(path).get("task") == "loss", -path.stat().st_mtime

    return [path.parent for path in sorted(found, key=rank)]


def figure_names(t: Translate) -> dict[str, str]:
    """Names of figures for people; one that is not here keeps its own."""
    return {
        "accuracy": t("accuracy"),
        "balanced_accuracy": t("balanced accuracy"),
        "precision": t("precision"),
        "recall": t("recall"),
        "f1": "F1",
        "roc_auc": "ROC AUC",
        "average_precision": t("average precision"),
        "tpr_at_fpr_10": t("true positives at 10 % false ones"),
        "tpr_at_fpr_1": t("true positives at 1 % false ones"),
        "brier": t("Brier score (lower is better)"),
        "ece": t("calibration error (lower is better)"),
        "exact_match": t("exact match"),
        "bleu": "BLEU",
        "chrf": "chrF",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
        "perplexity": t("perplexity"),
        "loss": t("loss"),
        "tokens": t("tokens"),
        "log_loss": t("log loss"),
        "seconds": t("seconds"),
        "mass": t("share of the model's words that are one of the answers"),
    }


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers of a model's figures, those one level below among them."""
    kept = {name: value for name, value in figures.items() if name not in TOLD}
    inner = {k: v for part in kept.values() if isinstance(part, dict) for k, v in part.items()}
    return {k: v for k, v in {**kept, **inner}.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def figure(key: str, value: float) -> str:
    if key == "seconds":
        return f"{value:,.0f}" if value else "–"  # none where the predictions were there already
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def figures_html(found: dict[str, Any], t: Translate) -> str:
    """The figures of metrics.json, one a row, with their intervals; a model a column, the base before the trained."""
    models = found.get("models", {})
    order = sorted(models, key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0))
    numbers = {name: flat(models[name]) for name in order}
    names = list(dict.fromkeys(key for figures in numbers.values() for key in figures))
    names = [key for key in names if key not in LAST] + [key for key in names if key in LAST]
    titles, words = (
        figure_names(t),
        {"base": t("base model"), "trained": t("trained"), "majority vote": t("majority vote")},
    )
    rows = []
    for key in names:
        cells = []
        for name in order:
            value, interval = numbers[name].get(key), models[name].get(f"{key}_interval")
            shown = "–" if value is None else figure(key, value)
            if interval and value is not None:
                shown += f" <small>{interval[0]:.3f}–{interval[1]:.3f}</small>"
            cells.append(shown)
        rows.append([escape(titles.get(key, key.replace("_", " "))), *cells])
    return table([t("figure"), *(escape(words.get(name, name)) for name in order)], rows)


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """The whole lines of predictions so far."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def clip(text: str) -> str:
    return escape(text if len(text) <= LONG else text[:LONG] + " …")


def said(line: dict[str, Any], t: Translate) -> str:
    """What a model said to a row: its choice with the probability, its text, or how well it foresaw the answer."""
    if "probabilities" in line:
        return f"{clip(line['prediction'])} · {line['probabilities'].get(line['prediction'], 0):.0%}"
    if "prediction" in line:
        return clip(line["prediction"])
    return f"{t('perplexity')} {math.exp(line['nats'] / max(1, line['tokens'])):.2f}" if "nats" in line else "–"


def predictions_html(folder: Path, page: int, t: Translate) -> tuple[str, int, int]:
    """A page of predictions beside what was right and what the base said; with its number (from 0) and their count."""
    lines = read_predictions(folder / "predictions.jsonl")
    before = {line["row"]: line for line in read_predictions(folder / "predictions.base.jsonl")}
    pages = max(1, -(-len(lines) // SHOWN))
    page = min(max(page, 0), pages - 1)
    rows = []
    for line in lines[page * SHOWN : (page + 1) * SHOWN]:
        right = line.get("prediction", "").strip() == line["label"].strip()
        mark = ' <span class="right">✓</span>' if right else ""
        base = said(before.get(line["row"], {}), t)
        cells = [clip(line["prompt"]), clip(line["label"]), base, said(line, t) + mark]
        rows.append([f'<div class="words">{cell}</div>' for cell in cells])
    if not rows:
        return "", 0, 1
    return table([t("asked"), t("right answer"), t("base model"), t("trained")], rows, first_left=4), page, pages


def pictures_html(folder: Path) -> str:
    """The pictures that evaluate.py drew."""
    parts = [
        f'<a href="{address(file)}" target="_blank"><img src="{address(file)}" alt="{escape(file.stem)}"></a>'
        for file in sorted(folder.glob("*.png"))
    ]
    return f'<div class="pictures">{"".join(parts)}</div>' if parts else ""


def results_html(name: str | None, t: Translate) -> str:
    """Everything that was measured of a run, the newest first, with a link to its report."""
    if not name:
        return widgets.train_first(t)
    report = widgets.run_folder(name) / "report.html"
    parts = [f"<p>{link(report, t('The whole report of this run, one page'))}</p>"] if report.is_file() else []
    for folder in evaluations(name):
        found = export_page.read_json(folder / "metrics.json")
        count = f"{found.get('rows', 0):,}"
        head = f"{folder.name}: {t('{n} rows', n=count)}"
        parts.append(f"<h3>{escape(head)}</h3>{figures_html(found, t)}{pictures_html(folder)}")
    if not evaluations(name):
        parts.append(theme.empty(t("Not evaluated yet. Press Evaluate: it asks the model what it has never seen.")))
    return "".join(parts)


def page(t: Translate) -> Callable[[Any], None]:
    """The components inside an open gr.Tab. Returns what connects the events, given the tab."""
    import gradio as gr

    with gr.Row(equal_height=False):
        run = gr.Dropdown([], label=t("Run"), elem_id="eval-run", min_width=240)
        data = gr.Dropdown(
            data_page.datasets(),
            multiselect=True,
            allow_custom_value=True,
            label=t("Data (empty: what the run held out)"),
            elem_id="eval-data",
            min_width=240,
        )
        with gr.Column(min_width=200):
            base = gr.Checkbox(True, label=t("the base model too"), container=False)
            with gr.Row():
                go = gr.Button(t("Evaluate"), variant="primary", elem_id="eval-start", min_width=80)
                stop = gr.Button(t("Stop"), variant="stop", elem_id="eval-stop", min_width=60, visible=False)
    told = gr.HTML(elem_id="eval-fault", padding=False)
    doing = gr.HTML(elem_id="eval-state", padding=False)
    results = gr.HTML(elem_id="eval-results", padding=False)
    with gr.Column(visible=False) as fold:
        with gr.Row(elem_classes="pager"):
            gr.HTML(f"<h3>{t('Predictions')}</h3>", padding=False)
            which = gr.Dropdown([], show_label=False, container=False, elem_id="eval-which", min_width=240, scale=0)
            back = gr.Button("‹", min_width=40, scale=0, elem_id="eval-back")
            where = gr.HTML(elem_id="eval-where", elem_classes="pager-where", padding=False)
            forth = gr.Button("›", min_width=40, scale=0, elem_id="eval-forth")
        predictions = gr.HTML(elem_id="eval-predictions", padding=False)
    seen, asked_for, acted, timer = gr.State(dict), gr.State(0), gr.State(0.0), gr.Timer(2)

    def watch(name: str | None, held: str | None, wanted: int, shown: dict[str, Any]) -> list[Any]:
        names, chosen = export_page.chosen_run(name)
        parts = [folder.name for folder in evaluations(chosen)]
        part = held if held in parts else next(iter(parts), None)
        html, number, pages = ("", 0, 1)
        if part:
            html, number, pages = predictions_html(widgets.run_folder(chosen) / "eval" / part, wanted, t)
        job = export_page.newest_job(chosen, ("evaluate",))
        now = {
            "run": (names, chosen),
            "data": data_page.datasets(),
            "told": widgets.at_work(t),
            "doing": widgets.job_box(job, t),
            "results": results_html(chosen, t),
            "fold": bool(html),
            "which": (parts, part),
            "where": t("page {n} of {total}", n=f"{number + 1:,}", total=f"{pages:,}"),
            "predictions": html,
            "stop": bool(job) and jobs.state(job) == "running",
        }
        sent = dict(zip(now, widgets.only_changes(shown, **now), strict=True))
        if isinstance(sent["data"], list):
            sent["data"] = gr.Dropdown(choices=sent["data"])
        sent["told"] = widgets.outdated(sent["told"])
        for key, before in (("run", name), ("which", held)):
            if isinstance(sent[key], tuple):
                sent[key] = widgets.offer(*now[key], before)
        if isinstance(sent["fold"], bool):
            sent["fold"] = gr.Column(visible=sent["fold"])
        if isinstance(sent["stop"], bool):
            sent["stop"] = gr.Button(visible=sent["stop"])
        return [*sent.values(), gr.skip() if number == wanted else number, shown]

    def begin(name: str | None, names: list[str] | None, too: bool) -> tuple[str, float]:
        try:
            start(name, names or [], too, t)
        except UserError as error:
            return theme.fault(error), time.time()
        return "", time.time()

    def end(name: str | None) -> None:
        if job := export_page.newest_job(name, ("evaluate",)):
            jobs.interrupt(job)

    def connect(tab: gr.Tab) -> None:
        from gradio.context import Context

        quiet = {"show_progress": "hidden"}
        go.click(begin, [run, data, base], [told, acted], **quiet)
        stop.click(end, run, **quiet)
        back.click(lambda n: n - 1, asked_for, asked_for, **quiet)
        forth.click(lambda n: n + 1, asked_for, asked_for, **quiet)
        watched = [run, data, told, doing, results, fold, which, where, predictions, stop, asked_for, seen]
        # one event for all: of two at a time the older answer could come last
        moments = [Context.root_block.load, tab.select, timer.tick, run.change, which.change, asked_for.change]
        moments.append(acted.change)
        gr.on(moments, watch, [run, which, asked_for, seen], watched, trigger_mode="always_last", **quiet)

    return connect


CSS = """
.words { max-height: 120px; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.right { color: var(--c0); font-weight: 600; }
table.figures small { color: var(--body-text-color-subdued); margin-left: 6px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px;
  margin: 12px 0; }
.pictures a:has([alt="confusion"]) { grid-column: 1 / -1; order: 1; } /* a matrix a model, side by side */
.pictures img[alt="confusion"] { width: auto; max-width: 100%; max-height: 380px; }
.pictures img { width: 100%; border-radius: 8px; border: 1px solid var(--block-border-color); background: #fff; }
"""
