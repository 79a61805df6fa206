"""One list of checks before a training. `--dry-run` makes all and prints each result; a start ends with what fails.

A check yields its findings; a UserError that it raises is a fault. Cheap checks come first, and what one finds out
(the card, the model's size, the data) is kept in `Run` for the next ones and for the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common import Message, UserError
from runs.embedded_model import make_embedded
from training.check_data import (
    cannot_begin,
    check_batches,
    check_data,
    check_disk,
    check_inputs,
    check_memory,
    check_plan,
    check_rows,
    check_template,
)
from training.check_machine import (
    check_card,
    check_imports,
    check_output,
    check_packages,
    check_processes,
    check_python,
    check_run,
    check_trackers,
)
from training.check_model import check_adapter, check_model, check_parts
from training.check_rewards import check_answers, check_rewards
from training.findings import Check, Finding, Run, fault

LABELS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}

# By the names under which they are printed. The first need nothing heavy.
CHECKS: dict[str, Check] = {
    "python": check_python,
    "processes": check_processes,
    "card": check_card,
    "packages": check_packages,
    "output": check_output,
    "run": check_run,
    "template": check_template,
    "trackers": check_trackers,
    "adapter": check_adapter,
    "model": check_model,
    "parts": check_parts,
    "rewards": check_rewards,
}
CHECKS_WITH_DATA: dict[str, Check] = {
    "batches": check_batches,
    "data": check_data,
    "answers": check_answers,
    "inputs": check_inputs,
    "plan": check_plan,
    "memory": check_memory,
    "disk": check_disk,
}


def dry_run(run: Run) -> int:
    """Makes all checks and prints what they find; returns the exit status, 0 or 2."""
    run.ask_hub = True
    print(Message("will {recipe} run here?", recipe=run.loaded.recipe or Message("the default recipe")))
    faults: list[Message] = []
    for name, check in {**CHECKS, **CHECKS_WITH_DATA, "unsloth": check_imports}.items():
        if check is check_imports and faults:
            continue  # it takes seconds
        for finding in _findings(check, run):
            if finding.message in faults:
                continue
            if finding.level == "fault":
                faults.append(finding.message)
            print(f"  {LABELS[finding.level]}  {name:<10}{finding.message}")
    print(Message("no: {count} fault{count:plural}, see above", count=len(faults)) if faults else Message("yes"))
    return 2 if faults else 0


def _findings(check: Check, run: Run) -> Iterator[Finding]:
    try:
        yield from check(run)
    except UserError as error:
        yield fault(error.message)


def check_before_loading(run: Run) -> list[Message]:
    """Makes the checks that need nothing heavy, and returns what is to be noted.

    Raises UserError with all that is wrong. Nothing more is looked at of a finished run.
    """
    notes, faults = [], []
    for name, check in {**CHECKS, "data": check_rows}.items():
        for finding in _findings(check, run):
            if finding.level == "fault" and finding.message not in faults:
                faults.append(finding.message)
            elif finding.level == "note" and name in ("run", "adapter", "parts"):
                notes.append(finding.message)
        if name == "run" and run.resume.finished and not faults:
            break
    if len(faults) == 1:
        raise UserError.from_message(faults[0])
    if faults:
        raise UserError("{count} faults:\n  {faults:lines}", count=len(faults), faults=faults)
    return notes


def check_with_data(run: Run) -> list[Message]:
    """Tokenizes the data, plans the training, and makes the checks that need that.

    Raises UserError for the first that fails; returns what is to be noted. Too little memory is only noted, unless by
    far: how much is needed is an estimate.
    """
    notes = []
    for name, check in CHECKS_WITH_DATA.items():
        for finding in check(run):
            if finding.level == "fault" and (name != "memory" or cannot_begin(run)):
                raise UserError.from_message(finding.message)
            if finding.level == "fault" or (finding.level == "note" and name in ("batches", "inputs", "memory")):
                notes.append(finding.message)
    return notes


def make_missing_model(run: Run) -> None:
    """Makes the embedded model where it is asked for the first time; the checks let no other missing one pass."""
    if run.model.folder is None:
        make_embedded(Path(run.config.model_name_or_path))
        for finding in check_model(run):
            if finding.level == "fault":
                raise UserError.from_message(finding.message)
