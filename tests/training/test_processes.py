"""Several processes train one run as one process with the same effective batch would; only the first of them writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SAY, SAY_SETTINGS, make_tiny_model, ok, says, what_was_learned, write_jsonl

from common import Message
from runs.files import read_json
from runs.folder import read_log

STEPS = [*SAY_SETTINGS, "lora_dropout=0", "val_size=4"]  # 8 samples to train on, which 2 processes share evenly
PAIRS = [
    {"prompt": f"say {i}", "chosen": "yes " + "x" * (i % 7 + 1), "rejected": "no " + "y" * (i % 5 + 1)}
    for i in range(11)
]
JUDGED = [{"prompt": f"say {i}", "completion": "xy" * (i % 4 + 1), "label": i % 3 > 0} for i in range(11)]
PREFERENCES = ["max_steps=4", "logging_steps=3", "eval_steps=2", "save_steps=2", "val_size=3"]
DATA = {"say": SAY, "pairs": PAIRS, "judged": JUDGED, "broken": [{"instruction": "a", "output": None}]}

# Name → processes, data, settings; what else the harness is told.
RUNS: dict[str, tuple[int, str, list[str], dict[str, Any]]] = {
    "one": (1, "say", [*STEPS, "gradient_accumulation_steps=2"], {}),
    "two": (2, "say", STEPS, {}),
    "dpo": (1, "pairs", ["stage=dpo", *STEPS, *PREFERENCES, "gradient_accumulation_steps=4"], {}),
    "dpo_2": (2, "pairs", ["stage=dpo", *STEPS, *PREFERENCES, "gradient_accumulation_steps=2"], {}),
    "kto": (1, "judged", ["stage=kto", *STEPS, *PREFERENCES, "gradient_accumulation_steps=4"], {}),
    "kto_2": (2, "judged", ["stage=kto", *STEPS, *PREFERENCES, "gradient_accumulation_steps=2"], {}),
    "dropout": (2, "say", [*STEPS, "lora_dropout=0.1"], {}),
    "stopped": (2, "say", [*STEPS, "lora_dropout=0.1"], {"signal": signal.SIGTERM, "at": "stopped/checkpoint-6"}),
    "stopped, on": (2, "say", [*STEPS, "lora_dropout=0.1"], {}),
    "other": (2, "say", STEPS, {"signal": signal.SIGKILL, "at": "other/checkpoint-6"}),
    "other, refused": (1, "say", STEPS, {}),
    "other, on": (1, "say", [*STEPS, "gradient_accumulation_steps=2"], {}),
    "fault": (2, "say", STEPS, {"fault": True}),
    "broken": (2, "broken", STEPS, {}),
}  # fmt: skip


@dataclass
class Trained:
    folder: Path
    statuses: list[int]
    said: list[str]
    error: dict[str, Any] | None

    @property
    def log(self) -> list[dict]:
        return read_log(self.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_tiny_model(folder / "tiny")
    for name, rows in DATA.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def settings_of(place: Path, name: str) -> list[str]:
    _, data, settings, _ = RUNS[name]
    folder = name.partition(",")[0]
    named = {"model_name_or_path": place / "tiny", "dataset": place / f"{data}.jsonl", "output_dir": place / folder}
    return [*settings, *(f"{key}={value}" for key, value in named.items())]


@pytest.fixture(scope="module")
def trained(place: Path) -> dict[str, Trained]:
    """All of RUNS, one after the other, in forks of one process."""
    asked = []
    for name, (count, _, _, more) in RUNS.items():
        more = more | ({"at": str(place / more["at"])} if "at" in more else {})
        asked.append({"count": count, "arguments": settings_of(place, name), **more})
    command = [sys.executable, str(ROOT / "tests" / "training" / "forked_processes.py"), json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONECARD_CACHE": str(place / "cache")}
    done = ok(subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=900))
    results = zip(RUNS, json.loads(done.stdout.splitlines()[-1]), strict=True)
    return {name: Trained(place / name.partition(",")[0], **result) for name, result in results}


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_learned(folder: Path, expected: Path) -> None:
    """The same adapter to the bit; a logged loss may be that of two sums over the processes."""
    (weights, lines, _), (others, theirs, _) = what_was_learned(folder), what_was_learned(expected)
    assert weights == others
    for line, other in zip(lines, theirs, strict=True):
        ours, expected_line = ({k: v for k, v in one.items() if v is not None} for one in (line, other))
        assert ours == pytest.approx(expected_line, rel=1e-6)


def assert_same(found: Trained, expected: Trained) -> None:
    """Log and adapter agree but for the order in which numbers were added."""
    assert found.statuses == [0] * len(found.statuses), found.said
    assert expected.statuses == [0], expected.said
    times = {"tokens_per_second", "elapsed", "remaining"}
    lines = [[{k: v for k, v in line.items() if k not in times} for line in run.log] for run in (found, expected)]
    assert len(lines[0]) == len(lines[1]) > 2
    for line, other in zip(*lines, strict=True):
        assert line == pytest.approx(other, rel=2e-6, abs=2e-6)  # rewards are logged with six digits
    ours, theirs = weights_of(found.folder), weights_of(expected.folder)
    assert ours.keys() == theirs.keys()
    # a hundredth of a step: Adam makes a whole one of a gradient that is hardly more than rounding
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("several", "one"), [("two", "one"), ("dpo_2", "dpo"), ("kto_2", "kto")])
def test_several_processes_learn_what_one_does_with_the_same_effective_batch(trained, several, one):
    assert_same(trained[several], trained[one])


@pytest.mark.slow
def test_the_first_process_alone_writes_and_speaks(trained):
    found = trained["two"]
    assert found.said[1] == "" and "14 of 2 x 1 x 2 processes samples" in found.said[0]
    names = sorted(path.name for path in found.folder.iterdir())
    assert names == sorted(path.name for path in trained["one"].folder.iterdir())
    assert sum("loss" in line for line in found.log) == 4
    run = read_json(found.folder / "run.json")
    assert (run["processes"], run["status"], run["steps"]) == (2, "finished", 14)


@pytest.mark.slow
def test_one_stopped_process_stops_all_at_the_same_step_and_the_run_goes_on_exactly(trained):
    assert trained["stopped"].statuses == [130, 0], trained["stopped"].said
    assert trained["stopped, on"].statuses == [0, 0], trained["stopped, on"].said
    assert_learned(trained["stopped"].folder, trained["dropout"].folder)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_where_its_steps_stay_the_same(trained):
    killed = trained["other"]
    assert killed.statuses[0] != 0 and killed.statuses[1] == -signal.SIGKILL, killed.said
    refused = trained["other, refused"]
    assert refused.statuses == [2] and refused.error["sentence"] == says("begun with other settings"), refused.said
    (changed,) = refused.error["fields"]["changed"]
    assert changed == Message("{name}={then} then, {now} now", name="processes", then="2", now="1").to_json()
    assert_same(trained["other, on"], trained["one"])
    assert read_json(killed.folder / "run.json")["processes"] == 1


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_sentence(trained):
    for name, code, ended in (("fault", says("cannot be split"), 1), ("broken", says("with on_bad_rows=skip"), 0)):
        found = trained[name]
        assert found.statuses[ended] == 2 and found.statuses[1 - ended] != 0, found.said
        assert found.error["sentence"] == code and "error: " in found.said[ended], found.said


def launched(launcher: list[str], place: Path, *settings: str) -> subprocess.Popen[str]:
    """`dropout` of RUNS as a user starts it, with another output_dir."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONECARD_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", *launcher, str(ROOT / "train.py"), *settings_of(place, "dropout"), *settings]
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def process_of(launcher: int, rank: int) -> int:
    """The number of the process that a launcher has started as `rank`."""
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and "train.py" in " ".join(process.cmdline()):
            return process.pid
    raise AssertionError("not started")


@pytest.mark.slow
def test_torchrun_ends_after_a_kill_and_accelerate_launch_goes_on_to_the_bit(trained, place):
    folder = place / "launched"
    first = launched(["torch.distributed.run", "--nproc-per-node", "2"], place, f"output_dir={folder}")
    while not (folder / "checkpoint-6").exists() and first.poll() is None:
        time.sleep(0.01)
    os.kill(process_of(first.pid, 1), signal.SIGKILL)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1 and "SIGKILL" in err
    second = launched(
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], place, f"output_dir={folder}"
    )
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err[-3000:]
    assert "checkpoint-6" in out and out.count("talk to it") == 1
    assert_learned(folder, trained["dropout"].folder)
