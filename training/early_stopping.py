"""When a training stops before its last step: held-out loss no longer falls, or the data is known by heart; and which
checkpoint of preferences is the best."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from common import Config, Message
from training.arguments import REWARDS

ACCURACY = f"eval_{REWARDS['reward_accuracy']}"
MEMORIZED = 0.05  # a mean loss, in nats a token, below which there is nothing left to learn


def has_stalled(evaluations: Sequence[tuple[int, float]], patience: int, threshold: float, epoch_steps: float) -> bool:
    """Whether (step, eval_loss) have stopped improving: `patience` evaluations in a row, and at least one epoch,
    without a gain of more than `threshold` on the lowest loss before.

    The epoch is for tasks whose loss lies on a plateau before it falls: every sample is seen before it is judged.
    """
    step, waited = last_gain(evaluations, threshold)
    return waited >= patience and evaluations[-1][0] - step >= epoch_steps


def last_gain(evaluations: Sequence[tuple[int, float]], threshold: float) -> tuple[int, int]:
    """The step of the last gain of more than `threshold` on the lowest loss before (0: none), and evaluations since."""
    lowest, gained_at, waited = math.inf, 0, 0
    for step, loss in evaluations:
        if loss < lowest - threshold:
            lowest, gained_at, waited = loss, step, 0
        else:
            waited += 1
    return gained_at, waited


def has_memorized(losses: Sequence[tuple[int, float]], epoch_steps: float) -> bool:
    """Whether the (step, training loss) of the last three epochs are flat and near zero.

    At least 30 steps and four logged lines, so that each half has some.
    """
    if len(losses) < 2:
        return False
    window = max(3 * epoch_steps, 30, 4 * (losses[-1][0] - losses[-2][0]))
    start = losses[-1][0] - window
    if start < 0:
        return False
    earlier = [loss for step, loss in losses if start < step <= start + window / 2]
    later = [loss for step, loss in losses if step > start + window / 2]
    if not earlier or not later:
        return False
    means = [sum(part) / len(part) for part in (earlier, later)]
    return max(means) < MEMORIZED and means[0] - means[1] < MEMORIZED / 5


def stop_reason(log: Sequence[dict[str, Any]], config: Config, epoch_steps: int) -> Message | None:
    """The reason to end a training after these lines of transformers' log; None: go on.

    Of stage grpo the held-out reward counts, since its loss says nothing; of preferences both loss and accuracy.
    """
    if config.early_stopping == "no":
        return None
    patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
    is_grpo = config.stage == "grpo"
    keys = {"eval_reward": "eval_reward"} if is_grpo else {"eval_loss": "eval_loss", "eval_reward_accuracy": ACCURACY}
    measured: dict[str, list[tuple[int, float]]] = {}
    for name, key in keys.items():
        sign = 1 if name == "eval_loss" else -1
        if points := [(line["step"], sign * line[key]) for line in log if line.get(key) is not None]:
            measured[name] = points
    if measured and all(has_stalled(points, patience, threshold, epoch_steps) for points in measured.values()):
        return Message(
            "no improvement of more than {threshold:g} since step {step:,} ({figures})",
            threshold=threshold,
            step=max(last_gain(points, threshold)[0] for points in measured.values()),
            figures=", ".join(measured),
        )
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    if not measured and not is_grpo and has_memorized(losses, epoch_steps):
        return Message("the training loss is flat and near zero: the data is known by heart")
    return None


def preference_error(accuracy: float, comparisons: int, loss: float) -> float:
    """The share of held-out comparisons that come out wrong; of equal ones the one of the lower loss is lower.

    The loss, which is never negative, outweighs no comparison.
    """
    return 1 - accuracy + loss / (1 + loss) / comparisons


def ranked_right(chosen: list[float], rejected: list[float]) -> float:
    """The share of all pairs of a good and a bad answer in which the good one has the higher reward."""
    ordered = sorted(rejected)
    return sum(bisect_left(ordered, reward) for reward in chosen) / (len(chosen) * len(rejected))
