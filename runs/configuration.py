"""A recipe and a command line become a configuration: read, rename, coerce, complete, check it whole.

Every fault of both is named at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common import OPTIONS, ROOT, SAVES, Config, Message, UserError, command, help_text, nearest_word, run_script
from runs.compatibility import check_foreign, compatibility, push_notes, rename
from runs.option_values import as_text, coerce, is_left_empty
from runs.recipe import read_recipe
from runs.setting_checks import EMBEDDING_MODULES, REPORTERS, find_faults

V1_KEYS = {"train_dataset", "peft_config", "dist_config", "kernel_config", "micro_batch_size"}


class ConfigFaults(UserError):
    """The faults of a configuration, all at once: the field `faults`."""


@dataclass(frozen=True)
class Loaded:
    """A configuration and how it came about: the recipe's path (or None), its notes, the options that were set, and
    those of them that were set on the command line."""

    config: Config
    recipe: Path | None
    notes: list[Message]
    given: frozenset[str]
    typed: frozenset[str] = frozenset()


def load_config(arguments: list[str]) -> Loaded:
    """Reads `[RECIPE] [key=value ...]`, the recipe being a YAML or JSON file; later values win.

    Raises UserError that names every fault of the file and the command line at once.
    """
    recipe, typed = _parse(arguments)
    read = read_recipe(recipe) if recipe else {}
    if of_v1 := V1_KEYS & read.keys():
        text = "{recipe} is of LLaMA-Factory v1 ({keys}); use model_name_or_path, dataset, lora_rank, lora_target"
        raise UserError(text, recipe=recipe, keys=sorted(of_v1))
    faults: list[Message] = []
    notes: list[Message] = []
    values: dict[str, Any] = {}
    settings = rename(read, recipe, faults) | (typed_settings := rename(typed, None, faults))
    for name, setting in settings.items():
        try:
            if name not in OPTIONS:
                notes += check_foreign(name, setting.value)
            elif not is_left_empty(name, setting.value):
                values[name] = coerce(name, setting.value)
        except UserError as error:
            faults.append(setting.fault(error.message))
    config = _complete(Config(**values), recipe, notes)
    faults += find_faults(config)
    if faults:
        raise ConfigFaults(
            "the configuration has {count} fault{count:plural}:\n  {faults:lines}\n{help} lists every key.",
            count=len(faults),
            faults=faults,
            help=command("train.py", "--help"),
        )
    notes += push_notes(read | typed)
    return Loaded(config, recipe, notes, frozenset({*values, "output_dir"}), frozenset(typed_settings))


def _parse(arguments: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The recipe and the settings of a command line."""
    recipe: Path | None = None
    typed: dict[str, Any] = {}
    for argument in join_settings(arguments):
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals and re.fullmatch(r"[\w-]+", key) and not os.path.exists(argument):
            typed[key.replace("-", "_")] = _structure(value)
        elif argument.startswith("-"):
            flags = re.findall(r"--[a-z][a-z-]+", sys.modules["__main__"].__doc__ or "")  # of the command that runs
            near = nearest_word(argument, ["--help", *flags, *(f"--{name}" for name in OPTIONS)])
            raise UserError("unknown argument {argument}{near:suggestion}; see --help", argument=argument, near=near)
        elif recipe is not None:
            raise UserError("two recipes given, {first} and {second}; give one", first=recipe, second=argument)
        else:
            recipe = Path(argument).expanduser()
    return recipe, typed


def _structure(text: str) -> Any:
    """A list or mapping that was typed; any other value stays text."""
    try:
        return yaml.safe_load(text) if text.startswith(("[", "{")) else text
    except yaml.YAMLError:
        return text


def join_settings(arguments: list[str]) -> list[str]:
    """The arguments of a command line with the usual ways to write settings brought into one form.

    `--key value`, `--key=value` and `--key` (of what may be true) become `key=value`; `--config FILE` becomes `FILE`;
    the underscores of other flags become dashes. Raises UserError for another `--key` without a value.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        follows = rest[0] if rest and not rest[0].startswith("--") else None  # a value never begins with --
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not argument.startswith("--") or not name:
            joined.append(argument)
        elif not (key in (*OPTIONS, "config") or compatibility().knows(key)):
            joined.append(f"--{name.replace('_', '-')}{equals}{value}")
        elif not equals and (flags := compatibility().flag_values(key)) and as_text(follows or "--") not in flags:
            joined.append(f"{key}=true")
        elif not equals and follows is None:
            raise UserError("{argument} has no value; write {argument}=VALUE", argument=argument)
        else:
            value = value if equals else rest.pop(0)
            joined.append(value if key == "config" else f"{key}={value}")
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# What a configuration leaves open


def _complete(config: Config, recipe: Path | None, notes: list[Message]) -> Config:
    """The configuration with all filled in that depends on the recipe's place, other settings or this machine."""
    changed: dict[str, Any] = {
        "dataset_dir": find_dataset_dir(config.dataset_dir, recipe),
        "output_dir": config.output_dir or str(SAVES / (recipe.stem if recipe else "default")),
        "packing": defaults_of(config.stage)["packing"] if config.packing is None else config.packing,
        "reward_funcs": tuple(_reward_file(name, recipe) for name in config.reward_funcs),
        "report_to": tuple(name.lower() for name in config.report_to),
    }
    if "all" in changed["report_to"]:
        changed["report_to"] = tuple(name for name in REPORTERS if importlib.util.find_spec(name)) or ("none",)
        notes.append(Message("report_to: all means what is installed: {reporters}", reporters=changed["report_to"]))
    if config.trust_remote_code:
        notes.append(Message("trust_remote_code: the Python code that comes with the model is run with your rights"))
    if config.packing and config.stage in ("dpo", "kto", "grpo"):
        changed["packing"] = False
        notes.append(Message("packing has no effect in stages dpo, kto and grpo: their batches are padded"))
    embeddings = tuple(name for name in config.lora_target if name in EMBEDDING_MODULES)
    if embeddings and set(config.lora_target) > set(embeddings):  # Unsloth trains them in full, not by LoRA
        changed["lora_target"] = tuple(name for name in config.lora_target if name not in embeddings)
        changed["additional_target"] = tuple(dict.fromkeys((*config.additional_target, *embeddings)))
        notes.append(Message("{modules} of lora_target: trained in full, as in additional_target", modules=embeddings))
    return dataclasses.replace(config, **changed)


def defaults_of(stage: str) -> dict[str, Any]:
    """The default of every option in a stage."""
    return {name: option.default for name, option in OPTIONS.items()} | {"packing": stage == "pt"}


def find_dataset_dir(folder: str, recipe: Path | None) -> str:
    """The folder that `dataset_dir` means: in the working directory, else in a folder above the recipe, else the kit's.

    `folder` itself where it is nowhere: what reads the data says so.
    """
    if Path(folder).is_absolute() or Path(folder).is_dir():
        return folder
    above = recipe.resolve().parents if recipe else ()
    return next(
        (str(home / folder) for home in (*above, ROOT) if (home / folder / "dataset_info.json").is_file()), folder
    )


def _reward_file(reward: str, recipe: Path | None) -> str:
    """One of `reward_funcs`, where it is FILE.py:function with the file's path, which may be beside the recipe."""
    file, _, function = reward.rpartition(":")
    if file.endswith(".py") and recipe and not Path(file).is_file() and (recipe.parent / file).is_file():
        return f"{recipe.parent / file}:{function}"
    return reward


# ---------------------------------------------------------------------------------------------------------------------
# What a recipe is for


def asks_for_training(config: Config) -> bool:
    """Whether a recipe is for train.py: do_train where it is set, else unless it only evaluates or predicts."""
    if config.do_train is not None:
        return config.do_train
    return not (config.do_eval or config.do_predict)


def check_training_asked_for(loaded: Loaded) -> list[Message]:
    """Notes on what a training does otherwise than the recipe asks.

    Raises UserError for a recipe that asks for no training, or for what a training does not do.
    """
    config = loaded.config
    if not asks_for_training(config):
        evaluate = command("evaluate.py", *filter(None, [loaded.recipe]))
        text = "this recipe asks for no training; evaluate ({evaluate}), or set do_train: true to train"
        raise UserError(text, evaluate=evaluate)
    if loaded.recipe and config.export_dir and "dataset" not in loaded.given and config.do_train is None:
        merge = command("merge.py", loaded.recipe)
        text = "this recipe has an export_dir and no data: merge ({merge}), or set dataset to train"
        raise UserError(text, merge=merge)
    if config.compute_accuracy:
        raise UserError("compute_accuracy: not measured while training; take it out and run evaluate.py afterwards")
    for key in ("do_eval", "do_predict"):
        if getattr(config, key) and config.val_size == 0 and not config.eval_dataset:
            raise UserError("{key}: there is no data to do it on; set val_size above 0, or eval_dataset", key=key)
    if not loaded.recipe and not loaded.typed:
        text = "no recipe is given: training on {dataset} with default settings; the smallest recipe is {recipe}"
        return [Message(text, dataset=list(config.dataset), recipe="configs/quickstart.yaml")]
    if config.do_predict or config.predict_with_generate:
        return [Message("replies are generated by evaluate.py, which do_predict starts after the training")]
    return []


def run_command(main: Callable[[list[str]], None], usage: str, groups: tuple[str, ...] = ()) -> None:
    """`common.run_script` for a command that takes settings, in all the forms of `join_settings`.

    `--help` prints `usage` and the options (of `groups`).
    """

    def run(argv: list[str]) -> None:
        arguments = _without_command_word(join_settings(argv))
        if {"-h", "--help"} & set(arguments):
            print(help_text(usage, groups))
        else:
            main(arguments)

    run_script(run)


def _without_command_word(arguments: list[str]) -> list[str]:
    """Arguments without the command that LLaMA-Factory's users type first: `train.py train RECIPE`."""
    words = {"train": ("train",), "chat": ("chat",), "evaluate": ("eval",), "merge": ("export",), "api": ("api",)}
    is_word = arguments[1:] and arguments[0] in words.get(Path(sys.argv[0]).stem, ())
    return arguments[1:] if is_word and not os.path.exists(arguments[0]) else arguments
