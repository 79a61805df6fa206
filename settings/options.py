"""Every setting: one flat dataclass; a field's name is the key in YAML and on the command line."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from settings.kit import EMBEDDED_MODEL


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
    optim_args: str | None = option(None, "values of ademamix, sgd, rmsprop or adagrad, like momentum=0.9")
    adam_beta1: float = option(0.9, "decay of Adam's mean of gradients", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "decay of Adam's mean of squared gradients", minimum=0, maximum=1)
    adam_epsilon: float = option(1e-8, "what Adam adds to the divisor", minimum=0)
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
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the B matrices learn at so many times learning_rate; 16 is usual", minimum=0
    )
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
TYPES = typing.get_type_hints(Config)


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
