"""Settings that exclude or need each other: a check a topic, from a whole configuration to its faults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from common import OPTIONS, Config, Message, nearest_word

# Trackers that transformers knows, each by the name of its package.
REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "neptune", "trackio", "comet_ml", "clearml")

# What lr_scheduler_kwargs may set of each schedule of transformers that has arguments of its own.
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
EMBEDDING_MODULES = {"embed_tokens", "lm_head"}

# The optimizers that read optim_args in transformers; the others would ignore it without a message.
TAKE_ARGUMENTS = ("ademamix", "ademamix_8bit", "sgd", "rmsprop", "adagrad")


def find_faults(config: Config) -> list[Message]:
    """Every fault of the settings taken together."""
    checks = (_data, _steps, _optimizer, _schedule, _adapter, _preferences, _rewards, _output)
    return [fault for check in checks for fault in check(config)]


def _exclude(first: str, second: str) -> Message:
    return Message("{first} and {second} exclude each other; keep one", first=first, second=second)


def _data(config: Config) -> Iterator[Message]:
    size, probabilities, names = config.val_size or 0, config.interleave_probs, config.dataset
    if size and config.eval_dataset:
        yield _exclude("val_size", "eval_dataset")
    if size > 1 and size != int(size):
        yield Message("val_size must be a fraction below 1 or a whole number of samples")
    if config.mask_history and config.train_on_prompt:
        yield _exclude("mask_history", "train_on_prompt")
    if not names and config.do_train is not False and not (config.do_predict or config.do_eval):
        yield Message("dataset names no data; give a name of dataset_info.json or a file")
    if probabilities and len(probabilities) != len(names):
        text = "interleave_probs has {values} values for {datasets} datasets; give one for each"
        yield Message(text, values=len(probabilities), datasets=len(names))
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-3):
        yield Message("interleave_probs must be positive and sum to 1")


def _steps(config: Config) -> Iterator[Message]:
    if config.max_steps == 0:
        yield Message("max_steps must be -1 (off) or at least 1")
    if config.num_train_epochs == 0 and config.max_steps < 0:
        yield Message("num_train_epochs must be above 0")
    for key in ("eval_steps", "logging_steps", "save_steps"):
        steps = getattr(config, key)
        if steps is not None and (steps == 0 or (steps > 1 and steps != int(steps))):
            yield Message("{key} must be a whole number of steps, or a fraction of all steps below 1", key=key)


def _optimizer(config: Config) -> Iterator[Message]:
    if config.optim_args and config.optim not in TAKE_ARGUMENTS:
        text = "optim_args: {optim} takes none ({takers} do); set adam_beta1, adam_beta2, adam_epsilon, weight_decay"
        yield Message(text, optim=config.optim, takers=TAKE_ARGUMENTS)


def _schedule(config: Config) -> Iterator[Message]:
    schedule, given = config.lr_scheduler_type, config.lr_scheduler_kwargs or {}
    known = SCHEDULE_VALUES.get(schedule, ())
    if given and not known:
        text = "lr_scheduler_kwargs: {schedule} takes none ({takers} do); leave it out"
        yield Message(text, schedule=schedule, takers=[*SCHEDULE_VALUES])
        return
    for key, value in given.items():
        if key not in known:
            text = "lr_scheduler_kwargs: {schedule} takes no {key}{near:suggestion}; it takes {known}"
            yield Message(text, schedule=schedule, key=key, known=known, near=nearest_word(key, known))
        elif key.endswith("_type"):
            if value not in DECAYS:
                yield Message("lr_scheduler_kwargs: {key} must be one of {choices}", key=key, choices=DECAYS)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield Message("lr_scheduler_kwargs: {key}: {value} must be a number", key=key, value=value)
    needed = [MIN_RATES] if set(MIN_RATES) <= set(known) else []
    needed += [("num_decay_steps",)] if schedule == "warmup_stable_decay" else []
    for keys in needed:
        if len(given.keys() & set(keys)) != 1:
            text = "lr_scheduler_type: {schedule} needs exactly one of {keys} in lr_scheduler_kwargs"
            yield Message(text, schedule=schedule, keys=keys)
    rate, end = config.learning_rate, given.get("lr_end", 1e-7)
    if schedule == "polynomial" and isinstance(end, float | int) and rate and end >= rate:
        text = "lr_scheduler_kwargs: lr_end ({end:g}) must be below learning_rate ({rate:g})"
        yield Message(text, end=end, rate=rate)


def _adapter(config: Config) -> Iterator[Message]:
    adapter = config.adapter_name_or_path or ""
    if "," in adapter and not os.path.exists(adapter):
        text = "adapter_name_or_path names several adapters ({adapters}); merge all but one into the base first"
        yield Message(text, adapters=[name.strip() for name in adapter.split(",")])
    if set(config.lora_target) <= EMBEDDING_MODULES:
        yield Message("lora_target names only embeddings; name linear modules (q_proj,v_proj) or all")
    in_full = {name.rpartition(".")[2] for name in config.additional_target}
    if config.embedding_learning_rate is not None and not EMBEDDING_MODULES & in_full:
        yield Message("embedding_learning_rate: no embedding is trained; set additional_target: embed_tokens,lm_head")
    if config.use_dora and config.pissa_init:
        yield _exclude("pissa_init", "use_dora")
    if config.use_dora and config.lora_bias == "true":
        yield _exclude("lora_bias", "use_dora")
    if config.pissa_init and config.quantization_bit:
        yield Message("pissa_init cannot change quantized weights exactly; leave out quantization_bit or pissa_init")


def _preferences(config: Config) -> Iterator[Message]:
    # TRL's names, which are of stage grpo here
    for key, own in (("beta", "pref_beta"), ("epsilon", "adam_epsilon"), ("loss_type", "pref_loss")):
        if config.stage != "grpo" and getattr(config, key) != OPTIONS[key].default:
            yield Message("{key} is a setting of stage: grpo; use {own}", key=key, own=own)
    if config.dpo_label_smoothing and config.pref_loss != "sigmoid":
        yield Message("dpo_label_smoothing needs pref_loss: sigmoid")
    if config.pref_beta == 0 and config.stage in ("dpo", "kto"):
        yield Message("pref_beta: 0 leaves the preferences without effect")
    changes_base = {
        "pissa_init": config.pissa_init,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "lora_bias": config.lora_bias in ("all", "lora_only"),
    }
    if config.stage in ("dpo", "kto", "grpo"):
        text = "{key} is for stage: sft and pt; in {stage} it would change the reference, the model without its adapter"
        yield from (Message(text, key=key, stage=config.stage) for key, is_set in changes_base.items() if is_set)


def _rewards(config: Config) -> Iterator[Message]:
    if config.stage != "grpo":
        return
    functions, weights = config.reward_funcs, config.reward_weights
    if not functions:
        text = "stage: grpo needs reward_funcs: exact_label, json_valid, regex: PATTERN, FILE.py:function ..."
        yield Message(text)
    elif weights and len(weights) != len(functions):
        text = "reward_weights has {weights} values for {functions} reward_funcs"
        yield Message(text, weights=len(weights), functions=len(functions))
    batch, steps, each = config.per_device_train_batch_size, config.gradient_accumulation_steps, config.num_generations
    if batch * steps % each:
        enough = next(n for n in range(steps, steps + each + 1) if batch * n % each == 0)
        text = "{replies} replies a step must be a multiple of {each}; set gradient_accumulation_steps: {enough}"
        yield Message(text, replies=batch * steps, each=each, enough=enough)
    longest, cutoff_len = config.max_completion_length, config.cutoff_len
    if longest >= cutoff_len:
        text = "max_completion_length ({longest}) leaves no room for prompts within cutoff_len ({cutoff_len})"
        yield Message(text, longest=longest, cutoff_len=cutoff_len)
    if config.temperature == 0:
        yield Message("temperature: 0 makes all replies to a prompt the same, so nothing is learned; leave it out")


def _output(config: Config) -> Iterator[Message]:
    for key in ("output_dir", "export_dir"):
        folder = getattr(config, key) or ""
        if re.match(r"[A-Za-z]:/", folder):
            text = "{key}: {folder} is on a Windows drive; name a folder of this machine"
            yield Message(text, key=key, folder=folder)
    known = ("none", "all", *REPORTERS)
    for name in config.report_to:
        if name not in known:
            text = "report_to: {reporter} must be one of {known}{near:suggestion}"
            yield Message(text, reporter=name, known=known, near=nearest_word(name, known))
