"""What happens around the steps of a training: the log and the progress bar, saves, an interruption, the end."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState

from common import Config, Message, UserError
from runs.charts import draw_loss
from runs.files import append_lines
from runs.folder import LOG, SAMPLES, keep_lines, read_log
from training import early_stopping
from training.arguments import logged_rewards
from training.plan import TrainingPlan

PICTURE = "training_loss.png"
DRAW_EVERY = 15  # seconds; a picture costs a third of a second


class EvaluationInterrupted(Exception):
    """Ctrl-C or SIGTERM in the middle of an evaluation, which is done again when the run goes on."""


class Progress(TrainerCallback):
    """Writes the log, draws the loss, shows the progress bar."""

    def __init__(self, folder: Path, plot_loss: bool) -> None:
        self.folder, self.plot_loss = folder, plot_loss
        self.earlier_seconds = 0.0  # of the same run before it was interrupted
        self.bar: Any = None
        self.drawn_at = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from tqdm import tqdm

        # a resumed run goes on from its checkpoint: what was logged after that will be logged again
        evaluated = {line["step"] for line in state.log_history if "eval_loss" in line}
        kept = keep_lines(
            self.folder / LOG,
            lambda line: (
                line.get("step", math.inf) <= state.global_step  # another program's log has other keys
                and ("eval_loss" not in line or line["step"] in evaluated)
            ),
        )
        if (self.folder / SAMPLES).exists():
            keep_lines(self.folder / SAMPLES, lambda line: line.get("step", math.inf) <= state.global_step)
        self.earlier_seconds = kept[-1]["elapsed"] if kept else 0.0
        self.started, self.first_step = time.monotonic(), state.global_step
        self.first_tokens = state.num_input_tokens_seen
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", mininterval=1, file=sys.stderr
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs and "eval_loss" not in logs:
            return
        line = self._line(state, logs)
        append_lines(self.folder / LOG, [line])
        # of rewards it may be: all replies to a prompt can have the same one
        if logs.get("grad_norm") == 0 < logs.get("loss", 0) and "reward" not in logs:
            text = Message("step {step}: the gradient is zero: nothing was learned", step=state.global_step)
            print("\n", text, sep="", file=sys.stderr)
        keys = ("reward", "eval_reward") if {"reward", "eval_reward"} & logs.keys() else ("loss", "eval_loss")
        shown = {key: f"{logs[key]:.4f}" for key in keys if logs.get(key) is not None}
        self.bar.set_postfix({**shown, "tok/s": f"{line['tokens_per_second']:.0f}"}, refresh=False)
        if self.plot_loss and time.monotonic() - self.drawn_at > DRAW_EVERY:
            self.draw()

    def _line(self, state: TrainerState, logs: dict[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        steps, tokens = state.global_step - self.first_step, state.num_input_tokens_seen
        return {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch or 0.0, 4),
            **{key: logs[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs},
            **logged_rewards(logs),
            "tokens": int(tokens),
            "tokens_per_second": round((tokens - self.first_tokens) / seconds, 1),
            "elapsed": round(self.earlier_seconds + seconds, 1),
            "remaining": round(seconds / max(steps, 1) * (state.max_steps - state.global_step), 1),
        }

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()
        if self.plot_loss:
            self.draw()

    def draw(self) -> None:
        """Draws training_loss.png from the log."""
        draw_loss(read_log(self.folder), self.folder / PICTURE)
        self.drawn_at = time.monotonic()


class Interruption(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) saves a checkpoint after the step and stops; the second ends at once.

    An evaluation is given up where it stands, and repeated when the run goes on. Several processes stop together: each
    asks the others at every step.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.asked = False  # this process
        self.agreed = False  # all of them, which save at the same step

    def _agree(self) -> bool:
        if self.accelerator.num_processes == 1:
            self.agreed = self.asked
        else:
            if self.asked:
                self.accelerator.set_trigger()
            self.agreed = self.agreed or self.accelerator.check_trigger()
        return self.agreed

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        print("\n", Message("saving a checkpoint after this step; once more to end at once"), sep="", file=sys.stderr)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            raise EvaluationInterrupted

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed:
            control.should_evaluate = control.should_save = False


class Course(TrainerCallback):
    """Where a training begins, what is due at its steps, and when it ends before its last one.

    `restore` is called once transformers has read the state of the checkpoint to go on from. transformers saves at the
    steps that are evaluated, this at the others of `save_steps`. The run ends when `early_stopping.stop_reason` has a
    reason, which is kept: it looks at the whole log each time, so a resumed run stops where an uninterrupted one would.
    It ends with an error when its loss is no number, and before a gradient that is none reaches the weights. With
    float16's loss scaling an overflow is expected now and then, and the scaler leaves that step out: there the weights
    are looked at, after each step.
    """

    def __init__(self, config: Config, plan: TrainingPlan, restore: Callable[[], None]) -> None:
        self.config, self.plan, self.restore = config, plan, restore
        self.reason: Message | None = None  # to stop early

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.restore()
        self._stop_early(state, control)  # as a run that had stopped, but was killed before its adapter was saved

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the last loss, also between two logging_steps
        if self.plan.saves_evaluated and not self.plan.evaluates_at(state.global_step):
            control.should_save = self.plan.saves_at(state.global_step)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.plan.saves_evaluated and not self.plan.evaluates_at(state.global_step):
            control.should_save = False  # what is due was saved after the step

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for key in ("loss", "eval_loss"):
            if not math.isfinite(value := kwargs["logs"].get(key, 0.0)):
                raise diverged(key, value, state.global_step)
        self._stop_early(state, control)

    def _stop_early(self, state: TrainerState, control: TrainerControl) -> None:
        self.reason = self.reason or early_stopping.stop_reason(state.log_history, self.config, self.plan.epoch_steps)
        if self.reason:
            control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, *_: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not math.isfinite(norm := get_total_norm(gradients).item()):
            raise diverged("gradient", norm, state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: TrainerState, *_: Any, model: Any = None, **kwargs: Any) -> None:
        if args.fp16:
            check_finite_weights(model, state.global_step + 1)


def check_finite_weights(model: Any, step: int) -> None:
    """Raises UserError where a trained weight is no number."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.isfinite().all()):
            raise diverged(name, math.nan, step)


def diverged(what: str, value: float, step: int) -> UserError:
    """The end of a run in which this became a number that is not finite."""
    return UserError(
        "{what} became {value} at step {step}; start over with overwrite_output_dir=true and a tenth of learning_rate",
        what=what,
        value=str(value),
        step=step,
    )
