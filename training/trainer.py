"""The model with its adapter, by Unsloth, and TRL's trainer on samples that are tokens already."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Message, UserError
from runs.adapter import Adapter
from runs.folder import LOADING_LOG, for_transformers_4
from runs.imports import quick_imports
from runs.peft_loading import write_readable
from training import checkpoints, hardware, packing, pissa
from training.grpo import end_replies_at, grpo_arguments, loading_settings, with_columns
from training.memory import EXPERTS, sequences
from training.neftune import EmbeddingNoise
from training.plan import TrainingPlan
from training.preference_losses import BEST_BY, PREFERENCES, preference_arguments
from training.processes import ALONE, Processes
from training.rewards import Reward

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate
    from training.callbacks import EarlyStopping

# Settings that transformers' arguments call by the same name.
SAME_NAMES = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay",
    "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "full_determinism",
    "eval_delay", "logging_steps", "logging_first_step",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The model


@contextlib.contextmanager
def quietly(log: Path | None = None) -> Iterator[None]:
    """Keeps what libraries print while they load from the terminal, unless they fail; writes it into `log`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except BaseException as error:
        if not isinstance(error, UserError | KeyboardInterrupt):
            print(printed.getvalue(), file=sys.stderr)
        raise
    finally:
        if log and log.parent.is_dir() and printed.getvalue():
            log.write_text(printed.getvalue(), encoding="utf-8")


def import_unsloth() -> None:
    """Imports Unsloth, which must come before transformers, trl and peft."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it asks the hub at every start
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(common.CACHE / "unsloth_compiled"))
    print(Message("loading Unsloth ..."), flush=True)
    with quietly(), quick_imports():
        import unsloth  # noqa: F401
    gc.freeze()  # Unsloth and transformers collect garbage often: what was imported need not be looked through


def load_model(config: Config, precision: Precision, processes: Processes = ALONE) -> Any:
    """The model with its adapter, a new one or the one to go on with, by Unsloth on every device."""
    log = Path(config.output_dir) / LOADING_LOG
    if config.full_determinism:  # cuBLAS reads it once, long before transformers would set it
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    printing = quietly(log if processes.is_first else None)
    with _folder_to_load(config) as folder, printing, quick_imports():
        model = _load_from(folder, config, precision)
    check_quantized(model, config.quantization_bit, log)
    learn_in_float32(model)
    # PEFT takes the vectors of lora_bias for shards of a matrix, at each save
    warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
    if hardware.on_card():  # models that Unsloth has no attention of its own for, and all in 8 bit
        from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

        enable_hf_packed_attention()
    if config.pissa_init and not config.adapter_name_or_path:
        model.start = pissa.take_components(model, config.pissa_iter, config.seed)
    if not hardware.on_card():
        from training import cpu

        cpu.round_once(model)
        if precision.mixed == "bf16":
            cpu.store_in_bfloat16(model)
    return model


def learn_in_float32(model: Any) -> None:
    """A 16-bit weight has too few digits for small steps: what learns whole is kept as adapters are."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def check_quantized(model: Any, bits: int | None, log: Path) -> None:
    """Raises UserError where Unsloth has loaded 16-bit weights though 4 or 8 bit were asked for.

    It does so with a printed line where it cannot use bitsandbytes.
    """
    wanted = {4: "Params4bit", 8: "Int8Params"}.get(bits)
    if wanted and not any(type(weight).__name__ == wanted for weight in model.parameters()):
        raise UserError(
            "quantization_bit: {bits} was asked for, but the weights were loaded in 16 bit: bitsandbytes cannot be "
            "used here; {log} has what Unsloth says of it; mend bitsandbytes (make setup), or take "
            "quantization_bit out",
            bits=bits,
            log=log,
        )


def _load_from(folder: str, config: Config, precision: Precision) -> Any:
    from unsloth import FastLanguageModel

    from training import cpu

    on_cpu = not hardware.on_card()
    checkpointing = checkpointing_setting(config, on_cpu)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=config.cutoff_len,
        dtype=precision.weights,
        load_in_4bit=config.quantization_bit == 4,
        load_in_8bit=config.quantization_bit == 8,
        full_finetuning=False,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
        use_exact_model_name=True,
        **({"attn_implementation": cpu.register_sample_attention()} if on_cpu else {}),
        **loading_settings(config),
    )
    if config.adapter_name_or_path:
        return FastLanguageModel.for_training(model, use_gradient_checkpointing=bool(checkpointing))
    try:
        return FastLanguageModel.get_peft_model(
            model,
            r=config.lora_rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            bias=config.lora_bias if config.lora_bias in ("all", "lora_only") else "none",
            lora_bias=config.lora_bias == "true",
            **_modules_to_save(model, config.additional_target),
            target_modules=find_linear(model) if config.lora_target == ("all",) else list(config.lora_target),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            use_gradient_checkpointing=checkpointing,
            random_state=config.seed,
            max_seq_length=config.cutoff_len,
            # recomputing takes a third of a step: after the first one Unsloth leaves out what fits into memory
            **({} if on_cpu or config.gradient_checkpointing != "auto" else {"checkpoint_skip_layers": "auto"}),
            **_families(model),
        )
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise UserError(
            "lora_target: {targets} names no module of this model; it has {modules}",
            targets=config.lora_target,
            modules=find_linear(model),
        ) from None


def find_linear(model: Any) -> list[str]:
    """Last names of what `lora_target: all` means: all linear layers but the output layer, as PEFT's "all-linear".

    Of a mixture of experts also the experts, whose matrices are one parameter for each projection.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output]
    has_experts = any(".experts." in name and weight.ndim == 3 for name, weight in model.named_parameters())
    return sorted({name.rpartition(".")[2] for name in linear} | (EXPERTS if has_experts else set()))


def _modules_to_save(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What learns whole. An output layer that is the embedding stays so where both learn."""
    is_tied = bool(model.config.get_text_config().tie_word_embeddings)
    if not names:
        return {}
    if is_tied and {"embed_tokens", "lm_head"} <= set(names):
        return {"modules_to_save": [name for name in names if name != "lm_head"], "ensure_weight_tying": True}
    return {"modules_to_save": list(names), "ensure_weight_tying": False}


def _families(model: Any) -> dict[str, bool]:
    """Keeps Unsloth from dropping targets of a text model whose modules are not named as Llama's.

    For models that it has no code of its own for, FastLanguageModel asks for adapters outside of vision layers only,
    and finds them by the names around them ("model.layers.N.mlp."): of a GPT-NeoX it would find none.
    """
    generic = os.environ.get("UNSLOTH_USE_NEW_MODEL", "0") == "1"  # how Unsloth's loader tells get_peft_model
    sees = getattr(model.config, "vision_config", None) or getattr(model.config, "audio_config", None)
    return {"finetune_vision_layers": True} if generic and not sees else {}


@contextlib.contextmanager
def _folder_to_load(config: Config) -> Iterator[str]:
    """What Unsloth is to load: the base model, or a copy of the adapter that names the base where it is now."""
    base = str(Path(config.model_name_or_path).resolve())
    if config.adapter_name_or_path is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as copy:
        write_readable(Adapter(Path(config.adapter_name_or_path)), Path(copy), base_model_name_or_path=base)
        yield copy


def checkpointing_setting(config: Config, on_cpu: bool) -> bool | str:
    """The value for `use_gradient_checkpointing`; on a CPU it only costs time, a third of it."""
    wanted = {"true": True, "false": False, "auto": not on_cpu}[config.gradient_checkpointing]
    return ("unsloth" if not on_cpu else True) if wanted else False


@dataclass(frozen=True)
class Precision:
    """The dtype of the base's weights, and the one ("bf16", "fp16" or None) in which matrices are multiplied."""

    weights: Any
    mixed: str | None
    note: Message | None = None


def choose_precision(config: Config) -> Precision:
    """bfloat16 wherever the device multiplies it fast, else float16 on a card and float32 on a CPU."""
    import torch

    if hardware.on_card():
        if torch.cuda.is_bf16_supported():
            return Precision(
                torch.bfloat16,
                "bf16",
                Message("fp16: this card has bfloat16, which needs no loss scaling; it is used instead")
                if config.fp16
                else None,
            )
        if config.bf16:
            raise UserError("bf16: this card has no bfloat16; take it out, and float16 is used")
        return Precision(torch.float16, "fp16")
    from unsloth_zoo.cpu import cpu_bf16_supported

    if not cpu_bf16_supported():
        note = Message("fp16: float16 is slow on a CPU; float32 is used") if config.fp16 else None
        return Precision(
            torch.float32,
            None,
            Message("bf16: this CPU has no instructions for it, so it would be slow; float32 is used")
            if config.bf16
            else note,
        )
    note = Message("fp16: float16 is slow on a CPU; bfloat16 is used") if config.fp16 else None
    return Precision(torch.float32, "bf16" if config.bf16 is not False else None, note)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


def make_trainer(
    config: Config,
    precision: Precision,
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    plan: TrainingPlan,
    rewards: Sequence[Reward] = (),
    stop: Sequence[str] = (),
    processes: Processes = ALONE,
) -> tuple[Any, EarlyStopping]:
    """TRL's trainer of the stage (sped up by Unsloth), and the callback that knows why it stopped early.

    Of stage grpo: its rewards, and the control tokens that end a reply. Of several processes: `config` and `plan` are
    those of one that takes the samples of all (Processes.as_one).
    """
    from transformers import PrinterCallback

    from training import callbacks

    train = data.train if plan.packed_rows is None else packing.packed(data.train, plan.packed_rows)
    held_out = data.eval.select(range(plan.eval_samples)) if plan.eval_samples else None
    early, interruption = callbacks.EarlyStopping(config, plan), callbacks.Interruption(processes)
    shown = [callbacks.Progress(Path(config.output_dir), config.plot_loss)] if processes.is_first else []
    trainer_class, more = _trainer_class(config, rewards)
    if config.stage == "grpo":
        end_replies_at(model, tokenizer.convert_tokens_to_ids(list(stop)))
        train, held_out = with_columns(train), with_columns(held_out) if held_out else None
    trainer = trainer_class(
        model=model,
        args=training_arguments(config, precision, plan, processes),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[*shown, callbacks.Due(plan)],
        **more,
    )
    trainer.plan, trainer.save_limit, trainer.processes = plan, config.save_total_limit, processes
    _set_splitters(trainer, config, plan)
    trainer.lr_ratio_of_b = config.loraplus_lr_ratio or 1.0
    trainer.embedding_rate, trainer.start = config.embedding_learning_rate, getattr(model, "start", None)
    if config.neftune_noise_alpha:
        trainer.noise = EmbeddingNoise(model, config.neftune_noise_alpha)
    if held_out and config.stage in packing.FLAT_STAGES:
        eval_batches = math.ceil(plan.eval_samples / config.per_device_eval_batch_size)
        trainer.learned_a_batch = learned_tokens(held_out) / eval_batches
    finite = callbacks.FiniteNumbers(lambda: trainer.last_grad_norm)
    for callback in (callbacks.Resuming(trainer.restore), interruption, early, finite):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # the log is ours
    return trainer, early


def _set_splitters(trainer: Any, config: Config, plan: TrainingPlan) -> None:
    """How a batch is trained, and evaluated, in pieces that fit into memory."""
    from training.splitting import Splitter, pieces, pieces_of_rows

    settings = smaller_settings(config, plan.longest)
    is_flat = config.stage in packing.FLAT_STAGES
    if is_flat:  # else Unsloth goes through the held-out samples, to cut those beyond it: all are cut already
        trainer.args.max_length = trainer.args.max_seq_length = None
    divide = pieces if is_flat else partial(pieces_of_rows, of_pairs=config.stage == "dpo")
    trainer.train_splitter = Splitter(settings, divide, packing.micro_batch_tokens(config, plan.longest))
    trainer.eval_splitter = Splitter(settings, divide)


def _trainer_class(config: Config, rewards: Sequence[Reward]) -> tuple[type, dict[str, Any]]:
    """The trainer of the stage, and what only it takes."""
    if config.stage == "grpo":
        from training.grpo_trainer import GrpoTrainer

        return GrpoTrainer, {"config": config, "rewards": rewards}
    if config.stage in PREFERENCES:
        from training.preference_trainers import DpoTrainer, KtoTrainer

        return {"dpo": DpoTrainer, "kto": KtoTrainer}[config.stage], {"config": config}
    from training.sft_trainer import Trainer

    return Trainer, {"data_collator": packing.collate}


def learned_tokens(samples: Any) -> int:
    """How many tokens of tokenized samples are learned; the first of a sample has nothing to be predicted from."""
    return sum(label != packing.IGNORED for row in samples["labels"] for label in row[1:])


def smaller_settings(config: Config, longest: int) -> list[str]:
    """The two settings to change where a single sample does not fit into memory."""
    other = "gradient_checkpointing=true" if config.gradient_checkpointing == "false" else "lora_target=q_proj,v_proj"
    shorter = longest // 2 // sequences(config)
    return ["quantization_bit=4" if config.quantization_bit is None else other, f"cutoff_len={shorter}"]


def training_arguments(config: Config, precision: Precision, plan: TrainingPlan, processes: Processes = ALONE) -> Any:
    """transformers' arguments; all whose default differs between Unsloth's backends are set."""
    from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

    on_gpu = hardware.on_card()
    evaluated = plan.saves_evaluated  # transformers then insists on saving exactly where it evaluates; see Due
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
        "report_to": [name for name in config.report_to if name != "none" and processes.is_first],
        "run_name": Path(config.output_dir).name,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
    }
    if config.stage in PREFERENCES:
        return {"dpo": DPOConfig, "kto": KTOConfig}[config.stage](**arguments, **preference_arguments(config))
    if config.stage == "grpo":
        return GRPOConfig(**(arguments | grpo_arguments(config)))
    # one flat batch a step, of which the trainer fills its micro-batches
    samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return SFTConfig(
        **(arguments | {"per_device_train_batch_size": samples, "gradient_accumulation_steps": 1}),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,  # ours, in packing.py, never lets samples see each other
        padding_free=False,
    )


def save_adapter(trainer: Any, template: ChatTemplate, folder: Path) -> None:
    """Puts the adapter, the tokenizer and the chat template that was trained into the run folder, each file whole."""
    from training.callbacks import check_finite_weights

    check_finite_weights(trainer.model, trainer.state.global_step)
    beside = folder / checkpoints.BESIDE
    tokenizer = trainer.processing_class
    tokenizer.chat_template = template.saved or None
    tokenizer.save_pretrained(beside)
    for_transformers_4(beside)
    trainer.model.save_pretrained(beside, safe_serialization=True)
    if trainer.start:
        pissa.write_as_lora(beside, trainer.start)
    (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    for file in beside.iterdir():
        os.replace(file, folder / file.name)
    beside.rmdir()
