"""Commands that are killed, or whose disk is filled, at random moments and started again. Nothing that looks whole may
be broken, and the last start must end with what an undisturbed one made, bit for bit.

The commands run in forks of this process, which has imported what they need: a kill then costs a second, not the ten
that the imports take.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import (
    GRPO_SETTINGS,
    PROMPTS,
    SAY,
    SAY_SETTINGS,
    WORDS,
    make_run,
    save_random_model,
    what_was_learned,
    write_jsonl,
)
from fuzz import Tally
from tqdm import tqdm

import common
from runs.configuration import run_command

SECONDS = 300  # the longest that an undisturbed command may take


@dataclass
class Victim:
    """A command to kill: what it is called with, what must hold after a kill, and what it makes in the end."""

    name: str
    main: Callable[[list[str]], None]
    arguments: Callable[[Path], list[str]]  # of a folder to work in
    prepare: Callable[[Path], None]
    check: Callable[[Path], None]  # raises AssertionError where something looks whole and is not
    result: Callable[[Path], Any]


def log_of(folder: Path) -> Path:
    """Where a command in `folder` prints to: not on the disk that is filled."""
    return folder.parent.parent / f"{folder.name}.log"


def start(victim: Victim, folder: Path) -> int:
    """Forks a process that runs the command in `folder`; returns its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        common.CACHE = folder / "cache"  # of its own: what it holds is made, and killed, anew
        tqdm.set_lock(threading.RLock())  # tqdm's own is one for all forks, and a killed one may hold it for good
        log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [f"{victim.name}.py", *victim.arguments(folder)]
        run_command(victim.main, "")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def finish(victim: Victim, folder: Path, process: int | None = None, allowed: tuple[int, ...] = (0,)) -> float:
    """Waits until the command has ended, in one of the `allowed` ways; returns how long it took, in seconds."""
    started = time.monotonic()
    process = process or start(victim, folder)
    while time.monotonic() - started < SECONDS:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            said, code = log_of(folder).read_text(errors="replace"), os.waitstatus_to_exitcode(status)
            assert code in allowed and "Traceback" not in said, f"{victim.name} ended with {code}: {said[-800:]}"
            return time.monotonic() - started
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"{victim.name} hangs")


Disturb = Callable[[Victim, Path, int], None]  # what happens to a process that runs the command in a folder


def kill(_: Victim, __: Path, process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def fill_disk(victim: Victim, folder: Path, process: int) -> None:
    """Takes all space of the folder's disk until the command has ended, which it must do with a sentence."""
    file, size, step = folder.parent / "filler", 0, 1 << 26
    with open(file, "wb") as filler:
        while step >= 4096:
            try:
                os.posix_fallocate(filler.fileno(), size, step)
                size += step
            except OSError:
                step //= 2
    try:
        finish(victim, folder, process, (0, 2))
    finally:
        file.unlink()


def disturb_at_random(victim: Victim, disturb: Disturb, count: int, folder: Path, seed: int = 0) -> Tally:
    """Disturbs the command `count` times, a few times in a row in one folder, and compares what comes out at last."""
    draw, tally = random.Random(seed), Tally(f"{disturb.__name__}: {victim.name}")
    folder.mkdir(exist_ok=True)
    expected, seconds = None, 0.0
    for name in ("warm", "undisturbed"):  # the first reads the files of packages
        place = folder / name
        place.mkdir()
        victim.prepare(place)
        seconds = finish(victim, place)
        expected = victim.result(place)
    round_number = 0
    while tally.tried < count:
        round_number += 1
        place = folder / f"round-{round_number}"
        place.mkdir()
        victim.prepare(place)
        in_a_row = 0
        try:
            for _ in range(min(draw.randint(1, 4), count - tally.tried)):
                process = start(victim, place)
                time.sleep(draw.uniform(0, 1.05 * seconds))
                tally.tried += 1
                in_a_row += 1
                disturb(victim, place, process)
                victim.check(place)
            finish(victim, place)
            assert victim.result(place) == expected, "the result differs from the undisturbed one"
            tally.worked += in_a_row
        except (AssertionError, ValueError, OSError, KeyError) as error:
            tally.lost.append(f"{place}, {in_a_row} times: {type(error).__name__}: {str(error)[:900]}")
        shutil.rmtree(place)
        print(f"{tally.what}: {tally.tried} made, {tally.worked} survived", file=sys.stderr, flush=True)
    return tally


# ---------------------------------------------------------------------------------------------------------------------
# The commands


STAGES: dict[str, list[dict[str, Any]]] = {
    "sft": SAY,
    "pt": [{"text": f"{word} is a number"} for word in WORDS],
    "dpo": [{"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "no"} for word in WORDS],
    "kto": [{"prompt": f"Say {word}.", "completion": f"{word}!", "label": len(word) < 5} for word in WORDS],
    "grpo": PROMPTS,
}


def training(model: Path, stage: str = "sft") -> Victim:
    import train
    from training import model as loading

    loading.import_unsloth()

    def check(folder: Path) -> None:
        from training.checkpoints import find_damage

        for checkpoint in (folder / "run").glob("checkpoint-*"):
            assert find_damage(checkpoint) is None, f"{checkpoint.name} is damaged: {find_damage(checkpoint)}"

    return Victim(
        "train",
        train.main,
        lambda _: [
            f"model_name_or_path={model}",
            f"stage={stage}",
            "dataset=rows.jsonl",
            "output_dir=run",
            *SAY_SETTINGS,
            *(GRPO_SETTINGS if stage == "grpo" else ()),
        ],
        lambda folder: (write_jsonl(folder / "rows.jsonl", STAGES[stage]), None)[1],
        check,
        lambda folder: what_was_learned(folder / "run"),
    )


def merging(model: Path) -> Victim:
    import merge

    def weights(folder: Path) -> bytes:
        return (folder / "run" / "merged" / "model.safetensors").read_bytes()

    whole: list[bytes] = []

    def result(folder: Path) -> bytes:
        whole.append(weights(folder))
        return whole[-1]

    def check(folder: Path) -> None:
        if (folder / "run" / "merged").exists():
            assert (folder / "run" / "merged" / "merge.json").exists() and weights(folder) == whole[0]

    return Victim(
        "merge",
        merge.main,
        lambda _: ["run", "--overwrite", "dataset=rows.jsonl"],
        lambda folder: _prepare_run(folder, model),
        check,
        result,
    )


def _prepare_run(folder: Path, model: Path) -> None:
    write_jsonl(folder / "rows.jsonl", SAY)
    made = folder.parent.parent / "one-run"
    if not made.exists():
        make_run(model, made)
    shutil.copytree(made, folder / "run")


def evaluating(model: Path) -> Victim:
    import evaluate

    expected: dict[str, Any] = {}

    def results(folder: Path) -> dict[str, Any]:
        """What is measured, by file, without what differs each time."""
        found: dict[str, Any] = {}
        for file in sorted((folder / "run" / "eval").glob("*/metrics.json")):
            figures = json.loads(file.read_text())
            for one in figures["models"].values():
                one.pop("seconds", None)
            found[file.parent.name] = {name: figures[name] for name in figures if name not in ("date", "command")}
        return found

    def result(folder: Path) -> Any:
        predictions = {file.name: file.read_bytes() for file in (folder / "run/eval/rows").glob("predictions*.jsonl")}
        expected.update(results(folder))
        return predictions, results(folder)

    def check(folder: Path) -> None:
        for name, figures in results(folder).items():
            assert figures == expected[name], f"{name}: metrics.json differs from the undisturbed one"

    return Victim(
        "evaluate",
        evaluate.main,
        lambda _: ["run", "dataset=rows.jsonl", "infer_dtype=float32"],
        lambda folder: _prepare_run(folder, model),
        check,
        result,
    )


def quantizing(model: Path) -> Victim:
    import quantize

    output = Path("model") / "gguf"
    whole: dict[str, bytes] = {}

    def prepare(folder: Path) -> None:
        write_jsonl(folder / "rows.jsonl", SAY * 5)
        shutil.copytree(model, folder / "model")

    def files(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folder / output).glob("*.gguf")}

    def result(folder: Path) -> dict[str, bytes]:
        whole.update(files(folder))
        return files(folder)

    def check(folder: Path) -> None:
        assert files(folder).items() <= whole.items(), "a GGUF file differs from the undisturbed one"

    return Victim(
        "quantize",
        quantize.main,
        lambda folder: ["model", "--type", "q8_0", "dataset=rows.jsonl", *(["--overwrite"] if files(folder) else [])],
        prepare,
        check,
        result,
    )


@contextlib.contextmanager
def downloading(folder: Path) -> Iterator[Victim]:
    """download.py from a hub that is in no hurry, in a process of its own: a fork beside its threads could wait forever
    for a lock that one of them held."""
    import huggingface_hub.constants
    from test_download import WANTED, Hub, make_repository

    import download

    repository = make_repository(folder / "repository")
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    reader, writer = os.pipe()
    server = os.fork()
    if not server:
        hub = Hub({"org/Tiny-Chat": repository})
        hub.delay = 0.02
        hub.handle_error = lambda *_: None  # of connections that a kill has cut
        os.write(writer, hub.url.encode())
        while True:
            signal.pause()
    url = os.read(reader, 100).decode()
    place = Path("models") / "Tiny-Chat"

    def result(folder: Path) -> dict[str, bytes]:
        return {name: (folder / place / name).read_bytes() for name in sorted(WANTED)}

    def check(folder: Path) -> None:
        if (folder / place).exists():
            for name in WANTED:
                assert (folder / place / name).read_bytes() == (repository / name).read_bytes()

    try:
        arguments = ["org/Tiny-Chat", "--mirror", url]
        yield Victim("download", download.main, lambda _: arguments, lambda _: None, check, result)
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


KINDS: dict[str, Callable[[Path], Victim]] = {
    "train": training,
    "train, pt": lambda model: training(model, "pt"),
    "train, dpo": lambda model: training(model, "dpo"),
    "train, kto": lambda model: training(model, "kto"),
    "train, grpo": lambda model: training(model, "grpo"),
    "merge": merging,
    "evaluate": evaluating,
}


@contextlib.contextmanager
def victim_of(name: str, folder: Path, model: Path) -> Iterator[Victim]:
    """A command to disturb; what it needs beside `model` is made in `folder`."""
    if name == "download":
        with downloading(folder) as victim:
            yield victim
    elif name == "quantize":
        embedded = common.ROOT / common.EMBEDDED_MODEL  # its tokenizer is one that llama.cpp's converter knows
        small = save_random_model(
            folder / "small", embedded, dtype="bfloat16", tie_word_embeddings=True, initializer_range=0.1
        )
        yield quantizing(small)
    else:
        yield KINDS[name](model)


def kill_series(name: str, count: int, folder: Path, model: Path, seed: int = 0) -> Tally:
    """Kills of a command, with a folder for each series below `folder`."""
    with victim_of(name, folder, model) as victim:
        return disturb_at_random(victim, kill, count, folder / "kills", seed)


def full_disk_series(name: str, count: int, folder: Path, model: Path, seed: int = 0) -> Tally:
    """A disk that others fill at random moments: a tmpfs, which needs the right to mount one."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)], check=True)
    try:
        with victim_of(name, folder, model) as victim:
            return disturb_at_random(victim, fill_disk, count, disk, seed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
