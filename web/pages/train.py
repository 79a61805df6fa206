"""The page Train: settings → a recipe → train.py as a process of its own, and a watch on its run folder."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import psutil

import common
from common import Config, Message, UserError
from runs import charts
from runs.configuration import Loaded, load_config
from runs.folder import last_value
from runs.folder import read_log as read_run_log
from runs.report import duration, training_charts
from runs.target import missing_from_model
from runs.texts import Translator
from training.hardware import free_memory
from training.memory import PARTS, estimate_memory, read_model
from web import control, fields, jobs, widgets
from web.control import run_folder
from web.pages import data as data_page
from web.widgets import QUIET, fault, note

LOGGED = {"step", "total_steps", "tokens_per_second", "elapsed", "remaining"}  # what every line of our log has
BADGES = {"starting": "running", "interrupted": "stopped", "aborted": "stopped"}


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def find_gpu() -> common.Gpu | None:
    return _gpu(int(time.time() // 5))


@functools.lru_cache(maxsize=1)
def _gpu(now: int) -> common.Gpu | None:  # noqa: ARG001
    return common.find_gpu()


def memory_html(config: Config, t: Translator) -> str:
    """What the training will need at its peak beside what is free, as a bar of its parts."""
    folder = Path(config.model_name_or_path)
    if missing_from_model(folder):
        return note(t("Memory: known once the model is on this disk."))
    gpu = find_gpu()
    try:
        parts = estimate_memory(config, read_model(folder), gpu, data_page.longest_sample(config))
    except UserError:  # a broken config.json
        parts = None
    if parts is None:
        return note(t("Memory: cannot be estimated for this kind of model."))
    if gpu:
        return memory_bar(parts, gpu.free_memory, gpu.total_memory, gpu.name, t)
    total = psutil.virtual_memory().total
    return memory_bar(parts, free_memory(), total, t("main memory"), t)


def memory_bar(parts: dict[str, float], free: int, total: int, device: str, t: Translator) -> str:
    """The parts of the peak in bytes as a bar, with a mark at what is free of the device."""
    parts = {name: size for name, size in parts.items() if size}
    need = sum(parts.values())
    whole = max(need, total)
    pieces, keys = "", ""
    for index, (name, size) in enumerate(parts.items()):
        text = escape(f"{t.message(PARTS[name])} {widgets.size(size)}")
        pieces += f'<i class="c{index % 6}" style="width:{100 * size / whole:.2f}%" title="{text}"></i>'
        keys += f'<span class="key c{index % 6}"><i></i>{text}</span>'
    peak = t("about {need} at the peak", need=widgets.size(need))
    have = escape(t("{free} of {total} free", free=widgets.size(free), total=widgets.size(total)))
    limit = f'<b class="free" style="left:{100 * min(free, total) / whole:.2f}%" title="{have}"></b>'
    advice = t("It will not fit: choose 4 bit (on a card), a smaller batch, or a smaller cutoff_len.")
    return (
        f'<div class="memory"><div class="memory-head"><b>{escape(peak)}</b>'
        f"<span>{escape(device)}: {have}</span></div>"
        f'<div class="memory-bar">{pieces}{limit}</div><div class="keys">{keys}</div>'
        f"{fault(advice, t) if need > free else ''}</div>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run folder holds


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of trainer_log.jsonl that are of this kit: LLaMA-Factory's have the same file, but other keys."""
    return [line for line in read_run_log(folder) if line.keys() >= LOGGED]


def memory_used(run: dict[str, Any]) -> int | None:
    """Bytes that a running training has now: of the card, or of main memory."""
    gpu = find_gpu()
    if gpu:
        return gpu.total_memory - gpu.free_memory
    try:
        return psutil.Process(run["pid"]).memory_info().rss
    except psutil.Error:
        return None


def state_badge(state: str, t: Translator) -> str:
    names = {
        "running": t("running"),
        "starting": t("starting"),
        "finished": t("finished"),
        "interrupted": t("paused"),
        "failed": t("failed"),
        "killed": t("ended from outside"),
        "aborted": t("aborted"),
        "none": t("not started"),
    }
    return widgets.badge(BADGES.get(state, state), names[state])


def status_html(name: str | None, t: Translator) -> str:
    """A run at a glance: its state, how far it is, its figures, and its error in one sentence."""
    if not name:
        return widgets.empty(t("No run yet. Choose the settings and press Start."))
    folder = run_folder(name)
    state, run, lines = control.run_state(folder), control.read_run(folder) or {}, read_log(folder)
    job = jobs.find(control.job_folder(folder))
    parts = [f'<div class="job" data-state="{state}"><b>{escape(name)}</b> {state_badge(state, t)}</div>']
    parts.append(error_html(state, run, job, t))
    if state in ("killed", "aborted"):
        parts.append(note(ended_text(folder, state, t)))
    if state == "starting" or (state == "running" and not lines):
        parts.append(widgets.bar(None, jobs.last_line(job.log) if job else ""))
        return "".join(parts)
    if lines:
        parts += figures(folder, state, run, lines, t)
    if run.get("stopped_early"):
        parts.append(note(t("Stopped early:") + " " + t.message(run["stopped_early"])))
    if state == "finished":
        parts.append(widgets.next_steps(t, (t("Evaluate"), "evaluate"), (t("Chat"), "chat"), (t("Export"), "export")))
    return "".join(parts)


def error_html(state: str, run: dict[str, Any], job: jobs.Job | None, t: Translator) -> str:
    """Why a run failed: as the page's job has it, or as run.json has it where a terminal started the run."""
    if job and state in ("failed", "none", "finished", "interrupted") and (error := jobs.error(job)):
        return fault(error, t)
    return fault(t.message(run["error"]), t) if state == "failed" and run.get("error") else ""


def ended_text(folder: Path, state: str, t: Translator) -> str:
    """From where a run goes on that was ended from outside or aborted."""
    saved = any(folder.glob("checkpoint-*/trainer_state.json"))
    way_on = t("It goes on from its last checkpoint.") if saved else t("There was no checkpoint yet: it starts anew.")
    return f"{t('The process was ended before it could save.')} {way_on}" if state == "killed" else way_on


def figures(folder: Path, state: str, run: dict[str, Any], lines: list[dict[str, Any]], t: Translator) -> list[str]:
    """The bar and the tiles of a run that has begun."""
    last = lines[-1]
    step = (state == "finished" and run.get("steps")) or last["step"]  # not every step has a line
    left = last["remaining"] - (time.time() - (folder / "trainer_log.jsonl").stat().st_mtime)
    memory = memory_used(run) if state == "running" else run.get("peak_memory")
    loss, held_out, rate = last_value(lines, "loss"), last_value(lines, "eval_loss"), last_value(lines, "learning_rate")
    shown = [
        (t("step"), f"{step:,} / {last['total_steps']:,}"),
        (t("loss"), decimals(loss)),
        (t("eval loss"), decimals(held_out)),
        (t("learning rate"), charts.number(rate) if rate is not None else "–"),
        (t("tokens/s"), f"{last['tokens_per_second']:,.0f}"),
        (t("memory") if state == "running" else t("peak memory"), widgets.size(memory) if memory else "–"),
        (t("time so far") if state == "running" else t("time"), duration(last["elapsed"])),
    ]
    if state == "running":
        shown.append((t("time left"), duration(left)))
    done = 100 * step / max(1, last["total_steps"])
    bar = widgets.bar(done, t("{n} % of the steps", n=f"{done:.0f}")) if state != "finished" else ""
    return [bar, widgets.tiles(shown)]


def decimals(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "–"


def plots_html(names: Sequence[str], t: Translator) -> str:
    """The plot of the losses of one run or of several, and the small ones below it."""
    logs = {name: read_log(run_folder(name)) for name in names}
    large, *small = training_charts(logs, t, t("The curve starts with the first step."), 110)
    return f'{large}<div class="two">{"".join(small)}</div>'


def log_html(name: str | None, t: Translator) -> str:
    if not name:
        return ""
    printed = jobs.tail(control.job_folder(run_folder(name)) / "log")
    return widgets.log_box(printed or t("This run was started in a terminal, which has its log."))


def runs_html(t: Translator) -> str:
    """All runs with their key figures."""
    rows = [run_row(name, t) for name in control.run_names()]
    if not rows:
        return widgets.empty(t("No run yet."))
    head = [t("run"), t("state"), t("model"), t("data"), t("steps"), t("loss"), t("eval loss"), t("time")]
    return widgets.table(head, rows, first_left=4)


def run_row(name: str, t: Translator) -> list[str]:
    folder = run_folder(name)
    run, lines = control.read_run(folder) or {}, read_log(folder)
    data = ", ".join(item["name"] for item in run.get("data", {}).get("datasets", []))
    return [
        escape(name),
        state_badge(control.run_state(folder), t),
        escape(Path(run.get("model", "–")).name),
        escape(data or "–"),
        f"{run.get('steps') or last_value(lines, 'step') or 0:,}",
        decimals(run.get("last_loss") or last_value(lines, "loss")),
        decimals(run.get("eval_loss") or last_value(lines, "eval_loss")),
        duration(lines[-1]["elapsed"]) if lines else "–",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The page


class TrainPage:
    """The components, inside an open gr.Tab, and what they do; adds its options to `options` (name → component)."""

    def __init__(self, t: Translator, options: dict[str, Any]) -> None:
        self.t, self.options = t, options
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self.place_first_settings()
                self.place_start()
                self.place_other_settings()
                self.place_recipe()
            with gr.Column(scale=7, min_width=330):
                self.place_run()
        with gr.Accordion(t("All runs"), open=False, elem_id="all-runs", elem_classes="when-run"):
            self.all_runs = gr.HTML(padding=False)
        self.seen, self.acted, self.timer = gr.State(dict), gr.State(0.0), gr.Timer(2)
        # of a recipe, without a field
        self.others = gr.BrowserState({}, storage_key="onecard-kept", secret="onecard")

    def place_first_settings(self) -> None:
        t = self.t
        with gr.Group(elem_classes="tight"):
            with gr.Row():
                self.run_name = gr.Textbox(label=t("Name of the run"), max_lines=1, elem_id="run-name")
                recipes = [(path.stem, str(path)) for path in sorted((common.ROOT / "configs").glob("*.yaml"))]
                self.recipe = gr.Dropdown(recipes, value=None, label=t("Start from a recipe"), elem_id="recipe-choice")
            self.options["stage"] = fields.make_field("stage", t, t("Kind of training"))
            labels = list(fields.first_labels(t).items())
            for pair in (labels[i : i + 2] for i in range(0, len(labels), 2)):
                with gr.Row():
                    for name, label in pair:
                        self.options[name] = fields.make_field(name, t, label)

    def place_start(self) -> None:
        t = self.t
        self.memory = gr.HTML(elem_id="memory", padding=False)
        self.fault = gr.HTML(elem_id="train-fault", padding=False)
        label = t("start over where the run exists")
        self.overwrite = gr.Checkbox(False, label=label, visible=False, elem_id="start-over")
        self.start = gr.Button(t("Start"), variant="primary", elem_id="train-start")

    def place_other_settings(self) -> None:
        """Every other option of a training, folded by its group."""
        t = self.t
        with gr.Accordion(t("All other settings"), open=False, elem_id="all-settings"):
            for text, names in fields.folded_groups().items():
                rest = [name for name in names if name not in self.options]
                if rest:
                    with gr.Accordion(t.message(Message(text)).capitalize(), open=False):
                        for name in rest:
                            self.options[name] = fields.make_field(name, t)

    def place_recipe(self) -> None:
        t = self.t
        with gr.Accordion(t("Command and recipe"), open=False, elem_id="recipe"):
            gr.HTML(note(t("What the page starts, for a terminal or a script:")))
            copied = {"buttons": ["copy"], "wrap_lines": True, "lines": 2, "max_lines": 10}
            self.command = gr.Code(language="shell", label=t("Command"), elem_id="command", **copied)
            self.yaml = gr.Code(
                language="yaml", label=t("Recipe"), buttons=["copy", "download"], wrap_lines=True, elem_id="yaml"
            )
            types = [".yaml", ".yml", ".json"]
            self.load = gr.UploadButton(t("Load a recipe (YAML)"), file_types=types, elem_id="load")
        self.loaded_note = gr.HTML(elem_id="load-state", padding=False)

    def place_run(self) -> None:
        t = self.t
        with gr.Row(elem_classes="when-run"):
            self.run = gr.Dropdown([], label=t("Run"), elem_id="run", min_width=200)
            self.compare = gr.Dropdown([], multiselect=True, label=t("Compare with"), elem_id="compare", min_width=200)
        self.status = gr.HTML(elem_id="status", padding=False)
        with gr.Row():
            self.pause = gr.Button(t("Pause"), elem_id="train-pause", visible=False)
            self.go_on = gr.Button(t("Go on"), variant="primary", elem_id="train-go-on", visible=False)
            self.abort = gr.Button(t("Abort"), variant="stop", elem_id="train-abort", visible=False)
        self.plots = gr.HTML(elem_id="plots", elem_classes="when-run", padding=False)
        with gr.Accordion(t("Log"), open=True, elem_classes="when-run"):
            self.log = gr.HTML(elem_id="train-log", padding=False)

    # ---- settings

    def read(self, name: str, others: dict[str, str], *values: Any) -> Loaded:
        """The configuration of all fields; raises UserError with every fault."""
        return fields.read_settings(dict(zip(self.options, values, strict=True)), name, others)

    def show_settings(self, name: str, others: dict[str, str], *values: Any) -> list[Any]:
        """Faults or notes, memory, command, recipe, and whether the run is there."""
        t, there = self.t, gr.update(visible=control.exists(name))
        try:
            loaded = self.read(name, others, *values)
        except UserError as error:
            return [fault(error, t), "", "", "", there]
        listed = ", ".join(f"{option}={text}" for option, text in others.items())
        kept = [t("Of the recipe, without a field here: {settings}", settings=listed)] if others else []
        notes = "".join(note(t.message(text)) for text in [*kept, *loaded.notes])
        line = jobs.shell_line(control.train_command(loaded.config))
        return [notes, memory_html(loaded.config, t), line, control.recipe_text(loaded.config), there]

    def fill(self, path: str | None) -> list[Any]:
        """The fields of a recipe that was uploaded or chosen: a note, the run's name, the others, all options."""
        t = self.t
        if not path:
            return [gr.skip()] * (len(self.options) + 3)
        try:
            loaded = load_config([path])
        except UserError as error:
            shown = fault(fields.with_other_path(error, path, Path(path).name), t)
            return [shown, *([gr.skip()] * (len(self.options) + 2))]
        names = list(self.options)
        name, others = fields.run_name_of(loaded), fields.without_field(loaded, names)
        notes = [t("{file} is loaded.", file=Path(path).name), *map(t.message, loaded.notes)]
        if common.SAVES / name != Path(loaded.config.output_dir):
            folder = loaded.config.output_dir
            notes.append(t("Runs of this page lie below saves/: {name} there, not {folder}.", name=name, folder=folder))
        return [
            "".join(map(note, notes)),
            name,
            others,
            *fields.fields_of(loaded, names, fields.first_labels(t)).values(),
        ]

    def fit_model(self, model: str, *values: Any) -> list[Any]:
        """Good values for another model, where the fields still hold those that the page had put there."""
        changed = fields.fitting(model or "", dict(zip(fields.PRESET, values, strict=True)))
        return [changed.get(name, gr.skip()) for name in fields.PRESET]

    # ---- the run

    def begin(self, over: bool, name: str, others: dict[str, str], *values: Any) -> list[Any]:
        """Starts a run: whether to start over, the run that is looked at, and the time."""
        language = self.t.language
        acted = widgets.attempt(
            self.t, lambda: control.start_run(self.read(name, others, *values).config, over, language)
        )
        started = control.training_now() == name.strip()
        box = gr.update(visible=control.exists(name), **({"value": False} if started else {}))
        return [box, gr.update(choices=control.run_names(), **({"value": name.strip()} if started else {})), acted]

    def act(self, action: Callable[[Path], None], name: str | None) -> float:
        """What a button does with the run that is looked at."""
        return widgets.attempt(self.t, action, run_folder(name)) if name else 0.0

    def watch(self, name: str | None, others: list[str], shown: dict[str, Any]) -> dict[Any, Any]:
        """What has changed of the runs."""
        t = self.t
        names = control.run_names()
        chosen = name if name in names else (control.training_now() or next(iter(names), None))
        several = [chosen, *(other for other in others or [] if other != chosen)] if chosen else []
        state = control.run_state(run_folder(chosen)) if chosen else "none"
        at_work = gr.update(visible=state in ("running", "starting"))
        now = {
            self.run: gr.update(choices=names, value=chosen),
            self.compare: gr.update(choices=[other for other in names if other != chosen]),
            self.status: status_html(chosen, t),
            self.plots: plots_html(several, t),
            self.log: log_html(chosen, t),
            self.all_runs: runs_html(t),
            self.pause: at_work,
            self.go_on: gr.update(visible=state in ("interrupted", "killed", "aborted", "failed")),
            self.abort: at_work,
        }
        return {**widgets.changes(shown, now, {self.run: name}), self.seen: shown}

    # ---- events

    def connect(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Connects the events; the page looks at the run every two seconds and when `tab` is opened."""
        values = [self.run_name, self.others, *self.options.values()]
        outcome = [self.fault, self.memory, self.command, self.yaml, self.overwrite]
        changed = [*(component.change for component in values), tab.select]
        gr.on(changed, self.show_settings, values, outcome, trigger_mode="always_last", **QUIET)
        for event, source in ((self.load.upload, self.load), (self.recipe.input, self.recipe)):
            event(self.fill, source, [self.loaded_note, *values], **QUIET)
        model, fitted = self.options["model_name_or_path"], [self.options[name] for name in fields.PRESET]
        model.input(self.fit_model, [model, *fitted], fitted, **QUIET)
        stored, (restore, keep) = [self.run_name, *self.options.values()], fields.storage_scripts(self.options)
        blocks.load(None, None, stored, js=restore)  # their change calls `show_settings`
        gr.on([component.change for component in stored], None, stored, None, js=keep)
        self.start.click(self.begin, [self.overwrite, *values], [self.overwrite, self.run, self.acted], **QUIET)
        language = self.t.language
        actions = ((self.pause, control.pause), (self.abort, control.abort))
        for button, action in (*actions, (self.go_on, lambda folder: control.go_on(folder, language))):
            button.click(functools.partial(self.act, action), self.run, self.acted, **QUIET)
        watched = [self.run, self.compare, self.status, self.plots, self.log, self.all_runs]
        watched += [self.pause, self.go_on, self.abort, self.seen]
        # one event for all: of two at a time the older answer could come last
        moments = [blocks.load, tab.select, self.timer.tick, self.run.change, self.compare.change, self.acted.change]
        gr.on(moments, self.watch, [self.run, self.compare, self.seen], watched, trigger_mode="always_last", **QUIET)
