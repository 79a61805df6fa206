"""Runs that are killed, interrupted, damaged or short of disk space: each goes on, bit for bit, or says why not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    GRPO_SETTINGS,
    PROMPTS,
    ROOT,
    SAY,
    SAY_SETTINGS,
    Finished,
    ok,
    refused,
    run,
    says,
    what_was_learned,
    write_jsonl,
)
from safetensors import safe_open
from test_training import read_run

from common import Message
from training.checkpoints import MANIFEST, write_manifest

pytestmark = pytest.mark.slow


def command(model: Path, folder: Path, *more: str) -> list[str]:
    rows = folder.parent / "rows.jsonl"
    if not rows.exists():
        write_jsonl(rows, SAY)
    return ["train.py", f"model_name_or_path={model}", f"dataset={rows}", f"output_dir={folder}", *SAY_SETTINGS, *more]


def train(model: Path, folder: Path, *more: str) -> Finished:
    return run(*command(model, folder, *more), cwd=folder.parent)


def start(model: Path, folder: Path, *more: str, patch: str = "") -> subprocess.Popen[str]:
    """Starts a training in the background; `patch` is Python that is run before `train.main`."""
    words = command(model, folder, *more)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {words!r}\n{patch}\n"
    code += "import common, train; common.run_script(train.main)"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ok(train(tiny_model, folder))
    return folder


def steps_saved(folder: Path) -> list[int]:
    return [int(path.name[11:]) for path in folder.glob("checkpoint-*")]


IN_EVALUATION = """
import time
from training import callbacks
def slow(self, args, state, control, **kwargs):
    if state.global_step == 8:
        open({folder!r} + "/evaluating", "w").close()
        while not self.asked:
            time.sleep(0.01)
        raise callbacks.EvaluationInterrupted
callbacks.Interruption.on_prediction_step = slow
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_evaluation_is_repeated(undisturbed, tiny_model, tmp_path, number):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, patch=IN_EVALUATION.format(folder=str(folder)))
    wait_until((folder / "evaluating").exists, process)
    process.send_signal(number)
    process.communicate(timeout=300)
    if number == signal.SIGTERM:
        assert process.returncode == 130 and max(steps_saved(folder)) == 8
    ok(train(tiny_model, folder))
    assert what_was_learned(folder) == what_was_learned(undisturbed)
    assert read_run(folder)["best_step"] == read_run(undisturbed)["best_step"]


KILL_BEFORE_THE_LAST_SAVE = """
import os
import train
def killed(*given):
    os._exit(9)
conclude = train.conclude
def patched(prepared, trainer):
    trainer.save_adapter = killed
    conclude(prepared, trainer)
train.conclude = patched
"""


def test_a_run_killed_after_its_last_step_trains_no_other_one(undisturbed, tiny_model, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, patch=KILL_BEFORE_THE_LAST_SAVE)
    process.communicate(timeout=300)
    assert process.returncode == 9 and max(steps_saved(folder)) == 14
    ok(train(tiny_model, folder))
    assert what_was_learned(folder) == what_was_learned(undisturbed)
    assert read_run(folder)["steps"] == 14


def test_a_run_killed_after_it_stopped_early_stays_stopped(tiny_model, tmp_path):
    folder = tmp_path / "run"
    more = ["early_stopping=auto", "early_stopping_patience=1", "early_stopping_threshold=10"]
    process = start(tiny_model, folder, *more, patch=KILL_BEFORE_THE_LAST_SAVE)
    process.communicate(timeout=300)
    assert process.returncode == 9 and max(steps_saved(folder)) == 12
    ok(train(tiny_model, folder, *more))
    assert (read_run(folder)["steps"], read_run(folder)["stopped_early"]["sentence"]) == (12, says("no improvement"))


# A kill from outside can come too late: on a busy machine the run has ended by then.
KILL_AFTER_A_CHECKPOINT = """
import os, signal
from training import checkpoints
save = checkpoints.save_whole
def killed(folder, step, write):
    save(folder, step, write)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save_whole = killed
"""


def kill_after_checkpoint(model: Path, folder: Path, step: int, *more: str) -> None:
    process = start(model, folder, *more, patch=KILL_AFTER_A_CHECKPOINT.format(step=step))
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err
    assert max(steps_saved(folder)) == step


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(undisturbed, tiny_model, tmp_path):
    folder = tmp_path / "run"
    kill_after_checkpoint(tiny_model, folder, 9, "save_total_limit=5")
    with open(folder / "checkpoint-9" / "adapter_model.safetensors", "r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    result = ok(train(tiny_model, folder))
    damage = Message("the content of {file} has changed", file="adapter_model.safetensors")
    told = Message("{checkpoint} is damaged ({damage}) and not used", checkpoint=folder / "checkpoint-9", damage=damage)
    assert str(told) in result.stdout
    assert what_was_learned(folder) == what_was_learned(undisturbed)


PAIRS = [
    {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"No, I do not say {row['output']}"}
    for row in SAY
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (["stage=dpo"], PAIRS),
        (["stage=kto"], JUDGED),
        (GRPO_SETTINGS, PROMPTS),
        (["quantization_bit=4"], SAY),
    ],
)
def test_other_stages_and_quantized_bases_go_on_after_a_kill(
    tiny_model, tmp_path, settings: list[str], rows: list[dict]
):
    """From the checkpoint of step 9, in the middle of what a logged line is the mean of; step 10 was logged already."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    ok(train(tiny_model, undisturbed, *settings))
    kill_after_checkpoint(tiny_model, folder, 12, *settings, "save_total_limit=9")
    shutil.rmtree(folder / "checkpoint-12")
    ok(train(tiny_model, folder, *settings))
    assert what_was_learned(folder) == what_was_learned(undisturbed)
    kept = [read_run(run_folder) for run_folder in (folder, undisturbed)]
    assert kept[0]["best_step"] == kept[1]["best_step"]
    measured = {"stage=dpo": "eval_reward_accuracy", "stage=kto": "eval_reward_accuracy", "stage=grpo": "eval_reward"}
    measured = measured.get(settings[0], "eval_loss")
    assert kept[0][measured] == kept[1][measured] is not None
    if settings is not GRPO_SETTINGS:  # whose replies of a prompt may all have the same reward
        assert all(line["grad_norm"] > 0 for line in what_was_learned(folder)[1] if line["loss"] is not None)
    with safe_open(folder / "adapter_model.safetensors", "pt") as adapter:
        assert {adapter.get_slice(name).get_dtype() for name in adapter.keys()} == {"F32"}  # noqa: SIM118


def test_other_data_under_the_same_folder_is_refused_or_accepted_knowingly(tiny_model, tmp_path):
    folder = tmp_path / "run"
    kill_after_checkpoint(tiny_model, folder, 4)
    write_jsonl(tmp_path / "rows.jsonl", [*SAY[:-1], {**SAY[-1], "output": "twelve?"}])
    before = read_run(folder)["inputs"]
    result = train(tiny_model, folder)
    refused(result, "begun with other inputs")
    (change,) = result.error.fields["changes"]
    assert (change.sentence, change.fields["name"]) == (says("has changed"), str(tmp_path / "rows.jsonl"))
    checkpoint = result.error.fields["checkpoint"]
    ok(train(tiny_model, folder, f"resume_from_checkpoint={checkpoint}"))
    assert read_run(folder)["earlier_inputs"] == [before] and read_run(folder)["inputs"] != before


class Code:
    """What an attacker puts into a checkpoint: unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_brings_code_is_refused_and_runs_none(tiny_model, tmp_path, name: str):
    import torch

    folder, ran = tmp_path / "run", tmp_path / "ran"
    kill_after_checkpoint(tiny_model, folder, 6)
    torch.save({"state": Code(ran)}, folder / "checkpoint-6" / name)
    (folder / "checkpoint-6" / MANIFEST).unlink()  # whoever made the checkpoint made its manifest, too
    write_manifest(folder / "checkpoint-6")
    refused(train(tiny_model, folder), "hold code")
    assert not ran.exists()


NAN_GRADIENT = """
from training import stages
def poison(made):
    def hook(gradient):
        return gradient * float("nan") if made.state.global_step == 5 else gradient
    next(p for p in made.model.parameters() if p.requires_grad).register_hook(hook)
make = stages.make_trainer
def patched(*given):
    made = make(*given)
    poison(made)
    return made
stages.make_trainer = patched
"""


@pytest.mark.parametrize("more", [(), ("max_grad_norm=0",)])
def test_a_gradient_that_is_no_number_ends_the_run_and_reaches_no_adapter(tiny_model, tmp_path, more):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, *more, patch=NAN_GRADIENT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert read_run(folder)["error"]["sentence"] == says("a tenth of learning_rate")
    assert read_run(folder)["error"]["fields"] == {"what": "gradient", "value": "nan", "step": 6}
    assert not (folder / "adapter_model.safetensors").exists()
    assert steps_saved(folder) and max(steps_saved(folder)) < 6


# Unsloth catches an interruption with a bare `except:` in many places.
CAUGHT_WHILE_LOADING = """
import time
from training import model
load = model.load_model
def patched(*given):
    try:
        print("loading", flush=True)
        time.sleep(100)
    except:
        pass
    time.sleep(100)
    return load(*given)
model.load_model = patched
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_acts_at_once(tiny_model, tmp_path, number):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, patch=CAUGHT_WHILE_LOADING)
    while process.stdout.readline() != "loading\n":
        assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert time.monotonic() - sent < 50  # long before the loading goes on by itself
    assert not folder.exists()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 40 MB; skipped where this user may mount none."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_space_for_the_checkpoints_of_the_whole_run_is_checked_before_the_start(tiny_model, small_disk):
    result = train(tiny_model, small_disk / "run")
    refused(result, "free some, or set another output_dir")
    estimate = result.error.fields["estimate"].fields
    assert estimate["free"] < 0.05 < estimate["checkpoints"]
    assert not (small_disk / "run").exists()


FILL_THE_DISK = """
import errno
from training import checkpoints
write = checkpoints.write_manifest
def full(checkpoint):
    if checkpoint.name == "checkpoint-6":
        raise OSError(errno.ENOSPC, "No space left on device")
    write(checkpoint)
checkpoints.write_manifest = full
"""


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_space(undisturbed, tiny_model, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, patch=FILL_THE_DISK)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert read_run(folder)["error"]["sentence"] == says("of free disk") and 4 in steps_saved(folder)
    ok(train(tiny_model, folder))
    assert what_was_learned(folder) == what_was_learned(undisturbed)


HOLD_THE_FOLDER = """
import time
from training import model
def hold():
    print("holding", flush=True)
    time.sleep(300)
model.import_unsloth = hold
"""


def test_a_second_training_in_the_same_folder_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, folder, patch=HOLD_THE_FOLDER)
    while process.stdout.readline() != "holding\n":
        assert process.poll() is None
    result = train(tiny_model, folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    refused(result, "being trained")
    assert result.error.fields["process"] == str(process.pid)
