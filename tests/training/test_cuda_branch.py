"""Unsloth's CUDA branch, run on the CPU (cuda_on_cpu.py), trains what the samples alone would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_tiny_model


def make_model(folder: Path, kind: str) -> Path:
    """The tests' tiny Llama, or random weights of another architecture with its tokenizer and sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tiny_model(folder)
    if kind != "llama":
        sizes = json.loads((folder / "config.json").read_text())
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")
        config = AutoConfig.for_model(kind, head_dim=16, **{name: sizes[name] for name in names})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_unsloths_cuda_branch_trains_what_the_samples_alone_would(tmp_path: Path, kind: str):
    model = make_model(tmp_path / "tiny", kind)
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")}
    script = str(ROOT / "tests" / "training" / "cuda_on_cpu.py")
    done = subprocess.run([sys.executable, script, str(model)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
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
    done = subprocess.run([sys.executable, "-c", code, str(model)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]
