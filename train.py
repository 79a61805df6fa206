"""Fine-tunes a language model with Unsloth: a recipe → a run folder.

python train.py [RECIPE.yaml] [key=value ...]
    --dry-run    says whether the run will work here, and changes nothing
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Loaded, UserError
from preprocessing import dataset
from preprocessing.data_report import format_report, show_sample
from runs.files import write_json, write_text
from runs.folder import TRAINED, read_run, suit_transformers_4
from training import early_stopping, preflight, starting

if TYPE_CHECKING:
    from preprocessing.chat_template import ChatTemplate
    from preprocessing.dataset import Prepared
    from training.callbacks import EarlyStopping

# The projections of the Llama family under the names that Unsloth's kernels know.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(common.help_text(__doc__))
        return
    dry_run = "--dry-run" in arguments
    loaded = starting.locate_model(common.load_config([a for a in arguments if a != "--dry-run"]))
    common.check_training_asked_for(loaded)
    config, folder = loaded.config, Path(loaded.config.output_dir)
    for note in [*loaded.notes, *starting.adapter_notes(loaded)]:
        print(f"note: {note}")
    if dry_run:
        sys.exit(preflight.examine(loaded, starting.checks(loaded, folder)))
    start = starting.check(loaded, folder)
    if start.says:
        print(start.says)
    if start.finished:
        print_next(folder)
        return
    config = fit_batches(config)
    import_unsloth()  # takes ten seconds: faults that can be told before are
    tokenizer, template, data = prepare_data(config)
    samples = preflight.measure(config, data)
    preflight.make_plan(config, data, samples)
    starting.check_checkpoint(start, folder, samples.steps)
    precision = choose_precision(config)
    with starting_folder(config) as adapter_or_base, quietly():
        model = load_model(config, precision, adapter_or_base)
    trainer, early = make_trainer(config, precision, model, tokenizer, data)
    starting.make_room(start, folder)  # only now, when all that could be wrong with this run was tried
    begin(to_be_recorded(loaded), folder, data, resumed=start.checkpoint)
    try:
        announce(config, trainer, data, tokenizer, early.plan)
        trainer.train(resume_from_checkpoint=start.checkpoint)
    except BaseException as error:
        finish(folder, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error=str(error))
        raise
    conclude(folder, trainer, template, early.reason)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder before training


def to_be_recorded(loaded: Loaded) -> Loaded:
    """What config.yaml holds: that file is to train the same again, and to delete nothing."""
    once = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "overwrite_cache": False}
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **once))


def fit_batches(config: Config) -> Config:
    """The configuration with the batches that the model can take; says what was changed."""
    from training import packing

    config, note = packing.fitted(config)
    if note:
        print(f"note: {note}")
    return config


def prepare_data(config: Config) -> tuple[Any, ChatTemplate, Prepared]:
    """The tokenizer, the chat template and the data, all faults of which are told before a model is loaded."""
    from preprocessing.chat_template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    tokenizer = load_base_tokenizer(config)
    template = load_template(config.template, tokenizer)
    data = dataset.prepare(config, tokenizer, template)
    print(format_report(data.report))
    return tokenizer, template, data


def begin(loaded: Loaded, folder: Path, data: Prepared, resumed: str | None) -> None:
    """Writes config.yaml and run.json, before the first step."""
    import psutil

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", common.dump_config(loaded.config))
    write_trained(folder, data, resumed)
    packages = ("torch", "transformers", "trl", "peft", "datasets", "unsloth", "unsloth_zoo", "bitsandbytes")
    gpu = common.find_gpu()
    run = {
        "status": "running",
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),  # of the process: another may have its number one day
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed_from": resumed,
        "recipe": str(loaded.recipe) if loaded.recipe else None,
        "command": ["python", Path(sys.argv[0]).name, *sys.argv[1:]],
        "model": loaded.config.model_name_or_path,
        "seed": loaded.config.seed,
        "device": dataclasses.asdict(gpu) if gpu else {"name": "cpu", "cores": os.cpu_count()},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "commit": commit(),
        "data": data.report,
    }
    write_json(folder / "run.json", run)


def write_trained(folder: Path, data: Prepared, resumed: str | None) -> None:
    """Writes the fingerprints of the conversations that are trained on: evaluate.py never measures on them.

    They are kept because data files change. A run that goes on keeps those of its beginning, too.
    """
    import numpy as np

    file, contents = folder / TRAINED, data.contents
    for earlier in {file, Path(resumed).parent / TRAINED} if resumed else ():  # another run's checkpoint, too
        if earlier.is_file():
            contents = np.union1d(np.load(earlier), contents)
    beside = folder / f".{TRAINED}"
    with open(beside, "wb") as opened:
        np.save(opened, contents)
    os.replace(beside, file)


def commit() -> str | None:
    """The commit of this kit, with a + where files differ from it; None outside git."""
    command = ["git", "-C", str(common.ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def finish(folder: Path, status: str, **facts: Any) -> None:
    """Completes run.json."""
    run = read_run(folder) or {}
    run.update(status=status, ended=datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts)
    write_json(folder / "run.json", run)


# ---------------------------------------------------------------------------------------------------------------------
# The model and the trainer


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps what libraries print while they load to themselves, unless they fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException as error:
        if not isinstance(error, UserError):
            print(said.getvalue(), file=sys.stderr)
        raise


def import_unsloth() -> None:
    """Imports Unsloth, which must come before transformers, trl and peft."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it asks the hub at every start
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(common.CACHE / "unsloth_compiled"))
    print("loading Unsloth ...", flush=True)
    with quietly():
        import unsloth  # noqa: F401


def load_model(config: Config, precision: Precision, start: str) -> Any:
    """The model with its adapter, by Unsloth on every device: `start` is the base's folder, or an adapter's to go on
    with."""
    import torch
    from unsloth import FastLanguageModel

    from training import packing

    on_cpu = not torch.cuda.is_available()
    checkpointing = use_checkpointing(config, on_cpu)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=start,
        max_seq_length=config.cutoff_len,
        dtype=precision.weights,
        load_in_4bit=config.quantization_bit == 4,
        load_in_8bit=config.quantization_bit == 8,
        full_finetuning=False,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
        use_exact_model_name=True,
        **({"attn_implementation": packing.register_sample_attention()} if on_cpu else {}),
    )
    if config.adapter_name_or_path:
        return FastLanguageModel.for_training(model, use_gradient_checkpointing=bool(checkpointing))
    try:
        return FastLanguageModel.get_peft_model(
            model,
            r=config.lora_rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            bias="none",
            target_modules=PROJECTIONS if config.lora_target == ("all",) else list(config.lora_target),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            use_gradient_checkpointing=checkpointing,
            random_state=config.seed,
            max_seq_length=config.cutoff_len,
        )
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(
            f"lora_target: {','.join(config.lora_target)} names no module of this model; it has {', '.join(leaves)}"
        ) from None


@contextlib.contextmanager
def starting_folder(config: Config) -> Iterator[str]:
    """What Unsloth is to load: the base model, or a copy of the adapter that names the base where it is now."""
    base = str(Path(config.model_name_or_path).resolve())
    if config.adapter_name_or_path is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path(config.adapter_name_or_path) / name, copy)
        description = Path(copy) / "adapter_config.json"
        settings = json.loads(description.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        description.write_text(json.dumps(settings), encoding="utf-8")
        yield copy


def use_checkpointing(config: Config, on_cpu: bool) -> bool | str:
    """Unsloth's word for whether activations are recomputed: on a CPU it only costs time, a third of it."""
    wanted = {"true": True, "false": False, "auto": not on_cpu}[config.gradient_checkpointing]
    return ("unsloth" if not on_cpu else True) if wanted else False


@dataclass(frozen=True)
class Precision:
    """The dtype of the base's weights, and the one ("bf16", "fp16" or None) in which matrices are multiplied."""

    weights: Any
    mixed: str | None


def choose_precision(config: Config) -> Precision:
    """bfloat16 wherever the device multiplies it fast, else float16 on a card and float32 on a CPU."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            if config.fp16:
                print("note: fp16: this card has bfloat16, which needs no loss scaling; it is used instead")
            return Precision(torch.bfloat16, "bf16")
        if config.bf16:
            raise UserError("bf16: this card has no bfloat16; take it out, and float16 is used")
        return Precision(torch.float16, "fp16")
    from unsloth_zoo.cpu import cpu_bf16_supported

    native = cpu_bf16_supported()
    if config.fp16:
        print(f"note: fp16: float16 is slow on a CPU; {'bfloat16' if native else 'float32'} is used")
    if config.bf16 and not native:
        print("note: bf16: this CPU has no instructions for it, so it would be slow; float32 is used")
    return Precision(torch.float32, "bf16" if native and config.bf16 is not False else None)


def make_trainer(
    config: Config, precision: Precision, model: Any, tokenizer: Any, data: Prepared
) -> tuple[Any, EarlyStopping]:
    """TRL's SFTTrainer (which Unsloth has sped up by now) on samples that are already tokens; and what ends it."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from training import callbacks, packing

    train = data.train
    if config.packing:
        train = packing.packed(data.train, data.train_lengths, config.cutoff_len)
    steps, epoch_steps = packing.total_steps(config, len(train)), packing.epoch_steps(config, len(train))
    plan = early_stopping.make_plan(config, steps, epoch_steps, int(data.train_lengths.sum()), data.eval_lengths)
    held_out = data.eval.select(range(plan.samples)) if plan.samples else None

    early = callbacks.EarlyStopping(config, plan)
    eval_batches = math.ceil(plan.samples / config.per_device_eval_batch_size)
    learned_a_batch = learned_tokens(held_out) / eval_batches if held_out else 1

    class Trainer(SFTTrainer):
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """TRL would write one into every checkpoint."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            save_whole(self, super()._save_checkpoint, model, trial)

        def _get_output_dir(self, trial: Any) -> str:
            return getattr(self, "saving_in", None) or super()._get_output_dir(trial)

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Weights a batch's loss by its learned tokens: the mean over batches is then that over all tokens."""
            weight = int((inputs["labels"] != packing.IGNORED).sum()) / learned_a_batch
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            return (loss * weight, *rest)

    trainer = Trainer(
        model=model,
        args=training_arguments(config, precision, plan),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=packing.collate,
        callbacks=[callbacks.Progress(Path(config.output_dir), config.plot_loss), callbacks.Interruption(), early],
    )
    trainer.remove_callback(PrinterCallback)  # the log is ours
    return trainer, early


def learned_tokens(samples: Any) -> int:
    """How many tokens of tokenized samples are learned; the first of a sample has nothing to be predicted from."""
    from training import packing

    return sum(label != packing.IGNORED for row in samples["labels"] for label in row[1:])


def save_whole(trainer: Any, save: Any, model: Any, trial: Any) -> None:
    """Lets transformers write a checkpoint beside the others, then moves it there: a kill leaves whole ones only."""
    from transformers.trainer_utils import rotate_checkpoints

    folder = Path(trainer.args.output_dir)
    name = f"checkpoint-{trainer.state.global_step}"
    trainer.saving_in = str(folder / ".saving")
    shutil.rmtree(trainer.saving_in, ignore_errors=True)
    try:
        save(model, trial)
    finally:
        beside, trainer.saving_in = Path(trainer.saving_in), None
    if trainer.state.best_global_step:
        best = folder / f"checkpoint-{trainer.state.best_global_step}"
        trainer.state.best_model_checkpoint = str(best)
        trainer.state.save_to_json(str(beside / name / "trainer_state.json"))
    (beside / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    (beside / name / "README.md").unlink(missing_ok=True)
    for file in (beside / name).iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(beside / name, folder / name)
    beside.rmdir()
    rotate_checkpoints(str(folder), trainer.args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=False)


def training_arguments(config: Config, precision: Precision, plan: early_stopping.Plan) -> Any:
    """transformers' arguments; all whose default differs between Unsloth's backends are set."""
    import torch
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=config.output_dir,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps or config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        data_seed=config.seed,
        bf16=precision.mixed == "bf16",
        fp16=precision.mixed == "fp16",
        gradient_checkpointing=bool(use_checkpointing(config, not on_gpu)),
        logging_steps=config.logging_steps,
        logging_first_step=config.logging_first_step,
        logging_nan_inf_filter=False,  # it would hide a NaN and go on
        eval_strategy=plan.eval_strategy,
        eval_steps=plan.eval_steps,
        save_strategy=plan.save_strategy,
        save_steps=plan.save_steps,
        save_total_limit=config.save_total_limit,
        load_best_model_at_end=config.load_best_model_at_end and plan.keeps_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        include_num_input_tokens_seen="all",
        report_to=[name for name in config.report_to if name != "none"],
        run_name=Path(config.output_dir).name,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,  # ours, in batches.py, never lets samples see each other
        padding_free=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def announce(config: Config, trainer: Any, data: Prepared, tokenizer: Any, plan: early_stopping.Plan) -> None:
    """Says what will be done, and shows a sample as it will be learned."""
    from training import packing

    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(math.prod(shape) for shape in preflight.tensor_shapes(Path(config.model_name_or_path)).values())
    args = trainer.args
    steps = packing.total_steps(config, len(trainer.train_dataset))
    print(f"model      {config.model_name_or_path}: {total:,} parameters, {trainable:,} trained")
    print(f"data       {len(data.train):,} samples, {int(data.train_lengths.sum()):,} tokens")
    print(
        f"steps      {steps:,} of {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"{'rows' if config.packing else 'samples'}, learning rate {args.learning_rate:g} "
        f"({args.lr_scheduler_type.value})"
    )
    print(f"held out   {early_stopping.describe(config, plan, data.eval_lengths)}")
    for warning in early_stopping.warnings(config, len(data.train), steps, plan):
        print(f"warning: {warning}")
    print(show_sample(tokenizer, data.train[0]))


def conclude(folder: Path, trainer: Any, template: ChatTemplate, stopped_early: str | None) -> None:
    """Leaves the best adapter in the run folder, completes run.json and says what came of it."""
    from runs import report
    from training import callbacks

    state, lines = trainer.state, callbacks.read_log(folder)
    evaluations = [line for line in state.log_history if "eval_loss" in line]
    best_is_kept = trainer.args.load_best_model_at_end and state.best_global_step
    last_eval_loss = evaluations[-1]["eval_loss"] if evaluations else None
    facts = {
        "steps": state.global_step,
        "total_steps": state.max_steps,
        "stopped_early": stopped_early,
        "best_step": state.best_global_step if best_is_kept else state.global_step,  # whose adapter is kept
        "stop": template.stop,  # what ends a turn: merge.py and quantize.py read it
        "tokens": int(state.num_input_tokens_seen),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "seconds": lines[-1]["elapsed"] if lines else None,
        "train_loss": callbacks.mean_loss(lines),
        "last_loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "eval_loss": state.best_metric if best_is_kept else last_eval_loss,
        "eval_seconds": round(sum(line["eval_runtime"] for line in evaluations), 1),
        "peak_memory": peak_memory(),
    }
    if state.global_step < state.max_steps and not stopped_early:
        finish(folder, "interrupted", **facts)
        print(f"\nstopped at step {state.global_step} of {state.max_steps}; to go on: {again(folder)}")
        sys.exit(130)
    save_adapter(trainer, template, folder)
    finish(folder, "finished", **facts)
    written = report.write(folder)
    minutes, seconds = divmod(round(facts["seconds"] or time.process_time()), 60)
    held_out = (
        f", eval_loss {facts['eval_loss']:.4f} (step {facts['best_step']})" if facts["eval_loss"] is not None else ""
    )
    if stopped_early:
        print(f"\nstopped at step {state.global_step:,} of {state.max_steps:,}: {stopped_early}", end="")
    print(
        f"\nfinished   {state.global_step:,} of {state.max_steps:,} steps in {minutes} min {seconds} s, "
        f"{facts['tokens']:,} tokens, peak memory {facts['peak_memory'] / 1e9:.1f} GB\n"
        f"loss       {lines[0].get('loss', math.nan):.3f} at first, {facts['last_loss']:.3f} at last{held_out}\n"
        f"report     {written}"
    )
    if evaluations:
        print(f"measure it: {common.command('evaluate.py', folder)}")
    print_next(folder)


def save_adapter(trainer: Any, template: ChatTemplate, folder: Path) -> None:
    """Puts the adapter, the tokenizer and the chat template that was trained into the run folder, each file whole."""
    beside = folder / ".saving"
    tokenizer = trainer.processing_class
    tokenizer.chat_template = template.saved
    tokenizer.save_pretrained(beside)
    suit_transformers_4(beside)
    trainer.model.save_pretrained(beside, safe_serialization=True)
    (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    for file in beside.iterdir():
        os.replace(file, folder / file.name)
    beside.rmdir()


def peak_memory() -> int:
    """Most memory used so far, in bytes: the card's where there is one, else this process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def again(folder: Path) -> str:
    """The command that goes on with a run: its own configuration deletes nothing, whatever the recipe says."""
    return common.command("train.py", folder / "config.yaml")


def print_next(folder: Path) -> None:
    print(f"talk to it: {common.command('chat.py', folder)}")


if __name__ == "__main__":
    common.run_script(main)
