"""What an earlier run has left in its folder, and what a start with the same folder makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Message, UserError
from runs.configuration import Loaded, load_config
from runs.files import read_json
from runs.folder import LOADING_LOG, TRAINED, left_by_training, read_run
from runs.process import is_alive
from runs.target import find_model
from training import checkpoints
from training.findings import Note
from training.plan import TrainingPlan

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate

WITHOUT_EFFECT = {name for name, field in common.OPTIONS.items() if field.metadata["resume"] == "any"}
LONGER_RUN = {name for name, field in common.OPTIONS.items() if field.metadata["resume"] == "longer"}
HASHED_WHOLE = 64 << 20  # bytes up to which a file is hashed whole; of a larger one, BLOCKS of BLOCK bytes
BLOCK, BLOCKS = 1 << 16, 64
TOKENIZER = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"]
# Of run.json: "data", "conversations", "model", "tokenizer" or "template" → name → hash
Inputs = dict[str, dict[str, str]]


@dataclass(frozen=True)
class ResumePlan:
    """Where a training begins, and what is told of that."""

    notes: tuple[Note, ...] = ()
    checkpoint: Path | None = None  # to resume from
    finished: bool = False  # nothing is left to do
    overwrite: bool = False  # what the folder holds of an earlier run is deleted


def plan_resume(loaded: Loaded, folder: Path, processes: int = 1) -> ResumePlan:
    """Looks at what an earlier run has left in `folder`, and changes nothing. `processes` are those that would train.

    A recipe that says overwrite_output_dir (nearly every file of LLaMA-Factory does) means the runs before this one:
    started again after an interruption it is resumed. Only the command line starts an interrupted run over. Raises
    UserError where the folder holds something that is neither to be continued nor to be overwritten.
    """
    config, overwrite = loaded.config, loaded.config.overwrite_output_dir
    named = checkpoints.named_checkpoint(config)
    within = named is not None and named.resolve().is_relative_to(folder.resolve())
    try:
        run, broken = read_run(folder), None
    except UserError as error:
        run, broken = None, error
    refuse_running(folder, run or {})
    left = left_by_run(folder)
    can_resume = run and run["status"] != "finished" and config.resume_from_checkpoint != "false"
    is_typed = "overwrite_output_dir" in loaded.typed
    resumes = within or (can_resume and not is_typed and named is None and checkpoints.all_checkpoints(folder))
    if overwrite and not resumes:
        note = Note("{folder} is started over: what is there is deleted when the training begins", folder=folder)
        return ResumePlan((note,) if left else (), named, overwrite=True)
    if broken:
        raise broken
    if run is None and left and not within:
        raise UserError(
            "{folder} holds {file} but no run.json; choose another output_dir, or overwrite_output_dir=true",
            folder=folder,
            file=left[0].name,
        )
    newest, damaged = named, []
    if run:
        refuse_changed_settings(config, folder, run, within, processes)
        if run["status"] == "finished":
            note = Note("{folder} is finished; to train it again: overwrite_output_dir=true", folder=folder)
            return ResumePlan((note,), finished=True)
        if not named:
            newest, damaged = checkpoints.newest_whole(config, folder)
    notes = list(map(Note.of, damaged))
    if newest and overwrite:
        note = Note(
            "resuming from {checkpoint}; to start over: overwrite_output_dir=true on the command line, without "
            "resume_from_checkpoint",
            checkpoint=newest,
        )
        notes.append(note)
    elif newest:
        notes.append(Note("resuming from {checkpoint}", checkpoint=newest))
    elif run:
        notes.append(Note("{folder} starts at step 0: it has no complete checkpoint", folder=folder))
    return ResumePlan(tuple(notes), newest)


def left_by_run(folder: Path) -> list[Path]:
    """What a run has left in `folder`; nothing where a model failed to load, or a kill came before run.json."""
    left = [path for path in left_by_training(folder) if path.name != LOADING_LOG]
    return [] if {path.name for path in left} in ({TRAINED}, {TRAINED, "config.yaml"}) else left


def refuse_running(folder: Path, run: dict[str, Any]) -> None:
    """Raises UserError where another process of this machine trains in `folder`, as run.json tells."""
    host = run.get("host", socket.gethostname())
    is_here = host == socket.gethostname()  # the processes of other machines are unknown: there the lock decides
    if run.get("status") == "running" and is_here and is_alive(run.get("pid", 0), run.get("created")):
        raise UserError(
            "{folder} is being trained by process {process} on {host}; wait for it, or choose another output_dir",
            folder=folder,
            process=run["pid"],
            host=host,
        )


def refuse_changed_settings(config: Config, folder: Path, run: dict[str, Any], within: bool, processes: int) -> None:
    """Raises UserError where settings that change the result differ from those that the run was begun with."""
    changed = changed_settings(config, folder, run, processes)
    if not changed:
        return
    is_longer = run["status"] == "finished" and {setting.fields["name"] for setting in changed} <= LONGER_RUN
    if is_longer and (newest := checkpoints.newest_whole(config, folder)[0]):
        raise UserError(
            "{folder} is finished ({changed}); with another output_dir, train the adapter further with "
            "adapter_name_or_path={folder}, or resume it with its optimizer: resume_from_checkpoint={checkpoint}",
            folder=folder,
            changed=changed,
            checkpoint=newest,
        )
    raise UserError(
        "{folder} was begun with other settings ({changed}); use those, or another output_dir{over}",
        folder=folder,
        changed=changed,
        over="" if within else Message(", or overwrite_output_dir=true on the command line"),
    )


def changed_settings(config: Config, folder: Path, run: dict[str, Any], processes: int) -> list[Message]:
    """The settings, of those that change the result, which the run in `folder` was begun with at another value."""
    begun = locate_model(load_config([str(folder / "config.yaml")])).config
    then = {name: getattr(begun, name) for name in common.OPTIONS} | {"processes": run.get("processes", 1)}
    now = {name: getattr(config, name) for name in common.OPTIONS} | {"processes": processes}
    kept = WITHOUT_EFFECT - {"temperature"} if config.stage == "grpo" else WITHOUT_EFFECT
    changed = {name for name in now if name not in kept and then[name] != now[name]}
    # more processes with as much less accumulation take the same steps, except for what each draws at random
    samples = [of["gradient_accumulation_steps"] * of["processes"] for of in (then, now)]
    if samples[0] == samples[1] and not config.lora_dropout and not config.neftune_noise_alpha:
        changed -= {"gradient_accumulation_steps", "processes"}
    return [
        Message("{name}={then} then, {now} now", name=name, then=_shown(then[name]), now=_shown(now[name]))
        for name in now
        if name in changed
    ]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_steps_left(resume: ResumePlan, folder: Path, plan: TrainingPlan) -> None:
    """Raises UserError where another run's checkpoint leaves nothing of the plan to train."""
    if resume.checkpoint is None or resume.checkpoint.resolve().is_relative_to(folder.resolve()):
        return
    step = read_json(resume.checkpoint / "trainer_state.json")["global_step"]
    if step >= plan.steps:
        raise UserError(
            "resume_from_checkpoint: {checkpoint} is at step {step} of {steps}; raise num_train_epochs, or start from "
            "its weights with adapter_name_or_path",
            checkpoint=resume.checkpoint,
            step=step,
            steps=plan.steps,
        )


def locate_model(loaded: Loaded) -> Loaded:
    """With the folder of the model in place of another name of it: that is what is read, and recorded."""
    folder = find_model(loaded.config.model_name_or_path)
    if folder is None:
        return loaded
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model_name_or_path=str(folder)))


def clear_old_run(resume: ResumePlan, folder: Path) -> None:
    """Deletes what the new run replaces, and nothing else."""
    if resume.overwrite:
        for path in left_by_training(folder):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    checkpoints.remove_leftovers(folder)


def describe_inputs(model: Path, template: ChatTemplate, data: TrainingData) -> Inputs:
    """The hashes of all that a training is made of besides its settings."""
    files = [item for part in ("datasets", "eval_datasets") for entry in data.report[part] for item in entry["files"]]
    weights = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    tokenizer = [model / name for name in TOKENIZER if (model / name).is_file()]
    return {
        "data": {item["path"]: item.get("sha256") or item["fingerprint"] for item in files},
        "conversations": {"": hashlib.sha256(data.contents.tobytes()).hexdigest()},
        "model": {file.name: hash_file(file) for file in weights},
        "tokenizer": {file.name: hash_file(file) for file in tokenizer},
        "template": {template.name: hashlib.sha256(template.text.encode()).hexdigest()},
    }


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's size and content; of a large file, of evenly spread blocks (hashing 16 GB takes a
    minute, and another training changes all of a model's weights)."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    starts = [0] if size <= HASHED_WHOLE else [n * (size - BLOCK) // (BLOCKS - 1) for n in range(BLOCKS)]
    with open(file, "rb") as opened:
        for start in starts:
            opened.seek(start)
            found.update(opened.read(HASHED_WHOLE if size <= HASHED_WHOLE else BLOCK))
    return found.hexdigest()


def find_changes(then: Inputs, now: Inputs) -> list[Message]:
    """The inputs that differ from those that a run was begun with."""
    changes = []
    for kind in [kind for kind in now if kind != "conversations"]:
        before, after = then.get(kind, {}), now[kind]
        if kind == "data" and sorted(before.values()) == sorted(after.values()):  # a file may have moved
            continue
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        changes += [Message("{kind}: {name} has changed", kind=kind, name=name) for name in differing]
    if not changes and then.get("conversations", {}) != now["conversations"]:  # no file says why they differ
        changes = [Message("the same files give other conversations; has dataset_info.json changed?")]
    return changes
