"""The stages beside sft, by the command line: trained on a tiny model, resumed, evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok, run, save_adapter, write_jsonl

from runs.log import read_log


def train(model: Path, folder: Path, data: Path, *settings: str):
    return run(
        "train.py",
        f"model_name_or_path={model}",
        f"dataset={data}",
        f"output_dir={folder}",
        *("cutoff_len=128", "learning_rate=1e-2", "gradient_accumulation_steps=1", "val_size=6", "seed=1"),
        *settings,
    )


def metrics(folder: Path, data: Path) -> dict:
    return json.loads((folder / "eval" / data.stem / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_documents_are_learned_and_evaluated(tmp_path, tiny_model):
    documents = [{"text": " ".join(["one two three"] * (i % 9 + 1)) + str(i)} for i in range(40)]
    data, folder = write_jsonl(tmp_path / "documents.jsonl", documents), tmp_path / "run"
    done = ok(train(tiny_model, folder, data, "stage=pt", "max_steps=40"))
    assert "packed rows" in done.stdout and "100.0%" in done.stdout  # of the tokens are learned
    losses = [line["eval_loss"] for line in read_log(folder) if "eval_loss" in line]
    assert losses[-1] < 4.8
    ok(run("evaluate.py", str(folder)))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("documents", 6)
    assert found["models"]["trained"]["perplexity"] < found["models"]["base"]["perplexity"] / 2


def test_stages_that_are_not_trained_here_say_what_to_use():
    for stage in ("rm", "ppo"):
        done = run("train.py", f"stage={stage}")
        (fault,) = done.error.fields["faults"]
        assert done.returncode == 2 and fault.fields["problem"].code == f"stage_{stage}"
        assert "dpo" in str(fault.fields["problem"])


PAIRS = [
    {"prompt": f"say {i}", "chosen": "yes please " + "x" * (i % 7 + 1), "rejected": "no no " + "y" * (i % 5 + 1)}
    for i in range(40)
]


@pytest.mark.slow
def test_preferences_are_learned_resumed_and_evaluated(tmp_path, tiny_model):
    data, folder = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    settings = (
        "stage=dpo",
        "max_steps=16",
        "save_strategy=steps",
        "save_steps=8",
        "save_total_limit=9",
        "eval_steps=8",
    )
    done = ok(train(tiny_model, folder, data, *settings))
    assert "[chosen] yes please" in done.stdout and "[rejected] no no" in done.stdout
    last = read_log(folder)[-1]
    assert last["eval_loss"] < 0.5 and last["eval_reward_accuracy"] == 1 and last["eval_reward_margin"] > 0.5
    again = tmp_path / "again"
    ok(train(tiny_model, again, data, *settings, f"resume_from_checkpoint={folder / 'checkpoint-8'}"))
    weights = [(run_folder / "adapter_model.safetensors").read_bytes() for run_folder in (folder, again)]
    assert weights[0] == weights[1]
    ok(run("evaluate.py", str(folder)))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("pairs", 6)
    assert "preference_accuracy_interval" in found["models"]["trained"]
    assert found["models"]["trained"]["margin"] > found["models"]["base"]["margin"] + 1


JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]


@pytest.mark.slow
def test_judged_answers_are_learned_resumed_and_evaluated(tmp_path, tiny_model):
    data, folder = write_jsonl(tmp_path / "judged.jsonl", JUDGED), tmp_path / "run"
    steps = ("max_steps=16", "save_strategy=steps", "save_steps=8", "save_total_limit=9", "eval_steps=8")
    settings = ("stage=kto", "val_size=12", *steps)
    ok(train(tiny_model, folder, data, *settings, "per_device_train_batch_size=1", "gradient_accumulation_steps=4"))
    last = read_log(folder)[-1]
    assert last["eval_loss"] < 0.4 and last["eval_reward_accuracy"] > 0.8 and last["eval_reward_margin"] > 0.5
    again = tmp_path / "again"
    from_eight = f"resume_from_checkpoint={folder / 'checkpoint-8'}"
    one_row = ("per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    ok(train(tiny_model, again, data, *settings, *one_row, from_eight))
    weights = [(run_folder / "adapter_model.safetensors").read_bytes() for run_folder in (folder, again)]
    assert weights[0] == weights[1]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:6])
    ok(run("evaluate.py", str(folder), f"dataset={data},{pairs}"))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("judged", 12)
    assert found["models"]["trained"]["roc_auc"] > found["models"]["base"]["roc_auc"]
    figures = metrics(folder, pairs)["models"]
    assert figures["trained"]["margin"] > figures["base"]["margin"] + 1


@pytest.mark.slow
def test_first_losses_and_gradients_are_those_of_plain_pytorch(tmp_path, tiny_model):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", noise=0.05)
    found = []
    for way in ("kit", "plain"):
        script = Path(__file__).with_name("exact_preferences.py")
        command = [sys.executable, str(script), way, str(tiny_model), str(adapter)]
        done = ok(subprocess.run(command, capture_output=True, text=True, cwd=ROOT))
        found.append(json.loads(done.stdout.splitlines()[-1]))
    kit, plain = found
    for name in plain:
        assert kit[name]["loss"] == pytest.approx(plain[name]["loss"], rel=1e-5), name
        assert kit[name]["gradients"].keys() == plain[name]["gradients"].keys()
        for parameter, sums in plain[name]["gradients"].items():
            assert kit[name]["gradients"][parameter] == pytest.approx(sums, rel=1e-4, abs=1e-5), (name, parameter)
