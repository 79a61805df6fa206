"""report.html: one file that needs no network, from a whole run or from what there is of one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

import common
import metrics
import report


def make_folder(folder: Path) -> Path:
    """A run folder as train.py and evaluate.py leave it, with a name that would be markup."""
    folder.mkdir()
    common.write_text(folder / "config.yaml", "learning_rate: 0.0003\nauthor: <b>Orbit</b>\n")
    run = {"status": "finished", "model": "models/x", "steps": 20, "total_steps": 30, "peak_memory": 2e9, "seconds": 75}
    common.write_json(folder / "run.json", run | {"command": ["python", "train.py", "r.yaml"]})
    log = [{"step": i, "loss": 2 / i, "learning_rate": 1e-4, "tokens_per_second": 50.0} for i in range(1, 21)]
    log.insert(10, {"step": 10, "eval_loss": 0.5})
    common.write_text(folder / "trainer_log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    part = folder / "eval" / "d"
    part.mkdir(parents=True)
    p = np.random.default_rng(0).random(40)
    figures = metrics.classification([str(i % 2) for i in range(40)], np.stack([1 - p, p], 1), ("0", "1"))
    found = {"dataset": "d", "task": "classification", "rows": 40, "left_out": 0, "models": {"trained": figures}}
    common.write_json(part / "metrics.json", found | {"command": ["python", "evaluate.py", "run", "dataset=d"]})
    return folder


def test_one_file_with_everything_and_no_network(tmp_path: Path) -> None:
    page = report.write(make_folder(tmp_path / "run")).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert page.count("<svg") == 5  # loss, learning rate, ROC, precision-recall, calibration
    assert "1 min 15 s" in page and "2.0 GB" in page and "python train.py r.yaml" in page
    assert "python evaluate.py run dataset=d" in page
    assert "<b>Orbit" not in page and "&lt;b&gt;Orbit" in page
    assert page.count('class="zh"') >= page.count('class="en"') > 30


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    common.write_json(tmp_path / "run.json", {"status": "running"})
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Nothing is logged yet." in page and "Not evaluated yet" in page
