"""TRL's trainer, as this kit uses it. To be imported after Unsloth, which replaces trl's class by a faster one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from common import UserError
from runs.disk import check_free_space
from runs.files import read_json
from training import checkpoints, packing, pissa
from training.callbacks import EvaluationInterrupted, check_finite_weights
from training.learning_rates import split_learning_rates
from training.neftune import EmbeddingNoise
from training.plan import TrainingPlan
from training.processes import Processes
from training.splitting import Splitter, share, with_gradients_apart

LOSS_STATE = "loss_since_log.json"  # of a checkpoint: what the next logged loss is to begin with


@contextlib.contextmanager
def refusing_pickles(checkpoint: Any) -> Iterator[None]:
    """Around transformers' reading of a checkpoint's states: what torch does not load as numbers is one sentence."""
    try:
        yield
    except torch.serialization.pickle.UnpicklingError:
        raise UserError(
            "{checkpoint}: optimizer or random states hold code, not only numbers, and are not loaded; use another "
            "checkpoint",
            checkpoint=checkpoint,
        ) from None


class RunTrainer:
    """What the trainers of all stages add to TRL's: checkpoints that appear whole, and exact resuming."""

    plan: TrainingPlan
    processes: Processes
    save_limit: int | None  # checkpoints that are kept
    lr_ratio_of_b: float = 1.0  # learning rate of the adapter's B matrices in that of the others (LoRA+)
    embedding_rate: float | None = None  # learning rate of embeddings that learn whole
    start: pissa.Start | None = None  # how a PiSSA adapter began
    last_grad_norm: float = 0.0
    writing_to: Path | None = None  # where a checkpoint is being written
    resumed_from: Path | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write one into every checkpoint."""

    def floating_point_ops(self, *_: Any) -> int:
        """transformers' estimate, which no one reads, counts all parameters at every step."""
        return 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and (self.lr_ratio_of_b != 1 or self.embedding_rate is not None):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            rates = {"ratio": self.lr_ratio_of_b, "embedding_rate": self.embedding_rate}
            split_learning_rates(optimizer.param_groups, names, **rates)
        return optimizer

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains from the beginning or from a checkpoint to the end."""
        self.resumed_from, self.saved = checkpoint, []
        if checkpoint:
            state = read_json(checkpoint / "trainer_state.json")
            self.args.eval_on_start = self._misses_evaluation(state["global_step"], state["log_history"])
        # an EvaluationInterrupted is of the evaluation that the earlier part of the run left out
        with contextlib.suppress(EvaluationInterrupted):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    @property
    def misses_evaluation(self) -> bool:
        """Whether the training was interrupted before or in the evaluation that is due after its last step."""
        return self._misses_evaluation(self.state.global_step, self.state.log_history)

    def _misses_evaluation(self, step: int, log: list[dict[str, Any]]) -> bool:
        return self.plan.evaluates_at(step) and step not in {line["step"] for line in log if "eval_loss" in line}

    def since_log(self) -> dict[str, Any]:
        """What the next logged line is to begin with."""
        return {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

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
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            self._save_checkpoint(self.model, None)
            self.control.should_training_stop, self.control.should_save = True, False

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.last_grad_norm = float(norm)
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with pissa.as_trained(Path(resume_from_checkpoint), self.start) as folder:
            super()._load_from_checkpoint(str(folder), model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with refusing_pickles(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with refusing_pickles(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with pissa.as_trained(Path(best), self.start) as folder:
            self.state.best_model_checkpoint = str(folder)
            super()._load_best_model()
        self.state.best_model_checkpoint = best

    def _name_best_checkpoint(self) -> None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: trained weights, the optimizer's moments, tokenizer and random states."""
        return 12 * count_trainable(self.model) + 10_000_000

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        check_finite_weights(self.model, step)
        check_free_space(folder, self.checkpoint_bytes())  # torch's own error does not say that the disk is full

        def write(beside: Path) -> None:
            self.writing_to = beside
            try:
                super(RunTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.writing_to = None
            if self.state.best_global_step:  # it has looked for the best one in `beside`
                best = folder / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(beside / f"checkpoint-{step}" / "trainer_state.json"))
            if self.start:
                pissa.write_as_lora(beside / f"checkpoint-{step}", self.start)
            (beside / f"checkpoint-{step}" / LOSS_STATE).write_text(json.dumps(self.since_log()), encoding="utf-8")

        if self.processes.is_first:
            checkpoints.save_whole(folder, step, write)
            self.saved.append(step)
            checkpoints.delete_old(folder, self.save_limit, self.saved, self.state.best_global_step)
        self.processes.wait()
        self._name_best_checkpoint()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writing_to) if self.writing_to else super()._get_output_dir(trial)


class MeansTrainer(RunTrainer):
    """The trainer of a stage whose logged lines have means over the steps since the last one, beside the loss."""

    def since_log(self) -> dict[str, Any]:
        return {**super().since_log(), "means": self._metrics["train"]}

    def restore(self) -> None:
        super().restore()
        if self.resumed_from and self.processes.is_first:  # which logs
            saved = read_json(self.resumed_from / LOSS_STATE, default={}).get("means", {})
            self._metrics["train"].update(saved)


class Trainer(RunTrainer, SFTTrainer):
    """SFTTrainer with micro-batches of equal size, and an exact mean of the evaluation loss."""

    share: float = 1.0  # of the mean loss of a piece in the one that is wanted
    learned_a_batch: float  # learned tokens of a batch of the held-out samples, on average
    train_splitter: Splitter
    eval_splitter: Splitter
    noise: EmbeddingNoise | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """In micro-batches: `inputs` is the flat batch of a whole optimizer step, of all processes."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train, learned = super().training_step, count_learned(inputs)

        def step(piece: dict[str, Any]) -> Any:
            if self.noise:
                self.noise.lengths = piece["packed_seq_lengths"]
            # the loss of a model that takes no count is the piece's mean
            self.share = 1.0 if num_items_in_batch is not None else count_learned(piece) / max(learned, 1)
            return with_gradients_apart(trained, lambda: train(model, piece, num_items_in_batch))

        with self.processes.own_random_numbers(self.args.seed, self.state.global_step):
            loss = self._run_share(self.train_splitter, inputs, step)
        self.processes.total_gradients(trained)
        return loss

    def _run_share(self, splitter: Splitter, inputs: Any, step: Callable[[dict[str, Any]], Any]) -> torch.Tensor:
        """Runs `step` on what this process takes of a flat batch; returns the sum over all processes."""
        mine = share(dict(inputs), self.processes.rank, self.processes.count)
        loss = splitter.run(mine, step) if mine else torch.zeros((), device=self.args.device)
        return self.processes.total(loss)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every batch is one summand of the mean; `gather_for_metrics` would cut down a last one that is not full."""
        self.gather_function = self.accelerator.gather
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """Weights a batch's loss by its learned tokens: the mean over batches is then that over all tokens.

        TRL's own leaves out how many they are.
        """

        def step(piece: dict[str, Any]) -> Any:
            learned = count_learned(piece)
            if not learned:
                return torch.zeros((), device=self.args.device)
            self.share = learned / self.learned_a_batch
            piece = self._prepare_inputs(piece)
            with torch.no_grad(), self.compute_loss_context_manager():
                items = self._get_num_items_in_batch([piece], self.args.device)
                return self.compute_loss(model, piece, num_items_in_batch=items).detach()

        return self._run_share(self.eval_splitter, inputs, step), None, None  # prediction_loss_only

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.share


def count_learned(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != packing.IGNORED).sum())


def count_trainable(model: Any) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
