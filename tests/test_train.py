"""train.py on a tiny model made on the spot, through the real Unsloth, TRL and transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run, write_jsonl

import common
import dataset
import formats

ROWS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in ("one", "two", "three", "four")]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = [
    "cutoff_len=128", "num_train_epochs=6", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
    "learning_rate=0.01", "logging_steps=1", "lora_rank=4",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def train(model: Path, data: Path, folder: Path, *more: str, **kwargs) -> subprocess.CompletedProcess[str]:
    settings = [f"model_name_or_path={model}", f"dataset={data}", f"output_dir={folder}", *SETTINGS, *more]
    return run("train.py", *settings, cwd=data.parent, **kwargs)


def read_run(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def losses(folder: Path) -> dict[int, float]:
    """Step → loss; fails where a step stands twice."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """Folder of a finished run of 12 steps; treat it as read-only."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    result = train(tiny_model, rows, folder / "run", "save_steps=5")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder / "run"


@pytest.mark.slow
def test_packed_batches_and_micro_batches_train_the_same(tiny_model):
    """Loss and gradients of a flat batch, a packed row and the samples alone; steps cut into micro-batches."""
    script = [sys.executable, str(ROOT / "tests" / "exact_training.py"), str(tiny_model)]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    exact = report["device"] == "cpu"  # float32; a card computes in bfloat16, with 8 bits of mantissa
    same = {"abs": 1e-5} if exact else {"rel": 1e-3}
    assert report["gradient"] > 1e-2
    assert report["loss"] == pytest.approx(report["losses_alone"], **same)
    assert report["loss"] == pytest.approx(report["loss_packed"], **same)
    assert report["gradient_difference"] < (1e-5 if exact else 0.02 * report["gradient"])
    assert report["gradient_difference_packed"] < (1e-5 if exact else 0.02 * report["gradient"])
    assert report["loss_without_adapter"] == pytest.approx(report["reference_loss"], **same)
    assert report["step"] > 1e-3
    assert report["step_difference"] < (1e-6 if exact else 0.02 * report["step"])


@pytest.mark.slow
def test_the_run_folder_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "run.json", "trainer_log.jsonl", "training_loss.png", "adapter_config.json",
        "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "checkpoint-10", "checkpoint-12", "report.html", "trained.npy",
    }  # fmt: skip
    trained, _ = dataset.read_conversations(common.run_config(finished))
    assert set(np.load(finished / "trained.npy").tolist()) == set(map(formats.fingerprint, trained))
    state = read_run(finished)
    assert state["status"] == "finished"
    assert state["steps"] == state["total_steps"] == 12
    assert state["data"]["datasets"][0]["rows"] == 4
    assert state["seed"] == 42
    assert state["versions"]["unsloth"]
    assert state["peak_memory"] > (1e8 if common.find_gpu() is None else 1e6)  # a card holds the model alone
    lines = [json.loads(line) for line in (finished / "trainer_log.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert set(lines[0]) == {
        "step", "total_steps", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
        "elapsed", "remaining",
    }  # fmt: skip
    assert lines[-1]["tokens"] == 6 * state["data"]["datasets"][0]["tokens"] == state["tokens"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert (finished / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("training_args.bin"))


@pytest.mark.slow
def test_what_the_script_says(finished):
    said = (finished.parent / "stdout").read_text()
    assert "are learned" in said
    assert "12 of 2 x 1 samples" in said
    assert said.rstrip().endswith(f"python chat.py {finished}")


@pytest.mark.slow
def test_plain_peft_loads_the_adapter_and_the_template(finished, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, finished)(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    template = AutoTokenizer.from_pretrained(finished).chat_template
    assert "generation %}" not in template
    assert "<|im_start|>" in template
    settings = json.loads((finished / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # as transformers 4 knows it


@pytest.mark.slow
def test_a_finished_run_says_so_and_other_settings_are_refused(finished, tiny_model):
    rows = finished.parent / "rows.jsonl"
    before = (finished / "run.json").read_bytes()
    result = train(tiny_model, rows, finished, "save_steps=5")
    assert result.returncode == 0
    assert "is finished" in result.stdout
    result = train(tiny_model, rows, finished, "save_steps=5", "lora_rank=8")
    assert result.returncode == 2
    assert "lora_rank=4 then, 8 now" in result.stderr
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.slow
def test_its_own_config_trains_the_same_losses(finished, tmp_path):
    result = run("train.py", str(finished / "config.yaml"), f"output_dir={tmp_path / 'again'}", cwd=finished.parent)
    assert result.returncode == 0, result.stderr
    on_card = common.find_gpu() is not None  # whose kernels do not add up in one order
    expected = pytest.approx(losses(finished), rel=1e-2) if on_card else losses(finished)
    assert losses(tmp_path / "again") == expected


def interrupt(process: subprocess.Popen, folder: Path, step: int, number: int) -> None:
    """Sends a signal once the log has reached `step`."""
    log = folder / "trainer_log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)


LONGER = ["save_steps=4", "max_steps=40"]  # enough steps that a signal comes before the end


@pytest.fixture(scope="module")
def uninterrupted(finished, tiny_model) -> Path:
    folder = finished.parent / "uninterrupted"
    result = train(tiny_model, finished.parent / "rows.jsonl", folder, *LONGER)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_with_the_same_losses(finished, uninterrupted, tiny_model, tmp_path, number):
    rows = finished.parent / "rows.jsonl"
    folder = tmp_path / "run"
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={folder}", *SETTINGS, *LONGER]
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=rows.parent)
    interrupt(process, folder, 6, number)
    out, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "to go on: python" in out
        state = read_run(folder)
        assert state["status"] == "interrupted"
        assert (folder / f"checkpoint-{state['steps']}").is_dir()
    else:
        assert read_run(folder)["status"] == "running"  # nobody was left to write it
    assert not (folder / "adapter_model.safetensors").exists()
    result = run("train.py", *settings, cwd=rows.parent)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert read_run(folder)["status"] == "finished"
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert read_run(folder)["train_loss"] == pytest.approx(read_run(uninterrupted)["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_held_out_data_choose_the_best_step_and_an_adapter_is_trained_further(finished, tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "more.jsonl", ROWS * 5)
    result = train(
        tiny_model, rows, tmp_path / "run", "val_size=4", "eval_steps=2", "save_steps=2", "max_steps=6",
        "neat_packing=true", "use_rslora=true", "save_total_limit=1", f"adapter_name_or_path={finished}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert sorted(measured) == [2, 4, 6]
    state = read_run(tmp_path / "run")
    assert measured[state["best_step"]] == min(measured.values()) == state["eval_loss"]
    best = tmp_path / "run" / f"checkpoint-{state['best_step']}" / "adapter_model.safetensors"
    assert best.read_bytes() == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    # it went on from the trained adapter, not from a fresh one
    first = next(line["loss"] for line in lines if "loss" in line)
    assert first < losses(finished)[1] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_2024-05-25.yaml", "train_2024-07-09.yaml"])
def test_the_tutorials_own_files_train(tiny_model, tmp_path, name):
    """Unchanged, with the data of data/; only the model's path differs (and one step is enough here)."""
    more = [f"model_name_or_path={tiny_model}", f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    result = run("train.py", f"tests/tutorial/{name}", *more)
    assert result.returncode == 0, result.stderr
    assert "note: fp16" in result.stdout
    assert "<|start_header_id|>" in (tmp_path / "run" / "chat_template.jinja").read_text()
    state = read_run(tmp_path / "run")
    assert [entry["name"] for entry in state["data"]["datasets"]] == [
        "fintech" if "05-25" in name else "diy",
        "identity",
    ]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    wanted = {"q_proj", "v_proj"} if "05-25" in name else set(PROJECTIONS)
    assert set(config["target_modules"]) == wanted
    assert (config["r"], config["lora_alpha"]) == (8, 16)


@pytest.mark.slow
def test_overwriting_deletes_the_run_and_nothing_else(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-99").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    result = train(tiny_model, data, folder)
    assert result.returncode == 2
    assert "overwrite_output_dir=true" in result.stderr
    result = train(tiny_model, data, folder, "overwrite_output_dir=true", "max_steps=1", "use_dora=true")
    assert result.returncode == 0, result.stderr
    assert not (folder / "checkpoint-99").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert config["lora_alpha"] == 8


@pytest.mark.slow
def test_unknown_modules_are_named(tiny_model, data, tmp_path):
    result = train(tiny_model, data, tmp_path / "run", "lora_target=c_attn")
    assert result.returncode == 2
    assert "q_proj" in result.stderr
    assert "Traceback" not in result.stderr
    assert read_run(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
def test_a_loss_that_explodes_ends_the_run(tiny_model, data, tmp_path):
    result = train(tiny_model, data, tmp_path / "run", "learning_rate=1e38", "max_grad_norm=0", "optim=sgd")
    assert result.returncode == 2
    assert "lower learning_rate" in result.stderr


def in_a_second(model: Path, data: Path, folder: Path, *more: str) -> str:
    """The error of a run that must end with status 2 before anything heavy, having written nothing."""
    before = time.monotonic()
    used = os.times().children_user
    result = train(model, data, folder, *more)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert os.times().children_user - used < 1.5, f"{time.monotonic() - before:.1f} s"
    assert not folder.exists()
    return result.stderr


def test_bad_input_is_told_in_a_second(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    bad = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], {**ROWS[1], "output": None}])
    message = in_a_second(tiny_model, bad, folder)
    assert "bad.jsonl" in message
    assert "2" in message
    assert "there is no model" in in_a_second(tmp_path / "nothing", data, folder)
    assert "reads at most 8192" in in_a_second(tiny_model, data, folder, "cutoff_len=10000")
    assert "dataset" in in_a_second(tiny_model, tmp_path / "none.jsonl", folder)


def test_a_recipe_that_predicts_is_not_trained(tiny_model, data, tmp_path):
    recipe, folder = tmp_path / "predict.yaml", tmp_path / "run"
    settings = f"do_predict: true\neval_dataset: {data}\nmodel_name_or_path: {tiny_model}\noutput_dir: {folder}\n"
    recipe.write_text(settings)
    for more in ([], ["--dry-run"]):
        result = run("train.py", str(recipe), *more, cwd=tmp_path)
        assert result.returncode == 2 and f"this recipe predicts: python evaluate.py {recipe}" in result.stderr
    assert not folder.exists()
    recipe.write_text(settings + "do_train: true\n")
    assert "this recipe predicts" not in run("train.py", str(recipe), "--dry-run", cwd=tmp_path).stderr


def test_what_was_trained_on_before_an_interruption_is_kept(tmp_path):
    import train as script

    def trained(contents: list[int], resumed: str | None) -> list[int]:
        data = dataset.Prepared(None, None, None, None, np.array(contents), report={})
        script.write_trained(tmp_path, data, resumed)
        return np.load(tmp_path / "trained.npy").tolist()

    assert trained([3, 5], None) == [3, 5]
    assert trained([4, 5], "checkpoint-4") == [3, 4, 5]
    assert trained([4, 5], None) == [4, 5]


def test_bad_input_deletes_nothing_of_an_earlier_run(tiny_model, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "finished"}')
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": 5}])
    assert train(tiny_model, bad, folder, "overwrite_output_dir=true").returncode == 2
    assert (folder / "checkpoint-9").is_dir()
    assert (folder / "run.json").read_text() == '{"status": "finished"}'


def test_settings_that_this_machine_cannot_follow(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    message = in_a_second(tiny_model, data, folder, f"adapter_name_or_path={tmp_path}")
    assert "adapter_config.json" in message
    if importlib.util.find_spec("wandb") is None:
        assert "pip install wandb" in in_a_second(tiny_model, data, folder, "report_to=wandb")
    if common.find_gpu() is None:
        assert "needs a GPU" in in_a_second(tiny_model, data, folder, "quantization_bit=8")


def test_half_a_model_is_named(tiny_model, data, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (half / name).write_bytes((tiny_model / name).read_bytes())
    (half / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:5000])
    assert "lacks model.safetensors" in in_a_second(half, data, tmp_path / "run")


def test_a_run_that_is_under_way_is_left_alone(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "running", "pid": os.getpid()}))
    result = train(tiny_model, data, folder)
    assert result.returncode == 2
    assert f"process {os.getpid()}" in result.stderr
