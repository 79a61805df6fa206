"""What a training reports as it goes: trainer_log.jsonl, training_loss.png, the progress bar; and how it is stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common import Config, UserError
from runs.charts import draw_loss
from runs.files import read_jsonl, write_text
from training import early_stopping

LOG = "trainer_log.jsonl"
PICTURE = "training_loss.png"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's trainer_log.jsonl; a last line cut off by a kill is left out."""
    return read_jsonl(folder / LOG)


def mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """The training loss over all steps of a log: each line's loss stands for the steps since the line before."""
    total, seen = 0.0, 0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["step"] - seen)
            seen = line["step"]
    return total / seen if seen else None


class Progress(TrainerCallback):
    """Writes the log, draws the loss, shows the bar."""

    def __init__(self, folder: Path, plot_loss: bool) -> None:
        self.folder, self.plot_loss = folder, plot_loss
        self.earlier_seconds = 0.0  # of the same run before it was interrupted
        self.bar: Any = None
        self.drawn = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm import tqdm

        # a resumed run goes on from its checkpoint: what was logged after that will be logged again
        kept = [line for line in read_log(self.folder) if line["step"] <= state.global_step]
        write_text(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))
        self.earlier_seconds = kept[-1]["elapsed"] if kept else 0.0
        self.started, self.first_step = time.monotonic(), state.global_step
        self.first_tokens = state.num_input_tokens_seen
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", mininterval=1, file=sys.stderr
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step == state.max_steps:
            control.should_log = True  # the last loss and the whole time, whatever logging_steps is

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        steps = state.global_step - self.first_step
        tokens = state.num_input_tokens_seen
        line = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch or 0.0, 4),
            **{key: logs[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in logs},
            "tokens": int(tokens),
            "tokens_per_second": round((tokens - self.first_tokens) / seconds, 1),
            "elapsed": round(self.earlier_seconds + seconds, 1),
            "remaining": round(seconds / max(steps, 1) * (state.max_steps - state.global_step), 1),
        }
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {key: f"{logs[key]:.4f}" for key in ("loss", "eval_loss") if key in logs}
        self.bar.set_postfix({**shown, "tok/s": f"{line['tokens_per_second']:.0f}"}, refresh=False)
        for key in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise UserError(
                    f"the {key} became {logs[key]} at step {state.global_step}; "
                    "start over with a lower learning_rate (a tenth), overwrite_output_dir=true"
                )
        if self.plot_loss and time.monotonic() - self.drawn > 15:  # a picture costs a third of a second
            self.draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
        if self.plot_loss:
            self.draw()

    def draw(self) -> None:
        """Draws training_loss.png from the log."""
        draw_loss(read_log(self.folder), self.folder / PICTURE)
        self.drawn = time.monotonic()


class Interruption(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) saves a checkpoint after the step and stops; the second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        print("\nsaving a checkpoint after this step; once more to end at once", file=sys.stderr)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_training_stop = True
            control.should_save = control.should_log = True
            control.should_evaluate = False


class EarlyStopping(TrainerCallback):
    """Ends the training when `early_stopping.why_stop` has a reason, which it keeps.

    It looks at the whole log each time and has no state of its own, so a resumed run stops where an uninterrupted one
    would.
    """

    def __init__(self, config: Config, plan: early_stopping.Plan) -> None:
        self.config, self.plan = config, plan
        self.reason: str | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reason = self.reason or early_stopping.why_stop(state.log_history, self.config, self.plan)
        if self.reason:
            control.should_training_stop = True
