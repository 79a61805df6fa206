"""TRL's DPO and KTO on the kit's own token ids. To be imported after Unsloth, which replaces trl's classes.

The reference is the same model with its adapter off, so there is no second copy of it. A batch is padded:
`input_ids`, `attention_mask` and `completion_mask`, a row an answer; of pairs first all chosen, then all rejected ones.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer

from common import Config
from training.preference_losses import (
    BEST_BY,
    WITHOUT_REFERENCE,
    judged_losses,
    pair_losses,
    preference_error,
    ranked_right,
    remove_reference,
    with_mismatched,
)
from training.sft_trainer import MeansTrainer
from training.splitting import Splitter, with_gradients_apart

IDS = ("input_ids", "attention_mask", "completion_mask")
KINDS = ("rewards/chosen", "rewards/rejected")


class PreferenceTrainer(MeansTrainer):
    """What DPO and KTO share: token ids as they are, no copy of the adapter, exact means, batches that are split."""

    train_splitter: Splitter
    eval_splitter: Splitter

    def __init__(self, *, config: Config, **kwargs: Any) -> None:
        self.config = config
        self.losses_of_step: list[torch.Tensor] = []  # so far, of each micro-batch; zero of another process's
        super().__init__(**kwargs)
        remove_reference(self.model)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # of token ids

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with all that needs no gradient, by row: `reference` (log-probability) and `share` (of the loss)."""
        raise NotImplementedError

    def losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The losses of the pairs or answers of a batch; logs their rewards."""
        raise NotImplementedError

    def accuracy(self, chosen: list[float], rejected: list[float]) -> tuple[float, int]:
        """The share of comparisons in which the better answer has the higher reward, and how many there are."""
        return ranked_right(chosen, rejected), len(chosen) * len(rejected)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """In pieces where the micro-batch does not fit into memory; several processes take the micro-batches in turn.

        Returns the loss of the whole optimizer step with its last micro-batch, and zero before.
        """
        processes, turn = self.processes, len(self.losses_of_step)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train = super().training_step

        def step(piece: dict[str, Any]) -> Any:
            return with_gradients_apart(trained, lambda: train(model, piece, num_items_in_batch))

        model.train()
        nothing = torch.zeros((), device=self.args.device)
        if turn % processes.count == processes.rank:
            number = self.state.global_step * self.args.gradient_accumulation_steps + turn
            with processes.own_random_numbers(self.args.seed, number):
                batch = self.with_reference(self._prepare_inputs(inputs))
                self.losses_of_step.append(self.train_splitter.run(batch, step))
        else:
            self.losses_of_step.append(nothing)
        if not self.accelerator.sync_gradients:
            return nothing
        loss, self.losses_of_step = torch.stack(self.losses_of_step).sum(), []
        processes.total_gradients(trained)
        return processes.total(loss)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        predict = super().prediction_step
        batch = self.with_reference(self._prepare_inputs(inputs))
        loss = self.eval_splitter.run(batch, lambda piece: predict(model, piece, *args, **kwargs)[0])
        return loss, None, None  # prediction_loss_only

    def _compute_loss(self, model: Any, inputs: Any, *_: Any) -> torch.Tensor:
        batch = inputs if "share" in inputs else self.with_reference(inputs)
        losses = self.losses(model, batch)
        return (losses * batch["share"][: len(losses)]).sum()

    def _log_probabilities(self, model: Any, batch: dict[str, Any], prefix: str = "") -> torch.Tensor:
        """The log-probability of each row's answer."""
        ids, attention, mask = (batch[prefix + name] for name in IDS)
        labels = ids.masked_fill(mask == 0, -100)
        given = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        return model(**given, use_cache=False, fused_lm_head=True).log_probs.sum(1)

    def _note(self, name: str, values: torch.Tensor) -> None:
        """Adds to what the next logged value of `name` is the mean of."""
        self._metrics["train" if self.model.training else "eval"][f"rewards/{name}"] += values.detach().tolist()

    def _gather_rewards(self) -> None:
        """Leaves the first process, which logs and saves them, what all have noted of their micro-batches."""
        noted = self._metrics["train"]
        for name in KINDS:
            gathered = self.processes.gather(noted.pop(name, []))
            if self.processes.is_first and (values := [value for each in gathered for value in each]):
                noted[name] = values

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._gather_rewards()
        super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:
            self._gather_rewards()
        found, accuracy, comparisons = self._metrics["train" if self.model.training else "eval"], 1.0, 1
        chosen, rejected = (found.pop(name, []) for name in KINDS)
        found |= {name: values for name, values in zip(KINDS, (chosen, rejected), strict=True) if values}
        if chosen and rejected:
            found["rewards/margins"] = [sum(chosen) / len(chosen) - sum(rejected) / len(rejected)]
            accuracy, comparisons = self.accuracy(chosen, rejected)
            found["rewards/accuracies"] = [accuracy]
        if "eval_loss" in logs:
            logs[BEST_BY] = preference_error(accuracy, comparisons, logs["eval_loss"])
        super().log(logs, *args, **kwargs)


class DpoTrainer(PreferenceTrainer, DPOTrainer):
    """DPO, also with ORPO's and SimPO's loss, which have no reference."""

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch, rows = {name: inputs[name] for name in IDS}, len(inputs["input_ids"])
        if self.config.pref_loss in WITHOUT_REFERENCE:
            batch["reference"] = torch.zeros(rows, device=inputs["input_ids"].device)
        else:
            batch["reference"] = torch.cat(self.compute_ref_log_probs(self.model, inputs))
        return batch | {"share": torch.full_like(batch["reference"], 2 / rows)}

    def losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        tokens = batch["completion_mask"][:, 1:].sum(1)
        losses, rewards = pair_losses(self.config, self._log_probabilities(model, batch), batch["reference"], tokens)
        chosen, rejected = rewards.chunk(2)
        self._note("chosen", chosen)
        self._note("rejected", rejected)
        return losses

    def accuracy(self, chosen: list[float], rejected: list[float]) -> tuple[float, int]:
        """Of the pairs themselves."""
        right = [good > bad for good, bad in zip(chosen, rejected, strict=True)]
        return sum(right) / len(right), len(right)


class KtoTrainer(PreferenceTrainer, KTOTrainer):
    """KTO, whose KL is measured on each prompt with the answer to another one, also where a batch is one row."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_type, self.calculate_KL = "kto", True  # see preference_losses.preference_arguments

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return with_mismatched(dataset)

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        reference, mismatched = self.compute_ref_log_probs(self.model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            kl = (self._log_probabilities(self.model, inputs, "KL_") - mismatched).mean().clamp(min=0)
        batch = {name: inputs[name] for name in (*IDS, "label")} | {"reference": reference}
        return batch | {"kl": kl.expand(len(reference)), "share": torch.full_like(reference, 1 / len(reference))}

    def losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        good, kl, tokens = batch["label"].bool(), batch["kl"], batch["completion_mask"][:, 1:].sum(1)
        logs = self._log_probabilities(model, batch)
        losses, rewards = judged_losses(self.config, logs, batch["reference"], tokens, good, kl)
        self._note("chosen", rewards[good])
        self._note("rejected", rewards[~good])
        return losses
