"""The stages beside sft, by the command line: trained on a tiny model, resumed, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import run, write_jsonl

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


def test_documents_are_learned_and_evaluated(tmp_path, tiny_model):
    documents = [{"text": " ".join(["one two three"] * (i % 9 + 1)) + str(i)} for i in range(40)]
    data, folder = write_jsonl(tmp_path / "documents.jsonl", documents), tmp_path / "run"
    done = train(tiny_model, folder, data, "stage=pt", "max_steps=40")
    assert done.returncode == 0, done.stderr
    assert "packed rows" in done.stdout and "100.0%" in done.stdout  # of the tokens are learned
    losses = [line["eval_loss"] for line in read_log(folder) if "eval_loss" in line]
    assert losses[-1] < 4.8
    done = run("evaluate.py", str(folder))
    assert done.returncode == 0, done.stderr
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("documents", 6)
    assert found["models"]["trained"]["perplexity"] < found["models"]["base"]["perplexity"] / 2


def test_stages_that_are_not_trained_here_say_what_to_use():
    for stage in ("rm", "ppo"):
        done = run("train.py", f"stage={stage}")
        (fault,) = done.error.fields["faults"]
        assert done.returncode == 2 and fault.fields["problem"].code == f"stage_{stage}"
        assert "dpo" in str(fault.fields["problem"])
