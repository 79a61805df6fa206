"""The page Evaluate: evaluate.py for a run, its figures, pictures and predictions, base beside trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from common import UserError
from runs.files import read_jsonl
from runs.metric_names import METRICS
from web import control, jobs, widgets
from web.control import read_json, run_folder
from web.pages import data as data_page
from web.texts import Translator
from web.widgets import QUIET, address, link, table

SHOWN = 5  # predictions on a page
MAX_TEXT = 600  # characters of a text that are shown
FIRST = ("majority vote", "base")  # these stand left of the trained model


def start(name: str | None, data: Sequence[str], base: bool, t: Translator) -> None:
    """Starts evaluate.py for a run; raises UserError where there is none."""
    if not name:
        raise UserError("there is no trained run yet; train one first")
    folder = run_folder(name)
    command = ["evaluate.py", str(folder), *([f"dataset={','.join(data)}"] if data else [])]
    command += [] if base else ["--no-base"]
    control.start_command(control.job_folder(folder, "evaluate"), command, t.language)


def evaluations(name: str | None) -> list[Path]:
    """The folders with figures of a run, newest first; those of general knowledge come last."""
    if not name:
        return []
    found = (run_folder(name) / "eval").glob("*/metrics.json")

    def rank(path: Path) -> tuple[bool, float]:
        return read_json(path).get("task") == "loss", -path.stat().st_mtime

    return [path.parent for path in sorted(found, key=rank)]


def figure(figures: dict[str, Any], key: str) -> str:
    """A figure with its interval, where it has one."""
    value, interval = figures.get(key), figures.get(f"{key}_interval")
    if value is None or (key == "seconds" and not value):  # none where the predictions were there already
        return "–"
    text = f"{value:,.0f}" if key == "seconds" else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f"{text} <small>{interval[0]:.3f}–{interval[1]:.3f}</small>" if interval else text


def figures_html(found: dict[str, Any], t: Translator) -> str:
    """The figures of metrics.json, one a row, with their intervals; a model a column, the base before the trained."""
    models = found.get("models", {})
    order = sorted(models, key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0))
    words = {"base": t("base model"), "trained": t("trained"), "majority vote": t("majority vote")}
    rows = [
        [escape(names.zh if t.language == "zh" else names.en), *(figure(models[name], key) for name in order)]
        for key, names in METRICS.items()
        if any(models[name].get(key) is not None for name in order)
    ]
    return table([t("figure"), *(escape(words.get(name, name)) for name in order)], rows)


def clip(text: str) -> str:
    return escape(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …")


def answer(line: dict[str, Any], t: Translator) -> str:
    """A model's answer to a row: its choice with the probability, its text, or its perplexity on the right answer."""
    if "probabilities" in line:
        return f"{clip(line['prediction'])} · {line['probabilities'].get(line['prediction'], 0):.0%}"
    if "prediction" in line:
        return clip(line["prediction"])
    return f"{t('perplexity')} {math.exp(line['nats'] / max(1, line['tokens'])):.2f}" if "nats" in line else "–"


def predictions_html(folder: Path, page: int, t: Translator) -> tuple[str, int, int]:
    """A page of predictions beside what was right and what the base said; with its number (from 0) and their count."""
    lines = read_jsonl(folder / "predictions.jsonl")
    before = {line["row"]: line for line in read_jsonl(folder / "predictions.base.jsonl")}
    page, pages, shown = widgets.turn_to(page, len(lines), SHOWN)
    rows = []
    for line in (lines[i] for i in shown):
        right = line.get("prediction", "").strip() == line["label"].strip()
        mark = ' <span class="right">✓</span>' if right else ""
        base = answer(before.get(line["row"], {}), t)
        cells = [clip(line["prompt"]), clip(line["label"]), base, answer(line, t) + mark]
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


def results_html(name: str | None, t: Translator) -> str:
    """Everything that was measured of a run, the newest first, with a link to its report."""
    if not name:
        return widgets.train_first(t)
    report = run_folder(name) / "report.html"
    parts = [f"<p>{link(report, t('The complete report of this run, one page'))}</p>"] if report.is_file() else []
    for folder in evaluations(name):
        found = read_json(folder / "metrics.json")
        count = f"{found.get('rows', 0):,}"
        head = f"{folder.name}: {t('{n} rows', n=count)}"
        parts.append(f"<h3>{escape(head)}</h3>{figures_html(found, t)}{pictures_html(folder)}")
    if not evaluations(name):
        parts.append(widgets.empty(t("Not evaluated yet. Press Evaluate: it asks the model what it has never seen.")))
    return "".join(parts)


class EvaluatePage:
    """The components, inside an open gr.Tab, and what they do."""

    def __init__(self, t: Translator) -> None:
        self.t = t
        self.place_start()
        self.fault = gr.HTML(elem_id="eval-fault", padding=False)
        self.job = gr.HTML(elem_id="eval-state", padding=False)
        self.results = gr.HTML(elem_id="eval-results", padding=False)
        with gr.Column(visible=False) as self.fold:
            self.place_predictions()
        self.seen, self.page, self.acted, self.timer = gr.State(dict), gr.State(0), gr.State(0.0), gr.Timer(2)

    def place_start(self) -> None:
        t = self.t
        with gr.Row(equal_height=False):
            self.run = gr.Dropdown([], label=t("Run"), elem_id="eval-run", min_width=240)
            self.data = gr.Dropdown(
                data_page.datasets(),
                multiselect=True,
                allow_custom_value=True,
                label=t("Data (empty: what the run held out)"),
                elem_id="eval-data",
                min_width=240,
            )
            with gr.Column(min_width=200):
                self.base = gr.Checkbox(True, label=t("the base model too"), container=False)
                with gr.Row():
                    self.go = gr.Button(t("Evaluate"), variant="primary", elem_id="eval-start", min_width=80)
                    self.stop = gr.Button(t("Stop"), variant="stop", elem_id="eval-stop", min_width=60, visible=False)

    def place_predictions(self) -> None:
        with gr.Row(elem_classes="pager"):
            gr.HTML(widgets.heading(self.t("Predictions")), padding=False)
            plain = {"show_label": False, "container": False}
            self.which = gr.Dropdown([], elem_id="eval-which", min_width=240, scale=0, **plain)
            self.back = gr.Button("‹", min_width=40, scale=0, elem_id="eval-back")
            self.where = gr.HTML(elem_id="eval-where", elem_classes="pager-where", padding=False)
            self.forth = gr.Button("›", min_width=40, scale=0, elem_id="eval-forth")
        self.predictions = gr.HTML(elem_id="eval-predictions", padding=False)

    def watch(self, name: str | None, held: str | None, wanted: int, shown: dict[str, Any]) -> dict[Any, Any]:
        """What has changed of the run's evaluations."""
        t = self.t
        names, chosen = control.choose_trained(name)
        parts = [folder.name for folder in evaluations(chosen)]
        part = held if held in parts else next(iter(parts), None)
        html, number, pages = ("", 0, 1)
        if part:
            html, number, pages = predictions_html(run_folder(chosen) / "eval" / part, wanted, t)
        job = control.newest_job(chosen, ("evaluate",))
        now = {
            self.run: gr.update(choices=names, value=chosen),
            self.data: gr.update(choices=data_page.datasets()),
            self.job: widgets.job_box(job, t),
            self.results: results_html(chosen, t),
            self.fold: gr.update(visible=bool(html)),
            self.which: gr.update(choices=parts, value=part),
            self.where: t("page {n} of {total}", n=f"{number + 1:,}", total=f"{pages:,}"),
            self.predictions: html,
            self.stop: gr.update(visible=jobs.is_running(job)),
        }
        sent = widgets.changes(shown, now, {self.run: name, self.which: held})
        turned = {} if number == wanted else {self.page: number}
        return {**sent, **widgets.outdated(shown, self.fault), **turned, self.seen: shown}

    def begin(self, name: str | None, data: list[str] | None, base: bool) -> tuple[str, float]:
        return widgets.run_now(start, self.t, name, data or [], base, self.t)

    def connect(self, tab: Any) -> None:
        """Connects the events; the page looks at the run every two seconds and when `tab` is opened."""
        self.go.click(self.begin, [self.run, self.data, self.base], [self.fault, self.acted], **QUIET)
        self.stop.click(lambda name: control.stop_newest(name, ("evaluate",)), self.run, **QUIET)
        self.back.click(lambda n: n - 1, self.page, self.page, **QUIET)
        self.forth.click(lambda n: n + 1, self.page, self.page, **QUIET)
        watched = [self.run, self.data, self.fault, self.job, self.results, self.fold, self.which, self.where]
        watched += [self.predictions, self.stop, self.page, self.seen]
        # one event for all: of two at a time the older answer could come last
        moments = [Context.root_block.load, tab.select, self.timer.tick]
        moments += [self.run.change, self.which.change, self.page.change, self.acted.change]
        looked_at = [self.run, self.which, self.page, self.seen]
        gr.on(moments, self.watch, looked_at, watched, trigger_mode="always_last", **QUIET)
