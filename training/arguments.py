"""transformers' and TRL's words: the arguments of their trainers, and the names under which these log."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError
from training import hardware
from training.plan import TrainingPlan

PREFERENCES = ("dpo", "kto")  # the stages
BEST_BY = "eval_preference_error"  # what the best checkpoint of these has the least of
# Settings that transformers' arguments call by the same name.
SAME_NAMES = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay",
    "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "full_determinism",
    "eval_delay", "logging_steps", "logging_first_step",
)  # fmt: skip
# Names in trainer_log.jsonl → TRL's.
REWARDS = {
    "reward_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}
REPLIES = {
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
OF_GRPO = ("num_generations", "max_completion_length", "beta", "epsilon", "loss_type", "scale_rewards")


@dataclass(frozen=True)
class Precision:
    """The dtype of the base's weights, and the one ("bf16", "fp16" or None) in which matrices are multiplied."""

    weights: Any
    mixed: str | None
    note: Message | None = None


def choose_precision(config: Config) -> Precision:
    """bfloat16 wherever the device multiplies it fast, else float16 on a GPU and float32 on a CPU."""
    import torch

    if hardware.on_card():
        if torch.cuda.is_bf16_supported():
            note = Message("fp16: this GPU has bfloat16, which needs no loss scaling; bfloat16 is used")
            return Precision(torch.bfloat16, "bf16", note if config.fp16 else None)
        if config.bf16:
            raise UserError("bf16: this GPU has no bfloat16; remove it, and float16 is used")
        return Precision(torch.float16, "fp16")
    from unsloth_zoo.cpu import cpu_bf16_supported

    has_bfloat16 = cpu_bf16_supported()
    used, note = "bfloat16" if has_bfloat16 else "float32", None
    if config.fp16:
        note = Message("fp16: float16 is slow on a CPU; {used} is used", used=used)
    elif config.bf16 and not has_bfloat16:
        note = Message("bf16: this CPU has no bfloat16 instructions; float32 is used")
    return Precision(torch.float32, "bf16" if has_bfloat16 and config.bf16 is not False else None, note)


def training_arguments(config: Config, precision: Precision, plan: TrainingPlan) -> Any:
    """transformers' arguments; all whose default differs between Unsloth's backends are set."""
    on_gpu = hardware.on_card()
    evaluated = plan.saves_evaluated  # transformers then insists on saving exactly where it evaluates; see Course
    arguments = {
        **{name: getattr(config, name) for name in SAME_NAMES},
        "warmup_steps": config.warmup_steps or config.warmup_ratio,
        "data_seed": config.seed,
        "bf16": precision.mixed == "bf16",
        "fp16": precision.mixed == "fp16",
        "gradient_checkpointing": bool(checkpointing_setting(config, not on_gpu)),
        "logging_nan_inf_filter": False,  # it would hide a NaN and go on
        "eval_strategy": plan.eval_strategy,
        "eval_steps": plan.eval_steps,
        "save_strategy": plan.eval_strategy if evaluated else plan.save_strategy,
        "save_steps": (plan.eval_steps if evaluated else plan.save_steps) or 500,
        "save_total_limit": None,  # checkpoints.delete_old
        "load_best_model_at_end": evaluated,
        "metric_for_best_model": BEST_BY if config.stage in PREFERENCES else "eval_loss",
        "greater_is_better": False,
        "include_num_input_tokens_seen": "non_padding" if config.stage in PREFERENCES else "all",
        "report_to": [name for name in config.report_to if name != "none"],
        "run_name": Path(config.output_dir).name,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "average_tokens_across_devices": True,
        "router_aux_loss_coef": 0.0,  # else TRL adds the routers' balancing loss, unasked
        "ddp_find_unused_parameters": False,  # each adapter is in every forward pass
    }
    return _of_stage(config, arguments)


def _of_stage(config: Config, arguments: dict[str, Any]) -> Any:
    """TRL's arguments of the stage: those of every training, and its own."""
    from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

    if config.stage in PREFERENCES:
        arguments |= {"max_length": config.cutoff_len, "disable_dropout": False}
    if config.stage == "dpo":
        return DPOConfig(**arguments)
    if config.stage == "kto":
        # TRL refuses KTO in random order and with batches of one, because it takes the answers of other prompts from
        # the same batch; here they come with the rows (with_mismatched), and KtoTrainer sets its own loss
        return KTOConfig(**arguments, loss_type="apo_zero_unpaired", train_sampling_strategy="random")
    if config.stage == "grpo":
        arguments |= {name: getattr(config, name) for name in OF_GRPO} | {
            "temperature": 1.0 if config.temperature is None else config.temperature,
            "num_generations_eval": 1,
            "include_num_input_tokens_seen": "no",  # TRL counts them
            "metric_for_best_model": "eval_reward",
            "greater_is_better": True,
            "use_vllm": uses_vllm(config),
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        }
        return GRPOConfig(**arguments)
    made = SFTConfig(
        **arguments,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,  # ours, in packing.py, never lets samples see each other
        padding_free=False,
    )
    if made.world_size == 1:  # one flat batch a step, of which the trainer fills its micro-batches
        made.per_device_train_batch_size *= made.gradient_accumulation_steps
        made.gradient_accumulation_steps = 1
    return made


def checkpointing_setting(config: Config, on_cpu: bool) -> bool | str:
    """The value for `use_gradient_checkpointing`; on a CPU it only costs time, a third of it."""
    wanted = {"true": True, "false": False, "auto": not on_cpu}[config.gradient_checkpointing]
    return ("unsloth" if not on_cpu else True) if wanted else False


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


def logged_rewards(logs: dict[str, Any]) -> dict[str, float]:
    """What TRL logs of rewards and replies, by the names of trainer_log.jsonl.

    Of each reward function of stage grpo on top: `reward_NAME` and `reward_NAME_std`.
    """
    names = REWARDS
    if "reward" in logs or "eval_reward" in logs:
        names = REPLIES | {
            f"reward_{function}{'_std' if kind == 'std' else ''}": f"rewards/{function}/{kind}"
            for function, kind in (key.partition("rewards/")[2].rsplit("/", 1) for key in logs if key.count("/") > 1)
            if kind in ("mean", "std")
        }
    found = {f"{part}{name}": logs.get(f"{part}{its}") for part in ("", "eval_") for name, its in names.items()}
    return {name: round(value, 6) for name, value in found.items() if value is not None}


def split_learning_rates(
    groups: list[dict[str, Any]], names: dict[Any, str], *, ratio: float = 1.0, embedding_rate: float | None = None
) -> None:
    """Splits an optimizer's parameter groups by learning rate, in place; `names` has each parameter's name.

    LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices of LoRA, and vectors, get `ratio` times the rate of the
    others, as in PEFT's create_loraplus_optimizer. Embedding and output layer in modules_to_save get
    `embedding_rate`. The groups of the other parameters stay in front: their rate is logged.
    """
    usual: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for group in groups:
        by_rate: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            name = names.get(parameter, "")
            rate = group["lr"] * (ratio if "lora_B" in name or parameter.ndim == 1 else 1.0)
            module, in_full, _ = name.partition(".modules_to_save.")
            if embedding_rate is not None and in_full and module.endswith(("embed_tokens", "lm_head")):
                rate = embedding_rate
            by_rate.setdefault(rate, []).append(parameter)
        for rate, parameters in by_rate.items():
            (usual if rate == group["lr"] else own).append({**group, "params": parameters, "lr": rate})
    groups[:] = usual + own
