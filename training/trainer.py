"""What the trainers of all stages add to transformers' and TRL's: checkpoints that appear whole, and exact resuming.

To be imported after Unsloth. All private members of transformers' Trainer that the kit overrides or reads stand here,
each with its reason; tests/training/test_private_members.py names them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from common import UserError
from runs.files import check_free_space, read_json
from runs.folder import for_transformers_4
from training import callbacks, checkpoints, packing, pissa
from training.arguments import Precision, split_learning_rates, training_arguments
from training.model import train_in_float32
from training.splitting import with_gradients_apart

if TYPE_CHECKING:
    from preprocessing.template import ChatTemplate
    from training.prepare import Prepared

LOSS_STATE = "loss_since_log.json"  # of a checkpoint: what the next logged loss is to begin with


class RunTrainer:
    """A mixin in front of one of TRL's trainers."""

    resumed_from: Path | None = None

    def __init__(self, prepared: Prepared, model: Any, precision: Precision, **of_stage: Any) -> None:
        self.config, self.plan, self.saved = prepared.config, prepared.plan, []
        self.pissa_start = getattr(model, "pissa_start", None)
        self.course = callbacks.Course(self.config, self.plan, self.restore)
        arguments, data, plan = training_arguments(self.config, precision, self.plan), prepared.data, self.plan
        if arguments.device.type == "cpu":  # to the "cpu:0" of several processes torch cannot load an optimizer's state
            arguments._setup_devices = torch.device("cpu")
        progress = callbacks.Progress(Path(self.config.output_dir), self.config.plot_loss)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self.rows(
                data.train if plan.packed_rows is None else packing.packed(data.train, plan.packed_rows)
            ),
            eval_dataset=self.rows(data.eval.select(range(plan.eval_samples))) if plan.eval_samples else None,
            processing_class=prepared.tokenizer,
            callbacks=[
                *([progress] if arguments.process_index == 0 else []),
                self.course,
            ],
            **of_stage,
        )
        self.add_callback(callbacks.Interruption(self.accelerator))
        self.remove_callback(PrinterCallback)  # the log is ours
        train_in_float32(self.model)  # TRL has cast the adapters of a quantized model to bfloat16

    def rows(self, dataset: Any) -> Any:
        """Tokenized samples as TRL's trainer takes them."""
        return dataset

    def size_kept_layers(self, samples: int, tokens: int) -> None:
        """Tells Unsloth the largest forward pass, `samples` x `tokens`: on a card it keeps what fits beside it of the
        activations, instead of recomputing them. It would take a whole optimizer step for one forward pass.
        """
        if planner := getattr(self.model, "_unsloth_auto_skip", None):
            planner.target_batch, planner.target_seq = samples, tokens

    @property
    def smaller_settings(self) -> list[str]:
        """What to change, one after the other, where a single sample does not fit into memory."""
        config = self.config
        recompute = (
            "gradient_checkpointing=true" if config.gradient_checkpointing == "false" else "lora_target=q_proj,v_proj"
        )
        shorter = self.plan.longest // 2 // (2 if config.stage == "dpo" else 1)
        return ["quantization_bit=4" if config.quantization_bit is None else recompute, f"cutoff_len={shorter}"]

    def train_in_pieces(self, batch: dict[str, Any], step: Callable[[dict[str, Any]], Any]) -> Any:
        """What `step` returns for a batch; one process splits it where it does not fit into memory."""
        if self.args.world_size > 1:
            return self.train_splitter.run(batch, step)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.train_splitter.run(batch, lambda piece: with_gradients_apart(trained, lambda: step(piece)))

    # -----------------------------------------------------------------------------------------------------------------
    # Public methods of transformers' Trainer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write one into every checkpoint."""

    def floating_point_ops(self, *_: Any) -> int:
        """transformers' estimate, which no one reads, counts all parameters at every step."""
        return 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        ratio, embedding_rate = self.config.loraplus_lr_ratio or 1.0, self.config.embedding_learning_rate
        if is_new and (ratio != 1 or embedding_rate is not None):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            split_learning_rates(optimizer.param_groups, names, ratio=ratio, embedding_rate=embedding_rate)
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All that is held out: each of several processes evaluates it as one would.

        transformers would share it, and repeat samples where their number cannot be shared evenly.
        """
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        loader = DataLoader(self.eval_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self.summands
        return super().evaluation_loop(*args, **kwargs)

    def summands(self, losses: torch.Tensor) -> torch.Tensor:
        """The mean loss of an evaluated batch once for each of its rows; each process has all batches."""
        state = self.accelerator.gradient_state
        return losses[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else losses

    # -----------------------------------------------------------------------------------------------------------------
    # Going on from a checkpoint

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains from the beginning or from a checkpoint to the end."""
        self.resumed_from = checkpoint
        if checkpoint:
            state = read_json(checkpoint / "trainer_state.json")
            self.args.eval_on_start = self._misses_evaluation(state["global_step"], state["log_history"])
        # an EvaluationInterrupted is of the evaluation that the earlier part of the run left out
        with contextlib.suppress(callbacks.EvaluationInterrupted), _refusing_pickles(checkpoint):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    @property
    def misses_evaluation(self) -> bool:
        """Whether the training was interrupted before or in the evaluation that is due after its last step."""
        return self._misses_evaluation(self.state.global_step, self.state.log_history)

    def _misses_evaluation(self, step: int, log: list[dict[str, Any]]) -> bool:
        return self.plan.evaluates_at(step) and step not in {line["step"] for line in log if "eval_loss" in line}

    def since_log(self) -> dict[str, Any]:
        """What the next logged line is to begin with: `_tr_loss` is the sum of losses since the step it names."""
        loss = self.accelerator.reduce(self._tr_loss.clone(), "mean").item()
        return {"loss": loss, "last_logged_step": self._globalstep_last_logged}

    def restore(self) -> None:
        """What a resumed run needs besides what transformers restores: the losses since the last logged step, which
        the next logged one is a mean of, and where the best checkpoint is now (in another run's folder, perhaps)."""
        if self.resumed_from is None:
            return
        saved = read_json(self.resumed_from / LOSS_STATE, default=None)
        if saved:
            self._tr_loss.fill_(saved["loss"])
            self._globalstep_last_logged = saved["last_logged_step"]
        self._name_best_checkpoint()
        if self.state.best_model_checkpoint is None:
            self.state.best_metric = self.state.best_global_step = None

    def _name_best_checkpoint(self) -> None:
        best = Path(self.config.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    # -----------------------------------------------------------------------------------------------------------------
    # Private members of transformers' Trainer

    def _run_epoch(self, **kwargs: Any) -> None:
        """transformers would train one more step of a run that was killed after its last checkpoint."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluates without using up random numbers: a run that repeats an evaluation goes on like any other."""
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda):
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler:  # at the start, where transformers does not look for the best step
            self._determine_best_metric(metrics, trial)
            self._name_best_checkpoint()
        return metrics

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation that is interrupted leaves a checkpoint of its step, from which it is repeated."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except callbacks.EvaluationInterrupted:
            self._save_checkpoint(self.model, None)
            self.control.should_training_stop, self.control.should_save = True, False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """A checkpoint of a PiSSA adapter holds a LoRA on the plain base, not what is trained."""
        with pissa.as_trained(Path(resume_from_checkpoint), self.pissa_start) as folder:
            super()._load_from_checkpoint(str(folder), model)

    def _load_best_model(self) -> None:
        """As _load_from_checkpoint."""
        best = self.state.best_model_checkpoint
        with pissa.as_trained(Path(best), self.pissa_start) as folder:
            self.state.best_model_checkpoint = str(folder)
            super()._load_best_model()
        self.state.best_model_checkpoint = best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers writes into the final folder, file by file; here a checkpoint is whole, or not there."""
        folder, step = Path(self.config.output_dir), self.state.global_step
        callbacks.check_finite_weights(self.model, step)
        check_free_space(folder, self.checkpoint_bytes())  # torch's own error does not say that the disk is full
        since_log = self.since_log()

        def write(beside: Path) -> None:
            """By all processes: each writes its random numbers."""
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(beside)
            try:
                super(RunTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            self.accelerator.wait_for_everyone()
            if not self.is_world_process_zero():
                return
            if self.state.best_global_step:  # it has looked for the best one in `beside`
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(beside / f"checkpoint-{step}" / "trainer_state.json"))
            if self.pissa_start:
                pissa.write_as_lora(beside / f"checkpoint-{step}", self.pissa_start)
            (beside / f"checkpoint-{step}" / LOSS_STATE).write_text(json.dumps(since_log), encoding="utf-8")

        if self.is_world_process_zero():
            checkpoints.save_whole(folder, step, write)
            self.saved.append(step)
            checkpoints.delete_old(folder, self.config.save_total_limit, self.saved, self.state.best_global_step)
        else:
            write(folder / checkpoints.BESIDE)
        self.accelerator.wait_for_everyone()
        self._name_best_checkpoint()

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: trained weights, the optimizer's moments, tokenizer and random states."""
        return 12 * count_trainable(self.model) + 10_000_000

    def save_adapter(self, template: ChatTemplate) -> None:
        """Puts the adapter, the tokenizer and the trained chat template into the run folder, each file whole."""
        callbacks.check_finite_weights(self.model, self.state.global_step)
        folder = Path(self.config.output_dir)
        beside = folder / checkpoints.BESIDE
        self.processing_class.chat_template = template.saved or None
        self.processing_class.save_pretrained(beside)
        for_transformers_4(beside)
        self.model.save_pretrained(beside, safe_serialization=True)
        if self.pissa_start:
            pissa.write_as_lora(beside, self.pissa_start)
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        for file in beside.iterdir():
            os.replace(file, folder / file.name)
        beside.rmdir()


class MeansTrainer(RunTrainer):
    """The trainer of a stage whose logged lines have means over the steps since the last one, beside the loss.

    TRL keeps them in `_metrics`: {"train" or "eval": {name: values}}. Its copy of the adapter is deleted: the reference
    is then the model with its adapter off.
    """

    def __init__(self, prepared: Prepared, model: Any, precision: Precision, **of_stage: Any) -> None:
        super().__init__(prepared, model, precision, **of_stage)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def since_log(self) -> dict[str, Any]:
        return {**super().since_log(), "means": self._metrics["train"]}

    def restore(self) -> None:
        super().restore()
        if self.resumed_from:
            self._metrics["train"].update(read_json(self.resumed_from / LOSS_STATE, default={}).get("means", {}))


@contextlib.contextmanager
def _refusing_pickles(checkpoint: Path | None) -> Iterator[None]:
    """What torch does not load as numbers is one sentence."""
    try:
        yield
    except torch.serialization.pickle.UnpicklingError:
        raise UserError(
            "{path}: its states hold code, not only numbers; use another checkpoint", path=checkpoint
        ) from None


def count_trainable(model: Any) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
