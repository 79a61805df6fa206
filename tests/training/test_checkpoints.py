"""Checkpoints: whole or not there, damage recognised, the only good one never deleted; one training a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, user_error

from common import Message
from runs.configuration import load_config
from runs.files import write_json
from runs.folder import locked
from training import checkpoints, resume


def make_checkpoint(folder: Path, step: int) -> Path:
    """A checkpoint of small files, written as the trainer writes it."""

    def write(beside: Path) -> None:
        made = beside / f"checkpoint-{step}"
        made.mkdir(parents=True)
        (made / "adapter_model.safetensors").write_bytes(bytes(range(200)))
        (made / "optimizer.pt").write_bytes(b"moments" * 40)
        (made / "training_args.bin").write_bytes(b"pickle")
        write_json(made / "trainer_state.json", {"global_step": step})

    return checkpoints.save_whole(folder, step, write)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (4, 8):
        make_checkpoint(folder, step)
    return folder


CONFIG = load_config([]).config


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[77] ^= 1
    file.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 100)


def empty(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("")


def delete(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


def break_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (flip_a_byte, Message("the content of {file} has changed", file="adapter_model.safetensors")),
        (truncate, Message("{file} has {size:,} bytes, not {expected:,}", file="optimizer.pt", size=100, expected=280)),
        (empty, Message("{file} has {size:,} bytes, not {expected:,}", file="trainer_state.json", size=0, expected=23)),
        (delete, Message("{file} is missing", file="optimizer.pt")),
        (break_manifest, Message("{file} cannot be read", file="manifest.json")),
    ],
)
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(run, damage, found):
    assert checkpoints.newest_whole(CONFIG, run) == (run / "checkpoint-8", [])
    damage(run / "checkpoint-8")
    told = Message("{checkpoint} is damaged ({damage}) and not used", checkpoint=run / "checkpoint-8", damage=found)
    assert checkpoints.newest_whole(CONFIG, run) == (run / "checkpoint-4", [told])
    named = load_config([f"resume_from_checkpoint={run / 'checkpoint-8'}"]).config
    with user_error("name another checkpoint"):
        checkpoints.named_checkpoint(named)


def test_a_checkpoint_has_a_manifest_of_all_its_files_and_no_pickle(run):
    files = json.loads((run / "checkpoint-4" / "manifest.json").read_text())["files"]
    names = {path.name for path in (run / "checkpoint-4").iterdir()}
    assert names == {*files, "manifest.json"} and "training_args.bin" not in names


def test_a_checkpoint_without_a_manifest_is_of_an_older_version(run):
    (run / "checkpoint-8" / "manifest.json").unlink()
    assert checkpoints.newest_whole(CONFIG, run) == (run / "checkpoint-8", [])
    (run / "checkpoint-8" / "trainer_state.json").write_text("")
    assert checkpoints.newest_whole(CONFIG, run)[0] == run / "checkpoint-4"


def test_a_write_that_fails_leaves_the_earlier_checkpoint_of_the_same_step(run):
    before = (run / "checkpoint-8" / "optimizer.pt").read_bytes()

    def write(beside: Path) -> None:
        (beside / "checkpoint-8").mkdir(parents=True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_whole(run, 8, write)
    assert (run / "checkpoint-8" / "optimizer.pt").read_bytes() == before
    checkpoints.remove_leftovers(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-8"]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_part_of_it(run, monkeypatch):
    def killed(folder, **_):
        for name in ("manifest.json", "optimizer.pt"):
            next(Path(folder).rglob(name)).unlink()
        raise KeyboardInterrupt

    make_checkpoint(run, 12)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoints.shutil, "rmtree", killed)
        checkpoints.delete_old(run, 2, [12], None)
    assert [path.name for path in checkpoints.all_checkpoints(run)] == ["checkpoint-8", "checkpoint-12"]
    assert [checkpoints.find_damage(path) for path in checkpoints.all_checkpoints(run)] == [None, None]
    checkpoints.remove_leftovers(run)
    assert not (run / ".saving").exists()


def test_a_kill_between_two_renames_loses_no_checkpoint(run):
    (run / "checkpoint-8").rename(run / ".replaced-checkpoint-8")
    checkpoints.remove_leftovers(run)
    assert checkpoints.newest_whole(CONFIG, run) == (run / "checkpoint-8", [])
    shutil.copytree(run / "checkpoint-8", run / ".replaced-checkpoint-8")
    checkpoints.remove_leftovers(run)
    assert not (run / ".replaced-checkpoint-8").exists()


def kept(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.all_checkpoints(folder)]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, [8]), (1, 4, [4, 8]), (2, 2, [2, 8]), (3, None, [4, 6, 8]), (None, 2, [2, 4, 6, 8])],
)
def test_the_newest_and_the_best_checkpoint_are_kept(run, limit, best, left):
    for step in (2, 6):
        make_checkpoint(run, step)
    checkpoints.delete_old(run, limit, [2, 4, 6, 8], best)
    assert kept(run) == left


def test_a_checkpoint_that_was_merged_while_the_run_went_on_is_kept(run):
    for step in (2, 6):
        make_checkpoint(run, step)
    (run / "checkpoint-2" / "merged").mkdir()
    checkpoints.delete_old(run, 1, [2, 4, 6, 8], None)
    assert kept(run) == [2, 8]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_its_new_ones(run):
    """Checkpoint 8 is damaged, and the run goes on from 4: the next one, 6, must not be deleted for the sake of 8."""
    flip_a_byte(run / "checkpoint-8")
    assert kept(run) == [4, 8]  # nothing is deleted before a new one is there
    make_checkpoint(run, 6)
    checkpoints.delete_old(run, 1, [6], None)
    assert kept(run) == [6]


HOLDER = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs.folder import locked
with locked(Path(sys.argv[2])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_as_long_as_its_holder_lives(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ROOT), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    with user_error("being trained", folder=str(folder), process=str(holder.pid)), locked(folder):
        pass
    holder.kill()  # which leaves the file
    holder.wait()
    assert (folder / ".lock").exists()
    (folder / "mine").touch()
    with locked(folder):
        assert (folder / ".lock").read_text().split()[0] == str(os.getpid())
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_training_of_which_nothing_came_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="x"), locked(tmp_path / "run"):
        raise ValueError("x")
    assert not (tmp_path / "run").exists()


CHANGED = "{kind}: {name} has changed"


def test_changed_inputs_are_named(tmp_path):
    from types import SimpleNamespace

    def described(content: str, template: str, order: list[int]) -> dict:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
        files = [{"path": "a.json", "bytes": 3, "sha256": content * 20}]
        report = {"datasets": [{"files": files}], "eval_datasets": []}
        data = SimpleNamespace(report=report, contents=np.array(order))
        return resume.describe_inputs(tmp_path, SimpleNamespace(name="llama3", text=template), data)

    then = described("{}", "old", [1, 2])
    assert resume.find_changes(then, described("{}", "old", [1, 2])) == []
    found = {
        (m.sentence, m.fields.get("kind"), m.fields.get("name"))
        for m in resume.find_changes(then, described("[]", "new", [3]))
    }
    assert found == {
        (CHANGED, "data", "a.json"), (CHANGED, "model", "config.json"),
        (CHANGED, "template", "llama3"),
    }  # fmt: skip
    (only,) = resume.find_changes(then, described("{}", "old", [3]))
    assert only == Message("the same files give other conversations; has dataset_info.json changed?")
    moved = then | {"data": {"elsewhere/a.json": "{}" * 20}}
    assert resume.find_changes(then, moved) == []


def test_other_weights_of_the_same_size_have_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "HASHED_WHOLE", 1000)
    file = tmp_path / "weights"
    prints = set()
    for value in (0, 1):
        file.write_bytes(bytes([value]) * 9_000_000)
        prints.add(resume.hash_file(file))
    assert len(prints) == 2
