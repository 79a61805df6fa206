"""The page Model and data: which model, which data, and what is learned of it to the token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError
from preprocessing import dataset
from preprocessing.faults import fault_messages
from preprocessing.registry import EXTENSIONS, find_entries
from runs import charts
from runs.target import missing_from_model
from training import preflight
from web import jobs, theme, widgets
from web.widgets import Translate

UPLOADS = common.SAVES / "uploads"
DOWNLOADS = common.SAVES / "downloads"
MODELS = Path(common.EMBEDDED_MODEL).parent
SAMPLES = 4  # on a page
_preparing = threading.Lock()  # one at a time: two would tokenize the same data twice


# ---------------------------------------------------------------------------------------------------------------------
# Models


def models() -> list[str]:
    """Whole models below models/, the embedded one first (which the first training makes where it is missing)."""
    found = sorted(path.as_posix() for path in MODELS.glob("*") if path.is_dir() and path.name[0] != ".")
    whole = [path for path in found if not missing_from_model(Path(path))]
    return [common.EMBEDDED_MODEL, *(path for path in whole if path != common.EMBEDDED_MODEL)]


def templates() -> list[str]:
    return sorted(path.stem for path in (common.ROOT / "templates").glob("*.jinja"))


def model_facts(name: str, t: Translate) -> str:
    """What is known of a model, as HTML; what is missing of it where it is not whole."""
    folder = Path(name)
    missing = missing_from_model(folder)
    if missing and name == common.EMBEDDED_MODEL:
        return theme.note(t("Comes in a Python package (93 MB); the first training fetches it, without a hub."))
    if missing and folder.is_dir():
        return theme.fault(t("{name} is not a whole model; it lacks {what}.", name=name, what=", ".join(missing)))
    if missing:
        return theme.fault(t("{name} is not on this disk; fetch it below, or choose another.", name=name))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        said = t("{file} is broken ({error}); fetch the model again.", file=folder / "config.json", error=error)
        return theme.fault(said)
    config = config.get("text_config", config)  # of a model that also sees
    parameters = sum(_product(shape) for shape in preflight.tensor_shapes(folder).values())
    facts = [
        t("{n} parameters", n=count(parameters)),
        widgets.size(preflight.model_bytes(folder)),
        t("reads {n} tokens", n=f"{config.get('max_position_embeddings', 0):,}"),
        config.get("model_type", "?"),
    ]
    return theme.note(" · ".join(facts))


def _product(shape: list[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def count(number: int) -> str:
    """`135 M`, `8.0 B`."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number:,}"


def download_folder(model: str) -> Path:
    return DOWNLOADS / re.sub(r"[^\w.-]+", "--", model)


def lacks_embedded(model: str | None) -> bool:
    """Whether the embedded model is chosen and not on this disk yet: it needs no hub, only download.py."""
    return model == common.EMBEDDED_MODEL and bool(missing_from_model(Path(model)))


def start_download(model: str, source: str, t: Translate) -> jobs.Job:
    """Fetches the embedded model, or one of a hub, with download.py; raises UserError for an empty name."""
    model = model.strip()
    if model == common.EMBEDDED_MODEL:
        return jobs.start(download_folder(model), ["download.py"], t)
    if not model or model.startswith("-"):
        raise UserError(t("give the model's name on the hub: ORG/NAME"))
    options = {"modelscope": ["--modelscope"], "mirror": ["--mirror", "https://hf-mirror.com"]}.get(source, [])
    return jobs.start(download_folder(model), ["download.py", model, *options], t)


def newest_download() -> jobs.Job | None:
    records = sorted(DOWNLOADS.glob("*/job.json"), key=lambda path: path.stat().st_mtime)
    return jobs.find(records[-1].parent) if records else None


# ---------------------------------------------------------------------------------------------------------------------
# Data


def datasets(dataset_dir: str = Config.dataset_dir) -> list[str]:
    """What can be chosen: the names of the registry, then the uploaded files."""
    try:
        registry = json.loads((Path(dataset_dir) / "dataset_info.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        registry = {}  # what is wrong with it is told where it is used
    return [*registry, *(path.as_posix() for path in sorted(UPLOADS.glob("*")) if path.suffix.lower() in EXTENSIONS)]


def keep_upload(file: Path, check: Callable[[Path], None], t: Translate) -> Path:
    """Copies an uploaded file to saves/uploads under its own name, in place of an earlier one of that name.

    Only one that `check` lets pass gets there; what it raises is told of the file's own place.
    """
    name = re.sub(r"[^\w.-]+", "_", file.name).lstrip(".") or "data.json"
    name = "data.json" if name == "run.json" else name  # which would look like a run
    if Path(name).suffix.lower() not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise UserError(t("{file} is of an unknown type; known are {types}", file=file.name, types=known))
    UPLOADS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=UPLOADS) as hidden:
        beside = Path(hidden) / name
        shutil.copyfile(file, beside)
        try:
            check(beside)
        except UserError as error:
            raise UserError(str(error).replace(str(beside), str(UPLOADS / name))) from None
        os.replace(beside, UPLOADS / name)
    return UPLOADS / name


def prepare(config: Config) -> tuple[Any, dataset.Prepared]:
    """The tokenizer and the prepared data of a configuration; raises UserError with all that is wrong with it."""
    dataset.check(config)
    entries = find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir)
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for e in entries for file in e.files)
    ours = ("model", "data")
    chosen = {name: getattr(config, name) for name in options_of(*ours) if name != "quantization_bit"}
    with _preparing:
        return _prepared(Config(**chosen, seed=config.seed, eval_strategy=config.eval_strategy), stamps)


@functools.lru_cache(maxsize=4)
def _prepared(config: Config, stamps: tuple[Any, ...]) -> tuple[Any, dataset.Prepared]:  # noqa: ARG001
    """`prepare`; the files' times and sizes in `stamps` only make changed data a new question."""
    from preprocessing.chat_template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    tokenizer = load_base_tokenizer(config)
    prepared = dataset.prepare(config, tokenizer, load_template(config.template, tokenizer))
    _longest[config.model_name_or_path, config.dataset] = int(prepared.train_lengths.max())
    return tokenizer, prepared


_longest: dict[tuple[str, tuple[str, ...]], int] = {}


def longest_sample(config: Config) -> int | None:
    """Tokens of the longest sample, where the data of a configuration was checked on this page."""
    return _longest.get((config.model_name_or_path, config.dataset))


@functools.cache
def options_of(*groups: str) -> list[str]:
    """The names of the options in groups of Config, in the order of `--help`."""
    names, title = [], ""
    for field in dataclasses.fields(Config):
        title = field.metadata.get("group", title)
        if "help" in field.metadata and title in groups:
            names.append(field.name)
    return names


def report_html(report: dict[str, Any], t: Translate) -> str:
    """dataset.py's report as a table, with its notes and the rows that are left out."""
    head = [t("dataset"), t("rows"), t("samples"), t("tokens"), t("median"), t("longest"), t("learned")]
    head += [t("truncated"), t("duplicates"), t("skipped")]
    every = report["datasets"] + report["eval_datasets"]
    rows = []
    for item in every:
        plain = [f"{item[name]:,}" for name in ("rows", "samples", "tokens", "median", "longest")]
        share = f"{item['learned'] / max(1, item['tokens']):.0%}"
        rest = [f"{item[name]:,}" for name in ("truncated", "duplicates", "skipped")]
        rows.append([escape(item["name"]), *plain, share, *rest])
    for part, name in (("train", t("= to train")), ("eval", t("= held out"))):
        if part in report and (len(every) > 1 or "eval" in report):
            plain = [f"{report[part][key]:,}" for key in ("samples", "tokens", "median", "longest")]
            rows.append([name, "", *plain, "", "", "", ""])
    notes = [theme.note(f"{item['name']}: {Message.from_json(note)}") for item in every for note in item["notes"]]
    skipped = [str(message) for item in every for message in fault_messages(item["faults"])]
    left_out = [t("Rows that are left out:"), *skipped] if skipped else []
    return widgets.table(head, rows) + "".join(notes) + theme.fault("\n".join(left_out))


def lengths_html(prepared: dataset.Prepared, cutoff_len: int, t: Translate) -> str:
    lengths = [int(n) for n in prepared.train_lengths]
    said = t("{count} samples of {low} to {high} tokens")
    mark = (cutoff_len, f"cutoff_len {cutoff_len:,}")
    return charts.histogram(t("How long the samples are"), t("tokens"), lengths, said, mark)


def sample_html(tokenizer: Any, sample: dict[str, list[int]], number: int, t: Translate) -> str:
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


def samples_html(tokenizer: Any, prepared: dataset.Prepared, page: int, t: Translate) -> tuple[str, int, int]:
    """A page of samples (from 0) with the page's number and how many there are; a number beyond the end is the last."""
    total = len(prepared.train)
    pages = max(1, -(-total // SAMPLES))
    page = min(max(page, 0), pages - 1)
    shown = range(page * SAMPLES, min(total, (page + 1) * SAMPLES))
    return "".join(sample_html(tokenizer, prepared.train[i], i + 1, t) for i in shown), page, pages


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(t: Translate, options: dict[str, Any], read: Callable[..., Config]) -> Callable[[Any], None]:
    """The components inside an open gr.Tab; adds the options that stand here to `options` (name → component).

    `read(*values)` makes a Config of all options' values in their order. The function that is returned connects the
    events; call it when every page has added its options.
    """
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(min_width=330):
            gr.HTML(f"<h3>{t('Model')}</h3>", padding=False)
            model = gr.Dropdown(
                models(),
                value=common.EMBEDDED_MODEL,
                allow_custom_value=True,
                label=t("Model on this disk"),
                info=t("one found in models/, or the path of any folder"),
                elem_id="option-model_name_or_path",
            )
            facts = gr.HTML(model_facts(common.EMBEDDED_MODEL, t), elem_id="model-facts", padding=False)
            fetch_embedded = gr.Button(
                t("Fetch it now"), visible=lacks_embedded(common.EMBEDDED_MODEL), elem_id="fetch-embedded"
            )
            template = gr.Dropdown(
                [(t("the model's own"), ""), *templates()],
                value="chatml",  # of the embedded model
                label=t("Chat template"),
                info=t("what surrounds the words; must be the one the model was made with"),
                elem_id="option-template",
            )
            with gr.Accordion(t("Fetch a model from a hub"), open=False, elem_id="fetch") as fold:
                hub_name = gr.Textbox(label=t("Name on the hub"), placeholder="ORG/NAME", elem_id="hub-name")
                sources = [(t("Hugging Face"), "hub"), (t("mirror"), "mirror"), ("ModelScope", "modelscope")]
                source = gr.Radio(sources, value="hub", label=t("From"))
                with gr.Row():
                    fetch = gr.Button(t("Fetch"), variant="primary", elem_id="fetch-start")
                    stop = gr.Button(t("Stop"), elem_id="fetch-stop")
                fetching = gr.HTML(elem_id="fetch-state", padding=False)
        with gr.Column(min_width=330):
            gr.HTML(f"<h3>{t('Data')}</h3>", padding=False)
            names = gr.Dropdown(
                datasets(),
                value=list(Config.dataset),
                multiselect=True,
                allow_custom_value=True,
                label=t("Datasets"),
                info=t("of data/dataset_info.json, uploaded, or the path of a file; several are mixed"),
                elem_id="option-dataset",
            )
            upload = gr.UploadButton(
                t("Upload a file (JSON, JSON lines, CSV, Parquet)"), file_types=list(EXTENSIONS), elem_id="upload"
            )
            uploaded = gr.HTML(elem_id="upload-state", padding=False)
            look = gr.Button(t("Check the data"), variant="primary", elem_id="check-data")
    report = gr.HTML(
        theme.empty(t("Check the data to see its tokens, and what is learned of them.")),
        elem_id="report",
        padding=False,
    )
    with gr.Column(visible=False) as details:
        lengths = gr.HTML(elem_id="lengths", padding=False)
        with gr.Row(elem_classes="pager"):
            legend = theme.note(t("Coloured: learned by the model. Plain: only read."))
            gr.HTML(f"<h3>{t('What is learned')}</h3>{legend}", padding=False)
            back = gr.Button("‹", min_width=40, scale=0, elem_id="samples-back")
            where = gr.HTML(elem_id="samples-where", elem_classes="pager-where", padding=False)
            forth = gr.Button("›", min_width=40, scale=0, elem_id="samples-forth")
        samples = gr.HTML(elem_id="samples", padding=False)
        gr.HTML(widgets.next_steps(t, (t("Train"), "train")), padding=False)
    number = gr.State(0)
    seen = gr.State(dict)
    timer = gr.Timer(2)
    options |= {"model_name_or_path": model, "template": template, "dataset": names}

    def show(page: int, *values: Any) -> list[Any]:
        try:
            config = read(*values)
            if missing_from_model(Path(config.model_name_or_path)):
                dataset.check(config)
                said = t("The rows are well-formed. Their tokens can be counted once the model is on this disk.")
                return [theme.note(said), gr.skip(), gr.Column(visible=False), "", "", 0]
            tokenizer, prepared = prepare(config)
        except UserError as error:
            return [theme.fault(error), gr.skip(), gr.Column(visible=False), "", "", 0]
        html, page, pages = samples_html(tokenizer, prepared, page, t)
        shown = t("page {n} of {total}", n=f"{page + 1:,}", total=f"{pages:,}")
        lengths_now = lengths_html(prepared, config.cutoff_len, t)
        return [report_html(prepared.report, t), lengths_now, gr.Column(visible=True), html, shown, page]

    def take(file: str, chosen: list[str], *values: Any) -> list[Any]:
        def check(path: Path) -> None:
            settings = [
                [str(path)] if option is names else v for option, v in zip(options.values(), values, strict=True)
            ]
            dataset.check(dataclasses.replace(read(*settings), eval_dataset=()))

        try:
            kept = keep_upload(Path(file), check, t).as_posix()
        except UserError as error:
            said = t("It is not used. Mend the file and upload it again.")
            return [theme.fault(error) + theme.note(said), *[gr.skip()] * 7]
        chosen = [*(name for name in chosen if name != kept), kept]
        said = t("{file} is well-formed and was added to the datasets.", file=Path(kept).name)
        now = [chosen if option is names else value for option, value in zip(options.values(), values, strict=True)]
        return [theme.note(said), gr.Dropdown(choices=datasets(), value=chosen), *show(0, *now)]

    def begin(name: str, origin: str) -> tuple[str, Any]:
        try:
            job = start_download(name, origin, t)
        except UserError as error:
            return theme.fault(error), gr.Accordion(open=True)
        return widgets.job_box(job, t), gr.Accordion(open=True)

    def end() -> None:
        if job := newest_download():
            jobs.interrupt(job)

    def watch(chosen: str | None, shown: dict[str, Any]) -> list[Any]:
        now = {
            "job": widgets.job_box(newest_download(), t),
            "facts": model_facts(chosen or "", t),
            "fetch": lacks_embedded(chosen),
            "models": models(),
            "datasets": datasets(),
        }
        sent = dict(zip(now, widgets.only_changes(shown, **now), strict=True))
        if isinstance(sent["fetch"], bool):
            sent["fetch"] = gr.Button(visible=sent["fetch"])
        for name in ("models", "datasets"):
            if isinstance(sent[name], list):
                sent[name] = gr.Dropdown(choices=sent[name])
        return [*sent.values(), shown]

    def connect(tab: gr.Tab) -> None:
        from gradio.context import Context

        settings = list(options.values())
        shown = [report, lengths, details, samples, where, number]
        look.click(show, [gr.State(0), *settings], shown, show_progress="minimal", show_progress_on=report)
        back.click(lambda page, *values: show(page - 1, *values), [number, *settings], shown, show_progress="hidden")
        forth.click(lambda page, *values: show(page + 1, *values), [number, *settings], shown, show_progress="hidden")
        upload.upload(
            take,
            [upload, names, *settings],
            [uploaded, names, *shown],
            show_progress="minimal",
            show_progress_on=uploaded,
        )
        fetch.click(begin, [hub_name, source], [fetching, fold], show_progress="hidden")
        fetch_embedded.click(begin, [model, source], [fetching, fold], show_progress="hidden")
        stop.click(end, show_progress="hidden")
        watched = [fetching, facts, fetch_embedded, model, names, seen]
        moments = [Context.root_block.load, timer.tick, tab.select, model.change]
        gr.on(moments, watch, [model, seen], watched, trigger_mode="always_last", show_progress="hidden")

    return connect


CSS = """
.sample { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--block-border-color);
  border-radius: 8px; padding: 10px 14px 12px; margin-bottom: 10px; line-height: 1.65; max-height: 360px;
  overflow-y: auto; font-size: 14px; background: var(--block-background-fill); }
.sample-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 12px; font-size: 13px;
  color: var(--body-text-color-subdued); white-space: normal; margin-bottom: 4px; }
.sample .learned { background: #cdeee6; color: #064e45; border-radius: 3px; padding: 1px 0; }
.dark .sample .learned { background: #134e47; color: #b6f5ea; }
.sample .control { font-family: var(--font-mono); font-size: 11px; opacity: .75; }
.pager { align-items: center; gap: 8px !important; } .pager .pager-where { flex: 0 0 auto !important; font-size: 14px;
  width: auto !important; min-width: 84px !important; text-align: center; }
@media (max-width: 640px) { .pager > :first-child { flex: 1 0 100% !important; } }
"""
