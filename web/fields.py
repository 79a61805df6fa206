"""The settings of a training: options of common.Config as fields of the page, and the configuration that they make.

Only options that are treated specially are named here: a new option of Config appears by itself, in its group.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import common
from common import OPTIONS, Config, Message, UserError
from runs.configuration import ConfigFaults, Loaded, load_config
from runs.texts import Translator
from training import memory
from web import control
from web.theme import static

NOT_TRAINING = ("chat", "export", "evaluation")  # groups of options that a training does not read
DECIDED_BY_PAGE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "use_unsloth")
QUICKSTART = common.ROOT / "configs" / "quickstart.yaml"
SMALL = 10**9  # parameters below which a model needs the high learning rate of QUICKSTART
PRESET = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
PRESET += ("cutoff_len", "lora_rank", "warmup_steps", "template")


def first_labels(t: Translator) -> dict[str, str]:
    """The settings that decide over a run, in the order of the page; all others are folded by their groups."""
    return {
        "num_train_epochs": t("Passes over the data"),
        "learning_rate": t("Learning rate"),
        "per_device_train_batch_size": t("Batch size"),
        "gradient_accumulation_steps": t("Batches per step"),
        "cutoff_len": t("Longest sample, in tokens"),
        "lora_rank": t("LoRA rank"),
        "quantization_bit": t("Base model in 4 or 8 bit"),
        "val_size": t("Held out (share or number)"),
        "name": t("The model's name"),
        "author": t("Its author"),
        "packing": t("Pack several samples into a row"),
    }


@functools.cache
def folded_groups() -> dict[str, list[str]]:
    """The titles and names of a training's options, without those of one choice or that the page decides."""
    found: dict[str, list[str]] = {}
    title = ""
    for option in dataclasses.fields(Config):
        title = option.metadata.get("group", title)
        hidden = option.name in DECIDED_BY_PAGE or len(option.metadata.get("choices", ())) == 1
        if "help" in option.metadata and title not in NOT_TRAINING and not hidden:
            found.setdefault(title, []).append(option.name)
    return found


def choices_of(name: str) -> list[str]:
    return [str(choice) for choice in OPTIONS[name].metadata["choices"]]


# ---------------------------------------------------------------------------------------------------------------------
# Fields


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


def make_field(name: str, t: Translator, label: str | None = None) -> Any:
    """The Gradio component of an option: with a `label` it shows the quickstart's value, else empty is the default."""
    import gradio as gr

    option, text = OPTIONS[name], OPTIONS[name].metadata["help"]
    default = field_value(name, option.default)
    shown = {"label": label or name, "info": None if label else t.message(Message(text)), "elem_id": f"option-{name}"}
    if option.type == "bool":
        return gr.Checkbox(default, **shown)
    if not is_text(name):
        unset = [(t("no") if name == "quantization_bit" else t("unset"), "")] if option.default is None else []
        return gr.Dropdown([*unset, *(choices_of(name) or ("true", "false"))], value=default, **shown)
    placeholder = default or (t("automatic") if label else t("unset"))
    return gr.Textbox(preset(True).get(name, default if label else ""), max_lines=1, placeholder=placeholder, **shown)


def storage_scripts(options: dict[str, Any]) -> tuple[str, str]:
    """JavaScript functions that fill the fields from the browser's storage, and that keep there what was set."""
    initial = {name: component.value for name, component in options.items()}
    limited = {name: ["", *choices_of(name)] for name in options if choices_of(name)}
    restore = static("restore_settings.js").replace("INITIAL", json.dumps(initial))
    restore = restore.replace("CHOICES", json.dumps(limited))
    return restore, static("keep_settings.js").replace("NAMES", json.dumps(list(options)))


# ---------------------------------------------------------------------------------------------------------------------
# Fields ↔ configuration


def read_settings(fields: dict[str, Any], name: str, others: dict[str, str] | None = None) -> Loaded:
    """The configuration of what stands in the fields, for a run called `name`; raises UserError with every fault.

    `others` is what `without_field` found in a loaded recipe.
    """
    faults: list[Message] = []
    arguments = [f"{n}={text}" for n, text in (others or {}).items() if n in OPTIONS]  # one may be of an older kit
    try:
        arguments.append(f"output_dir={control.run_folder(name)}")
    except UserError as error:
        faults.append(error.message)
        arguments.append(f"output_dir={common.SAVES}")
    for option, value in fields.items():
        text = ",".join(value) if isinstance(value, list) else value
        if text not in (None, "", field_value(option, OPTIONS[option].default)):
            arguments.append(f"{option}={text}")
    if fields.get("dataset") == []:
        faults.append(Message("no dataset is chosen; choose one on the page Model and data"))
    try:
        loaded = load_config(arguments)
    except UserError as error:
        found = error.fields["faults"] if isinstance(error, ConfigFaults) else [error.message]
        faults += [_on_this_page(fault) for fault in found]
    if faults:
        raise UserError("{faults:lines}", faults=faults)
    return loaded


def _on_this_page(fault: Message) -> Message:
    """A fault of a setting with this page as its place, and not the command line."""
    place = {"place": Message("this page")} if "place" in fault.fields else {}
    return Message(fault.sentence, **{**fault.fields, **place})


def fields_of(loaded: Loaded, names: Sequence[str], first: Collection[str] = ()) -> dict[str, Any]:
    """What the fields must hold for a loaded recipe; one not in `first` that has its default stays empty, as it was."""
    values = {name: field_value(name, getattr(loaded.config, name)) for name in names}
    folded = {n for n in names if is_text(n) and n not in (*first, "model_name_or_path", "dataset")}
    return {n: "" if n in folded and v == field_value(n, OPTIONS[n].default) else v for n, v in values.items()}


def without_field(loaded: Loaded, names: Sequence[str]) -> dict[str, str]:
    """What a loaded recipe sets and no field of `names` holds, as `key=value` would have it: it must not get lost."""
    known = (*names, "output_dir", "overwrite_output_dir")  # the last two are decided by the page
    rest = {n: v for n, v in control.differing(loaded.config).items() if n not in known}
    return {n: str(v).lower() if isinstance(v, bool | None) else str(v) for n, v in rest.items()}


def with_other_path(error: UserError, old: str, new: str) -> UserError:
    """The same error with another path of the file, wherever that stands in its fields: that of a copy says nothing."""
    text = json.dumps(error.message.to_json()).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    return UserError.from_message(Message.from_json(json.loads(text)))


def run_name_of(loaded: Loaded) -> str:
    """The name of a loaded recipe's run: its folder below saves/, or only its last part where it lies elsewhere."""
    folder = Path(loaded.config.output_dir)
    return (folder.relative_to(common.SAVES) if folder.is_relative_to(common.SAVES) else Path(folder.name)).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# Good values for a model


@functools.cache
def preset(small: bool) -> dict[str, Any]:
    """Good values of the settings PRESET: the quickstart's for a small model, else the kit's defaults."""
    config = load_config([str(QUICKSTART)]).config if small else Config()
    return {name: field_value(name, getattr(config, name)) for name in PRESET}


def parameters(model: Path) -> int:
    """The number of parameters of a model on the disk; 0 where it has no safetensors files."""
    return sum(math.prod(shape) for shape in memory.tensor_shapes(model).values())


def is_small(model: str) -> bool:
    folder = Path(model)
    return model == common.EMBEDDED_MODEL or (folder.is_dir() and 0 < parameters(folder) < SMALL)


def fitting(model: str, shown: dict[str, Any]) -> dict[str, Any]:
    """What to change of PRESET's fields for another model: nothing where the visitor has changed one of them."""
    wanted = preset(is_small(model))
    with_defaults = {n: v or field_value(n, OPTIONS[n].default) for n, v in shown.items()}
    untouched = any(with_defaults == preset(small) for small in (True, False))
    return {n: wanted[n] for n in PRESET if untouched and wanted[n] != shown[n]}
