"""What training on preferences needs beside TRL's trainers: their arguments, the losses, KTO's mismatched answers."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from common import Config

if TYPE_CHECKING:
    import datasets

PREFERENCES = ("dpo", "kto")  # the stages
WITHOUT_REFERENCE = ("orpo", "simpo")
BEST_BY = "eval_preference_error"  # what the best checkpoint has the least of
# Names in the log → TRL's.
REWARDS = {
    "reward_accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
}


def preference_arguments(config: Config) -> dict[str, Any]:
    """The arguments of TRL's DPOConfig or KTOConfig beside those of every training; the losses are computed here."""
    arguments = {"max_length": config.cutoff_len, "disable_dropout": False}
    if config.stage == "kto":
        # TRL refuses KTO in random order and with batches of one, because it takes the answers of other prompts from
        # the same batch; here they come with the rows (with_mismatched), and KtoTrainer sets its own loss
        arguments |= {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}
    return arguments


def preference_error(accuracy: float, comparisons: int, loss: float) -> float:
    """The share of held-out comparisons that come out wrong; of equal ones the one of the lower loss is lower.

    The loss, which is never negative, outweighs no comparison.
    """
    return 1 - accuracy + loss / (1 + loss) / comparisons


def ranked_right(chosen: list[float], rejected: list[float]) -> float:
    """The share of all pairs of a good and a bad answer in which the good one has the higher reward."""
    ordered = sorted(rejected)
    return sum(bisect_left(ordered, reward) for reward in chosen) / (len(chosen) * len(rejected))


def remove_reference(model: Any) -> None:
    """Deletes the copy of the adapter that TRL makes: the reference is then the model with its adapter off."""
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


def with_mismatched(dataset: datasets.Dataset) -> datasets.Dataset:
    """Judged answers, each with the answer of the row before as `KL_completion_ids`, as KTO measures its KL on."""
    import datasets

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
    import torch
    from torch.nn.functional import logsigmoid, relu

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
    import torch

    gained = logs - reference
    weights = torch.where(good, config.kto_chosen_weight, config.kto_rejected_weight)
    losses = weights * (1 - torch.sigmoid(config.pref_beta * torch.where(good, gained - kl, kl - gained)))
    return losses - config.pref_ftx * torch.where(good, logs / tokens, 0.0), config.pref_beta * gained
