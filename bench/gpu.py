"""The kit on a card that is held to 24 GB, with a model of the shape of Llama-3-8B: memory, speed, exactness.

    python bench/gpu.py [STEP ...]         default: all, in this order
        card      what the card can do: bfloat16 products, copies
        model     makes the model: random weights, and a tokenizer of bytes with llama3's control tokens
        train     the second tutorial file on it, as it is; its samples are shorter than cutoff_len
        full      the same on samples that fill cutoff_len: the highest memory that the file can need
        train4    the same as train in 4 bit (QLoRA)
        full4     the same as full in 4 bit
        exact     tests/training/exact_training.py: losses, gradients and steps beside plain PyTorch's, in bfloat16
        answer    bench/generate_speed.py: the engine, model.generate and Unsloth's generation
    --tiny        a tiny model, also without a card: proves that the steps run, and nothing else
    --work DIR    where the model (16 GB) and the runs lie between the steps; default: onecard-gpu in /tmp

It proves that the tutorial's file trains on 24 GB, how much of the card's speed that uses, that what is trained is
exact there, and which way of answering is the fastest. Every step is a process of its own and prints a row; its own
output is DIR/STEP.log. Of the 24 GB, 0.6 are left to the CUDA context, which the limit does not see; Unsloth, which
sizes its buffers by the free memory, is told the limit's. A token of LoRA training is counted as 4 floating-point
operations a weight (forward, and the gradients of the activations); with the activations computed again it is 6, so at
most two thirds of that ceiling can be reached.

IT HAS NOT RUN ON A CARD YET: only --tiny has, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

LIMIT, CONTEXT = 24e9, 0.6e9
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
RECIPE = ROOT / "tests" / "tutorial" / "train_2024-07-09.yaml"
STEPS = 5


class Place(NamedTuple):
    """Where the steps leave what the later ones need, and whether all is to be tiny."""

    work: Path
    tiny: bool


def on_card() -> bool:
    import torch

    return torch.cuda.is_available()


def seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, the mean of `times` after a warm-up."""
    import torch

    wait = torch.cuda.synchronize if on_card() else lambda: None
    work()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


# ---------------------------------------------------------------------------------------------------------------------
# The steps; each runs in a process of its own and returns its row


def card(at: Place) -> str:
    import torch

    device, size = ("cuda", 8192) if on_card() else ("cpu", 512)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros((1 << 31) if on_card() else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / seconds(lambda: left @ right, 20)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source), 20)
    (at.work / "card.json").write_text(json.dumps({"flops": flops, "bytes": copied}))
    name = torch.cuda.get_device_name() if on_card() else "no card"
    return f"{name}: {flops / 1e12:.3g} TFLOP/s in bfloat16, {copied / 1e12:.3g} TB/s, torch {torch.__version__}"


def model(at: Place) -> str:
    make_model(at.work / "model", {} if at.tiny else LLAMA3_8B)
    size = sum(file.stat().st_size for file in (at.work / "model").glob("*.safetensors"))
    return f"{matrix_weights(at.work / 'model'):,} weights that a token is multiplied with, {size / 1e9:.1f} GB"


def make_model(folder: Path, shape: dict[str, object]) -> None:
    """The tests' tiny model, or one of another shape with its tokenizer; random weights in bfloat16."""
    import torch
    from conftest import make_tiny_model
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    if shape:
        config = LlamaConfig(**{**config.to_dict(), **shape})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_card() else "cpu"):
        made = LlamaForCausalLM(config)
    made.save_pretrained(folder, max_shard_size="20GB")


def matrix_weights(folder: Path) -> int:
    """How many weights a token is multiplied with: all but the table of embeddings."""
    import math

    from training.memory import tensor_shapes

    shapes = tensor_shapes(folder)
    tied = "lm_head.weight" not in shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if tied or "embed_tokens" not in name)


def train(at: Place) -> str:
    return trained(at, "train", [])


def full(at: Place) -> str:
    return trained(at, "full", [f"dataset={full_rows(at)}"])


def train4(at: Place) -> str:
    return trained(at, "train4", ["quantization_bit=4"])


def full4(at: Place) -> str:
    return trained(at, "full4", ["quantization_bit=4", f"dataset={full_rows(at)}"])


def full_rows(at: Place) -> Path:
    """Samples that nearly fill cutoff_len; a letter is a token."""
    row = {"instruction": "Go on.", "input": "", "output": "onecard " * ((256 if at.tiny else 4096) // 8 - 8)}
    path = at.work / "full.jsonl"
    path.write_text((json.dumps(row) + "\n") * 64, encoding="utf-8")
    return path


def trained(at: Place, name: str, more: list[str]) -> str:
    """Runs train.py in this process, which is held to the limit, and reads its run folder."""
    hold_to_limit()
    os.chdir(ROOT)
    import train as script

    folder = at.work / name
    settings = [
        f"model_name_or_path={at.work / 'model'}",
        f"output_dir={folder}",
        f"max_steps={STEPS}",
        "logging_steps=1",
    ]
    settings += ["val_size=0", "overwrite_output_dir=true", *more]
    script.main([str(RECIPE), *settings, *(["cutoff_len=256", "gradient_accumulation_steps=2"] if at.tiny else [])])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]  # the first step compiles the kernels
    speed = (last["tokens"] - first["tokens"]) / max(0.1, last["elapsed"] - first["elapsed"])
    ceiling = json.loads((at.work / "card.json").read_text())["flops"] / (4 * matrix_weights(at.work / "model"))
    return (
        f"peak {run['peak_memory'] / 1e9:.2f} GB, {speed:,.0f} tokens/s, {100 * speed / ceiling:.0f} % of the ceiling "
        f"({ceiling:,.0f}), first step {first['elapsed']:.0f} s, loss {first['loss']:.3f} to {last['loss']:.3f}"
    )


def hold_to_limit() -> None:
    """Makes the card as small as one of 24 GB, to PyTorch's allocator and to those who ask how much is free."""
    import torch

    if not on_card():
        return
    room = int(LIMIT - CONTEXT)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)

    def mem_get_info(_: object = None) -> tuple[int, int]:
        return room - torch.cuda.memory_reserved(), int(LIMIT)

    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = mem_get_info


def exact(at: Place) -> str:
    """Of the tiny model, and of two layers of the large one."""
    rows, shapes = [], {"tiny": {}} if at.tiny else {"tiny": {}, "two layers": {**LLAMA3_8B, "num_hidden_layers": 2}}
    for name, shape in shapes.items():
        folder = at.work / f"exact-{name.replace(' ', '-')}"
        make_model(folder, shape)
        command = [sys.executable, str(ROOT / "tests" / "training" / "exact_training.py"), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr)
        found = json.loads(result.stdout.splitlines()[-1])
        print(found)
        loss = max(abs(found["loss"] / found[other] - 1) for other in ("losses_alone", "loss_packed"))
        gradient = max(found["gradient_difference"], found["gradient_difference_packed"]) / found["gradient"]
        reference = abs(found["loss_without_adapter"] / found["reference_loss"] - 1)
        rows.append(
            f"{name}, {found['dtype']}: losses differ by {loss:.0e}, gradients by {100 * gradient:.2f} %, steps by "
            f"{100 * found['step_difference'] / found['step']:.2f} %, the loss from float32's by {reference:.0e}"
        )
    return "; ".join(rows) + " (asked: 1e-03, 2 %, 2 %, 1e-03)"


def answer(at: Place) -> str:
    command = [sys.executable, str(ROOT / "bench" / "generate_speed.py"), str(at.work / "model"), "--unsloth"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    print(result.stdout)
    found = [line for line in result.stdout.splitlines() if line.startswith(("model.generate", "engine ", "Unsloth"))]
    speeds = [line if "failed" in line else f"{line[:18].strip()} {line[18:30].strip()} tokens/s" for line in found]
    ceiling = json.loads((at.work / "card.json").read_text())["bytes"] / 2 / (2 * matrix_weights(at.work / "model"))
    return f"{', '.join(speeds)}; {ceiling:,.0f} could be read out of the memory"


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    steps = {step.__name__: step for step in (card, model, train, full, train4, full4, exact, answer)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*steps, []], metavar="STEP")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, metavar="DIR", default=Path(tempfile.gettempdir()) / "onecard-gpu")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.alone:
        (work / f"{given.steps[0]}.row").write_text(steps[given.steps[0]](Place(work, given.tiny)), encoding="utf-8")
        return
    for name in given.steps or steps:
        started, log, row = time.monotonic(), work / f"{name}.log", work / f"{name}.row"
        row.unlink(missing_ok=True)
        command = [sys.executable, __file__, name, "--alone", "--work", str(work), *(["--tiny"] if given.tiny else [])]
        with log.open("w") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        said = log.read_text(errors="replace").strip().splitlines()
        told = row.read_text(encoding="utf-8") if row.exists() else f"FAILED: {said[-1] if said else 'no word'} ({log})"
        print(f"{name:<8}{time.monotonic() - started:>6.0f} s  {told}", flush=True)


if __name__ == "__main__":
    main()
