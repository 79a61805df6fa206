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
from common import Message, UserError
from runs.configuration import check_training_asked_for, load_config, run_command
from runs.disk import explaining_full_disk
from runs.lock import locked
from runs.process import interruptible
from training import preflight, record, resume, trainer
from training.findings import Run
from training.processes import Processes

if TYPE_CHECKING:
    from training.callbacks import EarlyStopping


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(common.help_text(__doc__))
        return
    processes = Processes.of_launcher()
    with processes.one_voice():
        start(arguments, processes)


def start(arguments: list[str], processes: Processes) -> None:
    if processes.is_first:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    loaded = resume.locate_model(load_config([a for a in arguments if a != "--dry-run"]))
    print_notes([*check_training_asked_for(loaded), *loaded.notes])
    run = Run.of(loaded, processes)
    if "--dry-run" in arguments:
        sys.exit(preflight.dry_run(run) if processes.is_first else 0)
    print_notes(preflight.check_before_loading(run))
    if run.resume.finished:
        print_next(run.folder)
        return
    with locked(run.folder) if processes.is_first else contextlib.nullcontext(), processes.connected():
        with processes.in_turn():
            preflight.make_missing_model(run)
        with interruptible():
            trainer.import_unsloth(bool(run.config.quantization_bit))  # takes seconds: told before is what can be
        with processes.in_turn():
            prepare_data(run)
        train(run)
    if run.config.do_predict and processes.is_first:
        predict(run)


def prepare_data(run: Run) -> None:
    """Tokenizes the data and plans the training, all faults of which are told before a model is loaded."""
    from preprocessing.data_report import format_report

    notes = preflight.check_with_data(run)
    print(format_report(run.data.report))
    print_notes(notes)


def train(run: Run) -> None:
    """Loads the model, trains it, and leaves the adapter in the run folder."""
    processes, resumed = run.processes, run.resume.checkpoint
    config = processes.as_one(run.config)
    precision = trainer.choose_precision(config)
    print_notes([precision.note] if precision.note else [])
    with interruptible():
        model = trainer.load_model(config, precision, processes)
        trained, early = trainer.make_trainer(
            config, precision, model, run.tokenizer, run.data, run.plan, run.rewards, run.template.stop, processes
        )
    processes.wait()
    if not processes.is_first:
        trained.train_from(resumed)
        return
    resume.clear_old_run(run.resume, run.folder)  # only now, when all that could be wrong with this run was tried
    record.begin_record(run.loaded, run.folder, run.data, run.inputs, resumed, processes.count)
    try:
        announce(run, trained.model)
        with explaining_full_disk(run.folder, trained.checkpoint_bytes()):
            trained.train_from(resumed)
            conclude(run, trained, early)
    except (Exception, KeyboardInterrupt) as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = error.message.to_json() if isinstance(error, UserError) else str(error)
        with contextlib.suppress(OSError):  # the disk may be full
            record.complete_record(run.folder, status, error=reason)
        raise


def announce(run: Run, model: Any) -> None:
    """Says what will be done, and shows a sample as it will be learned."""
    from preprocessing.data_report import show_sample
    from training import plan
    from training.sft_trainer import count_trainable

    config = run.config
    trainable = count_trainable(model)
    named = Message(
        "{model}: {total:,} parameters, {trained:,} trained",
        model=config.model_name_or_path,
        total=run.model.parameters,
        trained=trainable,
    )
    tokenized = Message(
        "{samples:,} samples, {tokens:,} tokens, the longest {longest:,}",
        samples=run.plan.samples,
        tokens=run.plan.tokens,
        longest=run.plan.longest,
    )
    steps = plan.describe_steps(config, run.plan, run.processes)
    held_out = plan.describe_evaluations(config, run.plan)
    print(
        Message(
            "model      {model}\ndata       {data}\nsteps      {steps}\nheld out   {held_out}",
            model=named,
            data=tokenized,
            steps=steps,
            held_out=held_out,
        )
    )
    for warning in plan.find_warnings(config, run.plan):
        print(Message("warning: {text}", text=warning))
    print(show_sample(run.tokenizer, run.data.train[0]))


def conclude(run: Run, trained: Any, early: EarlyStopping) -> None:
    """Leaves the best adapter in the run folder, completes run.json and says what came of it."""
    from runs import report

    facts, folder = record.facts_of(trained, run, early.reason), run.folder
    if trained.misses_evaluation or (facts["steps"] < facts["total_steps"] and not early.reason):
        record.complete_record(folder, "interrupted", **facts)
        # which deletes nothing, whatever the recipe says
        again = common.command("train.py", folder / "config.yaml", launcher=run.processes.launcher)
        print(
            "\n",
            Message(
                "stopped at step {step:,} of {steps:,}; to go on: {command}",
                step=facts["steps"],
                steps=facts["total_steps"],
                command=again,
            ),
            sep="",
        )
        sys.exit(130)
    trainer.save_adapter(trained, run.template, folder)
    record.complete_record(folder, "finished", **facts)
    written = report.write(folder)
    if early.reason:
        print(
            "\n",
            Message(
                "stopped at step {step:,} of {steps:,}: {reason}",
                step=facts["steps"],
                steps=facts["total_steps"],
                reason=early.reason,
            ),
            sep="",
            end="",
        )
    print_result(facts, written)
    if facts["eval_loss"] is not None:
        print(Message("measure it: {command}", command=common.command("evaluate.py", folder)))
    print_next(folder)


def predict(run: Run) -> None:
    """Starts the evaluation, which writes LLaMA-Factory's files of predictions, in this process's place.

    The memory of the training is free then; the evaluation's exit status is that of the whole.
    """
    arguments = [str(run.folder), "do_predict=true"]
    print("\n", Message("do_predict: {command}", command=common.command("evaluate.py", *arguments)), sep="", flush=True)
    os.execv(sys.executable, [sys.executable, str(common.ROOT / "evaluate.py"), *arguments])


def print_result(facts: dict[str, Any], written: Path) -> None:
    """Says how long the training took, where its loss began and ended, and where the report is."""
    minutes, seconds = divmod(round(facts["seconds"] or time.process_time()), 60)
    finished = Message(
        "{steps:,} of {total:,} steps in {minutes} min {seconds} s, {tokens:,} tokens, peak memory {gb:.1f} GB",
        steps=facts["steps"],
        total=facts["total_steps"],
        minutes=minutes,
        seconds=seconds,
        tokens=facts["tokens"],
        gb=facts["peak_memory"] / 1e9,
    )
    if "last_reward" in facts:
        print(
            "\n",
            Message(
                "finished   {finished}\nreward     {reward}\nreport     {report}",
                finished=finished,
                reward=describe_reward(facts),
                report=written,
            ),
            sep="",
        )
        return
    held_out = ""
    if facts["eval_loss"] is not None:
        held_out = Message(", eval_loss {loss:.4f} (step {step:,})", loss=facts["eval_loss"], step=facts["best_step"])
    if facts["eval_reward_accuracy"] is not None:
        accuracy = facts["eval_reward_accuracy"]
        held_out = Message(
            ", reward accuracy {accuracy:.3f} and eval_loss {loss:.4f} (step {step:,})",
            accuracy=accuracy,
            loss=facts["eval_loss"],
            step=facts["best_step"],
        )
    first, last = facts["first_loss"] or math.nan, facts["last_loss"] or math.nan
    loss = Message("{first:.3f} at first, {last:.3f} at last{held_out}", first=first, last=last, held_out=held_out)
    print(
        "\n",
        Message(
            "finished   {finished}\nloss       {loss}\nreport     {report}",
            finished=finished,
            loss=loss,
            report=written,
        ),
        sep="",
    )


def describe_reward(facts: dict[str, Any]) -> Message:
    """Where the mean reward of the replies began and ended."""
    held_out = ""
    if facts["eval_reward"] is not None:
        held_out = Message(
            ", eval_reward {reward:.4f} (step {step:,})", reward=facts["eval_reward"], step=facts["best_step"]
        )
    first, last = (math.nan if facts[key] is None else facts[key] for key in ("first_reward", "last_reward"))
    return Message("{first:.3f} at first, {last:.3f} at last{held_out}", first=first, last=last, held_out=held_out)


def print_notes(notes: list[Any]) -> None:
    for note in notes:
        print(Message("note: {text}", text=note))


def print_next(folder: Path) -> None:
    print(Message("talk to it: {command}", command=common.command("chat.py", folder)))


if __name__ == "__main__":
    run_command(main)
