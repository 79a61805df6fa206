"""The plan of a training: rows after packing, steps, evaluations, saves. Made once from settings and tokenized data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import Config, Message, UserError
from training import packing
from training.findings import Fact, Note

if TYPE_CHECKING:
    import numpy as np

    from preprocessing.dataset import TrainingData

EVAL_SHARE = 0.1  # of the training time, at most, goes into evaluations that are planned here
EVAL_COST = 0.5  # time of an evaluated token in trained ones: LoRA's backward pass costs about as much as its forward
FEWEST_EVAL_SAMPLES = 32  # held-out samples below which a loss is too noisy to choose a step by
EVALUATIONS = 20  # of a run at least, where they are cheap enough
FEW_STEPS, MANY_EPOCHS = 30, 30  # below and above which a warning is due


@dataclass(frozen=True)
class TrainingPlan:
    """What a training does. Evaluations and saves come every `..._steps` steps, after each epoch where that is None.

    `eval_strategy` and `save_strategy` are "no", "steps" or "epoch"; `saves_evaluated` tells that there also is a
    checkpoint of every step that is evaluated, so that the best one can be kept.
    """

    samples: int
    tokens: int  # of one epoch
    longest: int  # tokens of the longest sample
    packed_rows: list[list[int]] | None  # with packing: the indices of each row's samples
    epoch_steps: int  # optimizer steps of one epoch
    steps: int  # optimizer steps in all
    held_out: int | None  # samples
    eval_samples: int  # of the held-out ones, the first, that an evaluation takes
    eval_strategy: str
    eval_steps: int | None
    save_strategy: str
    save_steps: int | None
    saves_evaluated: bool
    first_eval: float = 0.0  # no evaluation is due before this step

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        return step >= self.first_eval and self._is_due(step, self.eval_strategy, self.eval_steps)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        is_kept = self.saves_evaluated and self.evaluates_at(step)
        return is_kept or self._is_due(step, self.save_strategy, self.save_steps)

    def _is_due(self, step: int, strategy: str, every: int | None) -> bool:
        return strategy != "no" and (step % (every or self.epoch_steps) == 0 or step == self.steps)

    def count_saves(self) -> int:
        """How many checkpoints are written, deleted ones included. No loop over the steps: a recipe may ask for a
        trillion."""
        if self.save_strategy == "no":
            return 0
        before_last, saved = self.steps - 1, self.save_steps or self.epoch_steps
        count = 1 + before_last // saved
        if self.saves_evaluated:
            evaluated = self.eval_steps or self.epoch_steps
            count += before_last // evaluated - before_last // math.lcm(saved, evaluated)
        return count


def make_plan(config: Config, data: TrainingData) -> TrainingPlan:
    """The plan of a run on tokenized data; raises UserError where evaluations are wanted and nothing is held out."""
    lengths = data.train_lengths
    packed_rows = packing.pack(lengths, config.cutoff_len) if config.packing else None
    rows = len(lengths) if packed_rows is None else len(packed_rows)
    epoch_steps, steps = packing.epoch_steps(config, rows), packing.total_steps(config, rows)
    tokens = int(lengths.sum())
    eval_strategy, eval_steps, eval_samples = plan_evaluations(
        config, steps, epoch_steps, tokens / epoch_steps, data.eval_lengths
    )
    first_eval = config.eval_delay * (epoch_steps if eval_strategy == "epoch" else 1)
    if first_eval > steps:
        eval_strategy, eval_steps, eval_samples = "no", None, 0
    save_steps = whole_steps(config.save_steps, steps) if config.save_strategy == "steps" else None
    return TrainingPlan(
        samples=len(lengths),
        tokens=tokens,
        longest=int(lengths.max()),
        packed_rows=packed_rows,
        epoch_steps=epoch_steps,
        steps=steps,
        held_out=None if data.eval_lengths is None else len(data.eval_lengths),
        eval_samples=eval_samples,
        eval_strategy=eval_strategy,
        eval_steps=eval_steps,
        save_strategy=config.save_strategy,
        save_steps=save_steps,
        saves_evaluated=config.load_best_model_at_end and eval_strategy != "no" and config.save_strategy != "no",
        first_eval=first_eval,
    )


def whole_steps(steps: float, total: int) -> int:
    """A setting that is a count of steps, or below 1 a share of all, as a count."""
    return math.ceil(steps * total) if steps < 1 else int(steps)


def plan_evaluations(
    config: Config, steps: int, epoch_steps: int, step_tokens: float, eval_lengths: np.ndarray | None
) -> tuple[str, int | None, int]:
    """Strategy ("no", "steps", "epoch"), steps between evaluations, and held-out samples that each takes.

    `step_tokens` are those that a step trains. Raises UserError where evaluations are wanted and nothing is held out.
    """
    strategy = config.eval_strategy
    if strategy == "auto":
        strategy = "no" if eval_lengths is None else "steps"
    if strategy == "no":
        return "no", None, 0
    if eval_lengths is None:
        raise UserError("eval_strategy: {strategy} needs held-out data; set val_size: 0.1", strategy=strategy)
    if strategy == "epoch":
        return "epoch", None, len(eval_lengths)
    if config.eval_steps is None:
        return "steps", *cheap_evaluations(steps, epoch_steps, step_tokens, eval_lengths)
    return "steps", whole_steps(config.eval_steps, steps), len(eval_lengths)


def cheap_evaluations(steps: int, epoch_steps: int, step_tokens: float, lengths: np.ndarray) -> tuple[int, int]:
    """Steps between evaluations, and how many held-out samples each takes: all cost at most EVAL_SHARE of the time.

    Counted in tokens, not measured: the same recipe must evaluate at the same steps on every machine. Where the whole
    held-out part would leave fewer than five evaluations, its first samples are taken.
    """
    import numpy as np

    wanted = max(1, min(math.ceil(steps / EVALUATIONS), math.ceil(epoch_steps / 2)))
    tokens = np.cumsum(lengths)
    affordable = EVAL_SHARE / EVAL_COST * step_tokens  # evaluated tokens that a step of training pays for
    every = max(wanted, math.ceil(tokens[-1] / affordable))
    samples = len(lengths)
    if every > steps / 5:
        longest = max(wanted, math.ceil(steps / 5))
        samples = int(np.searchsorted(tokens, affordable * longest, side="right"))
        samples = min(len(lengths), max(FEWEST_EVAL_SAMPLES, samples))
        every = max(wanted, math.ceil(tokens[samples - 1] / affordable))
    return min(every, steps), samples


def describe_data(plan: TrainingPlan) -> Fact:
    sizes = {name: getattr(plan, name) for name in ("samples", "tokens", "longest")}
    return Fact("{samples:,} samples, {tokens:,} tokens, the longest {longest:,}", **sizes)


def describe_steps(config: Config, plan: TrainingPlan, processes: int = 1) -> Fact:
    """How many optimizer steps of how many samples or packed rows."""
    unit = Message("samples") if plan.packed_rows is None else Message("packed rows")
    if config.stage == "grpo":
        prompts, each = packing.prompts_a_step(config), config.num_generations
        unit = Message("replies ({each} to each of {prompts:,} prompts)", prompts=prompts, each=each)
    return Fact(
        "{steps:,} of {batch} {unit}, learning rate {rate:g} ({schedule})",
        steps=plan.steps,
        batch=step_batch(config, processes),
        unit=unit,
        rate=config.learning_rate,
        schedule=config.lr_scheduler_type,
    )


def step_batch(config: Config, processes: int) -> Message:
    """The samples of an optimizer step, as a product."""
    sizes = {"batch": config.per_device_train_batch_size, "accumulation": config.gradient_accumulation_steps}
    if processes == 1:
        return Message("{batch} x {accumulation}", **sizes)
    return Message("{batch} x {accumulation} x {count} processes", **sizes, count=processes)


def describe_evaluations(config: Config, plan: TrainingPlan) -> Fact:
    """What is held out and how often it is evaluated."""
    if plan.held_out is None:
        return Fact("nothing")
    if plan.eval_strategy == "no":
        return Fact("{samples:,} samples, not evaluated while training", samples=plan.held_out)
    every = plan.eval_steps
    often = Message("every epoch") if every is None else Message("every {steps:,} steps", steps=every)
    if plan.first_eval > 1:
        often = Message("{often} from step {step:,} on", often=often, step=math.ceil(plan.first_eval))
    part = Message(", {samples:,} of them", samples=plan.eval_samples) if plan.eval_samples < plan.held_out else ""
    by_default = config.val_size is None and not config.eval_dataset
    return Fact(
        "{samples:,} samples{part} evaluated {often}{hint}",
        samples=plan.held_out,
        part=part,
        often=often,
        hint=Message(" (val_size: 0 would train on them, too)") if by_default else "",
    )


def check_plan(config: Config, plan: TrainingPlan) -> Iterator[Note]:
    """What of a plan is probably not meant: nothing changes, or the data is memorized."""
    warmup = config.warmup_steps or config.warmup_ratio
    if config.learning_rate == 0:
        yield Note("learning_rate: 0 trains nothing; 1e-4 is usual")
    if warmup >= 1 and warmup >= plan.steps:
        sizes = {"warmup": int(warmup), "steps": plan.steps}
        yield Note("warmup_steps: {warmup:,} of {steps:,} steps: the learning rate is never reached", **sizes)
    if (delay := plan.first_eval) > plan.steps:
        yield Note(
            "nothing is evaluated: eval_delay ends at step {delay:g} of {steps:,}", delay=delay, steps=plan.steps
        )
    if plan.eval_strategy != "no" and not plan.saves_evaluated:
        setting = "save_strategy: steps" if config.load_best_model_at_end else "load_best_model_at_end: true"
        yield Note("the adapter of the last step is kept; with {setting} that of the lowest eval_loss", setting=setting)
    if plan.steps < FEW_STEPS:
        enough, now = 2 * FEW_STEPS, config.gradient_accumulation_steps
        more = f"max_steps: {enough}"
        if config.max_steps < 0:
            more = f"num_train_epochs: {math.ceil(enough / plan.epoch_steps)}"
        smaller = max(1, now * plan.steps // enough)
        other = Message(" or {setting}", setting=f"gradient_accumulation_steps: {smaller}") if smaller < now else ""
        fields = {"steps": plan.steps, "more": more, "other": other}
        yield Note("only {steps} optimizer steps change little; set {more}{other}", **fields)
    if (epochs := plan.steps / plan.epoch_steps) >= MANY_EPOCHS:
        if config.early_stopping == "no" or (config.stage == "grpo" and plan.eval_strategy == "no"):
            ending = Message("early_stopping: auto would end it in time")
        elif plan.eval_strategy != "no":
            ending = Message("it stops when eval_loss (stage grpo: eval_reward) no longer improves")
        else:
            ending = Message("it stops when the loss is flat and near zero; with val_size: 0.1 earlier")
        sizes = {"epochs": round(epochs), "samples": plan.samples}
        yield Note(
            "{epochs:,} epochs of {samples:,} samples: after about ten a model overfits; {ending}",
            ending=ending,
            **sizes,
        )
