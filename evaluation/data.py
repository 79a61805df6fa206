"""Which rows a model is evaluated on: data that was asked for or held out, without the rows that it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import common
from common import Config, Message, UserError
from evaluation.tasks import (
    Answers,
    Classification,
    Conversation,
    Documents,
    EvalDataset,
    Judged,
    Pairs,
    Rewarded,
    Task,
    Texts,
    answer_of,
)
from preprocessing import dataset
from preprocessing.rows import fingerprint
from runs.configuration import asks_for_training
from runs.files import read_json, sha256
from runs.folder import READ_WITH, Training, read_run, run_config, trainings_of

STAGES = ("sft", "dpo", "kto")
GENERAL = "general_test"  # of data/: shows whether the model has forgotten general knowledge
MAX_LABELS, MAX_LABEL_LENGTH = 20, 32  # of a closed set: answers, and characters of one
POSITIVE = {"yes", "y", "true", "t", "positive", "是", "对", "真", "有", "阳性"}  # of two labels, in lower case


def find_datasets(
    config: Config, run: Path | None, given: set[str], target: Path, notes: list[Message]
) -> list[EvalDataset]:
    """The data that was asked for, or what the run held out, or the test sets registered for its datasets.

    `given` are the names of the settings that were asked for. Adds to `notes`. Raises UserError where nothing is left.
    """
    check_labels(config.labels)
    own = run_config(run) if run else None
    names = config.eval_dataset if "eval_dataset" in given else config.dataset if "dataset" in given else ()
    if not names and own is None:
        raise UserError("{target} is not a run, which would have held data out; name some: dataset=NAME", target=target)
    names, held_out = names or own.eval_dataset, None
    if own is None and config.val_size:  # LLaMA-Factory evaluates the part that this recipe's training would hold out
        held_out = set(map(fingerprint, dataset.read_conversations(config)[1]))
    elif not names and (held_out := held_out_by(run, own)):
        config, names = own, own.dataset
    elif not names:
        names, held_out = registered_test_sets(own), None
        notes.append(Message("{run} held nothing out; evaluated on {datasets} instead", run=run, datasets=list(names)))
    trainings = trainings_of(run, notes)
    home = (run or common.SAVES / target.name) / "eval"
    folders = result_folders(home, names).items()
    made = (make_dataset(config, name, folder, trainings, notes, held_out) for name, folder in folders)
    found = [data for data in made if data]
    answered = [data for data in found if isinstance(data.task, Classification | Texts)]
    if config.labels and answered and all(data.task.labels != config.labels for data in answered):
        answer = unknown_label(config.labels, [answer_of(row) for row in answered[0].rows])
        raise UserError("{dataset}: the answer '{answer}' is not in labels", dataset=answered[0].name, answer=answer)
    if any(data.name == GENERAL for data in found):
        return found
    return [*found, *general_knowledge(config, trainings, home)]


def result_folders(home: Path, names: Sequence[str]) -> dict[str, Path]:
    """The folder of each dataset: its name, or its file's; with a hash of its path where another dataset has it."""
    found: dict[str, Path] = {}
    for name in names:
        folder = home / (Path(os.path.abspath(name)).stem or "data")  # of "..", too, it lies in `home`
        if name != GENERAL and folder in {home / GENERAL, *found.values()}:
            folder = folder.with_name(f"{folder.name}-{hashlib.sha256(name.encode()).hexdigest()[:6]}")
        found[name] = folder
    return found


def make_dataset(
    config: Config,
    name: str,
    folder: Path,
    trainings: list[Training],
    notes: list[Message],
    held_out: set[int] | None = None,
) -> EvalDataset | None:
    """The rows that were not trained on, and the closed set of their answers, if there is one.

    `held_out` are fingerprints: only these rows are meant. None where a dataset has none of them.
    """
    rows = read_rows(config, name)
    wanted = [held_out is None or fingerprint(row) in held_out for row in rows]
    kept = [row for row, *facts in zip(rows, wanted, unseen(config, name, rows, trainings), strict=True) if all(facts)]
    if not any(wanted):
        return None
    if not kept:
        raise UserError("the model was trained on every row of {dataset}; name other data: dataset=NAME", dataset=name)
    return EvalDataset(name, kept, folder, task_of(config, name, kept, trainings, notes), sum(wanted) - len(kept))


def task_of(
    config: Config, name: str, rows: list[Conversation], trainings: list[Training], notes: list[Message]
) -> Task:
    """What is measured of these rows: a choice where their answers are a closed set."""
    others = {"text": Documents(), "chosen": Pairs(), "good": Judged(), "columns": Rewarded(config)}
    if task := next((task for key, task in others.items() if key in rows[0]), None):
        return task
    predicts = config.do_predict or config.predict_with_generate
    if config.do_eval and not predicts and not asks_for_training(config):  # LLaMA-Factory's do_eval: only the loss
        return Answers()
    answers, trained = [answer_of(row) for row in rows], trained_answers(name, trainings)
    unknown = unknown_label(config.labels, answers) if config.labels else None
    if unknown is not None:
        text = "labels do not fit {dataset}, which has the answer '{answer}'"
        notes.append(Message(text, dataset=name, answer=unknown))
    fit = config.labels and unknown is None
    if chosen := config.labels if fit else closed_set(answers, trained):
        return Classification(tuple(chosen), trained)
    if exceptions := exceptional_answers([*answers, *trained]):
        text = "{dataset}: but for the answer '{answer}' this would be a classification; correct or remove its row"
        notes.append(Message(text, dataset=name, answer=exceptions[0]))
    return Texts()


def general_knowledge(config: Config, trainings: list[Training], home: Path) -> list[EvalDataset]:
    """The kit's small general-knowledge set: what becomes less likely there was forgotten. None if all was trained."""
    settings = {"dataset_dir": str(common.ROOT / "data"), "default_system": None, "max_samples": None, "stage": "sft"}
    kit = dataclasses.replace(config, **settings)
    rows = read_rows(kit, GENERAL)
    kept = [row for row, new in zip(rows, unseen(kit, GENERAL, rows, trainings), strict=True) if new]
    return [EvalDataset(GENERAL, kept, home / GENERAL, Answers())] if kept else []


def read_rows(config: Config, name: str) -> list[Conversation]:
    """All conversations of one dataset."""
    stages = dict.fromkeys((config.stage, *STAGES))  # pairs may be evaluated with a run of another stage
    alone = {"dataset": (name,), "eval_dataset": (), "val_size": 0.0, "interleave_probs": (), "mix_strategy": "concat"}
    first: UserError | None = None
    for stage in stages:
        try:
            return dataset.read_conversations(dataclasses.replace(config, stage=stage, **alone))[0]
        except UserError as error:
            first = first or error
    raise first


# ---------------------------------------------------------------------------------------------------------------------
# What the model was trained on


def held_out_by(run: Path, config: Config) -> set[int]:
    """The fingerprints of what a run held out; raises UserError where that is no longer known."""
    _, held_out = dataset.read_conversations(config)
    recorded = (read_run(run) or {}).get("data", {}).get("datasets", []) if held_out else []
    for file in (file for entry in recorded for file in entry["files"] if "sha256" in file):
        if not Path(file["path"]).is_file() or sha256(Path(file["path"])) != file["sha256"]:
            raise UserError(
                "{file} has changed since the training of {run}: its held-out rows are not known; name other data: "
                "dataset=NAME",
                file=file["path"],
                run=run,
            )
    return set(map(fingerprint, held_out))


def registered_test_sets(config: Config) -> tuple[str, ...]:
    """NAME_test of each dataset NAME, where dataset_info.json has it. Raises UserError where there is none."""
    known = read_json(Path(config.dataset_dir) / "dataset_info.json", default={})
    found = tuple(f"{name}_test" for name in config.dataset if f"{name}_test" in known)
    if not found:
        raise UserError("the run held nothing out; name data: dataset=NAME, or train with val_size: 0.1")
    return found


def trained_answers(name: str, trainings: list[Training]) -> tuple[str, ...]:
    """The answers that the newest training saw in a dataset, or in the one whose test set it is, if it can be read."""
    if not trainings:
        return ()
    newest = trainings[0]
    own = next((other for other in newest.config.dataset if other in (name, name.removesuffix("_test"))), None)
    with suppress(UserError):  # a file that is gone
        rows = read_rows(newest.config, own) if own else []
        return tuple(answer_of(row) for row in rows if fingerprint(row) in newest.contents)
    return ()


def unseen(config: Config, name: str, rows: list[Conversation], trainings: list[Training]) -> list[bool]:
    """Which rows of a dataset no training saw, as that training's name, author and system message made them."""
    fresh = [True] * len(rows)
    for training in trainings:
        same_rows = {config.stage, training.config.stage} == {"sft", "grpo"}  # read as conversations or prompts
        names = [name for name in READ_WITH if name != "stage" or same_rows]
        as_trained = dataclasses.replace(config, **{key: getattr(training.config, key) for key in names})
        rendered = rows if as_trained == config else read_rows(as_trained, name)
        if len(rendered) != len(rows):  # rows that are faulty in one of the two readings were skipped
            continue
        fresh = [new and fingerprint(row) not in training.contents for new, row in zip(fresh, rendered, strict=True)]
    return fresh


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are a closed set, so that choosing among them is what is measured


def check_labels(labels: Sequence[str]) -> None:
    """Raises UserError for given labels among which there is nothing to choose."""
    if repeated := next((label for label, count in Counter(labels).items() if count > 1), None):
        raise UserError("labels: {label} is given twice; give each answer once", label=repeated)
    if len(labels) == 1:
        raise UserError("labels: {label} alone leaves no choice; give every answer", label=labels[0])


def unknown_label(labels: Sequence[str], answers: Sequence[str]) -> str | None:
    """The first answer that is not among the labels."""
    return next((text for text in answers if text not in labels), None)


def closed_set(answers: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """The labels in order, if the answers (and those trained on) are few, short, and repeated; else an empty tuple."""
    counts = Counter([*answers, *trained])
    repeated = min(counts.values()) >= 2 and sum(counts.values()) >= 5 * len(counts)
    if not (all(map(_is_short, counts)) and repeated and 2 <= len(counts) <= MAX_LABELS):
        return ()
    return _in_order(counts)


def _is_short(text: str) -> bool:
    return 0 < len(text) <= MAX_LABEL_LENGTH and "\n" not in text


def _in_order(counts: Counter[str]) -> tuple[str, ...]:
    """Labels by their number, then by their characters; of two, the positive one last.

    That is the higher number, or the one that means yes; of other words the rarer one, as one looks for what is rare.
    """
    numbers = {text: float(text) for text in counts if re.fullmatch(r"[+-]?\d+(\.\d+)?", text)}
    labels = sorted(counts, key=lambda text: (numbers.get(text, 0.0), text))
    if len(labels) == 2 and len(numbers) < 2:
        labels.sort(key=lambda text: (text.casefold() in POSITIVE, -counts[text]))
    return tuple(labels)


def exceptional_answers(answers: Sequence[str]) -> list[str]:
    """The few answers, at most one in twenty, without which the others would be a closed set."""
    counts = Counter(answers)
    exceptions = {text for text in counts if counts[text] < 2 or not _is_short(text)}
    rest = [text for text in answers if text not in exceptions]
    few = 0 < len(answers) - len(rest) <= max(1, len(answers) // 20)
    return [text for text in counts if text in exceptions] if few and rest and closed_set(rest, []) else []
