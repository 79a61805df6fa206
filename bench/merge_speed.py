"""Merging an adapter: merge.py beside LLaMA-Factory's export and PEFT, and beside copying the files.

    python bench/merge_speed.py [ROUNDS]      the embedded model, rank 8 on all projections; default 3 rounds in turn
    python bench/merge_speed.py --8b [N]      the shape of Llama-3-8B in bfloat16 with N layers (32), rank 16

Whole processes, imports and children included, nothing verified afterwards (neither peer does). Every contestant reads
the same files and writes weights, tokenizer and configuration. The 8B base is a sparse file of zeros: reading it costs
no disk, neither to the merge nor to the copy, so both are measured by what they compute and write.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tokenize_speed import MODEL, ROOT, peer_python

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ADAPTER = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, weight in model.named_parameters():
    if "lora_B" in name:
        weight.data.normal_(0, 0.01)
model.save_pretrained(sys.argv[2])
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
LLAMA_FACTORY = """
import sys
sys.modules["torchao"] = None  # this kit's, too new for it
sys.argv = ["llamafactory-cli", "export", sys.argv[1]]
from llamafactory.cli import main
main()
"""
COPY = """
import os, shutil, sys
shutil._USE_CP_SENDFILE = False  # a sparse file would stay sparse
os.makedirs(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    shutil.copy(os.path.join(sys.argv[1], name), sys.argv[2])
    with open(os.path.join(sys.argv[2], name), "rb+") as file:
        os.fsync(file)
"""
# What LLaMA-Factory 0.9.5 pins: it does not import beside this kit's newer ones.
PINNED = ["transformers==5.6.0", "tokenizers==0.22.2", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0"]
LLAMA3_8B = {"hidden": 4096, "inner": 14336, "heads": 1024, "vocabulary": 128256}


def llamafactory_python(folder: Path) -> str:
    """The interpreter of a throw-away environment with LLaMA-Factory and the releases it wants."""
    new = not folder.exists()
    python = peer_python(folder)
    if new:
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PINNED], check=True)
    return str(python)


def measure(command: list[str], output: Path) -> dict[str, float]:
    """CPU seconds, wall seconds and peak memory (MB) of a process with its children; `output` is removed before."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    environment = os.environ | {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status or not any(output.glob("*.safetensors")):
            told.seek(0)
            sys.exit(told.read().decode()[-3000:])
    wall = time.monotonic() - started
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "memory": usage.ru_maxrss / 1024}


def make_run(folder: Path, base: Path, rank: int) -> None:
    """The small files of a finished run beside its adapter, as train.py writes them."""
    import common
    from runs.files import write_json, write_text

    for path in (base / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")):
        shutil.copy(path, folder)
    config = common.Config(model_name_or_path=str(base), output_dir=str(folder), lora_rank=rank)
    write_text(folder / "config.yaml", common.dump_config(config))
    write_json(folder / "run.json", {"status": "finished", "stop": ["<|im_end|>"]})


def show(title: str, results: list[dict[str, float]], kit: dict[str, float]) -> dict[str, float]:
    """Prints the medians of one contestant, and its CPU time and memory as multiples of the kit's."""
    found = {key: median(result[key] for result in results) for key in results[0]}
    ratios = f"{found['cpu'] / kit['cpu']:>8.1f} x{found['memory'] / kit['memory']:>8.1f} x" if kit else ""
    print(f"{title:<26}{found['cpu']:>9.2f}{found['wall']:>9.1f}{found['memory']:>10,.0f}{ratios}", flush=True)
    return found


def small(rounds: int, folder: Path) -> None:
    run, out = folder / "run", folder / "out"
    subprocess.run([sys.executable, "-c", ADAPTER, MODEL, run], check=True, stderr=subprocess.DEVNULL)
    recipe = folder / "export.yaml"
    keys = {"model_name_or_path": MODEL, "adapter_name_or_path": run, "template": "chatml", "export_dir": out}
    keys |= {"finetuning_type": "lora", "export_size": 5, "export_device": "cpu", "export_legacy_format": "false"}
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    kit = [sys.executable, str(ROOT / "merge.py")]
    python = llamafactory_python(Path(tempfile.gettempdir()) / "lf-merge-venv")
    commands = {
        "merge.py, a run": [*kit, str(run), f"export_dir={out}", "--no-verify"],
        "merge.py, a merge file": [*kit, str(recipe), "--no-verify"],
        "LLaMA-Factory 0.9.5": [python, "-c", LLAMA_FACTORY, str(recipe)],
        "PEFT": [sys.executable, "-c", PEFT, str(MODEL), str(run), str(out)],
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    make_run(run, MODEL, 8)
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(measure(command, out))
    kit_median: dict[str, float] = {}
    for name, found in results.items():
        medians = show(name, found, kit_median)
        kit_median = kit_median or medians


def big(layers: int, folder: Path) -> None:
    base, run, out = folder / "base", folder / "run", folder / "out"
    make_8b(layers, base, run)
    make_run(run, base, 16)
    merge = [sys.executable, str(ROOT / "merge.py"), str(run), f"export_dir={out}", "--no-verify"]
    results = []
    for _ in range(2):  # in turn: a disk has moods
        results.append(measure([sys.executable, "-c", COPY, str(base), str(out)], out))
        results.append(measure(merge, out))
    copied = show("copying the files", results[::2], {})
    merged = show("merge.py", results[1::2], {})
    size = (base / "model.safetensors").stat().st_size / 1e9
    print(f"{size:.1f} GB: merging takes {merged['wall'] / copied['wall']:.2f} times as long as copying")


def make_8b(layers: int, base: Path, run: Path) -> None:
    """A base of the shape of Llama-3-8B, all zeros, and a random adapter of rank 16 on all projections."""
    import numpy as np
    from conftest import write_hollow_weights
    from safetensors.numpy import save_file

    shape = LLAMA3_8B
    hidden, inner, heads = shape["hidden"], shape["inner"], shape["heads"]
    linear = {
        f"self_attn.{n}_proj": s
        for n, s in zip("qkvo", [(hidden,) * 2, *[(heads, hidden)] * 2, (hidden,) * 2], strict=True)
    }
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    weights = {
        "model.embed_tokens.weight": (shape["vocabulary"], hidden),
        "lm_head.weight": (shape["vocabulary"], hidden),
    }
    weights["model.norm.weight"] = (hidden,)
    low, rng = {}, np.random.default_rng(0)
    for layer in range(layers):
        for name, size in linear.items():
            module = f"model.layers.{layer}.{name}"
            weights[f"{module}.weight"] = size
            low[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((16, size[1]), np.float32) * 0.01
            low[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((size[0], 16), np.float32) * 0.01
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    base.mkdir()
    write_hollow_weights(base / "model.safetensors", weights)
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, base)
    run.mkdir()
    save_file(low, run / "adapter_model.safetensors")
    (run / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 32}')


def main(argv: list[str]) -> None:
    print(f"{'':<26}{'CPU s':>9}{'wall s':>9}{'peak MB':>10}{'CPU':>8}  {'memory':>8}")
    with tempfile.TemporaryDirectory(prefix="merge-speed-") as temporary:
        if "--8b" in argv:
            big(int(argv[1]) if len(argv) > 1 else 32, Path(temporary))
        else:
            small(int(argv[0]) if argv else 3, Path(temporary))


if __name__ == "__main__":
    main(sys.argv[1:])
