"""The run folder: where runs are, how one stands, and what a training leaves there."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common import SAVES, Config, Message, UserError
from runs.configuration import load_config
from runs.files import read_jsonl, read_object, write_json, write_jsonl
from runs.recipe import read_recipe

TRAINED = "trained.npy"  # of a run folder: int64, the fingerprints of the conversations that it was trained on
SAMPLES = "samples.jsonl"  # of a run folder: replies of stage grpo and their rewards, some of each logged step
LOADING_LOG = "loading.log"  # of a run folder: what libraries print while they load the model
# Patterns of all that a training, and what comes after it, leaves in a run folder.
LEFT_BY_TRAINING = (
    *("checkpoint-[0-9]*", ".saving", ".replaced-*", "adapter_*", "tokenizer*", "special_tokens_map.json"),
    *("chat_template.jinja", "trainer_log.jsonl", "training_loss.png", "run.json", "config.yaml", "README.md"),
    *("merged", "gguf", "eval", "report.html", "runs", LOADING_LOG, SAMPLES, TRAINED),
)


def for_transformers_4(folder: Path) -> None:
    """Rewrites in tokenizer_config.json what only transformers 5 can read; it reads the older names as well."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(path, settings)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder, or None where there is none; raises UserError where it is broken."""
    file = folder / "run.json"
    text = "{file} is broken ({problem}); delete it, or train with overwrite_output_dir=true"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(text, file=file, problem=str(error)) from None
    if not isinstance(run, dict) or not isinstance(run.get("status"), str):
        raise UserError(text, file=file, problem="status")
    return run


def run_folders(saves: Path = SAVES) -> list[Path]:
    """All run folders below `saves`, newest first."""
    found = [path.parent for path in saves.rglob("run.json") if not path.parent.name.startswith("checkpoint-")]
    return sorted(found, key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)


def newest_run(saves: Path = SAVES) -> Path:
    """The newest run folder that has an adapter; raises UserError where there is none."""
    for folder in run_folders(saves):
        if (folder / "adapter_config.json").exists():
            return folder
    raise UserError("there is no finished run in {saves}/; train one first: make train", saves=saves)


def is_run(path: Path) -> bool:
    """Whether `path` is a folder that train.py wrote."""
    return (path / "run.json").is_file()


def run_of(path: Path) -> Path | None:
    """The run folder that a run, its checkpoint, its merged model or its GGUF belongs to."""
    file = path / "merge.json"
    record = read_object(file) if file.is_file() else {}
    places = [path, *path.parents][:3] + ([Path(record["run"])] if record.get("run") else [])
    return next((folder for folder in places if is_run(folder)), None)


# ---------------------------------------------------------------------------------------------------------------------
# What a run was trained on

READ_WITH = ("name", "author", "default_system", "stage")  # what the conversations that a row becomes depend on


@dataclass(frozen=True)
class Training:
    """What a run was trained on: the fingerprints of its conversations, as its own settings made them of the rows."""

    config: Config
    contents: set[int]


def trainings_of(run: Path | None, notes: list[Message], passed: frozenset[Path] = frozenset()) -> list[Training]:
    """The training of a run, and before it those that it continued; `notes` says of which that is not known."""
    import numpy as np

    if run is None:
        return []
    config, contents = run_config(run), set()
    if (run / TRAINED).is_file():
        contents = set(np.load(run / TRAINED, allow_pickle=False).tolist())
    else:  # an older run
        notes.append(Message("rows that {adapter} was trained on may be among these", adapter=run))
    before = (read_run(run) or {}).get("trained_before")
    if before is None:  # as in an older run, or with an adapter of another program
        return [Training(config, contents), *earlier_trainings(config, None, notes, passed | {run.resolve()})]
    return [Training(dataclasses.replace(config, **settings), contents) for settings in ({}, *before)]


def earlier_trainings(
    config: Config, resumed: Path | None, notes: list[Message], passed: frozenset[Path] = frozenset()
) -> list[Training]:
    """Those of the runs whose adapter, checkpoint or merged model a training begins with."""
    found: list[Training] = []
    for start in filter(None, (config.adapter_name_or_path, resumed, config.model_name_or_path)):
        run = run_of(Path(start))
        is_known = run and (run / "config.yaml").is_file() and run.resolve() not in passed
        try:
            found += trainings_of(run, notes, passed) if is_known else []
        except UserError:  # of a broken file, or one of a version with other settings
            is_known = False
        if not is_known and (run or start == config.adapter_name_or_path):
            notes.append(Message("rows that {adapter} was trained on may be among these", adapter=start))
    return found


def left_by_training(folder: Path) -> list[Path]:
    """What a training has left in `folder`: all that a new one there would delete."""
    return [path for name in LEFT_BY_TRAINING for path in folder.glob(name)] if folder.is_dir() else []


def run_config(folder: Path) -> Config:
    """The configuration of a run folder."""
    return load_config([str(folder / "config.yaml")]).config


def run_stage(folder: Path) -> str:
    """The stage of a run folder; a dash where its config.yaml is missing."""
    file = folder / "config.yaml"
    return str(read_recipe(file).get("stage", "sft")) if file.exists() else "-"


# ---------------------------------------------------------------------------------------------------------------------
# The log: a line for each logging step and each evaluation

LOG = "trainer_log.jsonl"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill has cut off is left out."""
    return read_jsonl(folder / LOG)


def keep_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites a log with the lines that `keep` accepts (a resumed run logs the others again); returns them."""
    lines = [line for line in read_jsonl(file) if keep(line)]
    write_jsonl(file, lines)
    return lines


def mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """The training loss over all steps of a log: each line's loss stands for the steps since the line before."""
    total, seen = 0.0, 0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["step"] - seen)
            seen = line["step"]
    return total / seen if seen else None


def last_value(lines: list[dict[str, Any]], key: str) -> Any:
    """The newest value of `key` in the log; None where no line has it."""
    return next((line[key] for line in reversed(lines) if key in line), None)


# ---------------------------------------------------------------------------------------------------------------------
# One training at a time

LOCK = ".lock"  # in the run folder, while a process trains there


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder, which is made if needed; raises UserError where another process holds it.

    The lock is the kernel's (flock): a process gives it back however it ends. On NFS the server keeps it, so that it
    holds between machines, too. A file system that knows no locks has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of the training


def _acquire(path: Path) -> IO[str]:
    import fcntl

    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process, _, host = (file.read() or "? ?").partition(" ")  # nothing: it is only now being written
            file.close()
            text = "{folder} is being trained by process {process} on {host}; wait for it, or choose another output_dir"
            raise UserError(text, folder=path.parent, process=process, host=host) from None
        except OSError:  # a file system without locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # the holder before has just deleted the file
