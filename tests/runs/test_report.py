"""report.html: one file that needs no network, from a whole run or from what there is of one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from PIL import Image

from common import Message, chinese
from evaluation import metrics
from runs import charts, report
from runs.charts import Curve
from runs.files import write_json, write_text


def make_folder(folder: Path) -> Path:
    """A run folder as train.py and evaluate.py leave it, with a name that would be markup."""
    folder.mkdir()
    write_text(folder / "config.yaml", "learning_rate: 0.0003\nauthor: <b>Orbit</b>\n")
    run = {"stopped_early": Message("flat since step {step:,}", step=1080).to_json()}
    run |= {
        "status": "finished",
        "model": "models/x",
        "steps": 20,
        "total_steps": 30,
        "peak_memory": 2e9,
        "seconds": 75,
    }
    run["trainable_parameters"] = 4884480
    write_json(folder / "run.json", run | {"command": ["python", "train.py", "r.yaml"]})
    log = [{"step": i, "loss": 2 / i, "learning_rate": 1e-4, "tokens_per_second": 50.0} for i in range(1, 21)]
    log.insert(10, {"step": 10, "eval_loss": 0.5})
    write_text(folder / "trainer_log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    part = folder / "eval" / "d"
    part.mkdir(parents=True)
    p = np.random.default_rng(0).random(40)
    figures = metrics.classification([str(i % 2) for i in range(40)], np.stack([1 - p, p], 1), ("0", "1"))
    found = {"dataset": "d", "task": "classification", "rows": 40, "left_out": 0, "models": {"trained": figures}}
    found |= {"labels": ["0", "1"], "positive": "1"}
    write_json(part / "metrics.json", found | {"command": ["python", "evaluate.py", "run", "dataset=d"]})
    return folder


def test_one_file_with_everything_and_no_network(tmp_path: Path) -> None:
    page = report.write(make_folder(tmp_path / "run")).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert page.count("<svg") == 5  # loss, learning rate, ROC, precision-recall, calibration
    assert "1 min 15 s" in page and "2.0 GB" in page and "python train.py r.yaml" in page
    assert "python evaluate.py run dataset=d" in page
    assert "<b>Orbit" not in page and "&lt;b&gt;Orbit" in page
    assert page.count('class="zh"') >= page.count('class="en"') > 30


def test_both_languages_say_all_and_the_commands_delete_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    page = report.write(folder).read_text(encoding="utf-8")
    assert "1 分 15 秒" in page
    assert "4,884,480" in page and "labels=1,0" in page and 'class="diagonal"' in page
    assert f"python train.py r.yaml output_dir={folder}-again" in page and "overwrite_output_dir=true" not in page
    assert page.count(">true-positive rate<") == page.count(">检出率<") == 1  # the axis itself has a name
    assert "held out</span>" in page
    lines = [line for line in (folder / "trainer_log.jsonl").read_text().splitlines() if "eval_loss" not in line]
    (folder / "trainer_log.jsonl").write_text("\n".join(lines))
    assert ">held out</span>" not in report.write(folder).read_text(encoding="utf-8")
    assert report.duration(7260) == "2 h 1 min" and report.duration(5) == "5 s"


def test_why_a_run_stopped_early_is_said_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chinese(), "flat since step {step:,}", "自第 {step:,} 步起不再下降")
    stopped = {"stopped_early": Message("flat since step {step:,}", step=1080).to_json()}
    assert report.stop_reason(stopped) == ("flat since step 1,080", "自第 1,080 步起不再下降")
    assert report.stop_reason({}) is None is report.stop_reason({"stopped_early": None})
    assert report.stop_reason({"stopped_early": "as it was"}) == (
        "as it was",
        "as it was",
    )


def test_a_precision_recall_curve_has_corners() -> None:
    """Else the one point of a majority vote would be a line above every other curve."""
    assert charts.with_corners([(1.0, 0.25), (0.0, 1.0)]) == [(1.0, 0.25), (0.0, 0.25), (0.0, 1.0)]
    page = charts.line_chart("PR", "x", [Curve("m", [(1.0, 0.25), (0.0, 1.0)], 0, steps=True)], unit_square=True)
    assert 'points="100.0,75.0 0.0,75.0 0.0,0.0"' in page and page.count("<i class=") == 2


def test_two_languages_of_a_chart_are_escaped_and_its_tooltips_are_plain() -> None:
    curve = Curve(("<loss>", "<损失>"), [(1, 2.0), (2, 1.0)], 0)
    page = charts.line_chart(("loss", "损失"), ("step", "步数"), [curve])
    assert '<span class="zh">&lt;损失&gt;</span>' in page and 'title="&lt;loss&gt;: 2 (step 1)"' in page
    assert "<loss>" not in page


def test_losses_of_one_and_of_two_runs_are_drawn(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    charts.draw_loss(log, tmp_path / "one.png")
    charts.draw_losses({"a": log, "b": []}, tmp_path / "two.png")
    rewards = [*log, {"step": 2, "loss": 1.0, "reward_margin": 0.5, "eval_reward_accuracy": 0.75}]
    charts.draw_loss(rewards, tmp_path / "with_margin.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png", "with_margin.png"]
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("one", "with_margin")]
    assert widths[1] > 1.5 * widths[0]
    write_jsonl(tmp_path / "trainer_log.jsonl", rewards)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "reward margin" in page and "奖励间隔" in page and "reward accuracy" in page


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"status": "running"})
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Nothing is logged yet." in page and "Not evaluated yet" in page
