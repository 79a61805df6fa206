"""Checkpoints: written whole with a manifest, checked against it, found, and deleted when newer ones are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common import Config, Message, UserError
from runs.files import read_json, sha256, write_json

MANIFEST = "manifest.json"  # {"files": {name: {"bytes": ..., "sha256": ...}}}, written last
BESIDE = ".saving"  # the folder in the run folder in which a checkpoint is written, and deleted
REPLACED = ".replaced-"  # before the name of a checkpoint whose successor of the same step is about to appear
UNUSED = ("training_args.bin", "README.md")  # a pickle that nothing reads, and PEFT's empty form


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run by their steps, whole or not."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()), key=step_of)


def save_whole(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Lets `write(beside)` write beside/checkpoint-STEP, then moves it to `folder`; returns where it is.

    It appears with all files on the disk and its manifest, or not at all. A checkpoint of the same step is replaced
    only then.
    """
    beside, name = folder / BESIDE, f"checkpoint-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    write(beside)
    written, place = beside / name, folder / name
    for unused in UNUSED:
        (written / unused).unlink(missing_ok=True)
    write_manifest(written)
    old = folder / f"{REPLACED}{name}"
    if place.exists():
        os.replace(place, old)
    os.replace(written, place)
    _sync(folder)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(beside)
    return place


def write_manifest(checkpoint: Path) -> None:
    """Flushes all files to the disk and writes their sizes and hashes."""
    files = {}
    for file in sorted(checkpoint.iterdir()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(checkpoint / MANIFEST, {"files": files})
    _sync(checkpoint)


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_old(folder: Path, limit: int | None, saved: list[int], best: int | None) -> None:
    """Deletes checkpoints until `limit` are left (None: none), never the newest or the best, nor one in which another
    command has made something, or is about to (`python merge.py RUN/checkpoint-8`, while the run trains).

    `saved` are the steps saved since the training began or went on, the newest last. Older checkpoints of later steps,
    which a run leaves that goes on from an earlier one, are deleted in any case.
    """
    found = {step_of(path): path for path in all_checkpoints(folder)}
    newest = saved[-1]
    for step in [step for step in found if step > newest]:
        delete(found.pop(step))
    used = {step for step, path in found.items() if any(file.is_dir() for file in path.iterdir())}
    protected = {newest, best, *used} & found.keys()
    for step in sorted(found):
        if limit is None or len(found) <= max(limit, len(protected)):
            return
        if step not in protected:
            delete(found.pop(step))


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint; one that a kill has left in part would look whole where its manifest went first."""
    beside = checkpoint.parent / BESIDE
    beside.mkdir(exist_ok=True)
    os.replace(checkpoint, beside / checkpoint.name)
    shutil.rmtree(beside)


def remove_leftovers(folder: Path) -> None:
    """Completes or removes what a kill has left of the writing of a checkpoint."""
    shutil.rmtree(folder / BESIDE, ignore_errors=True)
    for old in folder.glob(f"{REPLACED}checkpoint-*"):
        place = folder / old.name.removeprefix(REPLACED)
        if place.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, place)


def find_damage(checkpoint: Path) -> Message | None:
    """What of a checkpoint differs from its manifest, the first difference found; None: it is whole.

    One without a manifest, of an older version of the kit or of another program, is taken for whole where it has a
    trainer_state.json that can be read.
    """
    has_manifest = (checkpoint / MANIFEST).exists()
    file = checkpoint / (MANIFEST if has_manifest else "trainer_state.json")
    try:
        content = read_json(file)
        if not has_manifest:
            return None
        files = content["files"]
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return Message("{file} cannot be read", file=file.name)
    for name, (expected, _) in recorded.items():
        file = checkpoint / name
        if not file.is_file():
            return Message("{file} is missing", file=name)
        if (size := file.stat().st_size) != expected:
            return Message("{file} has {size:,} bytes, not {expected:,}", file=name, size=size, expected=expected)
    for name, (_, digest) in recorded.items():
        if sha256(checkpoint / name) != digest:
            return Message("the content of {file} has changed", file=name)
    return None


def newest_whole(config: Config, folder: Path) -> tuple[Path | None, list[Message]]:
    """The newest checkpoint that is whole, and the damaged ones after it; None where none is, or none is wanted."""
    damaged: list[Message] = []
    if config.resume_from_checkpoint == "false":
        return None, damaged
    for checkpoint in reversed(all_checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, damaged
        damaged.append(Message("{checkpoint} is damaged ({damage}) and not used", checkpoint=checkpoint, damage=damage))
    return None, damaged


def named_checkpoint(config: Config) -> Path | None:
    """The checkpoint that the configuration names; raises UserError where it is none, or damaged."""
    wanted = config.resume_from_checkpoint
    if wanted in (None, "true", "false"):
        return None
    checkpoint = Path(wanted).expanduser()
    if not (checkpoint / "trainer_state.json").exists():
        raise UserError(
            "resume_from_checkpoint: {path} is not a checkpoint; name a checkpoint-N folder of a run", path=wanted
        )
    if damage := find_damage(checkpoint):
        raise UserError(
            "resume_from_checkpoint: {path} is damaged ({damage}); name another checkpoint", path=wanted, damage=damage
        )
    return checkpoint
