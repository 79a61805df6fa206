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


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main(argv)`; a UserError becomes its sentence on stderr and exit status 2, Ctrl-C status 130."""
    _calm_threads()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else TRL tells the hub of every training
    for name in ("torchao", "torch.utils._pytree"):  # they warn of kernels for cards that nothing here uses
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except UserError as error:
        if file := os.environ.get("ONECARD_ERROR_FILE"):  # for a program that started this one
            Path(file).write_text(json.dumps(error.message.to_json(), ensure_ascii=False), encoding="utf-8")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python chat.py ... | head`: the reader went away, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _calm_threads() -> None:
    """Tells OpenMP how long its threads spin while they wait for each other; it must be told before torch is imported.

    Spinning is fastest on free cores, and six times slower than sleeping where other work shares them (docs/log.md).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "2000"


def python() -> str:
    """The word for this interpreter in a command to type: `python` only where the shell takes it for this one."""
    venv = ROOT / ".venv"
    if not venv.exists() or not os.path.samefile(sys.prefix, venv):
        return "python"
    active = os.environ.get("VIRTUAL_ENV")
    if active and Path(active).exists() and os.path.samefile(active, venv):
        return "python"
    return str((Path() if _at_home() else ROOT) / ".venv" / "bin" / "python")


def command(script: str, *words: object) -> str:
    """A command that runs a script of this kit, as a line for the shell in the working directory."""
    return shlex.join([python(), script if _at_home() else str(ROOT / script), *map(str, words)])


def _at_home() -> bool:
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
) -> Any:
    """A field of Config. `minimum` and `maximum` are inclusive; `choices` are all allowed values."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    )


def group(title: str) -> Any:
    """Marks where a group of options starts in `--help`; not an option itself."""
    return dataclasses.field(default=title, init=False, repr=False, metadata={"group": title})


@dataclass(frozen=True)
class Config:
    """Every setting of every script. Keys and meanings are LLaMA-Factory's where it has them."""

    _model: str = group("model")
    model_name_or_path: str = option(EMBEDDED_MODEL, "folder of the base model, or its name on the hub")
    adapter_name_or_path: str | None = option(None, "an adapter to go on training (train) or to use (chat, merge)")
    template: str | None = option(None, "a file of templates/ without .jinja; unset: the tokenizer's own chat template")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    quantization_bit: int | None = option(None, "load the base in 4 bit (QLoRA) or 8 bit; needs a GPU", choices=(4, 8))

    _data: str = group("data")
    dataset: tuple[str, ...] = option(
        ("identity", "general"), "names in dataset_info.json, or files; several with commas"
    )
    eval_dataset: tuple[str, ...] = option((), "datasets to evaluate on, instead of val_size")
    dataset_dir: str = option("data", "folder of dataset_info.json")
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
    neat_packing: bool = option(False, "the same as packing")
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
    output_dir: str | None = option(None, "the run folder; unset: saves/ and the recipe's name")
    overwrite_output_dir: bool = option(False, "start over, deleting what the folder holds of an earlier run")
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint folder to go on from; unset: the run's newest whole one; false: none"
    )
    logging_steps: float = option(5, "steps between lines of trainer_log.jsonl; below 1: a share", minimum=0)
    logging_first_step: bool = option(True, "log the first step too")
    save_strategy: str = option("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: float = option(100, "steps between checkpoints; below 1: a share", minimum=0)
    save_total_limit: int | None = option(2, "checkpoints kept; the best one always is", minimum=1)
    plot_loss: bool = option(True, "draw training_loss.png")
    report_to: tuple[str, ...] = option(("none",), "none, tensorboard, wandb, or several; all: those installed")
    use_unsloth: bool = option(True, "always on: training is Unsloth's")

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
    export_dir: str | None = option(None, "folder of the merged model; unset: merged/ in the run folder")
    export_size: int = option(5, "largest file of the merged model, in GB", minimum=1)
    export_dtype: str | None = option(
        None, "type of the merged weights; unset: the base model's", choices=("float16", "bfloat16", "float32")
    )

    _measuring: str = group("evaluation")
    labels: tuple[str, ...] = option(
        (), "the answers to choose from, the positive one of two last; unset: told from the data"
    )
    do_predict: bool = option(False, "evaluate.py also writes the files of LLaMA-Factory's do_predict")
    predict_with_generate: bool = option(False, "the same as do_predict")

    @property
    def alpha(self) -> int:
        """lora_alpha with its default filled in."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


OPTIONS = {f.name: f for f in dataclasses.fields(Config) if "help" in f.metadata}
_TYPES = typing.get_type_hints(Config)

MAY_BE_EMPTY = {"name", "author"}  # then {{name}} and {{author}} in the data stay as they are

# Older or other spellings of an option.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "early_stopping_steps": "early_stopping_patience",
    "disable_gradient_checkpointing": "gradient_checkpointing",  # with the opposite value
}

# Trackers that transformers knows, each by the name of its package.
REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "neptune", "trackio", "comet_ml", "clearml")

# Keys of LLaMA-Factory and transformers that change nothing on one card: accepted, with this note.
_ONE_CARD = "is about several cards or machines; there is one"
_ALWAYS = "is always so here"
_TEXT_ONLY = "text is trained here"
_NO_HUB = "nothing here asks a hub for files; download.py fetches a model"
_SWANLAB = "use report_to: swanlab"
IGNORED = {
    "do_train": "train.py trains, evaluate.py evaluates",
    "do_eval": "train.py evaluates where there is held-out data",
    "ddp_timeout": _ONE_CARD,
    "ddp_find_unused_parameters": _ONE_CARD,
    "local_rank": _ONE_CARD,
    "deepspeed": _ONE_CARD,
    "fsdp": _ONE_CARD,
    "fsdp_config": _ONE_CARD,
    "data_shared_file_system": _ONE_CARD,
    "include_num_input_tokens_seen": _ALWAYS + ": the log counts tokens",
    "include_tokens_per_second": _ALWAYS + ": the log has tokens a second",
    "include_effective_tokens_per_second": _ALWAYS + ": the log has tokens a second",
    "flash_attn": "the fastest attention of the device is used",
    "enable_liger_kernel": "Unsloth's kernels do this",
    "use_unsloth_gc": "gradient_checkpointing is Unsloth's",
    "use_reentrant_gc": "gradient_checkpointing is Unsloth's",
    "use_fast_tokenizer": _ALWAYS,
    "low_cpu_mem_usage": _ALWAYS,
    "double_quantization": _ALWAYS + " with quantization_bit: 4",
    "quantization_method": "bitsandbytes is used",
    "quantization_type": "nf4 is used",
    "upcast_layernorm": "Unsloth chooses the precision of the norms",
    "dataloader_num_workers": "batches are ready before they are needed",
    "dataloader_pin_memory": "batches are ready before they are needed",
    "remove_unused_columns": "samples have no unused columns",
    "preprocessing_batch_size": "the batch size of the tokenizer is chosen for you",
    "group_by_length": "batches have no padding that it could save",
    "ignore_pad_token_for_loss": "batches have no padding",
    "cache_dir": "set HF_HOME for the hub's cache",
    "run_name": "the run folder's name is the run's name",
    "infer_backend": "the engine chooses",
    "print_param_status": "the summary counts trainable parameters",
    "export_device": "the merge needs no device: it streams the files",
    "export_legacy_format": "only safetensors are written",
    "media_dir": _TEXT_ONLY,
    "image_max_pixels": _TEXT_ONLY,
    "image_min_pixels": _TEXT_ONLY,
    "video_max_pixels": _TEXT_ONLY,
    "video_min_pixels": _TEXT_ONLY,
    "freeze_vision_tower": _TEXT_ONLY,
    "freeze_multi_modal_projector": _TEXT_ONLY,
    "tf32": "the precision is chosen for the device",
    "save_only_model": "a checkpoint can always be resumed",
    "save_safetensors": _ALWAYS,
    "use_cache": _ALWAYS,
    "use_kv_cache": _ALWAYS,
    "ray_run_name": _ONE_CARD,
    "ray_num_workers": _ONE_CARD,
    "ray_storage_path": _ONE_CARD,
    "ray_storage_filesystem": _ONE_CARD,
    "ray_init_kwargs": _ONE_CARD,
    "resources_per_worker": _ONE_CARD,
    "placement_strategy": _ONE_CARD,
    "compute_accuracy": "evaluate.py measures accuracy",
    "model_revision": "download.py --revision fetches a model's revision",
    "hf_hub_token": _NO_HUB,
    "ms_hub_token": _NO_HUB,
    "om_hub_token": _NO_HUB,
    "hub_model_id": "merge.py --push uploads a model",
    "export_hub_model_id": "merge.py --push uploads a model",
    "use_swanlab": _SWANLAB,
    "swanlab_project": _SWANLAB,
    "swanlab_workspace": _SWANLAB,
    "swanlab_run_name": _SWANLAB,
    "swanlab_mode": _SWANLAB,
    "swanlab_api_key": _SWANLAB,
    "swanlab_logdir": _SWANLAB,
    "swanlab_lark_webhook_url": _SWANLAB,
    "swanlab_lark_secret": _SWANLAB,
    "logging_dir": "tensorboard's files stand in runs/ of the run folder",
    "logging_strategy": "logging_steps says when",
    "metric_for_best_model": "is always eval_loss here",
    "greater_is_better": "is always eval_loss here, of which less is better",
    "eval_on_start": "evaluations come with the steps; evaluate.py measures the model before training",
    "eval_accumulation_steps": "an evaluation keeps no logits",
    "data_seed": "seed is that of the data, too",
    "torch_compile": "Unsloth compiles what is worth it",
    "dataloader_drop_last": "no sample is left out",
    "dataloader_persistent_workers": "batches are ready before they are needed",
    "use_cpu": "the CPU trains where there is no card, or CUDA_VISIBLE_DEVICES=-1",
    "no_cuda": "the CPU trains where there is no card, or CUDA_VISIBLE_DEVICES=-1",
    "skip_special_tokens": "a reply is shown without control tokens",
}

# Keys that would change the result and that this kit does not have: refused unless false, zero, none or empty.
REFUSED = (
    "pissa_init",
    "use_galore",
    "use_apollo",
    "use_badam",
    "use_llama_pro",
    "use_adam_mini",
    "use_muon",
    "use_mca",
    "loraplus_lr_ratio",
    "neftune_noise_alpha",
    "pure_bf16",
    "shift_attn",
    "mixture_of_depths",
    "rope_scaling",
    "resize_vocab",
    "add_tokens",
    "add_special_tokens",
    "additional_target",
    "create_new_adapter",
    "train_from_scratch",
    "streaming",
    "tokenized_path",
    "export_quantization_bit",
    "vllm_config",
    "tool_format",
    "split_special_tokens",
    "new_special_tokens",
    "disable_shuffling",
    "label_smoothing_factor",
    "lr_scheduler_kwargs",
    "use_dft_loss",
    "use_eaft_loss",
    "use_asft_loss",
    "pissa_convert",
    "fp8",
    "moe_aux_loss_coef",
    "visual_inputs",
    "push_to_hub",
)

# Keys that would change the result, with the only value that is used here, which is LLaMA-Factory's default.
FIXED = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "loraplus_lr_embedding": 1e-6,
    "pissa_iter": 16,
    "num_beams": 1,
    "length_penalty": 1,
}
_OFF = ("", "none", "null", "false", "no", "off", "0", "0.0", "[]", "{}")


def _coerce(name: str, value: Any) -> Any:
    """`value` as the type of the option `name`; raises ValueError with what is allowed."""
    kind = _TYPES[name]
    if value in (False, "false", "off") and "no" in OPTIONS[name].metadata["choices"]:
        return "no"  # YAML reads a bare no as false
    optional = type(None) in typing.get_args(kind)
    if optional:
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    if kind is str and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "")):
        if optional:
            return None
        if typing.get_origin(kind) is tuple:
            return ("none",) if name == "report_to" else ()
        if kind is str and isinstance(value, str) and (value.strip() or name in MAY_BE_EMPTY):
            return value.strip()
        raise ValueError("a value is needed")
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        element = typing.get_args(kind)[0]
        return tuple(_scalar(element, item) for item in items if str(item).strip())
    return _scalar(kind, value)


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).strip().lower() not in words:
            raise ValueError("must be true or false")
        return words[str(value).strip().lower()]
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("must be a number")
        try:  # PyYAML reads 1e-4 as a string
            number = float(str(value).strip())
        except ValueError:
            raise ValueError("must be a number") from None
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        if kind is int and number != int(number):
            raise ValueError("must be a whole number")
        return kind(number)
    if isinstance(value, dict | list | tuple):
        raise ValueError("must be a single value")
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _check_option(name: str, value: Any) -> str | None:
    """What is wrong with a coerced value, or None."""
    meta = OPTIONS[name].metadata
    if value is None:
        return None
    if meta["choices"] and value not in meta["choices"]:
        return f"must be one of {', '.join(map(str, meta['choices']))}{nearest(str(value), map(str, meta['choices']))}"
    if meta["minimum"] is not None and value < meta["minimum"]:
        return f"must be at least {meta['minimum']:g}"
    if meta["maximum"] is not None and value > meta["maximum"]:
        return f"must be at most {meta['maximum']:g}"
    return None


@dataclass(frozen=True)
class Loaded:
    """A configuration and how it came about: the recipe's path (or None), its notes, the options that were set, and
    those of them that were set on the command line."""

    config: Config
    recipe: Path | None
    notes: list[str]
    given: frozenset[str]
    typed: frozenset[str] = frozenset()


def load_config(arguments: list[str]) -> Loaded:
    """Reads `[RECIPE] [key=value ...]`, the recipe being a YAML or JSON file; later values win.

    Raises UserError that names every fault of the file and the command line at once.
    """
    recipe: Path | None = None
    read: dict[str, Any] = {}
    typed: dict[str, Any] = {}
    for argument in arguments:
        text = argument[2:] if argument.startswith("--") else argument
        key, equals, value = text.partition("=")
        if equals and key.replace("_", "").replace("-", "").isalnum() and not Path(argument).exists():
            typed[key.replace("-", "_")] = _parse(value)
        elif argument.startswith("-"):
            raise UserError(f"unknown argument {argument}; settings are written key=value, --help lists them")
        elif recipe is not None:
            raise UserError(f"two recipes given, {recipe} and {argument}; give one, and settings as key=value")
        else:
            recipe = Path(argument)
            read = read_recipe(recipe)
    return _resolve(recipe, read, typed)


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.startswith(("[", "{")) else text
    except yaml.YAMLError:
        return text


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON recipe; raises UserError when it cannot be read, with line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = nearest(str(path), (str(p) for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json")))
        raise UserError(f"there is no recipe {path}{near}; recipes stand in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); a recipe is a YAML file in UTF-8") from None
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        twice = _keys_twice(yaml.compose(text, Loader=loader))
        content = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise UserError(f"{where}: {getattr(error, 'problem', error)}; write one `key: value` a line") from None
    if twice:
        raise UserError(f"{path}, {'; '.join(twice)}; keep one")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; write one `key: value` a line")
    return {str(key): value for key, value in content.items()}


def _keys_twice(document: yaml.Node | None) -> list[str]:
    """The settings that stand twice in a recipe, of which YAML would silently take the last."""
    lines: dict[str, list[int]] = {}
    for key, _ in document.value if isinstance(document, yaml.MappingNode) else ():
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    return [f"line {at[-1]}: {key} stands already in line {at[0]}" for key, at in lines.items() if len(at) > 1]


@dataclass(frozen=True)
class _Setting:
    """A value as it was given: under which key, and where."""

    key: str
    value: Any
    where: str


def _by_name(given: dict[str, Any], where: str, faults: list[str]) -> dict[str, _Setting]:
    """The settings of one origin by the names of their options; the same one under two names is a fault."""
    found: dict[str, _Setting] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if key == "disable_gradient_checkpointing":
            if _is_off(value):
                continue  # which is LLaMA-Factory's default
            value = "false"
        if name in found:
            faults.append(f"{where}: {found[name].key} and {key} are the same setting; keep one")
        found[name] = _Setting(key, value, where)
    return found


def _is_off(value: Any) -> bool:
    return str(value).strip().lower() in _OFF


def _is_fixed(key: str, value: Any) -> bool:
    """Whether `value` is what is used here for a key of FIXED."""
    try:
        return value is None or float(value) == FIXED[key]
    except (TypeError, ValueError):
        return False


def _resolve(recipe: Path | None, read: dict[str, Any], typed: dict[str, Any]) -> Loaded:
    faults: list[str] = []
    notes: list[str] = []
    values: dict[str, Any] = {}
    typed_by_name = _by_name(typed, "command line", faults)
    for name, setting in {**_by_name(read, str(recipe), faults), **typed_by_name}.items():
        key, value, where = setting.key, setting.value, setting.where
        if name in OPTIONS:
            try:
                meant = _coerce(name, value)
                fault = _check_option(name, meant)
            except ValueError as error:
                fault = str(error)
            if fault:
                faults.append(f"{where}: {key}: {value!r} {fault}")
            else:
                values[name] = meant
        elif key in IGNORED:
            notes.append(f"{key}: {IGNORED[key]}")
        elif key in REFUSED:
            if not _is_off(value):
                faults.append(f"{where}: {key} is something this kit does not do; take it out of the recipe")
        elif key in FIXED:
            if not _is_fixed(key, value):
                faults.append(f"{where}: {key} is always {FIXED[key]:g} here; take it out of the recipe")
        else:
            faults.append(f"{where}: unknown key {key}{nearest(key, [*OPTIONS, *ALIASES])}")
    faults += _combine(values, notes)
    if faults:
        head = "the configuration has a fault" if len(faults) == 1 else f"the configuration has {len(faults)} faults"
        raise UserError(f"{head}:\n  " + "\n  ".join(faults) + "\npython train.py --help lists every key.")
    if values.get("output_dir") is None:
        values["output_dir"] = str(SAVES / (recipe.stem if recipe else "default"))
    return Loaded(Config(**values), recipe, notes, frozenset(values), frozenset(typed_by_name))


def _combine(values: dict[str, Any], notes: list[str]) -> list[str]:
    """What is wrong with, or worth a note about, settings taken together; may adjust `values`."""
    faults = []
    if values.get("neat_packing"):
        values["packing"] = True
    if values.get("packing") and not values.get("neat_packing"):
        notes.append("packing: samples that share a row never see each other (LLaMA-Factory's neat_packing)")
    if values.get("use_unsloth") is False:
        notes.append("use_unsloth: training is Unsloth's on every device; false changes nothing")
    if values.get("val_size") and values.get("eval_dataset"):
        faults.append("val_size and eval_dataset exclude each other; keep one")
    if (values.get("val_size") or 0) > 1 and values["val_size"] != int(values["val_size"]):
        faults.append("val_size must be a fraction below 1 or a whole count of samples")
    if values.get("mask_history") and values.get("train_on_prompt"):
        faults.append("mask_history and train_on_prompt exclude each other; keep one")
    probabilities = values.get("interleave_probs", ())
    names = values.get("dataset", Config.dataset)
    if probabilities and len(probabilities) != len(names):
        faults.append(f"interleave_probs has {len(probabilities)} values for {len(names)} datasets; give one for each")
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-3):
        faults.append("interleave_probs must be positive and sum to 1")
    if not names:
        faults.append("dataset names no data; give a name of dataset_info.json or a file")
    if "all" in values.get("report_to", ()):
        values["report_to"] = tuple(name for name in REPORTERS if importlib.util.find_spec(name)) or ("none",)
        notes.append(f"report_to: all is here {', '.join(values['report_to'])}: what is installed")
    for reporter in values.get("report_to", ()):
        if reporter not in ("none", "all", *REPORTERS):
            known = ("none", "all", *REPORTERS)
            faults.append(f"report_to: {reporter!r} must be one of {', '.join(known)}{nearest(reporter, known)}")
    if values.get("max_steps") == 0:
        faults.append("max_steps must be -1 (off) or at least 1")
    if values.get("num_train_epochs") == 0 and values.get("max_steps", -1) < 0:
        faults.append("num_train_epochs must be above 0")
    for key in ("eval_steps", "logging_steps", "save_steps"):
        value = values.get(key)
        if value is not None and (value == 0 or (value > 1 and value != int(value))):
            faults.append(f"{key} must be a whole number of steps, or a share of all steps below 1")
    return faults


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
