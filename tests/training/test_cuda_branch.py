"""Unsloth's CUDA branch, run on the CPU (cuda_on_cpu.py): it trains what the samples alone would, and the whole command
works on it. What that cannot show stands in cuda_on_cpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, ok, save_random_model, write_jsonl

pytestmark = pytest.mark.slow

KINDS = {"Llama": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"head_dim": 16}, "Olmo2": {}}
WITHOUT_CODE = {"Olmo2"}  # in Unsloth
# The interpreter takes a sixth of a second for a token.
SHORT = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
SETTINGS = [
    "cutoff_len=16", "max_steps=4", "per_device_train_batch_size=1", "gradient_accumulation_steps=2", "packing=true",
    "eval_steps=2", "val_size=1", "lora_rank=4", "learning_rate=0.01", "logging_steps=1", "early_stopping=no",
]  # fmt: skip


def on_the_cuda_branch(folder: Path, *words: str) -> tuple[list[Any], str]:
    """What cuda_on_cpu.py prints as JSON, and all else that it prints. `folder` takes what Unsloth writes."""
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "training" / "cuda_on_cpu.py"), *words]
    done = ok(subprocess.run(command, capture_output=True, text=True, env=environment))
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.fixture(scope="module")
def reports(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What exact_training.py measures of each kind of model, with the loss by plain transformers in float32."""
    folder = tmp_path_factory.mktemp("exact")
    models = [str(save_random_model(folder / kind, tiny_model, kind, **settings)) for kind, settings in KINDS.items()]
    found, _ = on_the_cuda_branch(folder, "exact", *models)
    code = "import exact_training as e, sys; e.LENGTHS = ((3, 2), (6, 5), (5, 2)); "
    code += "print(*map(e.plain_loss, sys.argv[1:]))"
    here = ROOT / "tests" / "training"
    plain = ok(subprocess.run([sys.executable, "-c", code, *models], cwd=here, capture_output=True, text=True))
    losses = map(float, plain.stdout.splitlines()[-1].split())
    return {kind: {**report, "plain_loss": loss} for kind, report, loss in zip(KINDS, found, losses, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_unsloths_cuda_branch_trains_what_the_samples_alone_would(reports, kind: str):
    report = reports[kind]
    assert (report["dtype"], report["trainer"]) == ("torch.float16", "UnslothSFTTrainer")
    attention = report["attention"]
    if kind in WITHOUT_CODE:  # each of the four models is probed by three samples alone, in two layers
        assert attention.pop("transformers without boundaries") == 4 * 3 * 2
    assert list(attention) == ["transformers" if kind in WITHOUT_CODE else "own"]
    for other in ("losses_alone", "loss_packed"):
        assert report["loss"] == pytest.approx(report[other], rel=1e-4)
    assert report["loss_without_adapter"] == pytest.approx(report["plain_loss"], rel=2e-3)  # float16 beside float32
    assert report["gradient"] > 1e-3
    assert max(report["gradient_difference"], report["gradient_difference_packed"]) < 0.01 * report["gradient"]
    assert report["step_difference"] < 0.01 * report["step"]
    # Unsloth keeps the activations that fit beside the largest forward pass, of micro-batches of 4, 2 and 1 x 6 tokens
    assert report["planned_tokens"] == {"4": 24, "2": 12, "1": 6}


def command(*words: object) -> str:
    """Runs a command of the kit, which has no part in the pretence, and returns what it prints."""
    return ok(subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)).stdout


def log_of(run: Path) -> list[dict[str, Any]]:
    """What must be the same in each log of a training: not its times."""
    names = ("step", "loss", "eval_loss", "grad_norm", "tokens")
    lines = map(json.loads, (run / "trainer_log.jsonl").read_text().splitlines())
    return [{name: line[name] for name in names if name in line} for line in lines]


def test_the_whole_command_on_the_cuda_branch(tiny_model: Path, tmp_path: Path):
    """Training with packing, accumulation and evaluations; a kill after a checkpoint, going on; chat and merge."""
    from safetensors.torch import load_file

    model, rows = save_random_model(tmp_path / "short", tiny_model), tmp_path / "rows.jsonl"
    (model / "chat_template.jinja").write_text(SHORT)
    write_jsonl(rows, [{"instruction": f"{n}?", "input": "", "output": str(n % 10) * (n % 3 + 1)} for n in range(12)])
    whole, killed, on_cpu = (tmp_path / name for name in ("whole", "killed", "on_cpu"))
    settings = [f"model_name_or_path={model}", f"dataset={rows}", *SETTINGS]
    again = {"arguments": [*settings, f"output_dir={killed}"], "kill_at": None}
    runs = [
        {"arguments": [*settings, f"output_dir={whole}"], "kill_at": None},
        {**again, "kill_at": str(killed / "checkpoint-2")},
        again,
    ]
    statuses, printed = on_the_cuda_branch(tmp_path, "train", json.dumps(runs))
    assert statuses == [0, -9, 0], printed[-3000:]
    for noise in ("Filter:", "num_items_in_batch"):  # of Unsloth's trainer, at evaluations
        assert noise not in printed
    assert log_of(killed) == log_of(whole)
    assert [line["step"] for line in log_of(whole) if "eval_loss" in line] == [2, 4]
    adapter = load_file(whole / "adapter_model.safetensors")
    for name, weight in load_file(killed / "adapter_model.safetensors").items():
        assert weight.equal(adapter[name]), name

    command("train.py", *settings, f"output_dir={on_cpu}", "bf16=false")
    for line, other in zip(log_of(whole), log_of(on_cpu), strict=True):
        for key in {"loss", "eval_loss"} & set(line):
            assert line[key] == pytest.approx(other[key], rel=5e-3), (line, other)  # float16 beside float32
    assert command("chat.py", whole, "-p", "4?", "max_new_tokens=4")
    command("merge.py", whole)
    assert (whole / "merged" / "model.safetensors").is_file()
