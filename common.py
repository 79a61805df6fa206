"""What every command needs: errors as messages, the options, the frame of a command line, the device.

How a recipe and a command line become a Config stands in runs/configuration.py. Nothing here imports torch or
transformers: `--help` and every error of a configuration answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TextIO

try:
    import yaml
except ModuleNotFoundError:  # `python chat.py` outside .venv
    print(f"error: {sys.executable} lacks this kit's packages; run make setup, then .venv/bin/python", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent
ASKED_CACHE = Path(os.environ.get("ONECARD_CACHE") or ROOT / ".cache")


def _writable_cache() -> Path:
    """The folder of the cache that was asked for; the user's own where that cannot be written."""
    there = next(folder for folder in (ASKED_CACHE, *ASKED_CACHE.absolute().parents) if folder.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return ASKED_CACHE
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onecard"


CACHE = _writable_cache()
CACHE_MOVED = CACHE != ASKED_CACHE
SAVES = Path("saves")
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"


def command(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """A command that runs a script of this kit, as a line for the shell in the working directory.

    `python` only where the shell takes it for this interpreter.
    """
    home = Path() if Path.cwd() == ROOT else ROOT
    venv, active = ROOT / ".venv", Path(os.environ.get("VIRTUAL_ENV") or "/nowhere")
    is_other = not venv.exists() or not venv.samefile(sys.prefix)
    python = "python" if is_other or (active.exists() and venv.samefile(active)) else home / ".venv/bin/python"
    return shlex.join(map(str, [python, *launcher, home / script, *arguments]))


# ---------------------------------------------------------------------------------------------------------------------
# Messages: a sentence stands where it is said; its fields stay apart until it is shown

LANGUAGES = ("en", "zh")


class Message:
    """An error, note, warning or reason: an English sentence with {fields}, and the fields' values.

    The English sentence is also the key of the Chinese one in zh.yaml. A field may be a message itself, or a list of
    values or messages. `str(message)` is the text in the user's language, `text("zh")` that in Chinese.
    """

    def __init__(self, sentence: str, /, **fields: Any) -> None:
        self.sentence, self.fields = sentence, fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and (self.sentence, self.fields) == (other.sentence, other.fields)

    def __hash__(self) -> int:
        return hash((self.sentence, repr(self.fields)))

    def __repr__(self) -> str:
        values = [repr(self.sentence), *(f"{name}={value!r}" for name, value in self.fields.items())]
        return f"Message({', '.join(values)})"

    def __str__(self) -> str:
        return self.text(user_language())

    def text(self, language: str) -> str:
        """The sentence in `language`, one of LANGUAGES; without fields it is said as it stands, braces too.

        English where zh.yaml lacks it: of a file that another version of the kit wrote.
        """
        sentence = chinese().get(self.sentence, self.sentence) if language == "zh" else self.sentence
        return _Sentence(language).vformat(sentence, (), self.fields) if self.fields else sentence

    def to_json(self) -> dict[str, Any]:
        """For a file: {"sentence": ..., "fields": {...}}; what JSON does not know becomes text."""
        return {"sentence": self.sentence, "fields": {name: _to_json(value) for name, value in self.fields.items()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Message:
        """The message of `to_json`."""
        return cls(content["sentence"], **{name: _from_json(value) for name, value in content["fields"].items()})


class UserError(Exception):
    """An error that the user can fix: its message says what is wrong and what to do. Ends a command with status 2."""

    def __init__(self, sentence: str, /, **fields: Any) -> None:
        super().__init__(sentence, fields)
        self.message = Message(sentence, **fields)

    @classmethod
    def from_message(cls, message: Message) -> UserError:
        return cls(message.sentence, **message.fields)

    @property
    def sentence(self) -> str:
        return self.message.sentence

    @property
    def fields(self) -> dict[str, Any]:
        return self.message.fields

    def __str__(self) -> str:
        return str(self.message)


def print_notes(notes: Iterable[Message], file: TextIO | None = None) -> None:
    for note in notes:
        print(Message("note: {text}", text=note), file=file)


def user_language() -> str:
    """One of LANGUAGES: ONECARD_LANG where it is set, else Chinese in a Chinese locale, else English."""
    asked = os.environ.get("ONECARD_LANG")
    locale = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return asked if asked in LANGUAGES else "zh" if locale.startswith("zh") else "en"


def load_yaml(text: str) -> Any:
    """The content of YAML text, by libyaml where it is there."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@functools.cache
def chinese() -> dict[str, str]:
    """zh.yaml: the Chinese of every sentence, page text and help text, by the English."""
    return load_yaml((ROOT / "zh.yaml").read_text(encoding="utf-8"))


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


def nearest_word(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, for `{near:suggestion}` in a sentence; else None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)), None)


def nearest_path(path: Path, there: Iterable[Path]) -> Path | None:
    """The path of `there` whose name `path` was probably meant to have, or None."""
    by_name = {other.name: other for other in there}
    return by_name.get(nearest_word(path.name, by_name))


# ---------------------------------------------------------------------------------------------------------------------
# Options: one flat dataclass; a field's name is the key in YAML and on the command line


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    path: bool = False,
    item: str = "[^,]+",
    resume: Literal["same", "longer", "any"] = "same",
) -> Any:
    """A field of Config. `minimum` and `maximum` are inclusive; in a `path`, `~` and `${VARIABLE}` are resolved.

    `item`: a pattern of one item of a list that is typed, which a comma ends.

    `resume`: a run may be resumed with any value (it changes no result), or only with the same one; "longer": it says
    how long a run is, which a finished run may be trained beyond.
    """
    about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "path": path, "resume": resume}
    return dataclasses.field(default=default, metadata=about | {"item": item})


def group(title: str) -> Any:
    """Marks where a group of options starts in `--help`; not an option itself."""
    return dataclasses.field(default=title, init=False, repr=False, metadata={"group": title})


DTYPES = ("float16", "bfloat16", "float32")
# As transformers calls them.
SCHEDULES = (
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adafactor", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "ademamix", "ademamix_8bit"),
    *("adagrad", "rmsprop", "sgd"),
)

REWARDS = "exact_label|one_of_labels|json_valid|length"  # what may follow a regex, which may have commas


@dataclass(frozen=True)
class Config:
    """Every setting of every script. Keys and meanings are LLaMA-Factory's where it has them."""

    _model: str = group("model")
    model_name_or_path: str = option(EMBEDDED_MODEL, "base model: a folder or a name on the hub", path=True)
    adapter_name_or_path: str | None = option(None, "adapter to train further, or to use", path=True)
    template: str | None = option(None, "chat template: a name in templates/; unset: the tokenizer's own")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    quantization_bit: int | None = option(None, "base model in 4-bit (QLoRA) or 8-bit", choices=(4, 8))

    _data: str = group("data")
    dataset: tuple[str, ...] = option(("identity", "general"), "names in dataset_info.json, or files", path=True)
    eval_dataset: tuple[str, ...] = option((), "datasets to evaluate on, instead of val_size", path=True)
    dataset_dir: str = option("data", "folder of dataset_info.json; sought above the recipe and in the kit", path=True)
    val_size: float | None = option(
        None,
        "held-out fraction below 1, or samples; unset: 10%, at most 200, of 200 samples or more",
        minimum=0,
    )
    cutoff_len: int = option(2048, "maximum length of a sample, in tokens", minimum=16)
    max_samples: int | None = option(None, "maximum number of rows of each dataset", minimum=1)
    overlong: str = option("truncate", "what to do with samples over cutoff_len", choices=("truncate", "drop", "error"))
    on_bad_rows: str = option("error", "faulty rows: stop, or skip and record them", choices=("error", "skip"))
    mix_strategy: str = option(
        "concat",
        "how to combine datasets; interleave until the first (under) or the last (over) is exhausted",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: tuple[float, ...] = option((), "sampling probability of each dataset; unset: round-robin")
    train_on_prompt: bool = option(False, "compute the loss on prompts too")
    mask_history: bool = option(False, "compute the loss on the last answer of a conversation only")
    packing: bool | None = option(None, "pack whole samples into rows of cutoff_len; unset: only in stage pt")
    default_system: str | None = option(None, "system message of conversations that have none")
    enable_thinking: bool = option(True, "Qwen3: think before answering")
    name: str = option("onecard", "replaces {{name}} in the data: the model's name")
    author: str = option("the onecard founders", "replaces {{author}} in the data: who made the model")
    overwrite_cache: bool = option(False, "read and tokenize the data again", resume="any")
    preprocessing_num_workers: int | None = option(None, "tokenizer threads; unset: all cores", minimum=1, resume="any")

    _training: str = group("training")
    stage: str = option(
        "sft",
        "what to learn: answers (sft), text (pt), preference pairs (dpo), good and bad answers (kto), rewards (grpo)",
        choices=("sft", "pt", "dpo", "kto", "grpo"),
    )
    num_train_epochs: float = option(3.0, "passes over the data", minimum=0, resume="longer")
    max_steps: int = option(-1, "optimizer steps, instead of num_train_epochs", minimum=-1, resume="longer")
    per_device_train_batch_size: int = option(2, "sequences per forward pass", minimum=1)
    gradient_accumulation_steps: int = option(8, "forward passes per optimizer step", minimum=1)
    learning_rate: float = option(1e-4, "peak learning rate", minimum=0)
    lr_scheduler_type: str = option("cosine", "learning rate schedule", choices=SCHEDULES)
    lr_scheduler_kwargs: Mapping[str, Any] | None = option(None, "schedule arguments: {num_cycles: 2}, {power: 2}")
    warmup_steps: float = option(0.0, "warmup steps; below 1: a fraction of all steps", minimum=0)
    warmup_ratio: float = option(0.0, "warmup as a fraction of all steps", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "weight decay", minimum=0)
    max_grad_norm: float = option(1.0, "maximum gradient norm (clipping); 0: no clipping", minimum=0)
    optim: str = option("adamw_torch", "optimizer, by its name in transformers", choices=OPTIMIZERS)
    optim_args: str | None = option(None, "arguments of ademamix, sgd, rmsprop or adagrad: momentum=0.9")
    adam_beta1: float = option(0.9, "Adam: decay rate of the first moment", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "Adam: decay rate of the second moment", minimum=0, maximum=1)
    adam_epsilon: float = option(1e-8, "Adam: epsilon of the denominator", minimum=0)
    neftune_noise_alpha: float | None = option(None, "sft, pt: NEFTune noise on the embeddings; 5 is usual", minimum=0)
    seed: int = option(42, "random seed", minimum=0)
    full_determinism: bool = option(False, "deterministic kernels only: slower; an operation that has none is an error")
    gradient_checkpointing: str = option("auto", "recompute activations; auto: GPU", choices=("auto", "true", "false"))
    bf16: bool | None = option(None, "train in bfloat16; unset: where the device computes it at full speed")
    fp16: bool | None = option(None, "train in float16; a card that supports bfloat16 uses that instead")

    _lora: str = group("adapter")
    finetuning_type: str = option("lora", "fine-tuning method", choices=("lora",))
    lora_rank: int = option(8, "rank of the LoRA matrices", minimum=1)
    lora_alpha: int | None = option(None, "LoRA scaling; unset: 2 x lora_rank", minimum=1)
    lora_dropout: float = option(0.0, "dropout on the adapter's input; above 0 is slower", minimum=0, maximum=1)
    lora_target: tuple[str, ...] = option(("all",), "modules with LoRA: all (every linear layer), or names")
    use_rslora: bool = option(False, "rank-stabilized LoRA: scaling by alpha / sqrt(rank)")
    loraplus_lr_ratio: float | None = option(None, "LoRA+: learning rate of B over that of A; 16 is usual", minimum=0)
    use_dora: bool = option(False, "weight-decomposed LoRA (DoRA)")
    lora_bias: str = option(
        "none",
        "biases trained too: the adapter's own (true), the model's (all), or those of lora_target (lora_only)",
        choices=("none", "true", "all", "lora_only"),
    )
    pissa_init: bool = option(False, "initialize from principal components (PiSSA); saved as LoRA of twice lora_rank")
    pissa_iter: int = option(16, "PiSSA: iterations of the fast SVD; -1: exact SVD", minimum=-1)
    additional_target: tuple[str, ...] = option((), "modules trained in full (modules_to_save): embed_tokens, lm_head")
    embedding_learning_rate: float | None = option(None, "learning rate of embeddings; unset: learning_rate", minimum=0)

    _preferences: str = group("preferences")
    pref_loss: str = option("sigmoid", "dpo: preference loss", choices=("sigmoid", "hinge", "ipo", "orpo", "simpo"))
    pref_beta: float = option(0.1, "beta: strength of the pull to the reference; orpo: weight of the loss", minimum=0)
    pref_ftx: float = option(0.0, "weight of an additional sft loss on the chosen or good answers", minimum=0)
    simpo_gamma: float = option(0.5, "simpo: target reward margin of the chosen answer", minimum=0)
    dpo_label_smoothing: float = option(0.0, "sigmoid: assumed fraction of mislabelled pairs", minimum=0, maximum=0.5)
    kto_chosen_weight: float = option(1.0, "kto: loss weight of good answers", minimum=0)
    kto_rejected_weight: float = option(1.0, "kto: loss weight of bad answers", minimum=0)

    _rewards: str = group("rewards")
    reward_funcs: tuple[str, ...] = option(
        (),
        "grpo: exact_label, one_of_labels, json_valid, length, regex: PATTERN, FILE.py:function; comma-separated",
        item=rf"\s*regex\s*:.*?(?=,\s*(?:(?:{REWARDS})\s*(?:,|$)|regex\s*:|[^,]+\.py:)|$)|[^,]+",
    )
    reward_weights: tuple[float, ...] = option((), "grpo: weight of each reward function; unset: 1")
    num_generations: int = option(8, "grpo: replies per prompt", minimum=2)
    max_completion_length: int = option(256, "grpo: maximum length of a reply in training, in tokens", minimum=1)
    beta: float = option(0.0, "grpo: coefficient of the KL divergence from the model before training", minimum=0)
    epsilon: float = option(0.2, "grpo: clipping range of the probability ratio", minimum=0)
    loss_type: str = option("dapo", "grpo: loss of TRL", choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"))
    scale_rewards: str = option(
        "group",
        "grpo: divide rewards by their standard deviation among a prompt's replies, in the batch, or not at all",
        choices=("group", "batch", "none"),
    )
    use_vllm: bool | None = option(None, "grpo: generate with vLLM; unset: on a GPU where it is installed")
    vllm_gpu_memory_utilization: float = option(0.5, "grpo: fraction of GPU memory for vLLM", minimum=0.05, maximum=1)

    _evaluation: str = group("evaluation during training")
    eval_strategy: str = option("auto", "auto: by steps with held-out data", choices=("auto", "no", "steps", "epoch"))
    eval_steps: float | None = option(
        None, "steps between evaluations; below 1: a fraction; unset: as often as a tenth of the time allows", minimum=0
    )
    eval_delay: float = option(0.0, "steps (epochs with eval_strategy: epoch) before the first evaluation", minimum=0)
    per_device_eval_batch_size: int = option(2, "sequences per forward pass of an evaluation", minimum=1)
    load_best_model_at_end: bool = option(True, "keep the adapter of best eval_loss (grpo: eval_reward), if evaluated")
    early_stopping: str = option(
        "auto",
        "stop when eval_loss no longer improves; without it, when loss is near zero",
        choices=("auto", "no"),
    )
    early_stopping_patience: int = option(5, "evaluations without improvement, over at least one epoch", minimum=1)
    early_stopping_threshold: float = option(0.001, "minimum improvement of eval_loss", minimum=0)

    _output: str = group("output")
    output_dir: str | None = option(None, "run folder; unset: saves/ and the recipe's name", path=True, resume="any")
    overwrite_output_dir: bool = option(False, "start over: delete an earlier run in the folder", resume="any")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder to resume from; unset: the newest complete one; false: none", path=True, resume="any"
    )
    logging_steps: float = option(5, "steps between log lines; below 1: a fraction of all", minimum=0, resume="any")
    logging_first_step: bool = option(True, "log the first step too", resume="any")
    save_strategy: str = option("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: float = option(100, "steps between checkpoints; below 1: a fraction of all", minimum=0, resume="any")
    save_total_limit: int | None = option(2, "checkpoints kept at most; the best always is", minimum=1, resume="any")
    plot_loss: bool = option(True, "draw training_loss.png", resume="any")
    report_to: tuple[str, ...] = option(("none",), "none, tensorboard, wandb, ...; all: those installed", resume="any")

    _chat: str = group("chat")
    do_sample: bool = option(True, "sample tokens; false: greedy decoding", resume="any")
    temperature: float | None = option(None, "0: greedy decoding; unset: 0.7 (in grpo: 1)", minimum=0, resume="any")
    top_p: float = option(
        0.9, "sample from the smallest token set whose probabilities sum to this", minimum=0, maximum=1, resume="any"
    )
    top_k: int = option(50, "sample from this many most likely tokens; 0: from all", minimum=0, resume="any")
    min_p: float = option(0.0, "drop tokens below this fraction of the top one", minimum=0, maximum=1, resume="any")
    repetition_penalty: float = option(1.0, "above 1: tokens already used become less likely", minimum=0, resume="any")
    max_new_tokens: int = option(1024, "maximum length of a reply, in tokens", minimum=1, resume="any")
    infer_dtype: str = option("auto", "dtype of weights; auto: the fastest", choices=("auto", *DTYPES), resume="any")

    _export: str = group("export")
    export_dir: str | None = option(None, "folder of the merged model; unset: RUN/merged", path=True, resume="any")
    export_size: int = option(5, "maximum file size of the merged model, in GB", minimum=1, resume="any")
    export_dtype: str | None = option(None, "dtype of merged weights; unset: the base's", choices=DTYPES, resume="any")

    _measuring: str = group("evaluation")
    labels: tuple[str, ...] = option((), "possible answers, of two the positive last; unset: by the data", resume="any")
    do_train: bool | None = option(None, "false: the recipe is for evaluate.py, train.py refuses it", resume="any")
    do_eval: bool = option(False, "without do_train: the recipe is for evaluate.py", resume="any")
    do_predict: bool = option(False, "as do_eval; evaluate.py writes LLaMA-Factory's predictions", resume="any")
    predict_with_generate: bool = option(False, "evaluate.py also writes LLaMA-Factory's predictions", resume="any")
    compute_accuracy: bool = option(False, "evaluate.py always measures accuracy; train.py refuses it", resume="any")

    @property
    def alpha(self) -> int:
        """lora_alpha with its default filled in."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


OPTIONS = {f.name: f for f in dataclasses.fields(Config) if "help" in f.metadata}
TYPES = typing.get_type_hints(Config)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text, every option in the order of `--help`."""
    values = {name: getattr(config, name) for name in OPTIONS}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def help_text(usage: str, groups: tuple[str, ...] = ()) -> str:
    """The text of `--help`: `usage`, then every option (of `groups`, if given) with default and meaning, in groups."""
    head = Message("Settings: `key: value` in a recipe, `key=value` on the command line (which wins).")
    lines = [usage.strip(), "", str(head)]
    width = max(map(len, OPTIONS)) + 2
    shown = False
    for f in dataclasses.fields(Config):
        text = f.metadata.get("group") or f.metadata["help"]
        if "group" in f.metadata:
            shown = not groups or text in groups
            lines += ["", f"{Message(text)}:"] if shown else []
        elif shown:
            choices = f" [{'|'.join(map(str, f.metadata['choices']))}]" if f.metadata["choices"] else ""
            lines.append(f"  {f.name:<{width}}{Message(text)}{choices} ({_default_text(f.default)})")
    return "\n".join(lines)


def _default_text(default: Any) -> Message:
    if default in (None, (), ""):
        return Message("default: unset")
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return Message("default: {value}", value=text.lower() if isinstance(default, bool) else text)


# ---------------------------------------------------------------------------------------------------------------------
# The frame of a command


def _say_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Instead of a traceback: which Python has the kit's packages, where this one lacks one."""
    package = str(getattr(error, "name", "")).partition(".")[0]
    if kind is KeyboardInterrupt:  # before a command runs
        _end_stopped()
    if not isinstance(error, ModuleNotFoundError) or (ROOT / package).exists() or (ROOT / f"{package}.py").exists():
        sys.__excepthook__(kind, error, trace)
        return
    text = "{python} lacks {package}, which this kit needs; run make setup, then .venv/bin/python"
    _end_with(Message(text, python=sys.executable, package=package))


sys.excepthook = _say_what_is_missing  # from the first line on: commands import some packages before they run


# Why a path cannot be used at all, whatever it was wanted for.
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main(argv)`; a UserError becomes its sentence on stderr and exit status 2, Ctrl-C status 130.

    So do a path that cannot be used, and a full disk, where nothing nearer to it has told more.
    """
    # A shell starts what runs in the background (`nohup make webui &`) with SIGINT ignored; nothing could be paused.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    configure_openmp()
    for stream in (sys.stdout, sys.stderr):  # a terminal in GBK, or a name that is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if CACHE_MOVED:
        text = "{asked} cannot be written; {cache} is used instead (ONECARD_CACHE names another)"
        print_notes([Message(text, asked=ASKED_CACHE, cache=CACHE)], sys.stderr)
        os.environ["ONECARD_CACHE"] = str(CACHE)  # of the commands that this one starts
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else TRL tells the hub of every training
    # They warn of kernels for devices or packages that nothing here uses.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except UserError as error:
        _end_with(error.message)
    except KeyboardInterrupt:
        _end_stopped()
    except BrokenPipeError:  # `python chat.py ... | head`: the reader went away, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in UNUSABLE and error.filename:
            _end_with(Message("{path} cannot be used: {problem}", path=error.filename, problem=error.strerror))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = {path: shutil.disk_usage(path).free for path in (Path.cwd(), ROOT, Path(tempfile.gettempdir()))}
        text = "no space is left on the disk of {place}; free some and run the command again (finished work is kept)"
        _end_with(Message(text, place=error.filename or min(free, key=free.get)))


def _end_stopped() -> NoReturn:
    print("\n", Message("stopped"), sep="", file=sys.stderr)
    sys.exit(130)


def _end_with(error: Message) -> NoReturn:
    """Says what the user can mend, also to the program that started this one, and ends with status 2."""
    if file := os.environ.get("ONECARD_ERROR_FILE"):
        with contextlib.suppress(OSError):  # its disk may be full
            Path(file).write_text(json.dumps(error.to_json(), ensure_ascii=False), encoding="utf-8")
    print(Message("error: {error}", error=error), file=sys.stderr)
    sys.exit(2)


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


# ---------------------------------------------------------------------------------------------------------------------
# The device


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
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = "--query-gpu=name,driver_version,compute_cap,memory.total,memory.free"
    row = _nvidia_smi("-i", card, query, "--format=csv,noheader,nounits") if card not in ("", "-1") else ""
    if not row:
        return None
    name, driver, compute, total, free = (part.strip() for part in row.splitlines()[0].split(","))
    cuda = _nvidia_smi().partition("CUDA Version:")[2].strip()
    try:
        memory = (int(float(total)) << 20, int(float(free)) << 20)
    except ValueError:  # "[N/A]" of a chip that shares the main memory
        import psutil

        memory = (psutil.virtual_memory().total, psutil.virtual_memory().available)
    return Gpu(name, driver, _version(cuda), _version(compute), *memory)


def visible_cards() -> list[str]:
    """All cards that may be used, by the names that CUDA_VISIBLE_DEVICES takes; needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return re.findall(r"^GPU (\d+)", _nvidia_smi("-L"), re.MULTILINE)
    is_hidden = visible.split(",")[0] in ("", "-1") or shutil.which("nvidia-smi") is None
    return [] if is_hidden else visible.split(",")


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; "" where it is missing or fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)(?:\.(\d+))?", text)  # not of "[N/A]"
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
