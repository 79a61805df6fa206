"""Fine-tunes a language model with Unsloth: a recipe → a run folder.

python train.py [RECIPE.yaml] [key=value ...]
    --dry-run    says whether the run will work here, and changes nothing
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Message, UserError, print_notes
from preprocessing.data_report import format_report, show_sample
from runs.configuration import check_training_asked_for, load_config, run_command
from runs.files import on_disk_full
from runs.folder import earlier_trainings, locked
from runs.process import interruptible
from training import model, plan, prepare, record, resume
from training.arguments import choose_precision
from training.findings import Findings
from training.prepare import Prepared
from training.processes import Processes

if TYPE_CHECKING:
    from training.trainer import RunTrainer


def main(arguments: list[str]) -> None:
    processes = Processes.of_launcher()
    with processes.one_voice():
        start(arguments, processes)


def start(arguments: list[str], processes: Processes) -> None:
    if processes.is_first:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    loaded = resume.locate_model(load_config([a for a in arguments if a != "--dry-run"]))
    print_notes([*check_training_asked_for(loaded), *loaded.notes])
    if "--dry-run" in arguments:
        sys.exit(prepare.dry_run(loaded, processes) if processes.is_first else 0)
    found = Findings()
    started = prepare.look(loaded, processes, found)
    print_notes(found.conclude())
    if started.resume.finished:
        print_next(started.folder)
        return
    with locked(started.folder) if processes.is_first else contextlib.nullcontext(), processes.connected():
        with processes.in_turn():
            started = prepare.make_missing_model(started)
        with interruptible():
            model.import_unsloth()  # takes seconds: told before is what can be
        found = Findings()
        with processes.in_turn():
            prepared = prepare.prepare(started, found)
            notes = found.conclude()
        print(format_report(prepared.data.report))
        print_notes(notes)
        train(prepared)
    if loaded.config.do_predict and processes.is_first:
        predict(started.folder)


def train(prepared: Prepared) -> None:
    """Loads the model, trains it, and leaves the adapter in the run folder."""
    from training.stages import make_trainer

    folder, resumed = prepared.start.folder, prepared.start.resume.checkpoint
    precision = choose_precision(prepared.config)
    print_notes([precision.note] if precision.note else [])
    with interruptible():
        trainer = make_trainer(prepared, model.load_model(prepared.config, precision), precision)
    trainer.accelerator.wait_for_everyone()
    if not prepared.start.processes.is_first:
        trainer.train_from(resumed)
        return
    unknown: list[Message] = []
    trained = earlier_trainings(prepared.start.loaded.config, resumed, unknown)
    resume.clear_old_run(prepared.start.resume, folder)  # only now, when all that could be wrong was tried
    record.begin_record(prepared, trained, is_known=not unknown)
    try:
        announce(prepared, trainer.model)
        with on_disk_full(folder, trainer.checkpoint_bytes()):
            trainer.train_from(resumed)
            conclude(prepared, trainer)
    except (Exception, KeyboardInterrupt) as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = error.message.to_json() if isinstance(error, UserError) else str(error)
        with contextlib.suppress(OSError):  # the disk may be full
            record.complete_record(folder, status, error=reason)
        raise


def announce(prepared: Prepared, trained: Any) -> None:
    """Says what will be done, and shows a sample as it will be learned."""
    from training.trainer import count_trainable

    config, planned = prepared.config, prepared.plan
    total, learned = prepared.start.model.parameters, count_trainable(trained)
    name = config.model_name_or_path
    named = Message("{model}: {total:,} parameters, {trained:,} trained", model=name, total=total, trained=learned)
    steps = plan.describe_steps(config, planned, prepared.start.processes.count)
    print(Message("model      {model}\ndata       {data}", model=named, data=plan.describe_data(planned)))
    held_out = plan.describe_evaluations(config, planned)
    print(Message("steps      {steps}\nheld out   {held_out}", steps=steps, held_out=held_out))
    print(show_sample(prepared.tokenizer, prepared.data.train[0]))


def conclude(prepared: Prepared, trainer: RunTrainer) -> None:
    """Leaves the best adapter in the run folder, completes run.json and says what came of it."""
    from runs import report

    early, folder = trainer.course.reason, prepared.start.folder
    facts = record.facts_of(trainer, prepared, early)
    at = {"step": facts["steps"], "steps": facts["total_steps"]}
    if trainer.misses_evaluation or (facts["steps"] < facts["total_steps"] and not early):
        record.complete_record(folder, "interrupted", **facts)
        # which deletes nothing, whatever the recipe says
        again = common.command("train.py", folder / "config.yaml", launcher=prepared.start.processes.launcher)
        print("\n", Message("stopped at step {step:,} of {steps:,}; to resume: {command}", command=again, **at), sep="")
        sys.exit(130)
    trainer.save_adapter(prepared.template)
    record.complete_record(folder, "finished", **facts)
    print()
    if early:
        print(Message("stopped at step {step:,} of {steps:,}: {reason}", reason=early, **at))
    print_result(facts, report.write(folder))
    if facts["eval_loss"] is not None:
        print(Message("measure it: {command}", command=common.command("evaluate.py", folder)))
    print_next(folder)


def print_result(facts: dict[str, Any], written: Path) -> None:
    """Says how long the training took, where its loss or reward began and ended, and where the report is."""
    minutes, seconds = divmod(round(facts["seconds"] or time.process_time()), 60)
    finished = Message(
        "{steps:,} of {total_steps:,} steps in {minutes} min {seconds} s, {tokens:,} tokens, peak memory {gb:.1f} GB",
        **{name: facts[name] for name in ("steps", "total_steps", "tokens")},
        **{"minutes": minutes, "seconds": seconds, "gb": facts["peak_memory"] / 1e9},
    )
    rest = {"finished": finished, "report": written}
    is_reward = "last_reward" in facts
    name, *held_out = ("reward", "eval_reward") if is_reward else ("loss", "eval_reward_accuracy", "eval_loss")
    first, last = (math.nan if facts[key] is None else facts[key] for key in (f"first_{name}", f"last_{name}"))
    figures = ", ".join(f"{key} {facts[key]:.4f}" for key in held_out if facts[key] is not None)
    kept = Message(", {figures} (step {step:,})", figures=figures, step=facts["best_step"]) if figures else ""
    course = Message("{first:.3f} at first, {last:.3f} at last{held_out}", first=first, last=last, held_out=kept)
    if is_reward:
        print(Message("finished   {finished}\nreward     {reward}\nreport     {report}", reward=course, **rest))
    else:
        print(Message("finished   {finished}\nloss       {loss}\nreport     {report}", loss=course, **rest))


def predict(folder: Path) -> None:
    """Starts the evaluation, which writes LLaMA-Factory's files of predictions, in this process's place.

    The memory of the training is free then; the evaluation's exit status is that of the whole.
    """
    arguments = [str(folder), "do_predict=true"]
    print("\n", Message("do_predict: {command}", command=common.command("evaluate.py", *arguments)), sep="", flush=True)
    os.execv(sys.executable, [sys.executable, str(common.ROOT / "evaluate.py"), *arguments])


def print_next(folder: Path) -> None:
    print(Message("talk to it: {command}", command=common.command("chat.py", folder)))


if __name__ == "__main__":
    run_command(main, __doc__)
