"""The kit on a card that is held to 24 GB, with models of the shape of Llama-3-8B: memory, speed, exactness.

    python bench/gpu.py first              a call of at most 9 minutes: card model train full train4 full4 packed
    python bench/gpu.py second             the other one: card model eight other baseline exact resume answer
    python bench/gpu.py STEP ...
        card      what the card can do: bfloat16 products, copies; the versions
        model     makes the model: random weights, and a tokenizer of bytes with llama3's control tokens
        train     the second tutorial file on it, as it is; its samples are shorter than cutoff_len
        full      the same on samples that fill cutoff_len: the highest memory that the file can need
        train4    the same as train in 4 bit (QLoRA)
        full4     the same as full in 4 bit
        packed    the same as train with packing
        eight     the same as train in 8 bit
        other     an OLMo-2 of 1.5 billion weights, which Unsloth has no code of its own for
        baseline  plain transformers and PEFT on samples as long as those of full, with batch 1
        exact     tests/training/exact_training.py: losses, gradients and steps beside plain PyTorch's, in bfloat16
        resume    a small model with packing and evaluations: undisturbed, and killed and resumed
        answer    bench/generate_speed.py: the engine, model.generate and Unsloth's generation
    --tiny        tiny models, also without a card: proves that the steps run, and nothing else
    --minutes N   no step goes on for longer, counted from the start (default 9); what is left is named
    --work DIR    where the model (16 GB) and the runs lie between the calls; default: onecard-gpu in /tmp

Every step is a process of its own and prints a row; its own output is DIR/STEP.log. A row of a training tells the peak
beside training/memory.py's estimate, the speed, the bytes of loaded weights by type (4 bit is Params4bit, 8 bit
Int8Params), and of one step, watched by PyTorch's profiler, the share of its time in which the card computes and the
kernel of the attention. Of the 24 GB, 0.6 are left to the CUDA context, which the limit does not see. A token of LoRA
training is counted as 4 floating-point operations a weight (forward, and the gradients of the activations); with the
activations computed again it is 6, so at most two thirds of that ceiling can be reached.

Beside torch 2.11 Unsloth's fused loss can train nothing: there the logits are made whole (UNSLOTH_RETURN_LOGITS), which
the first row says, and every peak is higher by them.

IT HAS NOT RUN ON A CARD YET: only --tiny has, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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

from gpu_probe import WATCHED, hold_to_limit, on_card, watch  # noqa: E402

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
OLMO2 = {
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
RECIPE = ROOT / "tests" / "tutorial" / "train_2024-07-09.yaml"


class Place(NamedTuple):
    """Where the steps leave what the later ones need, and whether all is to be tiny."""

    work: Path
    tiny: bool


class NeedsCard(Exception):
    """A step that cannot run without a card."""


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


def avoid_fused_loss() -> bool:
    """Has Unsloth make the logits whole where its fused loss trains nothing; returns whether that is so."""
    from importlib.metadata import version

    if broken := version("torch").startswith("2.11."):
        os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    return broken


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
    loss = "unfused loss" if avoid_fused_loss() else "fused loss"
    return (
        f"{name}: {flops / 1e12:.3g} TFLOP/s in bfloat16, {copied / 1e12:.3g} TB/s, torch {torch.__version__}, {loss}"
    )


def model(at: Place) -> str:
    make_model(at.work / "model", {} if at.tiny else LLAMA3_8B)
    size = sum(file.stat().st_size for file in (at.work / "model").glob("*.safetensors"))
    return f"{matrix_weights(at.work / 'model'):,} weights that a token is multiplied with, {size / 1e9:.1f} GB"


def make_model(folder: Path, shape: dict[str, object], kind: str = "llama") -> Path:
    """The tests' tiny model, or one of another kind and shape with its tokenizer; random weights in bfloat16."""
    import torch
    from conftest import make_tiny_model
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "made").exists():
        return folder
    make_tiny_model(folder)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    tiny = json.loads((folder / "config.json").read_text())
    config = AutoConfig.for_model(kind, **{**{name: tiny[name] for name in names}, **shape})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_card() else "cpu"):
        made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder, max_shard_size="20GB")
    (folder / "made").touch()
    return folder


def matrix_weights(folder: Path) -> int:
    """How many weights a token is multiplied with: all but the table of embeddings."""
    import math

    from training.memory import tensor_shapes

    shapes = tensor_shapes(folder)
    tied = "lm_head.weight" not in shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if tied or "embed_tokens" not in name)


def train(at: Place) -> str:
    return trained(at, "train")


def full(at: Place) -> str:
    return trained(at, "full", f"dataset={full_rows(at)}")


def train4(at: Place) -> str:
    return trained(at, "train4", "quantization_bit=4")


def full4(at: Place) -> str:
    return trained(at, "full4", "quantization_bit=4", f"dataset={full_rows(at)}")


def packed(at: Place) -> str:
    return trained(at, "packed", "packing=true")


def eight(at: Place) -> str:
    if not on_card():
        raise NeedsCard
    return trained(at, "eight", "quantization_bit=8")


def other(at: Place) -> str:
    folder = make_model(at.work / "olmo2", {} if at.tiny else OLMO2, "olmo2")
    return trained(at, "other", model=folder)


def full_rows(at: Place) -> Path:
    """Samples that nearly fill cutoff_len; a letter is a token."""
    row = {"instruction": "Go on.", "input": "", "output": "onecard " * (full_length(at) // 8 - 8)}
    path = at.work / "full.jsonl"
    path.write_text((json.dumps(row) + "\n") * 64, encoding="utf-8")
    return path


def full_length(at: Place) -> int:
    return 256 if at.tiny else 4096


def trained(at: Place, name: str, *more: str, model: Path | None = None) -> str:
    """Runs train.py in this process, which is held to the limit, and reads its run folder."""
    from training.model import import_unsloth

    avoid_fused_loss()
    import_unsloth()
    hold_to_limit()
    watch(found := {})
    os.chdir(ROOT)
    import train as script

    model, folder = model or at.work / "model", at.work / name
    settings = [f"model_name_or_path={model}", f"output_dir={folder}", f"max_steps={WATCHED}", "logging_steps=1"]
    settings += ["val_size=0", "overwrite_output_dir=true", *more]
    script.main([str(RECIPE), *settings, *(["cutoff_len=256", "gradient_accumulation_steps=2"] if at.tiny else [])])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    first, before, last = lines[0], lines[-2], lines[-1]  # the first step compiles the kernels, the last is profiled
    speed = (before["tokens"] - first["tokens"]) / max(0.1, before["elapsed"] - first["elapsed"])
    ceiling = json.loads((at.work / "card.json").read_text())["flops"] / (4 * matrix_weights(model))
    loaded = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in found["loaded"].items())
    busy = "-" if found["busy"] is None else f"{100 * found['busy']:.0f} %"
    return (
        f"peak {run['peak_memory'] / 1e9:.2f} GB (estimate {found['estimate'] / 1e9:.2f}), {speed:,.0f} tokens/s, "
        f"{100 * speed / ceiling:.0f} % of the ceiling ({ceiling:,.0f}), card busy {busy}, first step "
        f"{first['elapsed']:.0f} s, loss {first['loss']:.3f} to {last['loss']:.3f}; GB loaded: {loaded}; attention: "
        f"{found['attention']}"
    )


def baseline(at: Place) -> str:
    """transformers and PEFT as their documentation shows, with gradient checkpointing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hold_to_limit()
    device, length = "cuda" if on_card() else "cpu", full_length(at)
    base = AutoModelForCausalLM.from_pretrained(at.work / "model", dtype=torch.bfloat16, device_map=device)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-5)
    ids = torch.randint(0, 256, (1, length), device=device)

    def step() -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    speed = length / seconds(step, 3)
    peak = torch.cuda.max_memory_reserved() / 1e9 if on_card() else 0
    return f"peak {peak:.2f} GB, {speed:,.0f} tokens/s with one sample of {length} tokens a step"


def exact(at: Place) -> str:
    """Of the tiny model, and of two layers of the large one."""
    avoid_fused_loss()
    rows, shapes = [], {"tiny": {}} if at.tiny else {"tiny": {}, "two layers": {**LLAMA3_8B, "num_hidden_layers": 2}}
    for name, shape in shapes.items():
        folder = make_model(at.work / f"exact-{name.replace(' ', '-')}", shape)
        said = run(ROOT / "tests" / "training" / "exact_training.py", folder)
        found = json.loads(said.splitlines()[-1])
        print(found)
        loss = max(abs(found["loss"] / found[other] - 1) for other in ("losses_alone", "loss_packed"))
        gradient = max(found["gradient_difference"], found["gradient_difference_packed"]) / found["gradient"]
        reference = abs(found["loss_without_adapter"] / found["reference_loss"] - 1)
        rows.append(
            f"{name}, {found['dtype']}: losses differ by {loss:.0e}, gradients by {100 * gradient:.2f} %, steps by "
            f"{100 * found['step_difference'] / found['step']:.2f} %, the loss from float32's by {reference:.0e}"
        )
    return "; ".join(rows) + " (asked: 1e-03, 2 %, 2 %, 1e-03)"


def run(script: Path, *words: object) -> str:
    """What a script prints; ends this step where it fails."""
    result = subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout


def resume(at: Place) -> str:
    """The same training twice, once killed after its second step."""
    import shutil

    from safetensors.torch import load_file

    avoid_fused_loss()
    rows, folders = at.work / "short.jsonl", [at.work / "whole", at.work / "killed"]
    row = '{"instruction": "Say %d.", "input": "", "output": "%s"}\n'
    rows.write_text("".join(row % (n, str(n) * (n % 7 + 1)) for n in range(40)), encoding="utf-8")
    settings = [f"model_name_or_path={make_model(at.work / 'small', {})}", f"dataset={rows}", "cutoff_len=256"]
    settings += ["max_steps=8", "eval_steps=2", "val_size=8", "packing=true", "learning_rate=0.01", "logging_steps=1"]
    settings += ["per_device_train_batch_size=2", "gradient_accumulation_steps=2", "early_stopping=no"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    whole = run(ROOT / "train.py", *settings, f"output_dir={folders[0]}")
    killed = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *settings, f"output_dir={folders[1]}"], cwd=ROOT)
    while killed.poll() is None and not (folders[1] / "checkpoint-2").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    print(whole, run(ROOT / "train.py", *settings, f"output_dir={folders[1]}"))
    logs = [[json.loads(line) for line in (f / "trainer_log.jsonl").read_text().splitlines()] for f in folders]
    evaluated = [line["eval_loss"] for line in logs[0] if "eval_loss" in line]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    difference = max(float((one[name].float() - two[name].float()).abs().max()) for name in one)
    last = [line["step"] for line in logs[1] if "loss" in line][-1]
    return (
        f"loss {logs[0][0]['loss']:.3f} to {evaluated[-1]:.3f} held out in {len(evaluated)} evaluations; killed after "
        f"step 2 and resumed to step {last}: adapters differ by {difference:.0e}"
    )


def answer(at: Place) -> str:
    said = run(ROOT / "bench" / "generate_speed.py", at.work / "model", "--unsloth")
    print(said)
    found = [line for line in said.splitlines() if line.startswith(("model.generate", "engine ", "Unsloth"))]
    speeds = [line if "failed" in line else f"{line[:18].strip()} {line[18:30].strip()} tokens/s" for line in found]
    ceiling = json.loads((at.work / "card.json").read_text())["bytes"] / 2 / (2 * matrix_weights(at.work / "model"))
    return f"{', '.join(speeds)}; {ceiling:,.0f} could be read out of the memory"


# ---------------------------------------------------------------------------------------------------------------------

FIRST = (card, model, train, full, train4, full4, packed)
SECOND = (card, model, eight, other, baseline, exact, resume, answer)
CALLS = {"first": FIRST, "second": SECOND}
STEPS_BY_NAME = {step.__name__: step for step in (*FIRST, *SECOND)}


def named_steps(words: list[str]) -> list[str]:
    """The steps that words of the command line name, in their order; all where there are none."""
    named = [step.__name__ for word in words for step in CALLS.get(word, ())] + [w for w in words if w in STEPS_BY_NAME]
    return [name for name in STEPS_BY_NAME if not words or name in named]


def run_step(name: str, given: argparse.Namespace, until: float) -> str:
    """Runs one step in a process of its own, until `until` at the longest; returns its row."""
    log, row = given.work / f"{name}.log", given.work / f"{name}.row"
    row.unlink(missing_ok=True)
    if time.monotonic() >= until:
        return "left out: no time left"
    command = [
        sys.executable,
        __file__,
        name,
        "--alone",
        "--work",
        str(given.work),
        *(["--tiny"] if given.tiny else []),
    ]
    try:
        with log.open("w") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=until - time.monotonic())
    except subprocess.TimeoutExpired:
        return f"stopped: no time left ({log})"
    said = log.read_text(errors="replace").strip().splitlines()
    return row.read_text(encoding="utf-8") if row.exists() else f"FAILED: {said[-1] if said else 'no word'} ({log})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*CALLS, *STEPS_BY_NAME, []], metavar="STEP")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--work", type=Path, metavar="DIR", default=Path(tempfile.gettempdir()) / "onecard-gpu")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.alone:
        (name,) = given.steps
        try:
            row = STEPS_BY_NAME[name](Place(given.work, given.tiny))
        except NeedsCard:
            row = "needs a card"
        (given.work / f"{name}.row").write_text(row, encoding="utf-8")
        return
    until = time.monotonic() + 60 * given.minutes
    for name in named_steps(given.steps):
        started = time.monotonic()
        told = run_step(name, given, until)
        print(f"{name:<9}{time.monotonic() - started:>5.0f} s  {told}", flush=True)


if __name__ == "__main__":
    main()
