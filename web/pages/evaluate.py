"""The page Evaluate: evaluate.py for a run, the report's part about its evaluations, and every prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from common import UserError
from runs import report
from runs.files import read_jsonl
from runs.texts import Translator
from web import control, jobs, widgets
from web.control import run_folder
from web.pages import data as data_page
from web.widgets import QUIET, link

MAX_ROWS = 1000  # predictions that are sent to the browser


def start(name: str | None, data: Sequence[str], base: bool, t: Translator) -> None:
    """Starts evaluate.py for a run; raises UserError where there is none."""
    if not name:
        raise UserError("there is no trained run yet; train one first")
    folder = run_folder(name)
    command = ["evaluate.py", str(folder), *([f"dataset={','.join(data)}"] if data else [])]
    command += [] if base else ["--no-base"]
    control.start_command(control.job_folder(folder, "evaluate"), command, t.language)


def evaluations(name: str | None) -> list[str]:
    """The datasets on which a run was evaluated, newest first."""
    found = (run_folder(name) / "eval").glob("*/metrics.json") if name else ()
    return [path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def results_html(name: str | None, t: Translator) -> str:
    """What was measured of a run, as its report has it, with a link to the whole report."""
    if not name:
        return widgets.train_first(t)
    if not evaluations(name):
        return widgets.empty(t("Not evaluated yet. Press Evaluate: it asks the model what it has never seen."))
    page, folder = "", run_folder(name)
    if (folder / "report.html").is_file():
        page = f"<p>{link(folder / 'report.html', t('The complete report of this run, one page'))}</p>"
    return f'<div class="report">{page}{report.evaluation_html(folder, t)}</div>'


def answer(line: dict[str, Any], t: Translator) -> str:
    """A model's answer to a row: its choice with the probability, its text, or its perplexity on the right answer."""
    if "probabilities" in line:
        return f"{line['prediction']} · {line['probabilities'].get(line['prediction'], 0):.0%}"
    if "prediction" in line:
        return line["prediction"]
    return f"{t('perplexity')} {math.exp(line['nats'] / max(1, line['tokens'])):.2f}" if "nats" in line else "–"


def predictions(folder: Path, t: Translator) -> list[list[str]]:
    """For each row: what was asked, the right answer, those of the base and of the trained model (✓: it is right)."""
    before = {line["row"]: line for line in read_jsonl(folder / "predictions.base.jsonl")}
    rows = []
    for line in read_jsonl(folder / "predictions.jsonl")[:MAX_ROWS]:
        mark = " ✓" if line.get("prediction", "").strip() == line["label"].strip() else ""
        base, trained = answer(before.get(line["row"], {}), t), answer(line, t)
        rows.append([line["prompt"], line["label"], base, trained + mark])
    return rows


class EvaluatePage:
    """The components, inside an open gr.Tab, and what they do."""

    def __init__(self, t: Translator) -> None:
        self.t = t
        self.place_start()
        self.job = gr.HTML(elem_id="eval-state", padding=False)
        self.results = gr.HTML(elem_id="eval-results", padding=False)
        with gr.Accordion(t("Predictions"), open=False, visible=False, elem_id="predictions") as self.fold:
            self.which = gr.Dropdown([], show_label=False, container=False, elem_id="eval-which")
            self.predictions = gr.Dataframe(
                headers=[t("prompt"), t("right answer"), t("base model"), t("trained model")],
                interactive=False,
                wrap=True,
                show_label=False,
                column_widths=["28%", "24%", "24%", "24%"],
                elem_id="eval-predictions",
            )
        self.seen, self.acted, self.timer = gr.State(dict), gr.State(0.0), gr.Timer(2)

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

    def watch(self, name: str | None, held: str | None, shown: dict[str, Any]) -> dict[Any, Any]:
        """What has changed of the run's evaluations."""
        t = self.t
        names, chosen = control.choose_trained(name)
        parts = evaluations(chosen)
        part = held if held in parts else next(iter(parts), None)
        rows = predictions(run_folder(chosen) / "eval" / part, t) if part else []
        job = control.newest_job(chosen, ("evaluate",))
        now = {
            self.run: gr.update(choices=names, value=chosen),
            self.data: gr.update(choices=data_page.datasets()),
            self.job: widgets.job_box(job, t),
            self.results: results_html(chosen, t),
            self.fold: gr.update(visible=bool(rows)),
            self.which: gr.update(choices=parts, value=part),
            self.predictions: gr.update(value=rows),
            self.stop: gr.update(visible=jobs.is_running(job)),
        }
        return {**widgets.changes(shown, now, {self.run: name, self.which: held}), self.seen: shown}

    def begin(self, name: str | None, data: list[str] | None, base: bool) -> float:
        return widgets.attempt(self.t, start, name, data or [], base, self.t)

    def connect(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Connects the events; the page looks at the run every two seconds and when `tab` is opened."""
        self.go.click(self.begin, [self.run, self.data, self.base], self.acted, **QUIET)
        self.stop.click(lambda name: control.stop_newest(name, ("evaluate",)), self.run, **QUIET)
        watched = [self.run, self.data, self.job, self.results, self.fold, self.which, self.predictions]
        watched += [self.stop, self.seen]
        # one event for all: of two at a time the older answer could come last
        moments = [blocks.load, tab.select, self.timer.tick]
        moments += [self.run.change, self.which.change, self.acted.change]
        gr.on(moments, self.watch, [self.run, self.which, self.seen], watched, trigger_mode="always_last", **QUIET)
