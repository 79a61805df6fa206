"""Several runs beside each other, and what is said of the results."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl

from evaluation import compare, metrics
from evaluation.results import forgetting
from evaluation.tasks import TASKS
from runs.files import write_json
from runs.metric_names import METRICS


def test_forgetting_is_reported_beyond_the_intervals() -> None:
    base = {"perplexity": 5.0, "perplexity_interval": [4.0, 6.0]}
    worse = {"perplexity": 12.0, "perplexity_interval": [9.0, 15.0]}
    near = {"perplexity": 6.5, "perplexity_interval": [5.5, 7.5]}
    (note,) = forgetting({"base": base, "trained": worse})
    assert str(note).startswith("note: trained forgot general knowledge: perplexity 5.0 before, 12.0 now; mix some")
    assert forgetting({"base": base, "trained": near}) == [] == forgetting({"trained": worse})


def test_runs_that_were_killed_and_models_made_of_a_run_are_listed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "saves" / "a" / "eval" / "d"
    part.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    write_json(tmp_path / "saves/a/run.json", {"status": "running", "pid": process.pid, "eval_loss": 0.0})
    (tmp_path / "saves/a/config.yaml").write_text("stage: pt\n", encoding="utf-8")
    figures = {"base": {"accuracy": 0.5}, "merged": {"accuracy": 0.75}}
    write_json(part / "metrics.json", {"dataset": "d", "models": figures})
    (row,) = compare.runs_table()[1:]
    assert row == ["saves/a", "pt", "interrupted", "-", "-", "-", "-", "0.0000", "d", "accuracy 0.750 (merged)"]
    assert compare.amount(1_234_567) == "1,234,567" and compare.amount(0.12345678) == "0.12346"


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"exact_match": 0.5, "perplexity": 3.0}, "exact match 0.500"),
        ({"preference_accuracy": 0.75, "margin": 1.0}, "preference accuracy 0.750"),
        ({"roc_auc": 0.625}, "ROC AUC 0.625"),
        ({"loss": 0.5, "perplexity": 1.65}, "perplexity 1.650"),
        ({"reward": 0.25}, "reward 0.250"),
    ],
)
def test_the_list_of_runs_has_a_figure_of_every_stage(tmp_path: Path, figures: dict[str, float], shown: str) -> None:
    (tmp_path / "eval" / "d").mkdir(parents=True)
    write_json(tmp_path / "eval/d/metrics.json", {"dataset": "d", "models": {"base": {}, "trained": figures}})
    assert compare.key_figure(tmp_path) == ("d", shown)


def test_two_runs_are_compared_on_the_same_conversations(tmp_path: Path) -> None:
    """Rows with the same last message and a different history."""
    for name, predictions in (("a", "00"), ("b", "011")):
        same = {"prompt": "same", "label": "0"}
        lines = [{"row": i, "conversation": str(i), "prediction": p} | same for i, p in enumerate(predictions)]
        write_jsonl(tmp_path / name, lines)
    pair = compare.paired_predictions(tmp_path / "a", tmp_path / "b")
    assert (pair["rows"], pair["difference"], pair["only_first_right"]) == (2, -0.5, 1)
    assert compare.paired_predictions(tmp_path / "a", tmp_path / "none") is None


@pytest.mark.slow
def test_all_differences_of_two_runs_are_shown(tmp_path: Path) -> None:
    figures = metrics.classification(["0", "1"], np.array([[0.9, 0.1], [0.2, 0.8]]), ("0", "1"))
    for name, rank in (("a", 8), ("b", 16)):
        folder = tmp_path / name / "eval" / "d"
        folder.mkdir(parents=True)
        found = {"dataset": "d", "task": "classification", "labels": ["0", "1"], "models": {"trained": figures}}
        write_json(folder / "metrics.json", found)
        line = {"row": 0, "conversation": "0", "prompt": "q", "label": "0", "prediction": "0"}
        write_jsonl(folder / "predictions.jsonl", [line])
        write_json(tmp_path / name / "run.json", {"status": "finished", "steps": 20})
        (tmp_path / name / "config.yaml").write_text(f"lora_rank: {rank}\n")
        write_jsonl(tmp_path / name / "trainer_log.jsonl", [{"step": 1, "loss": 2.0}])
    text = compare.describe_two_runs(tmp_path / "a", tmp_path / "b")
    assert re.search(r"lora_rank +8 +16", text) and "on 1 rows of both: accuracy +0.000" in text
    assert (tmp_path / "b" / "loss_beside_a.png").is_file()


def test_every_column_has_a_name() -> None:
    assert {name for task in TASKS.values() for name in (*task.main, *task.others)} <= set(METRICS)
