"""bench/gpu.py starts and knows its steps; what they measure needs a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok


def bench(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, words)], capture_output=True, text=True
    )


def test_an_unknown_step_is_refused():
    assert bench("trian").returncode == 2


def test_a_call_without_time_names_all_its_steps(tmp_path: Path):
    steps = {
        "first": ["card", "model", "train", "full", "train4", "full4", "packed"],
        "second": ["card", "model", "eight", "other", "baseline", "exact", "resume", "answer"],
    }
    for call, names in steps.items():
        lines = ok(bench(call, "--minutes", 0, "--work", tmp_path)).stdout.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert all(line.endswith("left out: no time left") for line in lines)


@pytest.mark.slow
def test_the_first_steps_run_without_a_card(tmp_path: Path):
    card, model = ok(bench("card", "model", "--tiny", "--work", tmp_path)).stdout.splitlines()
    assert "no card" in card and "FAILED" not in card
    assert "90,880 weights" in model
