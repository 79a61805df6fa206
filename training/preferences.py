"""Stages dpo and kto: TRL's trainers on the kit's own token ids. To be imported after Unsloth, which replaces trl's.

The reference is the same model with its adapter off, so there is no second copy of it. A batch is padded:
`input_ids`, `attention_mask` and `completion_mask`, a row an answer; of pairs first all chosen, then all rejected ones.
Private members of TRL's trainers that are overridden or read: `_prepare_dataset`, which tokenizes, `_compute_loss`,
which has other losses, and `_metrics`, in which it collects what a logged line has the means of.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch.nn.functional import logsigmoid, relu
from trl import DPOTrainer, KTOTrainer

from common import Config
from training.arguments import BEST_BY
from training.early_stopping import preference_error, ranked_right
from training.splitting import Splitter, pieces_of_rows, whole
from training.trainer import MeansTrainer

WITHOUT_REFERENCE = ("orpo", "simpo")
IDS = ("input_ids", "attention_mask", "completion_mask")
KINDS = ("rewards/chosen", "rewards/rejected")


class PreferenceTrainer(MeansTrainer):
    """What DPO and KTO share: token ids as they are, exact means, batches that are split.

    Theirs are `with_reference`, a batch with all that needs no gradient, by row: `reference` (log-probability) and
    `share` (of the loss); and `losses` of the pairs or answers of a batch, which logs their rewards.
    """

    def __init__(self, prepared: Any, model: Any, precision: Any) -> None:
        super().__init__(prepared, model, precision)
        divide = partial(pieces_of_rows, of_pairs=self.config.stage == "dpo")
        self.train_splitter = Splitter(self.smaller_settings, divide if self.args.world_size == 1 else whole)
        self.eval_splitter = Splitter(self.smaller_settings, divide)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # of token ids

    def accuracy(self, chosen: list[float], rejected: list[float]) -> tuple[float, int]:
        """The share of comparisons in which the better answer has the higher reward, and how many there are."""
        return ranked_right(chosen, rejected), len(chosen) * len(rejected)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        train = super().training_step

        def step(piece: dict[str, Any]) -> Any:
            return train(model, piece, num_items_in_batch)

        model.train()
        return self.train_in_pieces(self.with_reference(inputs), step)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        predict = super().prediction_step
        batch = self.with_reference(inputs)
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
        """Adds to what the next logged value of `name` is the mean of: in training, of all processes."""
        values, mode = values.detach().tolist(), "train" if self.model.training else "eval"
        self._metrics[mode][f"rewards/{name}"] += gather_object(values) if mode == "train" else values

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
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

    def __init__(self, prepared: Any, model: Any, precision: Any) -> None:
        super().__init__(prepared, model, precision)
        self.loss_type, self.calculate_KL = "kto", True  # see arguments.training_arguments

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


def with_mismatched(dataset: datasets.Dataset) -> datasets.Dataset:
    """Judged answers, each with the answer of the row before as `KL_completion_ids`, as KTO measures its KL on."""

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [dataset[i] | {"KL_completion_ids": dataset[i - 1]["completion_ids"]} for i in batch["row"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return datasets.Dataset.from_dict({"row": range(len(dataset))}).with_transform(read)


def pair_losses(config: Config, logs: Any, reference: Any, tokens: Any) -> tuple[Any, Any]:
    """DPO's loss of each pair (`pref_loss`, `pref_ftx`), and the rewards of all answers.

    By answer, first all chosen, then all rejected: the log-probabilities by the model and by its reference, and tokens.
    The losses: https://arxiv.org/abs/2305.18290 (sigmoid), 2305.10425 (hinge), 2310.12036 (ipo), 2403.07691 (orpo),
    2405.14734 (simpo); smoothed: a share `dpo_label_smoothing` of the pairs is taken to be labelled wrongly.
    """
    beta, kind, smoothing = config.pref_beta, config.pref_loss, config.dpo_label_smoothing
    means = logs / tokens
    chosen, rejected = means.chunk(2)
    rewards = beta * (means if kind in WITHOUT_REFERENCE else logs - reference)
    margin = rewards.chunk(2)[0] - rewards.chunk(2)[1]
    if kind == "sigmoid":
        losses = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    elif kind == "hinge":
        losses = relu(1 - margin)
    elif kind == "ipo":
        gained = ((logs - reference) / tokens).chunk(2)
        losses = (gained[0] - gained[1] - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        losses = -logsigmoid(margin - config.simpo_gamma)
    else:
        odds = chosen - rejected - torch.log1p(-torch.exp(chosen)) + torch.log1p(-torch.exp(rejected))
        losses = -chosen - beta * logsigmoid(odds)
    return losses - config.pref_ftx * chosen, rewards


def judged_losses(config: Config, logs: Any, reference: Any, tokens: Any, good: Any, kl: Any) -> tuple[Any, Any]:
    """KTO's loss (https://arxiv.org/abs/2402.01306) of each answer, and its reward.

    By answer: the log-probability by the model and by its reference, tokens, whether it is a good one, and the KL of
    model and reference that its reward is compared with.
    """
    gained = logs - reference
    weights = torch.where(good, config.kto_chosen_weight, config.kto_rejected_weight)
    losses = weights * (1 - torch.sigmoid(config.pref_beta * torch.where(good, gained - kl, kl - gained)))
    return losses - config.pref_ftx * torch.where(good, logs / tokens, 0.0), config.pref_beta * gained
