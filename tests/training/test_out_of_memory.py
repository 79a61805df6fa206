"""Memory that runs out: the micro-batch is trained in pieces, with the same result, or the run says what to change.

There is no card here: the error is raised after a backward pass, when its gradients have been added, and in
evaluations.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, WORDS, ok, run, write_jsonl

pytestmark = pytest.mark.slow

ROWS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!" * n} for n, word in enumerate(WORDS, 1)]
PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "No, I will not."} for row in ROWS]
JUDGED = [
    {"prompt": row["instruction"], "completion": row["output"], "label": i % 2 == 0} for i, row in enumerate(ROWS)
]
SETTINGS = [
    "cutoff_len=256", "max_steps=4", "per_device_train_batch_size=4", "per_device_eval_batch_size=3", "lora_rank=4",
    "learning_rate=0.01", "logging_steps=1", "eval_steps=2", "val_size=3", "bf16=false", "early_stopping=no",
]  # fmt: skip
ROUNDING = 1e-5  # of weights: Adam divides a gradient by its size, and the last digits differ between processors
PATCH = """
import accelerate, torch
from training import splitting
size, number = 0, 0
real_run, real_backward = splitting.Splitter.run, accelerate.Accelerator.backward

def run(self, batch, step):
    def counted(piece):
        global size, number
        size = piece["input_ids"].numel()
        evaluates = "prediction_step" in step.__qualname__
        number += not evaluates
        if evaluates and size > {limit} and number >= {first}:
            raise torch.OutOfMemoryError("raised by the test")
        return step(piece)
    return real_run(self, batch, counted)

def backward(self, loss, **more):
    real_backward(self, loss, **more)
    if size > {limit} and number >= {first}:
        raise torch.OutOfMemoryError("raised by the test")

accelerate.Accelerator.backward = backward
splitting.Splitter.run = run
"""


def train(model: Path, folder: Path, *more: str, limit: int = 1 << 30, first: int = 1, data: list | None = None):
    """Trains with memory for `limit` tokens from the micro-batch `first` on."""
    patched = folder.parent / "patched" / "train.py"
    patched.parent.mkdir(exist_ok=True)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom training import model\nmodel.import_unsloth()\n"
    code += PATCH.format(limit=limit, first=first)
    code += "import train\nfrom runs.configuration import run_command\nrun_command(train.main, train.__doc__)\n"
    patched.write_text(code, encoding="utf-8")
    rows = write_jsonl(folder.parent / "rows.jsonl", data or ROWS)
    named = [f"model_name_or_path={model}", f"dataset={rows}", f"output_dir={folder}"]
    return run(str(patched), *named, *SETTINGS, *more, cwd=folder.parent)


def learned(folder: Path) -> tuple[dict, list[dict]]:
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return load_file(folder / "adapter_model.safetensors"), lines


@pytest.mark.parametrize(
    ("data", "first", "limit", "settings"),
    [
        (ROWS, 1, 170, ["gradient_accumulation_steps=1"]),
        (ROWS, 4, 170, ["gradient_accumulation_steps=2", "packing=true", "cutoff_len=400"]),
        (PAIRS, 2, 260, ["stage=dpo", "pref_ftx=0.3", "gradient_accumulation_steps=2"]),
        (JUDGED, 2, 260, ["stage=kto", "pref_ftx=0.3", "gradient_accumulation_steps=2"]),
    ],
    ids=["at-the-first-step", "in-the-middle-with-accumulation-and-packing", "dpo", "kto"],
)
def test_a_run_whose_memory_ran_out_learns_the_same(tiny_model, tmp_path, data, first, limit, settings):
    import torch

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    ok(train(tiny_model, undisturbed, *settings, data=data))
    result = ok(train(tiny_model, disturbed, *settings, limit=limit, first=first, data=data))
    assert 1 <= result.stderr.count("out of memory: a batch") <= 5
    (weights, log), (expected, expected_log) = learned(disturbed), learned(undisturbed)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=ROUNDING, msg=name)
    for line, other in zip(log, expected_log, strict=True):
        for key in {"loss", "eval_loss", "eval_reward_margin", "tokens"} & set(line):
            assert line[key] == pytest.approx(other[key], rel=1e-6 if data is ROWS else 1e-5), (line, other)


def test_a_sample_that_does_not_fit_ends_the_run_with_what_to_change(tiny_model, tmp_path):
    result = train(tiny_model, tmp_path / "run", limit=20)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "out of memory: a batch of" in result.stderr, result.stderr
    assert "quantization_bit=4, cutoff_len=" in result.stderr
