"""When a training evaluates, when it stops, and what to warn of before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import Config, UserError

if TYPE_CHECKING:
    import numpy as np

SHARE = 0.1  # of the training time, at most, goes into evaluations that are planned here
FORWARD = 0.5  # time of an evaluated token in trained ones: LoRA's backward pass costs about as much as its forward
FEWEST = 32  # held-out samples below which a loss is too noisy to choose a step by
EVALUATIONS = 20  # of a run at least, where they are cheap enough
FEW_STEPS, MANY_PASSES = 30, 30
MEMORIZED = 0.05  # a mean loss, in nats a token, below which there is nothing left to learn


@dataclass(frozen=True)
class Plan:
    """When to evaluate and when to save; steps below 1 are a share of all, as transformers has it."""

    eval_strategy: str
    eval_steps: float | None
    save_strategy: str
    save_steps: float
    samples: int  # of the held-out part, the first, that an evaluation takes
    epoch_steps: float  # optimizer steps of one pass over the data

    @property
    def keeps_best(self) -> bool:
        """Whether there is a checkpoint of every step that was evaluated, and so of the best."""
        return self.eval_strategy != "no" and self.eval_strategy == self.save_strategy


def make_plan(config: Config, steps: int, epoch_steps: int, train_tokens: int, eval_lengths: np.ndarray | None) -> Plan:
    """Plans the evaluations of a run of so many `steps`; `train_tokens` are those of one pass.

    Raises UserError where evaluations are wanted and nothing is held out.
    """
    strategy = config.eval_strategy
    if strategy == "auto":
        strategy = "no" if eval_lengths is None else "steps"
    if strategy == "no":
        return Plan("no", None, config.save_strategy, config.save_steps, 0, epoch_steps)
    if eval_lengths is None:
        raise UserError(f"eval_strategy: {strategy} needs held-out data; set val_size: 0.1 or eval_dataset")
    eval_steps, samples = config.eval_steps, len(eval_lengths)
    if eval_steps is None and strategy == "steps":
        eval_steps, samples = cheap_evaluations(steps, epoch_steps, train_tokens / epoch_steps, eval_lengths)
    save_strategy, save_steps = config.save_strategy, config.save_steps
    if config.load_best_model_at_end and save_strategy != "no":
        # the best adapter can only be kept where there is a checkpoint of the step that was evaluated
        save_strategy, save_steps = strategy, save_steps if eval_steps is None else eval_steps
    return Plan(strategy, eval_steps, save_strategy, save_steps, samples, epoch_steps)


def cheap_evaluations(steps: int, epoch_steps: int, step_tokens: float, lengths: np.ndarray) -> tuple[int, int]:
    """Steps between evaluations, and how many held-out samples each takes, so that all cost at most SHARE of the time.

    Counted in tokens, not measured: the same recipe must evaluate at the same steps on every machine. Where the whole
    held-out part would leave fewer than five evaluations, its first samples are taken.
    """
    import numpy as np

    wanted = max(1, min(math.ceil(steps / EVALUATIONS), math.ceil(epoch_steps / 2)))
    tokens = np.cumsum(lengths)
    affordable = SHARE / FORWARD * step_tokens  # evaluated tokens a step of training pays for
    every = max(wanted, math.ceil(tokens[-1] / affordable))
    samples = len(lengths)
    if every > steps / 5:
        longest = max(wanted, math.ceil(steps / 5))
        samples = int(np.searchsorted(tokens, affordable * longest, side="right"))
        samples = min(len(lengths), max(FEWEST, samples))
        every = max(wanted, math.ceil(tokens[samples - 1] / affordable))
    return min(every, steps), samples


def stalled(evaluations: Sequence[tuple[int, float]], patience: int, threshold: float, epoch_steps: float) -> bool:
    """Whether (step, eval_loss) have stopped improving: `patience` evaluations in a row, and at least one pass over the
    data, without a gain of more than `threshold` on the lowest loss before.

    The pass is for tasks whose loss lies on a plateau before it falls: no sample is left unseen in the judgement.
    """
    at, waited = last_gain(evaluations, threshold)
    return waited >= patience and evaluations[-1][0] - at >= epoch_steps


def last_gain(evaluations: Sequence[tuple[int, float]], threshold: float) -> tuple[int, int]:
    """The step of the last gain of more than `threshold` on the lowest loss before (0: none), and evaluations since."""
    lowest, at, waited = math.inf, 0, 0
    for step, loss in evaluations:
        if loss < lowest - threshold:
            lowest, at, waited = loss, step, 0
        else:
            waited += 1
    return at, waited


def memorized(losses: Sequence[tuple[int, float]], epoch_steps: float) -> bool:
    """Whether the (step, training loss) of the last three passes are flat and near zero.

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


def why_stop(log: Sequence[dict[str, Any]], config: Config, plan: Plan) -> str | None:
    """The reason to end a training after these lines of transformers' log, for people; None: go on."""
    if config.early_stopping == "no":
        return None
    evaluations = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    if evaluations and stalled(
        evaluations, config.early_stopping_patience, config.early_stopping_threshold, plan.epoch_steps
    ):
        since, _ = last_gain(evaluations, config.early_stopping_threshold)  # the lowest may be later, by less than that
        return f"eval_loss has not improved by more than {config.early_stopping_threshold:g} since step {since:,}"
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    if not evaluations and memorized(losses, plan.epoch_steps):
        return "the training loss is flat and near zero: the data is known by heart"
    return None


def describe(config: Config, plan: Plan, eval_lengths: np.ndarray | None) -> str:
    """What is held out and how often it is evaluated, for people."""
    if plan.eval_strategy == "no":
        return "nothing" if eval_lengths is None else f"{len(eval_lengths):,} samples, not evaluated while training"
    count = f"{len(eval_lengths):,} samples"
    if plan.samples < len(eval_lengths):
        count += f", {plan.samples:,} of them"
    often = "every epoch" if plan.eval_steps is None else f"every {plan.eval_steps:g} steps"
    if plan.eval_steps is not None and plan.eval_steps < 1:
        often = f"each {plan.eval_steps:.0%} of the steps"
    unasked = config.val_size is None and not config.eval_dataset
    return f"{count} evaluated {often}" + (" (val_size: 0 would train on them, too)" if unasked else "")


def warnings(config: Config, samples: int, steps: int, plan: Plan) -> list[str]:
    """The two classic failures, told before the training: nothing changes, or everything is learned by heart."""
    found = []
    epoch_steps, held_out = plan.epoch_steps, plan.eval_strategy != "no"
    passes = steps / epoch_steps
    if held_out and not (config.load_best_model_at_end and plan.keeps_best):
        way = "save_strategy: steps" if config.load_best_model_at_end else "load_best_model_at_end: true"
        found.append(f"the adapter of the last step is kept, not that of the lowest eval_loss; {way} keeps the best")
    if steps < FEW_STEPS:
        more = math.ceil(2 * FEW_STEPS / epoch_steps)
        smaller = max(1, config.gradient_accumulation_steps * steps // (2 * FEW_STEPS))
        ways = [f"num_train_epochs: {more}" if config.max_steps < 0 else f"max_steps: {2 * FEW_STEPS}"]
        if smaller < config.gradient_accumulation_steps:
            ways.append(f"gradient_accumulation_steps: {smaller}")
        found.append(f"only {steps} optimizer steps, too few for much to change; set {' or '.join(ways)}")
    if passes >= MANY_PASSES:
        if config.early_stopping == "no":
            end = "early_stopping: auto would end it in time"
        elif held_out:
            end = "it will stop when eval_loss no longer falls"
        else:
            end = "it will stop when the loss is flat and near zero; val_size: 0.1 would end it in better time"
        found.append(
            f"{passes:,.0f} passes over {samples:,} samples, {steps:,} steps: after some ten passes a model knows its "
            f"data by heart and gets worse on any other; {end}"
        )
    return found
