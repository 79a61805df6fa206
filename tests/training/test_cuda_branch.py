"""Unsloth's CUDA branch, run on the CPU (cuda_on_cpu.py), trains what the samples alone would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok, save_random_model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_unsloths_cuda_branch_trains_what_the_samples_alone_would(tiny_model: Path, tmp_path: Path, kind: str):
    model = tiny_model if kind == "Llama" else save_random_model(tmp_path / "tiny", tiny_model, kind, head_dim=16)
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")}
    script = str(ROOT / "tests" / "training" / "cuda_on_cpu.py")
    done = ok(subprocess.run([sys.executable, script, str(model)], capture_output=True, text=True, env=environment))
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["dtype"], report["trainer"]) == ("torch.float16", "UnslothSFTTrainer")
    assert report["attention"]["packed"] > 0
    assert "other" not in report["attention"]
    for other in ("losses_alone", "loss_packed"):
        assert report["loss"] == pytest.approx(report[other], rel=1e-4)
    assert report["loss_without_adapter"] == pytest.approx(float(plain_loss(model)), rel=2e-3)  # float16 beside float32
    assert report["gradient"] > 1e-3
    assert max(report["gradient_difference"], report["gradient_difference_packed"]) < 0.01 * report["gradient"]
    assert report["step_difference"] < 0.01 * report["step"]


def plain_loss(model: Path) -> str:
    """exact_training's loss of the same samples by plain transformers, in a process without Unsloth."""
    code = "import exact_training as e, sys; e.LENGTHS = ((3, 2), (6, 5), (5, 2)); print(e.plain_loss(sys.argv[1]))"
    folder = ROOT / "tests" / "training"
    done = ok(subprocess.run([sys.executable, "-c", code, str(model)], cwd=folder, capture_output=True, text=True))
    return done.stdout.split()[-1]
