"""report.html and charts: one file that needs no network, from a whole run or from what there is of one."""

from __future__ import annotations

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
from runs.texts import Translator

STOPPED = Message("flat since step {step:,}", step=1080)


def make_folder(folder: Path) -> Path:
    """A run folder as train.py and evaluate.py leave it, with a name that would be markup."""
    folder.mkdir()
    write_text(folder / "config.yaml", "learning_rate: 0.0003\nauthor: <b>Orbit</b>\n")
    run = {"stopped_early": STOPPED.to_json(), "status": "finished", "model": "models/x", "steps": 20}
    run |= {"total_steps": 30, "peak_memory": 2e9, "seconds": 75, "trainable_parameters": 4884480}
    write_json(folder / "run.json", run | {"command": ["python", "train.py", "r.yaml"]})
    log = [{"step": i, "loss": 2 / i, "learning_rate": 1e-4, "tokens_per_second": 50.0} for i in range(1, 21)]
    log.insert(10, {"step": 10, "eval_loss": 0.5})
    write_jsonl(folder / "trainer_log.jsonl", log)
    part = folder / "eval" / "d"
    part.mkdir(parents=True)
    p = np.random.default_rng(0).random(40)
    figures = metrics.classification([str(i % 2) for i in range(40)], np.stack([1 - p, p], 1), ("0", "1"))
    found = {"dataset": "d", "task": "classification", "rows": 40, "left_out": 0, "models": {"trained": figures}}
    found |= {"labels": ["0", "1"], "positive": "1"}
    write_json(part / "metrics.json", found | {"command": ["python", "evaluate.py", "run", "dataset=d"]})
    return folder


def bodies(page: str) -> list[str]:
    """The report in English and in Chinese."""
    return re.findall(r'<main class="report ..">(.*?)</main>', page, re.DOTALL)


def test_one_file_with_everything_in_both_languages_and_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chinese(), STOPPED.sentence, "自第 {step:,} 步起不再下降")
    folder = make_folder(tmp_path / "run")
    page = report.write(folder).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "<b>Orbit" not in page
    english, zh = bodies(page)
    for body in (english, zh):
        assert body.count("<svg") == 6  # loss, learning rate, speed, ROC, precision-recall, calibration
        assert "0:01:15" in body and "2.0 GB" in body and "&lt;b&gt;Orbit" in body and "4,884,480" in body
        assert f"python train.py r.yaml output_dir={folder}-again" in body
        assert "python evaluate.py run dataset=d" in body and "overwrite_output_dir=true" not in body
        assert "labels=1,0" in body and body.count('class="diagonal"') == 2
    assert english.count(">true-positive rate<") == zh.count(">检出率<") == 1  # the axis itself has a name
    assert ">held out</span>" in english and ">留出集</span>" in zh
    assert "flat since step 1,080" in english and "自第 1,080 步起不再下降" in zh
    lines = [line for line in (folder / "trainer_log.jsonl").read_text().splitlines() if "eval_loss" not in line]
    (folder / "trainer_log.jsonl").write_text("\n".join(lines))
    assert ">held out</span>" not in report.write(folder).read_text(encoding="utf-8")


def test_figures_stand_a_model_a_column_with_their_intervals(tmp_path: Path) -> None:
    base = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "ece": None, "seconds": 12.4, "reward_length": 1.0}
    trained = {"accuracy": 0.9, "accuracy_interval": [0.8, 0.95], "ece": 0.1, "seconds": 0.0}
    found = {"dataset": "<d>", "task": "text", "rows": 4, "models": {"base": base, "trained": trained}, "left_out": 0}
    (tmp_path / "eval" / "d").mkdir(parents=True)
    write_json(tmp_path / "eval" / "d" / "metrics.json", found)
    html = report.evaluation_html(tmp_path, Translator("en"))
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", html)]
    assert cells[:6] == ["", "base model", "trained model", "accuracy", "0.500 0.400–0.600", "0.900 0.800–0.950"]
    assert cells[6:12] == ["calibration error (lower is better)", "–", "0.100", "seconds", "12.400", "0.000"]
    assert cells[12:] == ["reward: length", "1.000", "–"] and "&lt;d&gt;" in html
    assert "训练后的模型" in report.evaluation_html(tmp_path, Translator("zh"))


def test_times_are_hours() -> None:
    assert [report.duration(s) for s in (-3, 100.2, 227388, None)] == ["0:00:00", "0:01:40", "63:09:48", "–"]


def test_a_precision_recall_curve_has_corners() -> None:
    """Else the one point of a majority vote would be a line above every other curve."""
    assert charts.with_corners([(1.0, 0.25), (0.0, 1.0)]) == [(1.0, 0.25), (0.0, 0.25), (0.0, 1.0)]
    page = charts.line_chart("PR", "x", [Curve("m", [(1.0, 0.25), (0.0, 1.0)], 0, steps=True)], unit_square=True)
    assert 'points="100.0,75.0 0.0,75.0 0.0,0.0"' in page and page.count("<i class=") == 2


def test_plots_place_points_and_say_where_nothing_is() -> None:
    curve = charts.Curve("<loss>", [(1, 4.0), (2, float("nan")), (3, 0.0)], 0)
    html = charts.line_chart("Loss", "step", [curve], "nothing yet")
    assert 'title="&lt;loss&gt;: 4 (step 1)"' in html and "<loss>" not in html
    points = re.search(r'<polyline class="c0" points="([^"]*)"', html)[1].split()
    assert len(points) == 2 and points[1] == "100.0,100.0"  # the last at the right, at zero
    assert "nothing yet" in charts.line_chart("Loss", "step", [], "nothing yet")
    assert charts.ticks(0, 3.1, 4) == [0, 1, 2, 3]
    assert len(charts.thinned([(n, n) for n in range(100_000)])) <= charts.MAX_POINTS + 1
    bars = re.findall(
        r'height:([\d.]+)%" title="(\d+)–\d+ tokens: (\d+)', charts.histogram("h", "tokens", [1, 1, 1, 9])
    )
    assert [bar for bar in bars if bar[2] != "0"] == [("100.0", "1", "3"), ("33.3", "9", "1")]


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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["run", "我的训练", "run \U0001f9ff"])
def test_a_run_of_any_name_has_its_picture(tmp_path: Path, name: str) -> None:
    picture = tmp_path / name / "training_loss.png"
    picture.parent.mkdir()
    charts.draw_loss([{"step": 1, "loss": 2.0}], picture)
    assert picture.stat().st_size > 1000


def test_a_run_in_the_working_directory_has_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_folder(tmp_path / "run"))
    assert report.write(Path()).is_file()
    assert f"output_dir={tmp_path}/run-again" in Path("report.html").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"status": "running"})
    english, zh = bodies(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "Nothing is logged yet." in english and "Not evaluated yet" in english
    assert "尚未评估" in zh
