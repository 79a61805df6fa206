"""A recipe and a command line become a configuration; every fault of both is named at once."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common import OPTIONS, ROOT, SAVES, TYPES, Config, Message, UserError, command, nearest_word, run_script
from runs.compatibility import compatibility, is_default
from runs.option_values import as_text, check_option, coerce, is_unset
from runs.recipe import join_settings, read_recipe
from runs.redaction import REDACTED, is_secret, redact

MAY_BE_EMPTY = {"name", "author"}  # then {{name}} and {{author}} in the data stay as they are

# Trackers that transformers knows, each by the name of its package.
REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "neptune", "trackio", "comet_ml", "clearml")


# What lr_scheduler_kwargs may set of each schedule of transformers that has values of its own.
DECAYS = ("linear", "cosine", "1-sqrt")
MIN_RATES = ("min_lr", "min_lr_rate")
SCHEDULE_VALUES = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", *MIN_RATES),
    "cosine_warmup_with_min_lr": ("num_cycles", "warmup_lr_rate", *MIN_RATES),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
V1_KEYS = {"train_dataset", "peft_config", "dist_config", "kernel_config", "micro_batch_size"}
EMBEDDING_MODULES = {"embed_tokens", "lm_head"}

# The optimizers that read optim_args in transformers; the others would ignore it without a message.
TAKE_ARGUMENTS = ("ademamix", "ademamix_8bit", "sgd", "rmsprop", "adagrad")


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
    recipe: Path | None = None
    read: dict[str, Any] = {}
    typed: dict[str, Any] = {}
    for argument in join_settings(arguments):
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals and key.replace("_", "").replace("-", "").isalnum() and not os.path.exists(argument):
            typed[key.replace("-", "_")] = _parse(value)
        elif argument.startswith("-"):
            raise UserError(
                "unknown argument {argument}{near:suggestion}; settings are written key=value or --key value, "
                "--help lists them",
                argument=argument,
                near=nearest_word(argument, _flags()),
            )
        elif recipe is not None:
            raise UserError(
                "two recipes given, {first} and {second}; give one, and settings as key=value",
                first=recipe,
                second=argument,
            )
        else:
            recipe = Path(argument).expanduser()
            read = read_recipe(recipe)
    return _resolve(recipe, read, typed)


def _flags() -> list[str]:
    """The flags of the command that runs, which its docstring lists, and the settings."""
    told = re.findall(r"--[a-z][a-z-]+", sys.modules["__main__"].__doc__ or "")
    return ["--help", *told, *(f"--{name}" for name in OPTIONS)]


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.startswith(("[", "{")) else text
    except yaml.YAMLError:
        return text


@dataclass(frozen=True)
class _Setting:
    """A value as it was given: under which key, and where (a recipe, or None for the command line)."""

    key: str
    value: Any
    recipe: Path | None

    @property
    def shown(self) -> Any:
        """The value as an error may show it."""
        if is_secret(self.key):
            return REDACTED
        return redact(self.value) if isinstance(self.value, str) else self.value

    def fault(self, problem: Message) -> Message:
        place = Message("command line") if self.recipe is None else str(self.recipe)
        return Message(
            "{place}: {key}: {value} {problem}", place=place, key=self.key, value=self.shown, problem=problem
        )


def _by_name(given: dict[str, Any], recipe: Path | None, faults: list[Message]) -> dict[str, _Setting]:
    """The settings of one origin by the names of their options; the same one under two names is a fault."""
    known = compatibility()
    found: dict[str, _Setting] = {}
    for key, value in given.items():
        meant = known.means[key].get(as_text(value), {}) if key in known.means else {known.renamed.get(key, key): value}
        for name, one in meant.items():
            if name in found:
                one = _combined(name, found[name].value, one)
            if one is None and name in found:
                place = Message("command line") if recipe is None else str(recipe)
                faults.append(
                    Message(
                        "{place}: {first} and {second} are the same setting; keep one",
                        place=place,
                        first=found[name].key,
                        second=key,
                    )
                )
            else:
                found[name] = _Setting(key, one, recipe)
    return found


def _combined(name: str, first: Any, second: Any) -> Any:
    """The value of an option that two keys set, as use_swanlab adds to report_to; None where they contradict."""
    if name == "packing":  # of which neat_packing is a kind
        return as_text(first) in ("true", "1") or as_text(second) in ("true", "1")
    if name == "report_to":
        reporters = [one for value in (first, second) for one in (value if isinstance(value, list) else [value])]
        return [one for one in reporters if not is_unset(one)]
    return first if as_text(first) == as_text(second) else None


def _resolve(recipe: Path | None, read: dict[str, Any], typed: dict[str, Any]) -> Loaded:
    if of_v1 := V1_KEYS & read.keys():
        raise UserError(
            "{recipe} is a recipe of LLaMA-Factory's v1 ({keys}), and this kit reads the keys of 0.9: "
            "model_name_or_path for model, dataset (the data file itself) for train_dataset, "
            "per_device_train_batch_size for micro_batch_size, lora_rank, lora_alpha, lora_dropout, lora_target "
            "for peft_config",
            recipe=recipe,
            keys=sorted(of_v1),
        )
    faults: list[Message] = []
    notes: list[Message] = []
    values: dict[str, Any] = {}
    typed_by_name = _by_name(typed, None, faults)
    for name, setting in {**_by_name(read, recipe, faults), **typed_by_name}.items():
        problem = _foreign_key(name, setting, notes) if name not in OPTIONS else _read_option(name, setting, values)
        if problem:
            faults.append(setting.fault(problem))
    _move_embeddings(values, notes)
    faults += _check_preferences(values) + _check_schedule(values) + _check_rewards(values)
    faults += _check_data(values) + _check_adapter(values) + _check_steps(values) + _check_reporters(values, notes)
    if faults:
        raise ConfigFaults(
            "the configuration has {count} fault{count:plural}:\n  {faults:lines}\n{help} lists every key.",
            count=len(faults),
            faults=faults,
            help=command("train.py", "--help"),
        )
    notes += _push_notes({**read, **typed})
    if values.get("trust_remote_code"):
        notes.append(Message("trust_remote_code: the Python code that comes with the model is run with your rights"))
    if values.get("packing") and values.get("stage") in ("dpo", "kto", "grpo"):
        values["packing"] = False
        notes.append(Message("packing has no effect on answers that are compared: their batches are padded"))
    if "reward_funcs" in values:
        values["reward_funcs"] = tuple(find_reward_file(name, recipe) for name in values["reward_funcs"])
    if values.get("packing") is None:
        values["packing"] = defaults_of(values.get("stage", Config.stage))["packing"]
    if values.get("output_dir") is None:
        values["output_dir"] = str(SAVES / (recipe.stem if recipe else "default"))
    values["dataset_dir"] = find_dataset_dir(values.get("dataset_dir", Config.dataset_dir), recipe)
    named = {*_by_name(read, recipe, []), *typed_by_name}
    given = frozenset(values) - {name for name in ("dataset_dir", "packing") if name not in named}
    return Loaded(Config(**values), recipe, notes, given, frozenset(typed_by_name))


def defaults_of(stage: str) -> dict[str, Any]:
    """The default of every option in a stage."""
    return {name: option.default for name, option in OPTIONS.items()} | {"packing": stage == "pt"}


def _read_option(name: str, setting: _Setting, values: dict[str, Any]) -> Message | None:
    """Puts an option's value into `values`, where it is not left empty; or what is wrong with it."""
    value = setting.value
    is_optional_number = {type(None), float, int} & set(typing.get_args(TYPES[name])) > {type(None)}
    if is_optional_number and as_text(value) == "false":
        value = None
    if name in MAY_BE_EMPTY and isinstance(value, str):
        values[name] = value.strip()
        return None
    choices = OPTIONS[name].metadata["choices"]
    if is_unset(value) and not (isinstance(value, str) and value.strip().lower() in choices):
        if name == "dataset":
            values[name] = ()
        elif type(None) in typing.get_args(TYPES[name]):
            values[name] = None
        return None
    try:
        values[name] = coerce(name, value)
        return check_option(name, values[name])
    except UserError as error:
        return error.message


def _foreign_key(key: str, setting: _Setting, notes: list[Message]) -> Message | None:
    """What is wrong with a key that is no option; may add a note."""
    known = compatibility()
    if key in known.no_effect:
        return None
    if key in known.noted:
        defaults, reason = known.noted[key]
        if not is_default(setting.value, defaults):
            notes.append(Message("{key}: {value}: {reason}", key=key, value=setting.value, reason=Message(reason)))
        return None
    if key in known.refused:
        defaults, reason = known.refused[key]
        return (
            None
            if is_default(setting.value, defaults)
            else Message("is not supported: {reason}", reason=Message(reason))
        )
    return Message("is not a known key{near:suggestion}", near=nearest_word(key, [*OPTIONS, *known.renamed]))


def _push_notes(settings: dict[str, Any]) -> list[Message]:
    """What takes the place of an upload, which hub_model_id and the other settings of it would describe."""
    asked = compatibility().push
    wanted = [key for key in asked["switches"] if not is_default(settings.get(key), [False, None])]
    names = [settings[key] for key in asked["names"] if not is_unset(settings.get(key))]
    return (
        [
            Message(
                "{keys}: nothing is uploaded by itself; after training: merge.py RUN --push {repo}; a new "
                "repository is "
                "private",
                keys=wanted,
                repo=str((*names, "ORG/NAME")[0]),
            )
        ]
        if wanted
        else []
    )


def _check_data(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of the data taken together."""
    faults = []
    if values.get("val_size") and values.get("eval_dataset"):
        faults.append(
            Message("{first} and {second} exclude each other; keep one", first="val_size", second="eval_dataset")
        )
    if values.get("mask_history") and values.get("train_on_prompt"):
        faults.append(
            Message("{first} and {second} exclude each other; keep one", first="mask_history", second="train_on_prompt")
        )
    if (values.get("val_size") or 0) > 1 and values["val_size"] != int(values["val_size"]):
        faults.append(Message("val_size must be a fraction below 1 or a whole count of samples"))
    probabilities, names = values.get("interleave_probs", ()), values.get("dataset", Config.dataset)
    if not names and not (values.get("do_predict") or values.get("do_eval") or values.get("do_train") is False):
        faults.append(Message("dataset names no data; give a name of dataset_info.json or a file"))
    if probabilities and len(probabilities) != len(names):
        faults.append(
            Message(
                "interleave_probs has {values} value{values:plural} for {datasets} dataset{datasets:plural}; give one "
                "for each",
                values=len(probabilities),
                datasets=len(names),
            )
        )
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-3):
        faults.append(Message("interleave_probs must be positive and sum to 1"))
    return faults


def _check_preferences(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of preferences taken together."""
    if values.get("dpo_label_smoothing") and values.get("pref_loss", "sigmoid") != "sigmoid":
        return [Message("dpo_label_smoothing needs pref_loss: sigmoid")]
    if values.get("pref_beta") == 0 and values.get("stage") in ("dpo", "kto"):
        return [Message("pref_beta: 0 would make the preferences have no effect")]
    only_sft = [name for name in ("pissa_init", "neftune_noise_alpha") if values.get(name)]
    only_sft += ["lora_bias"] if values.get("lora_bias") in ("all", "lora_only") else []
    if values.get("stage", "sft") not in ("sft", "pt"):
        return [
            Message(
                "{key} is for stage: sft and pt; with {stage} the reference is the model with its adapter off, which "
                "{key} would change",
                key=name,
                stage=values["stage"],
            )
            for name in only_sft
        ]
    return []


def _move_embeddings(values: dict[str, Any], notes: list[Message]) -> None:
    """Unsloth trains embeddings whole, not by LoRA: those of lora_target count as additional_target."""
    targets = values.get("lora_target", ())
    moved = tuple(name for name in targets if name in EMBEDDING_MODULES)
    if moved and set(targets) > set(moved):
        values["lora_target"] = tuple(name for name in targets if name not in moved)
        values["additional_target"] = tuple(dict.fromkeys((*values.get("additional_target", ()), *moved)))
        notes.append(
            Message(
                "{modules} of lora_target: embeddings learn whole, not by LoRA, as in additional_target", modules=moved
            )
        )


def _check_rewards(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of stage grpo taken together."""
    if values.get("stage") != "grpo":
        return []

    def value(name: str) -> Any:
        return values.get(name, getattr(Config, name))

    faults = []
    functions, weights = value("reward_funcs"), value("reward_weights")
    if not functions:
        faults.append(
            Message(
                "stage: grpo needs reward_funcs: exact_label, one_of_labels, json_valid, length, regex: PATTERN, or "
                "FILE.py:function"
            )
        )
    elif weights and len(weights) != len(functions):
        faults.append(
            Message(
                "reward_weights has {weights} values for {functions} reward_funcs",
                weights=len(weights),
                functions=len(functions),
            )
        )
    batch, steps, each = map(value, ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"))
    if (replies := batch * steps) % each:
        enough = next(n for n in range(steps, steps + each + 1) if batch * n % each == 0)
        faults.append(
            Message(
                "per_device_train_batch_size x gradient_accumulation_steps = {batch} x {steps} = {replies} replies a "
                "step must be a multiple of num_generations ({each}): gradient_accumulation_steps: {enough}",
                batch=batch,
                steps=steps,
                replies=replies,
                each=each,
                enough=enough,
            )
        )
    longest, cutoff_len = value("max_completion_length"), value("cutoff_len")
    if longest >= cutoff_len:
        faults.append(
            Message(
                "max_completion_length ({longest}) leaves no room for prompts within cutoff_len ({cutoff_len}), which "
                "counts both",
                longest=longest,
                cutoff_len=cutoff_len,
            )
        )
    if value("temperature") == 0:
        faults.append(
            Message(
                "temperature: 0 would make all replies to a prompt the same, so that nothing is learned; leave it out"
            )
        )
    return faults


def _check_adapter(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of adapter and folders."""
    faults = []
    adapter = values.get("adapter_name_or_path") or ""
    if "," in adapter and not os.path.exists(adapter):
        faults.append(
            Message(
                "adapter_name_or_path names several adapters ({adapters}); one is supported: merge the others into the "
                "base first, with merge.py",
                adapters=[name.strip() for name in adapter.split(",")],
            )
        )
    if set(values.get("lora_target", ("all",))) <= {"embed_tokens", "lm_head"}:
        faults.append(
            Message(
                "lora_target names only embeddings (embed_tokens, lm_head); name linear modules, like q_proj,v_proj, "
                "or all"
            )
        )
    if values.get("embedding_learning_rate") is not None and not EMBEDDING_MODULES & {
        name.rpartition(".")[2] for name in values.get("additional_target", ())
    }:
        faults.append(
            Message("embedding_learning_rate: no embedding learns; set additional_target: embed_tokens,lm_head")
        )
    if values.get("pissa_init") and values.get("use_dora"):
        faults.append(
            Message("{first} and {second} exclude each other; keep one", first="pissa_init", second="use_dora")
        )
    if values.get("lora_bias") == "true" and values.get("use_dora"):
        faults.append(
            Message("{first} and {second} exclude each other; keep one", first="lora_bias", second="use_dora")
        )
    if values.get("pissa_init") and values.get("quantization_bit"):
        faults.append(
            Message(
                "pissa_init takes the principal components out of the weights, which quantized ones cannot lose "
                "exactly; leave out quantization_bit, or pissa_init"
            )
        )
    for name in ("output_dir", "export_dir"):
        if re.match(r"[A-Za-z]:/", values.get(name) or ""):
            faults.append(
                Message(
                    "{key}: {folder} is on a drive of Windows; name a folder of this machine",
                    key=name,
                    folder=values[name],
                )
            )
    return faults


def _check_schedule(values: dict[str, Any]) -> list[Message]:
    """What is wrong with lr_scheduler_kwargs for the schedule."""
    schedule, given = values.get("lr_scheduler_type", Config.lr_scheduler_type), values.get("lr_scheduler_kwargs") or {}
    known = SCHEDULE_VALUES.get(schedule, ())
    if given and not known:
        return [
            Message(
                "lr_scheduler_kwargs: {schedule} has no values to set ({takers} do); take it out",
                schedule=schedule,
                takers=[*SCHEDULE_VALUES],
            )
        ]
    faults = [
        Message(
            "lr_scheduler_kwargs: {schedule} does not read {key}{near:suggestion}; it reads {known}",
            schedule=schedule,
            key=key,
            known=known,
            near=nearest_word(key, known),
        )
        for key in given
        if key not in known
    ]
    for key in given.keys() & set(known):
        if key.endswith("_type"):
            if given[key] not in DECAYS:
                faults.append(Message("lr_scheduler_kwargs: {key} must be one of {choices}", key=key, choices=DECAYS))
        elif isinstance(given[key], bool) or not isinstance(given[key], int | float):
            faults.append(Message("lr_scheduler_kwargs: {key}: {value} must be a number", key=key, value=given[key]))
    if set(MIN_RATES) <= set(known) and len(given.keys() & set(MIN_RATES)) != 1:
        faults.append(
            Message(
                "lr_scheduler_type: {schedule} needs exactly one of {keys} in lr_scheduler_kwargs",
                schedule=schedule,
                keys=MIN_RATES,
            )
        )
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in given:
        faults.append(
            Message(
                "lr_scheduler_type: {schedule} needs exactly one of {keys} in lr_scheduler_kwargs",
                schedule=schedule,
                keys=("num_decay_steps",),
            )
        )
    rate, end = values.get("learning_rate", Config.learning_rate), given.get("lr_end", 1e-7)
    if schedule == "polynomial" and isinstance(end, float | int) and rate and end >= rate:
        faults.append(
            Message(
                "lr_scheduler_kwargs: polynomial falls to lr_end, {end:g}, which must be below learning_rate, {rate:g}",
                end=end,
                rate=rate,
            )
        )
    return faults


def _check_steps(values: dict[str, Any]) -> list[Message]:
    faults = []
    if values.get("max_steps") == 0:
        faults.append(Message("max_steps must be -1 (off) or at least 1"))
    if values.get("num_train_epochs") == 0 and values.get("max_steps", -1) < 0:
        faults.append(Message("num_train_epochs must be above 0"))
    if values.get("optim_args") and values.get("optim", Config.optim) not in TAKE_ARGUMENTS:
        faults.append(
            Message(
                "optim_args: {optim} does not read it ({takers} do); take it out, or set adam_beta1, adam_beta2, "
                "adam_epsilon, weight_decay",
                optim=values.get("optim", Config.optim),
                takers=TAKE_ARGUMENTS,
            )
        )
    for key in ("eval_steps", "logging_steps", "save_steps"):
        value = values.get(key)
        if value is not None and (value == 0 or (value > 1 and value != int(value))):
            faults.append(Message("{key} must be a whole number of steps, or a share of all steps below 1", key=key))
    return faults


def _check_reporters(values: dict[str, Any], notes: list[Message]) -> list[Message]:
    """Replaces `all` in report_to by what is installed; or what is wrong with it."""
    known = ("none", "all", *REPORTERS)
    reporters = tuple(name.lower() for name in values.get("report_to", ()))
    faults = [
        Message(
            "report_to: {reporter} must be one of {known}{near:suggestion}",
            reporter=name,
            known=known,
            near=nearest_word(name, known),
        )
        for name in reporters
        if name not in known
    ]
    if "all" in reporters:
        reporters = tuple(name for name in REPORTERS if importlib.util.find_spec(name)) or ("none",)
        notes.append(Message("report_to: all means what is installed: {reporters}", reporters=reporters))
    if reporters:
        values["report_to"] = reporters
    return faults


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


def find_reward_file(reward: str, recipe: Path | None) -> str:
    """One of `reward_funcs`, where it is FILE.py:function with the file's path, which may be beside the recipe."""
    file, _, function = reward.rpartition(":")
    if file.endswith(".py") and recipe and not Path(file).is_file() and (recipe.parent / file).is_file():
        return f"{recipe.parent / file}:{function}"
    return reward


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
        key = "do_train" if config.do_train is False else "do_predict" if config.do_predict else "do_eval"
        evaluate = command("evaluate.py", *([loaded.recipe] if loaded.recipe else []))
        raise UserError(
            "this recipe asks for no training ({key}: {value}); evaluate: {evaluate}; to train, set do_train: true",
            key=key,
            value=getattr(config, key),
            evaluate=evaluate,
        )
    if loaded.recipe and config.export_dir and "dataset" not in loaded.given and config.do_train is None:
        raise UserError(
            "this recipe names no data but an export_dir: it is for merging ({merge}); to train, set dataset",
            merge=command("merge.py", loaded.recipe),
        )
    if config.compute_accuracy:
        raise UserError(
            "compute_accuracy: accuracy is not measured while training; take it out, and run evaluate.py afterwards"
        )
    if config.do_eval and config.val_size == 0 and not config.eval_dataset:
        raise UserError("do_eval: there is nothing to evaluate on; set val_size above 0, or eval_dataset")
    if config.do_predict and config.val_size == 0 and not config.eval_dataset:
        raise UserError("do_predict: there is nothing to predict on; set val_size above 0, or eval_dataset")
    if not loaded.recipe and not loaded.typed:
        return [
            Message(
                "no recipe is given: a model is trained on {dataset} with the default settings; the smallest recipe is "
                "{recipe}",
                dataset=list(config.dataset),
                recipe="configs/quickstart.yaml",
            )
        ]
    return (
        [
            Message(
                "answers are generated after training, by evaluate.py, which do_predict starts by itself; "
                "while training "
                "only eval_loss is measured"
            )
        ]
        if config.do_predict or config.predict_with_generate
        else []
    )


def run_command(main: Callable[[list[str]], None]) -> None:
    """`common.run_script` for a command that takes settings, in all the forms of `join_settings`."""
    run_script(lambda arguments: main(_without_command_word(join_settings(arguments))))


def _without_command_word(arguments: list[str]) -> list[str]:
    """Arguments without the command that LLaMA-Factory's users type first: `train.py train RECIPE`."""
    words = {"train": ("train",), "chat": ("chat",), "evaluate": ("eval",), "merge": ("export",), "api": ("api",)}
    is_word = arguments[1:] and arguments[0] in words.get(Path(sys.argv[0]).stem, ())
    return arguments[1:] if is_word and not os.path.exists(arguments[0]) else arguments
