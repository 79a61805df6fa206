"""What stage grpo needs beside TRL's trainer: its arguments, its data, and whether vLLM generates the replies."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import common
from common import Config, UserError

# Names in the log → TRL's; `reward_NAME` and `reward_NAME_std` of each function come on top.
LOGGED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "groups_alike": "frac_reward_zero_std",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio": "clip_ratio/region_mean",
    "reply_tokens": "completions/mean_length",
    "reply_tokens_max": "completions/max_length",
    "replies_cut": "completions/clipped_ratio",
}


def uses_vllm(config: Config) -> bool:
    """Whether vLLM generates the replies: on a card, where it is installed, unless use_vllm is false.

    Raises UserError where it is asked for and cannot be had.
    """
    if config.stage != "grpo" or config.use_vllm is False:
        return False
    there = importlib.util.find_spec("vllm") is not None and common.find_gpu() is not None
    if config.use_vllm and not there:
        raise UserError("use_vllm: true needs a card and the package vllm; leave it out to generate by transformers")
    return there


def loading_settings(config: Config) -> dict[str, Any]:
    """What Unsloth is to be told so that it loads the weights once for vLLM and for the training."""
    if not uses_vllm(config):
        return {}
    share = config.vllm_gpu_memory_utilization
    return {"fast_inference": True, "gpu_memory_utilization": share, "max_lora_rank": config.lora_rank}


def grpo_arguments(config: Config) -> dict[str, Any]:
    """The arguments of TRL's GRPOConfig beside those of every training."""
    names = ("num_generations", "max_completion_length", "beta", "epsilon", "loss_type", "scale_rewards")
    return {name: getattr(config, name) for name in names} | {
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "num_generations_eval": 1,
        "include_num_input_tokens_seen": "no",  # TRL counts them
        "metric_for_best_model": "eval_reward",
        "greater_is_better": True,
        "use_vllm": uses_vllm(config),
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": config.vllm_gpu_memory_utilization,
    }


def end_replies_at(model: Any, stop: list[int]) -> None:
    """Lets these tokens end a reply, also where the model's own settings lack them."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    model.generation_config.eos_token_id = sorted({*own, *stop})


def with_columns(dataset: Any) -> Any:
    """Tokenized prompts as TRL takes them: `prompt`, `prompt_ids`, `answer` and the columns of all rows."""
    names = sorted({name for text in dataset["row"] for name in json.loads(text)})

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [json.loads(text) for text in batch["row"]]
        return {name: [row.get(name) for row in rows] for name in names} | {"prompt_ids": batch["prompt_ids"]}

    return dataset.with_transform(read)


def logged_rewards(logs: dict[str, Any]) -> dict[str, float]:
    """What TRL logs of replies and rewards, by the names of trainer_log.jsonl."""
    names = {f"{part}{name}": f"{part}{its}" for part in ("", "eval_") for name, its in LOGGED.items()}
    for key in logs:
        part, found, name = key.partition("rewards/")
        if found and name.endswith(("/mean", "/std")):
            function, _, kind = name.rpartition("/")
            names[f"{part}reward_{function}{'_std' if kind == 'std' else ''}"] = key
    return {name: round(logs[its], 6) for name, its in names.items() if logs.get(its) is not None}
