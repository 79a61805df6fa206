"""TRL's DPO and KTO on the kit's own token ids. To be imported after Unsloth, which replaces trl's classes.

The reference is the same model with its adapter off, so there is no second copy of it. Batches are padded: `input_ids`,
`attention_mask` and `completion_mask`, of pairs first all chosen, then all rejected sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from common import Config
from training.preferences import WITHOUT_REFERENCE, preference_losses, remove_reference, smoothed_losses
from training.sft_trainer import RunTrainer


class DpoTrainer(RunTrainer, DPOTrainer):
    """DPOTrainer on token ids as they are, without a copy of the adapter, and with ORPO, SimPO and smoothing."""

    def __init__(self, *, config: Config, **kwargs: Any) -> None:
        self.config = config
        super().__init__(**kwargs)
        remove_reference(self.model)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # of token ids

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self.config.pref_loss not in WITHOUT_REFERENCE and not self.config.dpo_label_smoothing:
            return super()._compute_loss(model, inputs, return_outputs)
        loss, rewards = self._own_loss(model, inputs)
        chosen, rejected = rewards.detach().chunk(2)
        found = self._metrics["train" if self.model.training else "eval"]
        found["rewards/chosen"].append(chosen.mean().item())
        found["rewards/rejected"].append(rejected.mean().item())
        found["rewards/accuracies"].append((chosen > rejected).float().mean().item())
        found["rewards/margins"].append((chosen - rejected).mean().item())
        return loss

    def _own_loss(self, model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the rewards of all chosen, then all rejected answers."""
        config, mask = self.config, inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logs = model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        means = logs / mask[:, 1:].sum(1)
        if config.pref_loss in WITHOUT_REFERENCE:
            losses = preference_losses(config, *means.chunk(2))
            rewards = config.pref_beta * means
        else:
            rewards = config.pref_beta * (logs - torch.cat(self.compute_ref_log_probs(self.model, inputs)))
            losses = smoothed_losses(rewards, config.dpo_label_smoothing)
        return (losses - config.pref_ftx * means.chunk(2)[0]).mean(), rewards
