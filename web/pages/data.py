"""The page Model and data: which model, which data, and what is learned of it to the token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

import common
from common import Config, UserError
from preprocessing import dataset
from preprocessing.faults import fault_messages
from preprocessing.registry import EXTENSIONS, find_entries
from runs import charts
from runs.configuration import find_dataset_dir
from runs.files import unfinished
from runs.target import missing_from_model
from runs.texts import Translator
from training import memory
from training.prepare import prepare_data
from web import control, fields, jobs, widgets
from web.imports import import_libraries
from web.widgets import QUIET, fault, note

UPLOADS = common.SAVES / "uploads"
DOWNLOADS = common.SAVES / "downloads"
MODELS = Path(common.EMBEDDED_MODEL).parent
SAMPLES = 4  # on a page
_preparing = threading.Lock()  # one at a time: two would tokenize the same data twice


# ---------------------------------------------------------------------------------------------------------------------
# Models


def models() -> list[str]:
    """Complete models below models/, the embedded one first (which the first training makes where it is missing)."""
    found = sorted(path.as_posix() for path in MODELS.glob("*") if path.is_dir() and path.name[0] != ".")
    complete = [path for path in found if not missing_from_model(Path(path))]
    return [common.EMBEDDED_MODEL, *(path for path in complete if path != common.EMBEDDED_MODEL)]


def templates() -> list[str]:
    return sorted(path.stem for path in (common.ROOT / "templates").glob("*.jinja"))


def model_facts(name: str, t: Translator) -> str:
    """What is known of a model, as HTML; what is missing of it where it is not complete."""
    folder = Path(name)
    missing = missing_from_model(folder)
    if missing and name == common.EMBEDDED_MODEL:
        return note(t("Comes in a Python package (93 MB); the first training fetches it, without a hub."))
    if missing and folder.is_dir():
        return fault(t("{name} is not a complete model; it lacks {what}.", name=name, what=", ".join(missing)), t)
    if missing:
        return fault(t("{name} is not on this disk; fetch it below, or choose another.", name=name), t)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        text = t("{file} is broken ({error}); fetch the model again.", file=folder / "config.json", error=error)
        return fault(text, t)
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


def is_embedded_missing(model: str | None) -> bool:
    """Whether the embedded model is chosen and not on this disk yet: it needs no hub, only download.py."""
    return model == common.EMBEDDED_MODEL and bool(missing_from_model(Path(model)))


def start_download(model: str, source: str, language: str) -> jobs.Job:
    """Fetches the embedded model, or one of a hub, with download.py; raises UserError for an empty name."""
    model = model.strip()
    if model == common.EMBEDDED_MODEL:
        return jobs.start(download_folder(model), ["download.py"], language)
    if not model or model.startswith("-"):
        raise UserError("give the model's name on the hub: ORG/NAME")
    options = {"modelscope": ["--modelscope"], "mirror": ["--mirror", "https://hf-mirror.com"]}.get(source, [])
    return jobs.start(download_folder(model), ["download.py", model, *options], language)


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
    name = upload_name(file.name)
    if not control.is_below(UPLOADS, common.SAVES):
        raise UserError(
            "{folder} is a link to {real}, out of saves/; uploads are kept only below saves/: replace the link by "
            "a folder",
            folder=UPLOADS,
            real=UPLOADS.resolve(),
        )
    with unfinished(UPLOADS / name) as hidden:
        beside = hidden / name
        shutil.copyfile(file, beside)
        try:
            check(beside)
        except UserError as error:
            raise fields.with_other_path(error, str(beside), str(UPLOADS / name)) from None
        os.replace(beside, UPLOADS / name)  # a symbolic link of that name is replaced, and not followed
    return UPLOADS / name


def prepare(config: Config) -> tuple[Any, dataset.TrainingData]:
    """The tokenizer and the prepared data of a configuration; raises UserError with all that is wrong with it."""
    dataset.check(config)
    entries = find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir, config.stage)
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for e in entries for file in e.files)
    names = fields.options_of("model", "data")
    chosen = {name: getattr(config, name) for name in names if name != "quantization_bit"}
    import_libraries()
    with _preparing:
        return _prepared(
            Config(**chosen, stage=config.stage, seed=config.seed, eval_strategy=config.eval_strategy), stamps
        )


@functools.lru_cache(maxsize=4)
def _prepared(config: Config, stamps: tuple[Any, ...]) -> tuple[Any, dataset.TrainingData]:  # noqa: ARG001
    """`prepare`; the files' times and sizes in `stamps` only make changed data a new question."""
    tokenizer, _, prepared = prepare_data(config)
    _longest[config.model_name_or_path, config.dataset, config.stage] = int(prepared.train_lengths.max())
    return tokenizer, prepared


_longest: dict[tuple[str, tuple[str, ...], str], int] = {}


def longest_sample(config: Config) -> int | None:
    """Tokens of the longest sample, where the data of a configuration was checked on this page."""
    return _longest.get((config.model_name_or_path, config.dataset, config.stage))


# ---------------------------------------------------------------------------------------------------------------------
# What is shown of prepared data


def report_html(report: dict[str, Any], t: Translator) -> str:
    """The report of the data as a table, with its notes and the rows that are left out."""
    head = [t("dataset"), t("rows"), t("number of samples"), t("tokens"), t("median"), t("longest"), t("learned")]
    head += [t("truncated"), t("duplicates"), t("skipped")]
    every = report["datasets"] + report["eval_datasets"]
    rows = []
    for item in every:
        counts = [f"{item[name]:,}" for name in ("rows", "samples", "tokens", "median", "longest")]
        share = f"{item['learned'] / max(1, item['tokens']):.0%}"
        rest = [f"{item[name]:,}" for name in ("truncated", "duplicates", "skipped")]
        rows.append([escape(item["name"]), *counts, share, *rest])
    for part, name in (("train", t("= to train")), ("eval", t("= held out"))):
        if part in report and (len(every) > 1 or "eval" in report):
            counts = [f"{report[part][key]:,}" for key in ("samples", "tokens", "median", "longest")]
            rows.append([name, "", *counts, "", "", "", ""])
    notes = [note(f"{item['name']}: {t.message(text)}") for item in every for text in item["notes"]]
    skipped = [t.message(message) for item in every for message in fault_messages(item["faults"])]
    left_out = [t("Rows that are left out:"), *skipped] if skipped else []
    return widgets.table(head, rows) + "".join(notes) + fault("\n".join(left_out), t)


def lengths_html(prepared: dataset.TrainingData, cutoff_len: int, t: Translator) -> str:
    lengths = [int(n) for n in prepared.train_lengths]
    mark = (cutoff_len, f"cutoff_len {cutoff_len:,}")
    return charts.histogram(t("Lengths of the samples"), t("tokens"), lengths, mark)


def sample_html(tokenizer: Any, sample: dict[str, list[int]], number: int, t: Translator) -> str:
    """A sample as the model reads it: learned tokens coloured, control tokens small."""
    controls = set(tokenizer.all_special_ids)
    kinds = [
        (token, "learned" if label != -100 else "", "control" if token in controls else "")
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
    ]
    parts = []
    for names, run in itertools.groupby(kinds, lambda kind: kind[1:]):
        text = escape(tokenizer.decode([token for token, *_ in run], skip_special_tokens=False))
        style = " ".join(filter(None, names))
        parts.append(f'<span class="{style}">{text}</span>' if style else text)
    total, learned = len(kinds), sum(bool(kind[1]) for kind in kinds)
    head = t("Sample {n}", n=f"{number:,}")
    tail = t("{learned} of {total} tokens are learned", learned=f"{learned:,}", total=f"{total:,}")
    return f'<div class="sample"><div class="sample-head"><b>{head}</b><span>{tail}</span></div>{"".join(parts)}</div>'


def samples_html(tokenizer: Any, prepared: dataset.TrainingData, page: int, t: Translator) -> tuple[str, int, int]:
    """A page of samples (from 0) with the page's number and how many there are; a number beyond the end is the last."""
    page, pages, shown = widgets.turn_to(page, len(prepared.train), SAMPLES)
    return "".join(sample_html(tokenizer, prepared.train[i], i + 1, t) for i in shown), page, pages


# ---------------------------------------------------------------------------------------------------------------------
# The page


class DataPage:
    """The components, inside an open gr.Tab, and what they do; adds its options to `options` (name → component).

    `read(*values)` makes a Config of all options' values in their order. Call `connect` once every page has added its
    options.
    """

    def __init__(self, t: Translator, options: dict[str, Any], read: Callable[..., Config]) -> None:
        self.t, self.options, self.read = t, options, read
        with gr.Row(equal_height=False):
            with gr.Column(min_width=330):
                self.place_model()
            with gr.Column(min_width=330):
                self.place_data()
        self.place_report()
        self.number, self.seen, self.timer = gr.State(0), gr.State(dict), gr.Timer(2)
        options |= {"model_name_or_path": self.model, "template": self.template, "dataset": self.names}

    def place_model(self) -> None:
        t, embedded = self.t, common.EMBEDDED_MODEL
        gr.HTML(widgets.heading(t("Model")), padding=False)
        self.model = gr.Dropdown(
            models(),
            value=embedded,
            allow_custom_value=True,
            label=t("Model on this disk"),
            info=t("one found in models/, or the path of any folder"),
            elem_id="option-model_name_or_path",
        )
        self.facts = gr.HTML(model_facts(embedded, t), elem_id="model-facts", padding=False)
        self.fetch_embedded = gr.Button(
            t("Fetch it now"), visible=is_embedded_missing(embedded), elem_id="fetch-embedded"
        )
        self.template = gr.Dropdown(
            [(t("the model's own"), ""), *templates()],
            value="chatml",  # of the embedded model
            label=t("Chat template"),
            info=t("marks who says what; must be the one that the model was trained with"),
            elem_id="option-template",
        )
        with gr.Accordion(t("Fetch a model from a hub"), open=False, elem_id="fetch") as self.fold:
            self.hub_name = gr.Textbox(label=t("Name on the hub"), placeholder="ORG/NAME", elem_id="hub-name")
            sources = [(t("Hugging Face"), "hub"), (t("mirror"), "mirror"), ("ModelScope", "modelscope")]
            self.source = gr.Radio(sources, value="hub", label=t("From"))
            with gr.Row():
                self.fetch = gr.Button(t("Fetch"), variant="primary", elem_id="fetch-start")
                self.stop = gr.Button(t("Stop"), elem_id="fetch-stop")
            self.fetching = gr.HTML(elem_id="fetch-state", padding=False)

    def place_data(self) -> None:
        t = self.t
        gr.HTML(widgets.heading(t("Data")), padding=False)
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
            with gr.Row(elem_classes="pager"):
                legend = note(t("Coloured: learned by the model. Plain: only read."))
                gr.HTML(widgets.heading(t("What is learned"), legend), padding=False)
                self.back = gr.Button("‹", min_width=40, scale=0, elem_id="samples-back")
                self.where = gr.HTML(elem_id="samples-where", elem_classes="pager-where", padding=False)
                self.forth = gr.Button("›", min_width=40, scale=0, elem_id="samples-forth")
            self.samples = gr.HTML(elem_id="samples", padding=False)
            gr.HTML(widgets.next_steps(t, (t("Train"), "train")), padding=False)

    def show(self, page: int, *values: Any) -> list[Any]:
        """The report of the data and a page of samples: report, lengths, details, samples, where, number."""
        t, hidden = self.t, gr.update(visible=False)
        try:
            config = self.read(*values)
            if missing_from_model(Path(config.model_name_or_path)):
                dataset.check(config)
                text = t("The rows are well-formed. Their tokens can be counted once the model is on this disk.")
                return [note(text), gr.skip(), hidden, "", "", 0]
            tokenizer, prepared = prepare(config)
        except UserError as error:
            return [fault(error, t), gr.skip(), hidden, "", "", 0]
        html, page, pages = samples_html(tokenizer, prepared, page, t)
        where = t("page {n} of {total}", n=f"{page + 1:,}", total=f"{pages:,}")
        lengths = lengths_html(prepared, config.cutoff_len, t)
        return [report_html(prepared.report, t), lengths, gr.update(visible=True), html, where, page]

    def take_upload(self, file: str, chosen: list[str], *values: Any) -> list[Any]:
        """Keeps an uploaded file, chooses it, and shows the report."""
        t = self.t

        def check(path: Path) -> None:
            config = self.read(*self.with_names([str(path)], values))
            dataset.check(dataclasses.replace(config, eval_dataset=()))

        try:
            kept = keep_upload(Path(file), check).as_posix()
        except UserError as error:
            refused = note(t("It is not used. Correct the file and upload it again."))
            return [fault(error, t) + refused, *[gr.skip()] * 7]
        names = with_upload(chosen, kept)
        if chosen and names == [kept] and kept not in chosen:
            text = t("{file} is well-formed and replaces the demonstration data.", file=Path(kept).name)
        else:
            text = t("{file} is well-formed and was added to the datasets.", file=Path(kept).name)
        dropdown = gr.update(choices=datasets(), value=names)
        return [note(text), dropdown, *self.show(0, *self.with_names(names, values))]

    def with_names(self, names: list[str], values: tuple[Any, ...]) -> list[Any]:
        """The values of all options, with other datasets."""
        return [names if o is self.names else v for o, v in zip(self.options.values(), values, strict=True)]

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
            self.fetch_embedded: gr.update(visible=is_embedded_missing(model)),
            self.model: gr.update(choices=models()),
            self.names: gr.update(choices=datasets()),
        }
        return {**widgets.changes(shown, now), self.seen: shown}

    def connect(self, tab: Any) -> None:
        """Connects the events; the page looks at the disk every two seconds and when `tab` is opened."""
        values = list(self.options.values())
        shown = [self.report, self.lengths, self.details, self.samples, self.where, self.number]
        self.check.click(
            self.show, [gr.State(0), *values], shown, show_progress="minimal", show_progress_on=self.report
        )
        self.back.click(lambda page, *rest: self.show(page - 1, *rest), [self.number, *values], shown, **QUIET)
        self.forth.click(lambda page, *rest: self.show(page + 1, *rest), [self.number, *values], shown, **QUIET)
        taken = [self.uploaded, self.names, *shown]
        progress = {"show_progress": "minimal", "show_progress_on": self.uploaded}
        self.upload.upload(self.take_upload, [self.upload, self.names, *values], taken, **progress)
        self.fetch.click(self.begin_download, [self.hub_name, self.source], [self.fetching, self.fold], **QUIET)
        begun = [self.fetching, self.fold]
        self.fetch_embedded.click(self.begin_download, [self.model, self.source], begun, **QUIET)
        self.stop.click(self.end_download, **QUIET)
        watched = [self.fetching, self.facts, self.fetch_embedded, self.model, self.names, self.seen]
        moments = [Context.root_block.load, self.timer.tick, tab.select, self.model.change]
        gr.on(moments, self.watch, [self.model, self.seen], watched, trigger_mode="always_last", **QUIET)
