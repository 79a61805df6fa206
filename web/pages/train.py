"""The page Train: settings → a recipe → train.py as a process of its own, and a watch on its run folder."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import psutil
import yaml

import common
from common import OPTIONS, Config, Loaded, Message, UserError
from runs import charts
from runs.files import write_text
from runs.folder import left_by_training
from runs.target import missing_from_model
from training import preflight
from web import jobs, theme, widgets
from web.pages import data as data_page
from web.widgets import OWN, Translate

# The settings that decide over a run, in the order of the page; all others are folded.
FIRST = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
FIRST += ("cutoff_len", "lora_rank", "quantization_bit", "val_size", "name", "author", "packing")
FOLDED = ("model", "data", "training", "adapter", "evaluation during training", "output")
# Decided by the page itself, or with only one value.
HIDDEN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "use_unsloth", "stage", "finetuning_type")
START = common.ROOT / "configs" / "quickstart.yaml"
SMALL = 10**9  # parameters below which a model needs the high learning rate of START
PRESET = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
PRESET += ("cutoff_len", "lora_rank", "warmup_steps", "template")
LOGGED = {"step", "total_steps", "tokens_per_second", "elapsed", "remaining"}  # what every line of our log has


# ---------------------------------------------------------------------------------------------------------------------
# Settings: what stands in the fields of the page ↔ a configuration


def is_text(name: str) -> bool:
    """Whether an option is typed, and not ticked or chosen."""
    return not OPTIONS[name].metadata["choices"] and "bool" not in str(OPTIONS[name].type)


def field_value(name: str, value: Any) -> Any:
    """An option's value as its field on the page holds it."""
    if OPTIONS[name].type == "bool":
        return bool(value)
    if name == "dataset":
        return list(value)
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def settle(fields: dict[str, Any], name: str, t: Translate, kept: dict[str, str] | None = None) -> Loaded:
    """The configuration of what stands in the fields, for a run called `name`; raises UserError with every fault.

    `kept` is what `without_field` found in a loaded recipe.
    """
    faults, arguments = [], [f"{n}={text}" for n, text in (kept or {}).items() if n in OPTIONS]  # some may be old
    try:
        arguments.append(f"output_dir={widgets.run_folder(name, t)}")
    except UserError as error:
        faults.append(str(error))
        arguments.append(f"output_dir={common.SAVES}")
    for option, value in fields.items():
        text = ",".join(value) if isinstance(value, list) else value
        if text not in (None, "", field_value(option, OPTIONS[option].default)):
            arguments.append(f"{option}={text}")
        elif text in (None, "", []) and option == "dataset":
            faults.append(t("no dataset is chosen; choose one on the page Model and data"))
    try:
        loaded = common.load_config(arguments)
    except UserError as error:
        said = error.fields["faults"] if error.code == "config_faults" else [error]
        faults += [str(fault).replace(f"{Message('command_line')}: ", "") for fault in said]
    if faults:
        raise UserError("\n".join(faults))
    return loaded


def differing(config: Config) -> dict[str, Any]:
    """The options that differ from their defaults, as a recipe has them."""
    chosen = {
        name: getattr(config, name) for name, option in OPTIONS.items() if getattr(config, name) != option.default
    }
    return {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in chosen.items()}


def recipe_text(config: Config) -> str:
    return yaml.safe_dump(differing(config), sort_keys=False, allow_unicode=True, width=120)


def command(config: Config) -> list[str]:
    """The command that trains this configuration without a recipe."""
    texts = {name: str(v).lower() if isinstance(v, bool) else v for name, v in differing(config).items()}
    return ["train.py", *(f"{name}={text}" for name, text in texts.items())]


def fields_of(loaded: Loaded, names: Sequence[str]) -> dict[str, Any]:
    """What the fields must hold for a loaded recipe; a folded one that has its default stays empty."""
    values = {name: field_value(name, getattr(loaded.config, name)) for name in names}
    folded = {n for n in names if is_text(n) and n not in (*FIRST, "model_name_or_path", "dataset")}
    return {n: "" if n in folded and v == field_value(n, OPTIONS[n].default) else v for n, v in values.items()}


def without_field(loaded: Loaded, names: Sequence[str]) -> dict[str, str]:
    """What a loaded recipe sets and no field of `names` holds, as `key=value` would have it: it must not get lost."""
    ours = (*names, "output_dir", "overwrite_output_dir")  # of these the page has its own way
    set_values = {n: v for n, v in differing(loaded.config).items() if n not in ours}
    return {n: str(v).lower() if isinstance(v, bool | None) else str(v) for n, v in set_values.items()}


def run_name_of(loaded: Loaded) -> str:
    """The name of a loaded recipe's run: its folder below saves/, or only its last part where it lies elsewhere."""
    folder = Path(loaded.config.output_dir)
    inside = folder.relative_to(common.SAVES) if folder.is_relative_to(common.SAVES) else Path(folder.name)
    return inside.as_posix()


@functools.cache
def preset(small: bool) -> dict[str, Any]:
    """Good values of the settings PRESET: the quickstart's for a small model, else the kit's defaults."""
    config = common.load_config([str(START)]).config if small else Config()
    return {name: field_value(name, getattr(config, name)) for name in PRESET}


def is_small(model: str) -> bool:
    folder = Path(model)
    if model == common.EMBEDDED_MODEL:
        return True
    shapes = preflight.tensor_shapes(folder) if folder.is_dir() else {}
    return 0 < sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes.values()) < SMALL


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def find_gpu() -> common.Gpu | None:
    return _gpu(int(time.time() // 5))


@functools.lru_cache(maxsize=1)
def _gpu(now: int) -> common.Gpu | None:  # noqa: ARG001
    return common.find_gpu()


def memory_html(config: Config, t: Translate) -> str:
    """What the training will need at its peak beside what is free, as a bar of its parts."""
    folder = Path(config.model_name_or_path)
    if missing_from_model(folder):
        return theme.note(t("Memory: known once the model is on this disk."))
    longest = data_page.longest_sample(config)
    reading = min(longest, config.cutoff_len) if longest and not config.packing else config.cutoff_len
    gpu = find_gpu()
    try:
        tokens = config.per_device_train_batch_size * reading
        parts = preflight.estimate_memory(config, folder, tokens, gpu)
    except (KeyError, json.JSONDecodeError):
        return theme.note(t("Memory: cannot be estimated for this kind of model."))
    need, free, total = (
        sum(parts.values()),
        *((gpu.free_memory, gpu.total_memory) if gpu else (preflight.free_memory(), psutil.virtual_memory().total)),
    )
    names = {
        "weights": t("weights"),
        "adapter": t("adapter"),
        "activations": t("activations"),
        "logits": t("logits"),
        "runtime": t("runtime"),
    }
    whole = max(need, total)
    pieces, keys = "", ""
    for index, (name, count) in enumerate(parts.items()):
        said = f"{names[name]} {widgets.size(count)}"
        pieces += f'<i class="c{index}" style="width:{100 * count / whole:.2f}%" title="{escape(said)}"></i>'
        keys += f'<span class="key c{index}"><i></i>{escape(said)}</span>'
    used = max(0, total - free)
    place = gpu.name if gpu else t("main memory")
    said = t("about {need} at the peak", need=widgets.size(need))
    have = t("{free} of {total} free", free=widgets.size(free), total=widgets.size(total))
    fits = need <= free
    verdict = (
        ""
        if fits
        else theme.fault(t("It will not fit: choose 4 bit (on a card), a smaller batch, or a smaller cutoff_len."))
    )
    limit = f'<b class="free" style="left:{100 * (total - used) / whole:.2f}%" title="{escape(have)}"></b>'
    return (
        f'<div class="memory"><div class="memory-head"><b>{escape(said)}</b>'
        f"<span>{escape(place)}: {escape(have)}</span></div>"
        f'<div class="memory-bar">{pieces}{limit}</div><div class="keys">{keys}</div>{verdict}</div>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs: start, pause, go on, abort


def job_folder(folder: Path, what: str = "train") -> Path:
    return folder / OWN / what


def is_there(name: str) -> bool:
    """Whether there is a run of that name, or what another program has left of one, which a new one would replace."""
    return widgets.can_be_name(name) and bool(left_by_training(widgets.run_folder(name)))


def run_state(folder: Path) -> str:
    """How a run is: one of `state_words`; `none` where nothing was started."""
    state = _run_state(folder)
    return "aborted" if state == "killed" and was_aborted(folder) else state


def was_aborted(folder: Path) -> bool:
    """Whether the last that was started in a run folder was ended by `abort`."""
    try:
        asked = (job_folder(folder) / jobs.ABORTED).stat().st_mtime
    except FileNotFoundError:
        return False
    run = widgets.read_run(folder)  # which a terminal may have started since
    return not run or asked >= datetime.fromisoformat(run["started"]).timestamp()


def _run_state(folder: Path) -> str:
    run, job = widgets.read_run(folder), jobs.find(job_folder(folder))
    if widgets.is_training(run):
        return "running"
    state = jobs.state(job) if job else "none"
    latest = job and run and datetime.fromisoformat(run["started"]).timestamp() >= job.created - 2
    if latest and state == "running":
        return "running"  # it has written how it ended, and is about to
    if run and (latest or not job or state == "done"):
        return "killed" if run["status"] == "running" else run["status"]
    if state == "running":
        return "starting"
    if run:
        return "killed" if run["status"] == "running" else run["status"]
    return {"stopped": "interrupted", "done": "none"}.get(state, state)


def run_names() -> list[str]:
    """The runs below saves/ with those that the page has only just started, newest first."""
    started = [path.parents[2].relative_to(common.SAVES) for path in common.SAVES.rglob(f"{OWN}/train/job.json")]
    jobs = {folder.as_posix() for folder in started if widgets.can_be_name(folder.as_posix())}

    def born(name: str) -> float:
        folder = widgets.run_folder(name)
        found = [path for path in (folder / "run.json", job_folder(folder) / "job.json") if path.exists()]
        return max((path.stat().st_mtime for path in found), default=0.0)

    return sorted({*widgets.run_names(), *jobs}, key=born, reverse=True)


def at_work() -> str | None:
    """The name of the run that is training now."""
    return next((n for n in run_names() if run_state(widgets.run_folder(n)) in ("running", "starting")), None)


def start_run(config: Config, overwrite: bool, t: Translate) -> Path:
    """Writes the recipe into the run folder and starts train.py with it; raises UserError where it cannot be."""
    folder = Path(config.output_dir)
    widgets.refuse_at_work(t)
    if left_by_training(folder) and not overwrite:
        raise UserError(
            t("{folder} holds a run already; choose another name, let it go on, or tick start over", folder=folder)
        )
    recipe = folder / OWN / "recipe.yaml"  # in the page's own folder: saves/NAME/recipe.yaml may be the user's
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, recipe_text(config))
    again = ["overwrite_output_dir=true"] if overwrite else []
    widgets.start_script(job_folder(folder), ["train.py", str(recipe), *again], t)
    return folder


def go_on(folder: Path, t: Translate) -> None:
    """Starts an interrupted run again, which goes on from its newest checkpoint."""
    recipe = next((folder / n for n in ("config.yaml", f"{OWN}/recipe.yaml") if (folder / n).exists()), None)
    if recipe is None:
        raise UserError(t("{folder} has no recipe to go on with; start a new run", folder=folder))
    widgets.start_script(job_folder(folder), ["train.py", str(recipe), "overwrite_output_dir=false"], t)


def pause(folder: Path) -> None:
    """What Ctrl-C does: a checkpoint after the step, then the end. Also for a run that a terminal has started."""
    _end(folder, jobs.interrupt, lambda process: process.send_signal(2))


def abort(folder: Path) -> None:
    """Ends a run at once; its newest checkpoint stays. The folder keeps that it was asked for."""
    if run_state(folder) in ("running", "starting"):
        job_folder(folder).mkdir(parents=True, exist_ok=True)
        (job_folder(folder) / jobs.ABORTED).touch()
    _end(folder, jobs.kill, lambda process: process.kill())


def _end(folder: Path, job_too: Callable[[jobs.Job], None], end: Callable[[psutil.Process], None]) -> None:
    run, job = widgets.read_run(folder), jobs.find(job_folder(folder))
    if job and jobs.state(job) == "running":
        job_too(job)
    elif widgets.is_training(run):
        end(psutil.Process(run["pid"]))


# ---------------------------------------------------------------------------------------------------------------------
# What a run folder tells


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of trainer_log.jsonl that are of this kit: LLaMA-Factory's have the same file, but other keys."""
    from training import callbacks

    return [line for line in callbacks.read_log(folder) if isinstance(line, dict) and line.keys() >= LOGGED]


def newest(lines: list[dict[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if key in line), None)


def memory_used(run: dict[str, Any]) -> int | None:
    """Bytes that a running training has now: of the card, or of main memory."""
    gpu = find_gpu()
    if gpu:
        return gpu.total_memory - gpu.free_memory
    try:
        return psutil.Process(run["pid"]).memory_info().rss
    except psutil.Error:
        return None


def state_words(t: Translate) -> dict[str, str]:
    return {
        "running": t("training"),
        "starting": t("starting"),
        "finished": t("finished"),
        "interrupted": t("paused"),
        "failed": t("failed"),
        "killed": t("ended from outside"),
        "aborted": t("aborted"),
        "none": t("not started"),
    }


BADGES = {"starting": "running", "interrupted": "stopped", "aborted": "stopped"}


def status_html(name: str | None, t: Translate) -> str:
    """A run at a glance: its state, how far it is, its figures, and its fault in one sentence."""
    if not name:
        return theme.empty(t("No run yet. Choose the settings and press Start."))
    folder = widgets.run_folder(name)
    state, run, lines = run_state(folder), widgets.read_run(folder) or {}, read_log(folder)
    job = jobs.find(job_folder(folder))
    head = f"<b>{escape(name)}</b> {widgets.badge(BADGES.get(state, state), state_words(t)[state])}"
    parts = [f'<div class="job" data-state="{state}">{head}</div>']
    if state in ("failed", "killed", "none", "finished", "interrupted") and job and jobs.fault(job, t):
        if state != "killed":
            parts.append(theme.fault(jobs.fault(job, t)))
    elif state == "failed" and run.get("error"):
        parts.append(theme.fault(run["error"]))
    if state in ("killed", "aborted"):
        whole = any(folder.glob("checkpoint-*/trainer_state.json"))
        told = t("It goes on from its last checkpoint.") if whole else t("There was no checkpoint yet: it starts anew.")
        ended = t("The process was ended before it could save.") if state == "killed" else ""
        parts.append(theme.note(f"{ended} {told}".strip()))
    if state == "starting" or (state == "running" and not lines):
        parts.append(widgets.bar(None, widgets.last_line(job) if job else ""))
        return "".join(parts)
    if lines:
        parts += figures(folder, state, run, lines, t)
    if run.get("stopped_early"):
        parts.append(theme.note(t("Stopped in time:") + " " + run["stopped_early"]))
    if state == "finished":
        parts.append(widgets.next_steps(t, (t("Evaluate"), "evaluate"), (t("Chat"), "chat"), (t("Export"), "export")))
    return "".join(parts)


def figures(folder: Path, state: str, run: dict[str, Any], lines: list[dict[str, Any]], t: Translate) -> list[str]:
    """The bar and the tiles of a run that has begun."""
    last = lines[-1]
    step = (state == "finished" and run.get("steps")) or last["step"]  # not every step has a line
    left = last["remaining"] - (time.time() - (folder / "trainer_log.jsonl").stat().st_mtime)
    memory = memory_used(run) if state == "running" else run.get("peak_memory")
    loss, held_out, rate = newest(lines, "loss"), newest(lines, "eval_loss"), newest(lines, "learning_rate")
    said = [
        (t("step"), f"{step:,} / {last['total_steps']:,}"),
        (t("loss"), f"{loss:.4f}" if loss is not None else "–"),
        (t("eval loss"), f"{held_out:.4f}" if held_out is not None else "–"),
        (t("learning rate"), charts.number(rate) if rate is not None else "–"),
        (t("tokens/s"), f"{last['tokens_per_second']:,.0f}"),
        (t("memory") if state == "running" else t("peak memory"), widgets.size(memory) if memory else "–"),
        (t("time so far") if state == "running" else t("time"), widgets.duration(last["elapsed"])),
    ]
    if state == "running":
        said.append((t("time left"), widgets.duration(left)))
    done = 100 * step / max(1, last["total_steps"])
    bar = widgets.bar(done, t("{n} % of the steps", n=f"{done:.0f}")) if state != "finished" else ""
    return [bar, widgets.tiles(said)]


def plots_html(names: Sequence[str], t: Translate) -> tuple[str, str]:
    """The plot of the losses of one run or of several, and the small ones of learning rate and speed."""
    from runs.charts import smooth

    losses, rates, speeds = [], [], []
    for index, name in enumerate(names):
        lines = read_log(widgets.run_folder(name))
        short = name.rpartition("/")[2]
        training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        smoothed = list(zip([x for x, _ in training], smooth([y for _, y in training]), strict=True))
        several = len(names) > 1
        label = short if several else t("training loss, smoothed")
        losses.append(charts.Curve(label, training, index, faint=True))
        losses.append(charts.Curve(label, smoothed, index))
        other = f"{short}: {t('eval loss')}" if several else t("eval loss")
        losses.append(charts.Curve(other, held_out, index if several else 1, dots=True))
        rate = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
        rates.append(charts.Curve(short if several else t("learning rate"), rate, index))
        speed = [(line["step"], line["tokens_per_second"]) for line in lines]
        speeds.append(charts.Curve(short if several else t("tokens/s"), speed, index))
    none = t("The curve starts with the first step.")
    large = charts.line_chart(t("Loss"), t("step"), losses, none)
    if not any(curve.points for curve in rates):
        return large, ""
    small = [charts.line_chart(t("Learning rate"), t("step"), rates, none, 110)]
    small.append(charts.line_chart(t("Tokens a second"), t("step"), speeds, none, 110))
    return large, f'<div class="two">{"".join(small)}</div>'


def log_html(name: str | None, t: Translate) -> str:
    if not name:
        return ""
    folder = widgets.run_folder(name)
    said = jobs.tail(job_folder(folder) / "log")
    return widgets.log_box(said or t("This run was started in a terminal, which has its log."))


def runs_html(t: Translate) -> str:
    """All runs with their key figures."""
    rows = []
    for name in run_names():
        folder = widgets.run_folder(name)
        run, state = widgets.read_run(folder) or {}, run_state(folder)
        lines = read_log(folder)
        data = ", ".join(item["name"] for item in run.get("data", {}).get("datasets", []))
        loss, held_out = (
            run.get("last_loss") or newest(lines, "loss"),
            run.get("eval_loss") or newest(lines, "eval_loss"),
        )
        rows.append(
            [
                escape(name),
                widgets.badge(BADGES.get(state, state), state_words(t)[state]),
                escape(Path(run.get("model", "–")).name),
                escape(data or "–"),
                f"{run.get('steps') or newest(lines, 'step') or 0:,}",
                f"{loss:.4f}" if loss is not None else "–",
                f"{held_out:.4f}" if held_out is not None else "–",
                widgets.duration(lines[-1]["elapsed"]) if lines else "–",
            ]
        )
    if not rows:
        return theme.empty(t("No run yet."))
    head = [t("run"), t("state"), t("model"), t("data"), t("steps"), t("loss"), t("eval loss"), t("time")]
    return widgets.table(head, rows, first_left=4)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_field(name: str, label: str, help: str | None, t: Translate, *, filled: bool = False) -> Any:
    """The component of an option; `filled` puts the default into the field instead of behind it."""
    import gradio as gr

    option, default = OPTIONS[name], field_value(name, OPTIONS[name].default)
    first = preset(True).get(name, default if filled else "")  # the embedded model is the one chosen at first
    common_part = {"label": label, "info": help, "elem_id": f"option-{name}"}
    if option.type == "bool":
        return gr.Checkbox(default, **common_part)
    choices = [str(choice) for choice in option.metadata["choices"]]
    if not is_text(name):
        unset = [(t("no") if filled else t("unset"), "")] if option.default is None else []
        return gr.Dropdown([*unset, *(choices or ["true", "false"])], value=default, **common_part)
    if filled:
        return gr.Textbox(first, max_lines=1, placeholder=default or t("automatic"), **common_part)
    return gr.Textbox(first, max_lines=1, placeholder=default or t("unset"), **common_part)


# What is set is kept in the browser: for another visit, the other language, and another start of the server. Put back
# there, too: an answer of the server could come after the visitor has typed, and take the place of that. INITIAL is
# what the fields hold at first, CHOICES what some are limited to. A name that the page had made is made anew.
RESTORE = """() => {
  const initial = INITIAL, choices = CHOICES, was = JSON.parse(localStorage.getItem("onecard-settings") ?? "{}");
  const two = (number) => String(number).padStart(2, "0"), now = new Date();
  const day = `${now.getFullYear()}${two(now.getMonth() + 1)}${two(now.getDate())}`;
  const made = `run-${day}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
  const fits = (n) => typeof (was[n] ?? undefined) === typeof initial[n] && (choices[n]?.includes(was[n]) ?? true);
  const held = Object.keys(initial).map((n) => (fits(n) ? was[n] : initial[n]));
  window.onecardRestored = true;
  return [/^run-\\d{8}-\\d{6}$/.test(was.run ?? "") ? made : was.run || made, ...held];
}"""
KEEP = """(run, ...values) => {
  const set = Object.fromEntries(NAMES.map((name, i) => [name, values[i]]));
  if (window.onecardRestored) localStorage.setItem("onecard-settings", JSON.stringify({run, ...set}));
}"""


def scripts(options: dict[str, Any]) -> tuple[str, str]:
    """RESTORE and KEEP for these fields."""
    initial = {name: component.value for name, component in options.items()}
    limited = [name for name in options if OPTIONS[name].metadata["choices"]]
    choices = {name: ["", *map(str, OPTIONS[name].metadata["choices"])] for name in limited}
    restore = RESTORE.replace("INITIAL", json.dumps(initial)).replace("CHOICES", json.dumps(choices))
    return restore, KEEP.replace("NAMES", json.dumps(list(options)))


def page(
    t: Translate, help_of: Callable[[str], str], group_of: Callable[[str], str], options: dict[str, Any]
) -> Callable[[Any], None]:
    """The components inside an open gr.Tab; adds its options to `options`.

    Returns what connects the events, given the tab. `help_of` an option and `group_of` a group's title are in the
    page's language.
    """
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=330):
            labels = {
                "num_train_epochs": t("Passes over the data"),
                "learning_rate": t("Learning rate"),
                "per_device_train_batch_size": t("Batch size"),
                "gradient_accumulation_steps": t("Batches a step"),
                "cutoff_len": t("Longest sample, in tokens"),
                "lora_rank": t("LoRA rank"),
                "quantization_bit": t("Base model in 4 or 8 bit"),
                "val_size": t("Held out (share or number)"),
                "name": t("The model's name"),
                "author": t("Its author"),
                "packing": t("Pack several samples into a row"),
            }
            with gr.Group(elem_classes="tight"):
                with gr.Row():
                    run_name = gr.Textbox(label=t("Name of the run"), max_lines=1, elem_id="run-name")
                    recipes = [(path.stem, str(path)) for path in sorted((common.ROOT / "configs").glob("*.yaml"))]
                    recipe = gr.Dropdown(recipes, value=None, label=t("Start from a recipe"), elem_id="recipe-choice")
                for pair in zip(FIRST[:-1:2], FIRST[1::2], strict=True):
                    with gr.Row():
                        for name in pair:
                            options[name] = make_field(name, labels[name], None, t, filled=True)
                options["packing"] = make_field("packing", labels["packing"], None, t)
            memory = gr.HTML(elem_id="memory", padding=False)
            fault = gr.HTML(elem_id="train-fault", padding=False)
            overwrite = gr.Checkbox(
                False, label=t("start over where the run exists"), visible=False, elem_id="start-over"
            )
            start = gr.Button(t("Start"), variant="primary", elem_id="train-start")
            refused = gr.HTML(elem_id="start-fault", padding=False)
            with gr.Accordion(t("All other settings"), open=False, elem_id="all-settings"):
                for title in FOLDED:
                    rest = [n for n in data_page.options_of(title) if n not in options and n not in HIDDEN]
                    if rest:
                        with gr.Accordion(group_of(title), open=False):
                            for name in rest:
                                options[name] = make_field(name, name, help_of(name), t)
            with gr.Accordion(t("Command and recipe"), open=False, elem_id="recipe"):
                gr.HTML(theme.note(t("What the page starts, for a terminal or a script:")))
                shown_command = gr.Code(
                    language="shell",
                    label=t("Command"),
                    buttons=["copy"],
                    wrap_lines=True,
                    lines=2,
                    max_lines=10,
                    elem_id="command",
                )
                shown_recipe = gr.Code(
                    language="yaml", label=t("Recipe"), buttons=["copy", "download"], wrap_lines=True, elem_id="yaml"
                )
                load = gr.UploadButton(t("Load a recipe (YAML)"), file_types=[".yaml", ".yml", ".json"], elem_id="load")
            loaded_note = gr.HTML(elem_id="load-state", padding=False)
        with gr.Column(scale=7, min_width=330):
            with gr.Row(elem_classes="when-run"):
                run = gr.Dropdown([], label=t("Run"), elem_id="run", min_width=200)
                compare = gr.Dropdown([], multiselect=True, label=t("Compare with"), elem_id="compare", min_width=200)
            status = gr.HTML(elem_id="status", padding=False)
            with gr.Row():
                buttons = {
                    "pause": gr.Button(t("Pause"), elem_id="train-pause", visible=False),
                    "go_on": gr.Button(t("Go on"), variant="primary", elem_id="train-go-on", visible=False),
                    "abort": gr.Button(t("Abort"), variant="stop", elem_id="train-abort", visible=False),
                }
            told = gr.HTML(elem_id="watch-fault", padding=False)
            loss_plot = gr.HTML(elem_id="loss-plot", elem_classes="when-run", padding=False)
            small_plots = gr.HTML(elem_id="small-plots", elem_classes="when-run", padding=False)
            with gr.Accordion(t("Log"), open=True, elem_classes="when-run"):
                log = gr.HTML(elem_id="train-log", padding=False)
    with gr.Accordion(t("All runs"), open=False, elem_id="all-runs", elem_classes="when-run"):
        all_runs = gr.HTML(padding=False)
    seen, acted, timer = gr.State(dict), gr.State(0.0), gr.Timer(2)
    kept = gr.BrowserState({}, storage_key="onecard-kept", secret="onecard")  # of a recipe, without a field

    def read_fields(name: str, others: dict[str, str], *values: Any) -> Loaded:
        return settle(dict(zip(options, values, strict=True)), name, t, others)

    def live(name: str, others: dict[str, str], *values: Any) -> list[Any]:
        there = gr.Checkbox(visible=is_there(name))
        try:
            config = (loaded := read_fields(name, others, *values)).config
        except UserError as error:
            return [theme.fault(error), "", "", "", there, ""]
        listed = ", ".join(f"{option}={text}" for option, text in others.items())
        held = [t("Of the recipe, without a field here: {settings}", settings=listed)] if others else []
        notes = "".join(map(theme.note, [*held, *map(str, loaded.notes)]))
        return [notes, memory_html(config, t), jobs.shown(command(config)), recipe_text(config), there, ""]

    def begin(over: bool, name: str, others: dict[str, str], *values: Any) -> list[Any]:
        try:
            folder = start_run(read_fields(name, others, *values).config, over, t)
        except UserError as error:
            return [theme.fault(error), gr.Checkbox(visible=is_there(name)), gr.skip()]
        begun = folder.relative_to(common.SAVES).as_posix()
        return ["", False, gr.Dropdown(choices=run_names(), value=begun)]

    def act(what: Callable[[Path], None]) -> Callable[[str | None], tuple[str, float]]:
        def acting(name: str | None) -> tuple[str, float]:
            try:
                if name:
                    what(widgets.run_folder(name))
            except UserError as error:
                return theme.fault(error), time.time()
            return "", time.time()

        return acting

    def watch(name: str | None, others: list[str], shown: dict[str, Any]) -> list[Any]:
        names = run_names()
        chosen = name if name in names else (at_work() or next(iter(names), None))
        several = [chosen, *(other for other in others or [] if other != chosen)] if chosen else []
        state = run_state(widgets.run_folder(chosen)) if chosen else "none"
        large, small = plots_html(several, t)
        busy = widgets.at_work(t)
        now = {
            "run": (names, chosen),
            "compare": [other for other in names if other != chosen],
            "status": status_html(chosen, t),
            "loss": large,
            "small": small,
            "log": log_html(chosen, t),
            "runs": runs_html(t),
            "pause": state in ("running", "starting"),
            "go_on": state in ("interrupted", "killed", "aborted", "failed"),
            "abort": state in ("running", "starting"),
            "told": busy,
            "refused": busy,
        }
        sent = dict(zip(now, widgets.only_changes(shown, **now), strict=True))
        sent |= {name: widgets.outdated(sent[name]) for name in ("told", "refused")}
        if isinstance(sent["run"], tuple):
            sent["run"] = widgets.offer(names, chosen, name)
        if isinstance(sent["compare"], list):
            sent["compare"] = gr.Dropdown(choices=now["compare"])
        for button in buttons:
            if isinstance(sent[button], bool):
                sent[button] = gr.Button(visible=sent[button])
        return [*sent.values(), shown]

    def fill(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip()] * (len(options) + 3)
        try:
            loaded = common.load_config([path])
        except UserError as error:
            said = str(error).replace(f"{path}: ", "").replace(path, Path(path).name)
            return [theme.fault(said), *([gr.skip()] * (len(options) + 2))]
        name, others = run_name_of(loaded), without_field(loaded, list(options))
        notes = [t("{file} is loaded.", file=Path(path).name), *map(str, loaded.notes)]
        if common.SAVES / name != Path(loaded.config.output_dir):
            moved = t(
                "Runs of this page lie below saves/: {name} there, not {folder}.",
                name=name,
                folder=loaded.config.output_dir,
            )
            notes.append(moved)
        return ["".join(map(theme.note, notes)), name, others, *fields_of(loaded, list(options)).values()]

    def fit_model(model: str, *values: Any) -> list[Any]:
        """Good values for another model, where the fields still hold those that the page had put there."""
        shown, fitting = dict(zip(PRESET, values, strict=True)), preset(is_small(model or ""))
        empty_is_default = {n: v or field_value(n, OPTIONS[n].default) for n, v in shown.items()}
        untouched = any(empty_is_default == preset(small) for small in (True, False))
        return [fitting[n] if untouched and fitting[n] != shown[n] else gr.skip() for n in PRESET]

    def connect(tab: gr.Tab) -> None:
        from gradio.context import Context

        settings = [run_name, kept, *options.values()]
        outcome = [fault, memory, shown_command, shown_recipe, overwrite, refused]
        quick = {"show_progress": "hidden", "trigger_mode": "always_last"}
        gr.on([*(c.change for c in settings), tab.select], live, settings, outcome, **quick)
        start.click(begin, [overwrite, *settings], [refused, overwrite, run], show_progress="hidden")
        for name, what in (("pause", pause), ("go_on", lambda folder: go_on(folder, t)), ("abort", abort)):
            buttons[name].click(act(what), run, [told, acted], show_progress="hidden")
        watched = [run, compare, status, loss_plot, small_plots, log, all_runs, *buttons.values(), told, refused, seen]
        root = Context.root_block
        # one event for all: of two at a time the older answer could come last
        moments = [root.load, tab.select, timer.tick, run.change, compare.change, acted.change]
        gr.on(moments, watch, [run, compare, seen], watched, **quick)
        load.upload(fill, load, [loaded_note, *settings], show_progress="hidden")
        recipe.input(fill, recipe, [loaded_note, *settings], show_progress="hidden")
        model, fitted = options["model_name_or_path"], [options[name] for name in PRESET]
        model.input(fit_model, [model, *fitted], fitted, show_progress="hidden")
        fields, (restore, keep) = [run_name, *options.values()], scripts(options)
        root.load(None, None, fields, js=restore)  # their change calls `live`
        gr.on([c.change for c in fields], None, fields, None, js=keep)

    return connect


CSS = """
.tight .block { padding-top: 7px !important; padding-bottom: 7px !important; }
.tight .block span { margin-bottom: 3px !important; } .tight input, .tight textarea { padding: 6px 8px !important; }
.tight .wrap-inner { padding: 0 !important; } .tight .wrap-inner input { margin: 3px !important; }
.memory { font-size: 14px; }
.memory-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 12px; }
.memory-head b { font-weight: 600; } .memory-head span { color: var(--body-text-color-subdued); }
.memory-bar { position: relative; display: flex; height: 14px; margin: 6px 0 8px; border-radius: 4px;
  background: var(--block-border-color); }
.memory-bar i { height: 100%; background: var(--c); } .memory-bar i:first-child { border-radius: 4px 0 0 4px; }
.memory-bar .free { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--body-text-color); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 10px 20px; }
"""
