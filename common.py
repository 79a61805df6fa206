"""What several scripts need and none owns: the configuration, user errors, the run folder, the device.

Nothing here imports torch or transformers: `--help` and every error of a configuration answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

try:
    import yaml
except ModuleNotFoundError:  # `python chat.py` outside .venv
    print(f"error: {sys.executable} lacks this kit's packages; run make setup, then .venv/bin/python", file=sys.stderr)
    sys.exit(2)

CACHE = Path(os.environ.get("ONECARD_CACHE", ROOT / ".cache"))
SAVES = Path("saves")
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"


# ---------------------------------------------------------------------------------------------------------------------
# Messages: code works with codes and fields; a sentence is made where it is shown

LANGUAGES = ("en", "zh")


class Message:
    """An error, note, warning or reason: a stable code and its fields. Its sentence stands in messages/*.yaml.

    A field may be a message itself, or a list of values or messages. `str(message)` is the sentence in the user's
    language, `text("zh")` that in Chinese.
    """

    def __init__(self, code: str, /, **fields: Any) -> None:
        self.code, self.fields = code, fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and (self.code, self.fields) == (other.code, other.fields)

    def __hash__(self) -> int:
        return hash((self.code, repr(self.fields)))

    def __repr__(self) -> str:
        return f"Message({', '.join([repr(self.code), *(f'{name}={value!r}' for name, value in self.fields.items())])})"

    def __str__(self) -> str:
        return self.text(user_language())

    def text(self, language: str) -> str:
        """The sentence in `language`, one of LANGUAGES."""
        sentence = sentences().get(self.code, {}).get(language, self.code)
        return _Sentence(language).vformat(sentence, (), self.fields) if self.fields else sentence

    def to_json(self) -> dict[str, Any]:
        """For a file: {"code": ..., "fields": {...}}; what JSON does not know becomes text."""
        return {"code": self.code, "fields": {name: _to_json(value) for name, value in self.fields.items()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Message:
        """The message of `to_json`."""
        return cls(content["code"], **{name: _from_json(value) for name, value in content["fields"].items()})


class UserError(Exception):
    """An error that the user can fix: its message says what is wrong and what to do. Ends a command with status 2."""

    def __init__(self, code: str, /, **fields: Any) -> None:
        super().__init__(code, fields)
        self.message = Message(code, **fields)

    @classmethod
    def from_message(cls, message: Message) -> UserError:
        return cls(message.code, **message.fields)

    @property
    def code(self) -> str:
        return self.message.code

    @property
    def fields(self) -> dict[str, Any]:
        return self.message.fields

    def __str__(self) -> str:
        return str(self.message)


def user_language() -> str:
    """One of LANGUAGES: ONECARD_LANG where it is set, else Chinese in a Chinese locale, else English."""
    asked = os.environ.get("ONECARD_LANG")
    locale = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return asked if asked in LANGUAGES else "zh" if locale.startswith("zh") else "en"


@functools.cache
def sentences() -> dict[str, dict[str, str]]:
    """All sentences of messages/*.yaml: code → language → sentence with {fields}."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "messages").glob("*.yaml")):
        found.update(yaml.load(file.read_text(encoding="utf-8"), Loader=loader) or {})
    return found


class _Sentence(string.Formatter):
    """Fills in a sentence. Besides Python's own, `{name:suggestion}` is " (did you mean 'x'?)" or nothing,
    `{count:plural}` an "s" unless the count is 1, and `{names:lines}` one item a line; a list is joined with commas."""

    def __init__(self, language: str) -> None:
        self.language = language

    def format_field(self, value: Any, format_spec: str) -> str:
        chinese = self.language == "zh"
        if format_spec == "suggestion":
            return "" if value is None else f"（是不是 '{value}'？）" if chinese else f" (did you mean '{value}'?)"
        if format_spec == "plural":
            return "" if value == 1 else "s"
        if isinstance(value, list | tuple | set | frozenset):
            joint = "\n  " if format_spec == "lines" else "、" if chinese else ", "
            return joint.join(self.format_field(item, "") for item in value)
        if isinstance(value, UserError | Message):
            return (value.message if isinstance(value, UserError) else value).text(self.language)
        return super().format_field(value if isinstance(value, int | float | str) else str(value), format_spec)


def _to_json(value: Any) -> Any:
    if isinstance(value, UserError):
        value = value.message
    if isinstance(value, Message):
        return value.to_json()
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Message.from_json(value)
    return [_from_json(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# The frame of a command


def run_script(main: Callable[[list[str]], None], *, takes_settings: bool = True) -> None:
    """Runs a script's `main(argv)`; a UserError becomes its sentence on stderr and exit status 2, Ctrl-C status 130.

    `takes_settings`: the script's arguments may be settings, in the forms of `join_settings`.
    """
    # A shell starts what runs in the background (`nohup make webui &`) with SIGINT ignored; nothing could be paused.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    configure_openmp()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else TRL tells the hub of every training
    # They warn of kernels for devices or packages that nothing here uses.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main(_without_command_word(join_settings(sys.argv[1:])) if takes_settings else sys.argv[1:])
    except UserError as error:
        if file := os.environ.get("ONECARD_ERROR_FILE"):  # for a program that started this one
            Path(file).write_text(json.dumps(error.message.to_json(), ensure_ascii=False), encoding="utf-8")
        print(Message("error_line", error=error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Message('stopped')}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python chat.py ... | head`: the reader went away, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _without_command_word(arguments: list[str]) -> list[str]:
    """Arguments without the command that LLaMA-Factory's users type first: `train.py train RECIPE`."""
    words = {"train": ("train",), "chat": ("chat",), "evaluate": ("eval",), "merge": ("export",), "api": ("api",)}
    is_word = arguments[1:] and arguments[0] in words.get(Path(sys.argv[0]).stem, ())
    return arguments[1:] if is_word and not Path(arguments[0]).exists() else arguments


def configure_openmp() -> None:
    """Sets how long OpenMP's threads spin while they wait for each other; call it before torch is imported.

    Spinning is fastest on free cores, and six times slower than sleeping where other work shares them (docs/log.md).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "2000"


def python() -> str:
    """How to call this interpreter in a command to type: `python` only where the shell takes it for this one."""
    venv = ROOT / ".venv"
    if not venv.exists() or not os.path.samefile(sys.prefix, venv):
        return "python"
    active = os.environ.get("VIRTUAL_ENV")
    if active and Path(active).exists() and os.path.samefile(active, venv):
        return "python"
    return str((Path() if _in_kit_folder() else ROOT) / ".venv" / "bin" / "python")


def command(script: str, *arguments: object) -> str:
    """A command that runs a script of this kit, as a line for the shell in the working directory."""
    return shlex.join([python(), script if _in_kit_folder() else str(ROOT / script), *map(str, arguments)])


def _in_kit_folder() -> bool:
    return Path.cwd() == ROOT


def nearest_word(word: str, known: typing.Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, for `{near:suggestion}` in a sentence; else None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)), None)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string. Goes once all messages are codes."""
    near = nearest_word(word, known)
    return f" (did you mean '{near}'?)" if near else ""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass; a field's name is the key in YAML and on the command line


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    path: bool = False,
) -> Any:
    """A field of Config. `minimum` and `maximum` are inclusive; `choices` are all allowed values; in a `path`, `~` and
    `${VARIABLE}` are resolved."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "path": path},
    )


def group(title: str) -> Any:
    """Marks where a group of options starts in `--help`; not an option itself."""
    return dataclasses.field(default=title, init=False, repr=False, metadata={"group": title})


@dataclass(frozen=True)
class Config:
    """Every setting of every script. Keys and meanings are LLaMA-Factory's where it has them."""

    _model: str = group("model")
    model_name_or_path: str = option(EMBEDDED_MODEL, "folder of the base model, or its name on the hub", path=True)
    adapter_name_or_path: str | None = option(
        None, "an adapter to go on training (train) or to use (chat, merge)", path=True
    )
    template: str | None = option(None, "a file of templates/ without .jinja; unset: the tokenizer's own chat template")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    quantization_bit: int | None = option(None, "load the base in 4 bit (QLoRA) or 8 bit; needs a GPU", choices=(4, 8))

    _data: str = group("data")
    dataset: tuple[str, ...] = option(
        ("identity", "general"), "names in dataset_info.json, or files; several with commas", path=True
    )
    eval_dataset: tuple[str, ...] = option((), "datasets to evaluate on, instead of val_size", path=True)
    dataset_dir: str = option(
        "data", "folder of dataset_info.json: in the working directory, above the recipe, or in the kit", path=True
    )
    val_size: float | None = option(
        None,
        "held-out part: a fraction below 1, or a count of samples; unset: a tenth, at most 200, of 200 samples or more",
        minimum=0,
    )
    cutoff_len: int = option(2048, "longest sample, in tokens", minimum=16)
    max_samples: int | None = option(None, "at most so many rows of each dataset", minimum=1)
    overlong: str = option(
        "truncate", "what happens to a sample longer than cutoff_len", choices=("truncate", "drop", "error")
    )
    on_bad_rows: str = option(
        "error", "faulty rows end the run, or are left out and recorded", choices=("error", "skip")
    )
    mix_strategy: str = option(
        "concat",
        "how several datasets are mixed; interleave until the first (under) or the last (over) is used up",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: tuple[float, ...] = option((), "a probability for each dataset; unset: in turn")
    train_on_prompt: bool = option(False, "learn the prompts too")
    mask_history: bool = option(False, "learn only the last answer of each conversation")
    packing: bool = option(False, "fill rows up to cutoff_len with whole samples that never see each other")
    default_system: str | None = option(None, "system message of conversations that have none")
    enable_thinking: bool = option(True, "qwen3: think before answering")
    name: str = option("onecard", "what {{name}} in the data becomes: the model's name")
    author: str = option("the onecard founders", "what {{author}} in the data becomes: who made the model")
    overwrite_cache: bool = option(False, "read and tokenize the data again")
    preprocessing_num_workers: int | None = option(None, "threads that tokenize; unset: one a core", minimum=1)

    _training: str = group("training")
    stage: str = option("sft", "kind of training", choices=("sft",))
    num_train_epochs: float = option(3.0, "passes over the data", minimum=0)
    max_steps: int = option(-1, "optimizer steps, instead of num_train_epochs", minimum=-1)
    per_device_train_batch_size: int = option(2, "samples (or packed rows) a forward pass", minimum=1)
    gradient_accumulation_steps: int = option(8, "forward passes an optimizer step", minimum=1)
    learning_rate: float = option(1e-4, "highest learning rate", minimum=0)
    lr_scheduler_type: str = option(
        "cosine",
        "course of the learning rate",
        choices=(
            "linear",
            "cosine",
            "constant",
            "constant_with_warmup",
            "polynomial",
            "inverse_sqrt",
            "cosine_with_restarts",
        ),
    )
    warmup_steps: float = option(0.0, "steps of rising learning rate; below 1: a share of all steps", minimum=0)
    warmup_ratio: float = option(0.0, "the same as a share of all steps", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "decay of the adapter's weights", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", minimum=0)
    optim: str = option(
        "adamw_torch",
        "optimizer, as transformers names it",
        choices=(
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "adafactor",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_8bit",
            "paged_lion_32bit",
            "ademamix",
            "ademamix_8bit",
            "adagrad",
            "rmsprop",
            "sgd",
        ),
    )
    seed: int = option(42, "seed of everything random", minimum=0)
    gradient_checkpointing: str = option(
        "auto",
        "recompute activations to save memory; auto: on a GPU only",
        choices=("auto", "true", "false"),
    )
    bf16: bool | None = option(None, "train in bfloat16; unset: where the device is good at it")
    fp16: bool | None = option(None, "train in float16; on a card that has bfloat16 that is used instead")

    _lora: str = group("adapter")
    finetuning_type: str = option("lora", "what is trained", choices=("lora",))
    lora_rank: int = option(8, "rank of the adapter's matrices", minimum=1)
    lora_alpha: int | None = option(None, "scale of the adapter; unset: 2 x lora_rank", minimum=1)
    lora_dropout: float = option(0.0, "dropout before the adapter; not 0 is slower", minimum=0, maximum=1)
    lora_target: tuple[str, ...] = option(("all",), "modules that get an adapter: all linear ones, or a list")
    use_rslora: bool = option(False, "rank-stabilized scale: alpha / sqrt(rank)")
    use_dora: bool = option(False, "weight-decomposed adapter (DoRA)")

    _evaluation: str = group("evaluation during training")
    eval_strategy: str = option(
        "auto",
        "when to evaluate; auto: by steps where there is held-out data",
        choices=("auto", "no", "steps", "epoch"),
    )
    eval_steps: float | None = option(
        None,
        "steps between evaluations; below 1: a share; unset: as often as a tenth of the time allows",
        minimum=0,
    )
    per_device_eval_batch_size: int = option(2, "samples a forward pass of an evaluation", minimum=1)
    load_best_model_at_end: bool = option(True, "keep the adapter of the lowest eval_loss, where one is measured")
    early_stopping: str = option(
        "auto",
        "stop when eval_loss no longer falls, or, with nothing held out, when the loss is flat and near zero",
        choices=("auto", "no"),
    )
    early_stopping_patience: int = option(5, "evaluations without a gain, over at least one epoch", minimum=1)
    early_stopping_threshold: float = option(0.001, "least gain in eval_loss that counts", minimum=0)

    _output: str = group("output")
    output_dir: str | None = option(None, "the run folder; unset: saves/ and the recipe's name", path=True)
    overwrite_output_dir: bool = option(False, "start over, deleting what the folder holds of an earlier run")
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint folder to go on from; unset: the run's newest whole one; false: none", path=True
    )
    logging_steps: float = option(5, "steps between lines of trainer_log.jsonl; below 1: a share", minimum=0)
    logging_first_step: bool = option(True, "log the first step too")
    save_strategy: str = option("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: float = option(100, "steps between checkpoints; below 1: a share", minimum=0)
    save_total_limit: int | None = option(2, "checkpoints kept; the best one always is", minimum=1)
    plot_loss: bool = option(True, "draw training_loss.png")
    report_to: tuple[str, ...] = option(("none",), "none, tensorboard, wandb, or several; all: those installed")

    _chat: str = group("chat")
    do_sample: bool = option(True, "draw words at random; false: always the likeliest")
    temperature: float = option(0.7, "how random; 0: always the likeliest word", minimum=0)
    top_p: float = option(0.9, "draw from the likeliest words of this total probability", minimum=0, maximum=1)
    top_k: int = option(50, "draw from so many likeliest words; 0: from all", minimum=0)
    min_p: float = option(0.0, "leave out words less likely than this share of the likeliest", minimum=0, maximum=1)
    repetition_penalty: float = option(1.0, "above 1: words already used become less likely", minimum=0)
    max_new_tokens: int = option(1024, "longest reply, in tokens", minimum=1)
    infer_dtype: str = option(
        "auto",
        "type of the weights; auto: the fastest of the device",
        choices=("auto", "float16", "bfloat16", "float32"),
    )

    _export: str = group("export")
    export_dir: str | None = option(None, "folder of the merged model; unset: merged/ in the run folder", path=True)
    export_size: int = option(5, "largest file of the merged model, in GB", minimum=1)
    export_dtype: str | None = option(
        None, "type of the merged weights; unset: the base model's", choices=("float16", "bfloat16", "float32")
    )

    _measuring: str = group("evaluation")
    labels: tuple[str, ...] = option(
        (), "the answers to choose from, the positive one of two last; unset: told from the data"
    )
    do_train: bool | None = option(None, "false: the recipe is for evaluate.py, and train.py refuses it")
    do_eval: bool = option(False, "without do_train: the recipe is for evaluate.py")
    do_predict: bool = option(
        False, "evaluate.py also writes LLaMA-Factory's files of predictions; without do_train: it is for evaluate.py"
    )
    predict_with_generate: bool = option(False, "evaluate.py also writes LLaMA-Factory's files of predictions")
    compute_accuracy: bool = option(False, "evaluate.py measures accuracy anyway; train.py refuses it")

    @property
    def alpha(self) -> int:
        """lora_alpha with its default filled in."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


OPTIONS = {f.name: f for f in dataclasses.fields(Config) if "help" in f.metadata}
_TYPES = typing.get_type_hints(Config)

MAY_BE_EMPTY = {"name", "author"}  # then {{name}} and {{author}} in the data stay as they are

# Trackers that transformers knows, each by the name of its package.
REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "neptune", "trackio", "comet_ml", "clearml")


@dataclass(frozen=True)
class Compatibility:
    """The keys of LLaMA-Factory and transformers that are not options here: configs/compat/llamafactory.yaml.

    `means`: key → value (as text) → options; `noted` and `refused`: key → its defaults and the code of the reason.
    """

    renamed: dict[str, str]
    means: dict[str, dict[str, dict[str, Any]]]
    no_effect: dict[str, Any]
    noted: dict[str, tuple[list[Any], str]]
    refused: dict[str, tuple[list[Any], str]]

    def knows(self, key: str) -> bool:
        return any(key in keys for keys in (self.renamed, self.means, self.no_effect, self.noted, self.refused))


@functools.cache
def compatibility() -> Compatibility:
    content = _load_yaml((ROOT / "configs/compat/llamafactory.yaml").read_text(encoding="utf-8"))
    for part in ("noted", "refused"):
        content[part] = {
            key: (default if isinstance(default, list) else [default], code)
            for code, keys in content[part].items()
            for key, default in keys.items()
        }
    return Compatibility(**content)


# ---------------------------------------------------------------------------------------------------------------------
# From text to the type of an option


def _is_unset(value: Any) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))


def _as_text(value: Any) -> str:
    """A value as the command line would have it."""
    return str(value).strip().lower() if isinstance(value, bool | str) else str(value)


def _is_default(value: Any, defaults: list[Any]) -> bool:
    """Whether a value that may be text is one of `defaults`; off (false, 0) is the same as unset."""
    off = ("false", "no", "off", "0", "0.0", "[]", "{}")
    for default in defaults:
        if default in (None, False) and (_is_unset(value) or _as_text(value) in off):
            return True
        try:
            if not isinstance(default, bool) and float(value) == float(default):
                return True
        except (TypeError, ValueError):
            pass
        if value == default or _as_text(value) == _as_text(default):
            return True
    return _is_unset(value)


def _coerce(name: str, value: Any) -> Any:
    """`value`, which is not unset, as the type of the option `name`; raises UserError with what is allowed."""
    kind, meta = _TYPES[name], OPTIONS[name].metadata
    if type(None) in typing.get_args(kind):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    if meta["choices"] and _as_text(value) in ("false", "off") and "no" in meta["choices"]:
        return "no"  # YAML reads a bare no as false
    if isinstance(value, list) and len(value) == 1 and typing.get_origin(kind) is not tuple:
        value = value[0]
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        element = typing.get_args(kind)[0]
        found = tuple(_scalar(element, item) for item in items if str(item).strip())
        return tuple(map(expand_path, found)) if meta["path"] else found
    found = _scalar(kind, value)
    if kind is str and meta["choices"]:
        found = next((choice for choice in meta["choices"] if choice.lower() == found.lower()), found)
    return expand_path(found) if meta["path"] else found


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        found = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if _as_text(value) not in found:
            raise UserError("must_be_boolean")
        return found[_as_text(value)]
    if kind in (int, float):
        try:  # PyYAML reads 1e-4 as a string
            number = math.nan if isinstance(value, bool) else float(str(value).strip())
        except ValueError:
            raise UserError("must_be_number") from None
        if not math.isfinite(number):
            raise UserError("must_be_number")
        if kind is int and number != int(number):
            raise UserError("must_be_whole")
        return kind(number)
    if isinstance(value, dict | list | tuple):
        raise UserError("must_be_single")
    return _as_text(value) if isinstance(value, bool) else str(value).strip()


def expand_path(path: str) -> str:
    """A path or name with `~`, `${VARIABLE}` and Windows' backslashes resolved.

    Raises UserError where a variable is not set.
    """
    if missing := [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]:
        raise UserError("variable_not_set", variable=missing[0])
    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda found: os.environ[found[1]], path))
    return path.replace("\\", "/") if "\\" in path and not os.path.exists(path) else path


def _check_option(name: str, value: Any) -> Message | None:
    """What is wrong with a coerced value, or None."""
    meta = OPTIONS[name].metadata
    if value is None:
        return None
    if meta["choices"] and value not in meta["choices"]:
        if name == "stage":
            return Message("stage_unsupported")
        if name == "finetuning_type":
            return Message("finetuning_type_unsupported")
        near = nearest_word(str(value), map(str, meta["choices"]))
        return Message("must_be_one_of", choices=meta["choices"], near=near)
    if meta["minimum"] is not None and value < meta["minimum"]:
        return Message("must_be_at_least", minimum=meta["minimum"])
    if meta["maximum"] is not None and value > meta["maximum"]:
        return Message("must_be_at_most", maximum=meta["maximum"])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Recipe and command line


@dataclass(frozen=True)
class Loaded:
    """A configuration and how it came about: the recipe's path (or None), its notes, the options that were set, and
    those of them that were set on the command line."""

    config: Config
    recipe: Path | None
    notes: list[Message]
    given: frozenset[str]
    typed: frozenset[str] = frozenset()


def join_settings(arguments: list[str]) -> list[str]:
    """The arguments of a command line with the usual ways to write settings brought into one form.

    `--key value`, `--key=value` and `--key` (of a boolean) become `key=value`; `--config FILE` becomes `FILE`; the
    underscores of other flags become dashes.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not argument.startswith("--") or not name:
            joined.append(argument)
        elif key == "config" and (equals or rest):
            joined.append(value if equals else rest.pop(0))
        elif not (key in OPTIONS or compatibility().knows(key)):
            joined.append(f"--{name.replace('_', '-')}{equals}{value}")
        elif equals:
            joined.append(f"{key}={value}")
        elif _is_boolean(key) and not (rest and _as_text(rest[0]) in ("true", "false", "yes", "no", "1", "0")):
            joined.append(f"{key}=true")
        elif rest:
            joined.append(f"{key}={rest.pop(0)}")
        else:
            joined.append(argument)
    return joined


def _is_boolean(key: str) -> bool:
    known = compatibility()
    if key in OPTIONS:
        return bool in (_TYPES[key], *typing.get_args(_TYPES[key]))
    defaults, _ = known.noted.get(key) or known.refused.get(key) or ([known.no_effect.get(key)], "")
    return key in known.means or isinstance(defaults[0], bool)


def load_config(arguments: list[str]) -> Loaded:
    """Reads `[RECIPE] [key=value ...]`, the recipe being a YAML or JSON file; later values win.

    Raises UserError that names every fault of the file and the command line at once.
    """
    recipe: Path | None = None
    read: dict[str, Any] = {}
    typed: dict[str, Any] = {}
    for argument in join_settings(arguments):
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals and key.replace("_", "").replace("-", "").isalnum() and not Path(argument).exists():
            typed[key.replace("-", "_")] = _parse(value)
        elif argument.startswith("-"):
            raise UserError("unknown_argument", argument=argument, near=nearest_word(argument, _flags()))
        elif recipe is not None:
            raise UserError("two_recipes", first=recipe, second=argument)
        else:
            recipe = Path(argument).expanduser()
            read = read_recipe(recipe)
    return _resolve(recipe, read, typed)


def _flags() -> list[str]:
    return ["--help", "--dry-run", *(f"--{name}" for name in OPTIONS)]


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.startswith(("[", "{")) else text
    except yaml.YAMLError:
        return text


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON recipe; raises UserError when it cannot be read, with line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = (str(p) for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json"))
        raise UserError("recipe_missing", recipe=path, near=nearest_word(str(path), there)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("recipe_not_text", recipe=path, problem=str(error)) from None
    try:
        twice = _keys_twice(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        content = _load_yaml(text)
    except yaml.YAMLError as error:
        if fault := _mistyped_line(text):
            raise UserError("recipe_faults", recipe=path, faults=[fault]) from None
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        if mark is None:
            raise UserError("recipe_not_yaml", recipe=path, problem=problem) from None
        fault = Message("yaml_problem", line=mark.line + 1, column=mark.column + 1, problem=problem)
        raise UserError("recipe_faults", recipe=path, faults=[fault]) from None
    if twice:
        raise UserError("recipe_faults", recipe=path, faults=twice)
    if content is None:
        return {}
    is_mapping = isinstance(content, dict)
    if (not is_mapping or any(not str(key).isprintable() for key in content)) and (fault := _mistyped_line(text)):
        raise UserError("recipe_faults", recipe=path, faults=[fault])
    if not is_mapping:
        raise UserError("recipe_without_settings", recipe=path)
    return {str(key): value for key, value in content.items()}


def _mistyped_line(text: str) -> Message | None:
    """The first line of a recipe that misses what makes it `key: value` but looks like one."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*[\w.-]+\s*：", line):
            return Message("line_with_wide_colon", line=number, text=line.strip())
        if re.match("[ \t]*[\u00a0\u3000\u200b\ufeff]|[ \t]*[\\w.-]+[ \t]*:[\u00a0\u3000\u200b]", line):
            return Message("line_with_odd_space", line=number, text=line.strip())
        if re.match(r"[A-Za-z_]\w*:[^\s/\\]", line):
            return Message("line_without_space", line=number, text=line.strip())
    return None


def _keys_twice(document: yaml.Node | None) -> list[Message]:
    """The settings that stand twice in a recipe, of which YAML would silently take the last."""
    lines: dict[str, list[int]] = {}
    for key, _ in document.value if isinstance(document, yaml.MappingNode) else ():
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    return [Message("key_twice", key=key, line=at[-1], first=at[0]) for key, at in lines.items() if len(at) > 1]


@dataclass(frozen=True)
class _Setting:
    """A value as it was given: under which key, and where (a recipe, or None for the command line)."""

    key: str
    value: Any
    recipe: Path | None

    def fault(self, problem: Message) -> Message:
        place = Message("command_line") if self.recipe is None else str(self.recipe)
        return Message("setting_fault", place=place, key=self.key, value=self.value, problem=problem)


def _by_name(given: dict[str, Any], recipe: Path | None, faults: list[Message]) -> dict[str, _Setting]:
    """The settings of one origin by the names of their options; the same one under two names is a fault."""
    known = compatibility()
    found: dict[str, _Setting] = {}
    for key, value in given.items():
        meant = (
            known.means[key].get(_as_text(value), {}) if key in known.means else {known.renamed.get(key, key): value}
        )
        for name, one in meant.items():
            if name in found:
                one = _combined(name, found[name].value, one)
            if one is None and name in found:
                place = Message("command_line") if recipe is None else str(recipe)
                faults.append(Message("same_setting", place=place, first=found[name].key, second=key))
            else:
                found[name] = _Setting(key, one, recipe)
    return found


def _combined(name: str, first: Any, second: Any) -> Any:
    """The value of an option that two keys set, as use_swanlab adds to report_to; None where they contradict."""
    if name == "packing":  # of which neat_packing is a kind
        return _as_text(first) in ("true", "1") or _as_text(second) in ("true", "1")
    if name == "report_to":
        reporters = [one for value in (first, second) for one in (value if isinstance(value, list) else [value])]
        return [one for one in reporters if not _is_unset(one)]
    return first if _as_text(first) == _as_text(second) else None


def _resolve(recipe: Path | None, read: dict[str, Any], typed: dict[str, Any]) -> Loaded:
    faults: list[Message] = []
    notes: list[Message] = []
    values: dict[str, Any] = {}
    typed_by_name = _by_name(typed, None, faults)
    for name, setting in {**_by_name(read, recipe, faults), **typed_by_name}.items():
        problem = _foreign_key(name, setting, notes) if name not in OPTIONS else _read_option(name, setting, values)
        if problem:
            faults.append(setting.fault(problem))
    faults += _check_data(values) + _check_adapter(values) + _check_steps(values) + _check_reporters(values, notes)
    if faults:
        raise UserError("config_faults", count=len(faults), faults=faults, help=command("train.py", "--help"))
    if values.get("output_dir") is None:
        values["output_dir"] = str(SAVES / (recipe.stem if recipe else "default"))
    values["dataset_dir"] = find_dataset_dir(values.get("dataset_dir", Config.dataset_dir), recipe)
    given = frozenset(values) - (set() if "dataset_dir" in {*read, *typed} else {"dataset_dir"})
    return Loaded(Config(**values), recipe, notes, given, frozenset(typed_by_name))


def _read_option(name: str, setting: _Setting, values: dict[str, Any]) -> Message | None:
    """Puts an option's value into `values`, where it is not left empty; or what is wrong with it."""
    value = setting.value
    if name in MAY_BE_EMPTY and isinstance(value, str):
        values[name] = value.strip()
        return None
    if _is_unset(value):
        if name == "dataset":
            values[name] = ()
        elif type(None) in typing.get_args(_TYPES[name]):
            values[name] = None
        return None
    try:
        values[name] = _coerce(name, value)
        return _check_option(name, values[name])
    except UserError as error:
        return error.message


def _foreign_key(key: str, setting: _Setting, notes: list[Message]) -> Message | None:
    """What is wrong with a key that is no option; may add a note."""
    known = compatibility()
    if key in known.no_effect:
        return None
    if key in known.noted:
        defaults, code = known.noted[key]
        if not _is_default(setting.value, defaults):
            notes.append(Message("setting_noted", key=key, value=setting.value, reason=Message(code)))
        return None
    if key in known.refused:
        defaults, code = known.refused[key]
        return None if _is_default(setting.value, defaults) else Message("setting_refused", reason=Message(code))
    return Message("unknown_key", near=nearest_word(key, [*OPTIONS, *known.renamed]))


def _check_data(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of the data taken together."""
    faults = []
    if values.get("val_size") and values.get("eval_dataset"):
        faults.append(Message("exclude_each_other", first="val_size", second="eval_dataset"))
    if values.get("mask_history") and values.get("train_on_prompt"):
        faults.append(Message("exclude_each_other", first="mask_history", second="train_on_prompt"))
    if (values.get("val_size") or 0) > 1 and values["val_size"] != int(values["val_size"]):
        faults.append(Message("val_size_not_whole"))
    probabilities, names = values.get("interleave_probs", ()), values.get("dataset", Config.dataset)
    if not names and not (values.get("do_predict") or values.get("do_eval") or values.get("do_train") is False):
        faults.append(Message("dataset_empty"))
    if probabilities and len(probabilities) != len(names):
        faults.append(Message("interleave_probs_count", values=len(probabilities), datasets=len(names)))
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-3):
        faults.append(Message("interleave_probs_sum"))
    return faults


def _check_adapter(values: dict[str, Any]) -> list[Message]:
    """What is wrong with the settings of adapter and folders."""
    faults = []
    adapter = values.get("adapter_name_or_path") or ""
    if "," in adapter and not Path(adapter).exists():
        faults.append(Message("several_adapters", adapters=[name.strip() for name in adapter.split(",")]))
    if set(values.get("lora_target", ("all",))) <= {"embed_tokens", "lm_head"}:
        faults.append(Message("lora_target_embeddings_only"))
    for name in ("output_dir", "export_dir"):
        if re.match(r"[A-Za-z]:/", values.get(name) or ""):
            faults.append(Message("windows_drive", key=name, folder=values[name]))
    return faults


def _check_steps(values: dict[str, Any]) -> list[Message]:
    faults = []
    if values.get("max_steps") == 0:
        faults.append(Message("max_steps_zero"))
    if values.get("num_train_epochs") == 0 and values.get("max_steps", -1) < 0:
        faults.append(Message("num_train_epochs_zero"))
    for key in ("eval_steps", "logging_steps", "save_steps"):
        value = values.get(key)
        if value is not None and (value == 0 or (value > 1 and value != int(value))):
            faults.append(Message("steps_not_whole", key=key))
    return faults


def _check_reporters(values: dict[str, Any], notes: list[Message]) -> list[Message]:
    """Replaces `all` in report_to by what is installed; or what is wrong with it."""
    known = ("none", "all", *REPORTERS)
    reporters = tuple(name.lower() for name in values.get("report_to", ()))
    faults = [
        Message("unknown_reporter", reporter=name, known=known, near=nearest_word(name, known))
        for name in reporters
        if name not in known
    ]
    if "all" in reporters:
        reporters = tuple(name for name in REPORTERS if importlib.util.find_spec(name)) or ("none",)
        notes.append(Message("report_to_all", reporters=reporters))
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


def asks_for_training(config: Config) -> bool:
    """Whether a recipe is for train.py: do_train where it is set, else unless it only evaluates or predicts."""
    if config.do_train is not None:
        return config.do_train
    return not (config.do_eval or config.do_predict)


def check_training_asked_for(loaded: Loaded) -> None:
    """Raises UserError for a recipe that asks for no training, or for what a training does not do."""
    config = loaded.config
    if not asks_for_training(config):
        key = "do_train" if config.do_train is False else "do_predict" if config.do_predict else "do_eval"
        evaluate = command("evaluate.py", *([loaded.recipe] if loaded.recipe else []))
        raise UserError("recipe_does_not_train", key=key, value=getattr(config, key), evaluate=evaluate)
    if config.compute_accuracy:
        raise UserError("accuracy_while_training")
    if config.do_eval and config.val_size == 0 and not config.eval_dataset:
        raise UserError("do_eval_without_data")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text, every option in the order of `--help`."""
    values = {name: getattr(config, name) for name in OPTIONS}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def help_text(usage: str, groups: tuple[str, ...] = ()) -> str:
    """The text of `--help`: `usage`, then every option (of `groups`, if given) with default and meaning, in groups."""
    lines = [usage.strip(), "", "Settings: `key: value` in a recipe, `key=value` on the command line (which wins)."]
    width = max(map(len, OPTIONS)) + 2
    title = ""
    for f in dataclasses.fields(Config):
        title = f.metadata.get("group", title)
        if groups and title not in groups:
            continue
        if "group" in f.metadata:
            lines += ["", f"{title}:"]
            continue
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        default = "unset" if default in (None, "") else str(default).lower() if isinstance(default, bool) else default
        choices = f" [{'|'.join(map(str, f.metadata['choices']))}]" if f.metadata["choices"] else ""
        lines.append(f"  {f.name:<{width}}{f.metadata['help']}{choices} (default: {default})")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Device


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of the first card; memory in bytes, `driver` like '580.65', `compute` like (8, 9)."""

    name: str
    driver: str
    cuda: tuple[int, int]
    compute: tuple[int, int]
    total_memory: int
    free_memory: int


def find_gpu() -> Gpu | None:
    """The card this kit would use (honours CUDA_VISIBLE_DEVICES), or None; needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or (visible is not None and visible.split(",")[0] in ("", "-1")):
        return None
    card = visible.split(",")[0] if visible else "0"
    query = "name,driver_version,compute_cap,memory.total,memory.free"
    command = ["nvidia-smi", "-i", card, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        row = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        banner = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, driver, compute, total, free = (part.strip() for part in row.splitlines()[0].split(","))
    cuda = banner.partition("CUDA Version:")[2].split()[0] if "CUDA Version:" in banner else "0.0"
    mib = 1 << 20
    try:
        memory = (int(float(total)) * mib, int(float(free)) * mib)
    except ValueError:  # "[N/A]" of a chip that shares the main memory
        import psutil

        memory = (psutil.virtual_memory().total, psutil.virtual_memory().available)
    return Gpu(name, driver, _version(cuda), _version(compute), *memory)


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)(?:\.(\d+))?", text)  # not of "[N/A]"
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
