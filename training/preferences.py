"""What training on preferences needs beside TRL's trainers: their arguments, and the losses that they lack."""

from __future__ import annotations

from typing import Any

from common import Config

PREFERENCES = ("dpo", "kto")  # the stages
WITHOUT_REFERENCE = ("orpo", "simpo")
# Names in the log → TRL's.
REWARDS = {
    "reward_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}


def dpo_arguments(config: Config) -> dict[str, Any]:
    """The arguments of TRL's DPOConfig beside those of every training."""
    arguments = {"beta": config.pref_beta, "max_length": config.cutoff_len, "disable_dropout": False}
    loss = "sigmoid" if config.pref_loss in WITHOUT_REFERENCE else config.pref_loss  # those are computed here
    types, weights = ([loss, "sft"], [1.0, config.pref_ftx]) if config.pref_ftx else ([loss], [1.0])
    return arguments | {"loss_type": types, "loss_weights": weights}


def remove_reference(model: Any) -> None:
    """Deletes the copy of the adapter that TRL makes: the reference is then the model with its adapter off."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


def preference_losses(config: Config, chosen: Any, rejected: Any) -> Any:
    """ORPO (https://arxiv.org/abs/2403.07691) or SimPO (https://arxiv.org/abs/2405.14734), a loss for each pair.

    `chosen`, `rejected`: the mean log-probability of a token of each answer.
    """
    import torch
    from torch.nn.functional import logsigmoid

    if config.pref_loss == "simpo":
        return -logsigmoid(config.pref_beta * (chosen - rejected) - config.simpo_gamma)
    odds = chosen - rejected - torch.log1p(-torch.exp(chosen)) + torch.log1p(-torch.exp(rejected))
    return -chosen - config.pref_beta * logsigmoid(odds)


def smoothed_losses(rewards: Any, smoothing: float) -> Any:
    """DPO's loss where a share `smoothing` of the pairs is taken to be labelled wrongly (cDPO), for each pair."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = rewards.chunk(2)
    margin = chosen - rejected
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
