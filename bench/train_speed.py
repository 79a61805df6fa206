"""Training a LoRA adapter: train.py beside LLaMA-Factory 0.9.5, on the same rows, in tokens a CPU-second.

    python bench/train_speed.py [STEPS]      default 20 optimizer steps of 2 x 1 rows of about 400 tokens

The embedded model in float32 weights, rank 8 on all projections, everything else the same; each contestant as it comes,
and with the settings that are best for it. A contestant runs twice, for 4 steps and for STEPS: the difference is what
the steps cost, without imports and loading. Whole processes with their children; memory and mean loss are the longer
run's, which goes once over the same rows in an order of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from merge_speed import llamafactory_python, measure
from tokenize_speed import MODEL, ROOT

FEW = 4
TO_FLOAT32 = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
LLAMA_FACTORY = """
import sys
sys.modules["torchao"] = None  # this kit's, too new for it
sys.argv = ["llamafactory-cli", "train", sys.argv[1]]
from llamafactory.cli import main
main()
"""
SAME = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "template": "chatml",
    "dataset": "rows",
    "cutoff_len": 512,
    "val_size": 0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "plot_loss": False,
    "report_to": "none",
}


def contestants(folder: Path) -> dict[str, tuple[list[str], dict[str, object]]]:
    """Name → the command before the recipe, and what its recipe says beside SAME."""
    kit = [sys.executable, str(ROOT / "train.py")]
    peer = [llamafactory_python(folder / "lf-merge-venv"), "-c", LLAMA_FACTORY]
    return {
        "train.py": (kit, {}),
        "train.py, float32": (kit, {"bf16": False}),
        "LLaMA-Factory": (peer, {}),
        "LLaMA-Factory, best": (peer, {"disable_gradient_checkpointing": True}),
    }


def main(argv: list[str]) -> None:
    steps = int(argv[0]) if argv else 20
    print(
        f"{'':<22}{'tokens':>9}{'CPU s':>8}{'wall s':>8}{'tokens/CPU s':>14}{'tokens/s':>10}{'peak MB':>9}{'loss':>8}"
    )
    with tempfile.TemporaryDirectory(prefix="train-speed-") as temporary:
        folder = Path(temporary)
        base = folder / "base"
        subprocess.run([sys.executable, "-c", TO_FLOAT32, MODEL, base], check=True, stderr=subprocess.DEVNULL)
        rows = json.loads((ROOT / "data" / "diy_small.json").read_text(encoding="utf-8"))[: 2 * steps]
        (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
        for name, (command, own) in contestants(Path(tempfile.gettempdir())).items():
            few, many = (train(folder, command, own, base, count) for count in (FEW, steps))
            tokens, cpu, wall = (many[key] - few[key] for key in ("tokens", "cpu", "wall"))
            print(
                f"{name:<22}{tokens:>9,.0f}{cpu:>8.1f}{wall:>8.1f}{tokens / cpu:>14.0f}{tokens / wall:>10.0f}"
                f"{many['memory']:>9,.0f}{many['loss']:>8.3f}",
                flush=True,
            )


def train(folder: Path, command: list[str], own: dict[str, object], base: Path, steps: int) -> dict[str, float]:
    """CPU and wall seconds, memory (MB), tokens and last loss of one run."""
    out, recipe = folder / "out", folder / "recipe.yaml"
    settings = SAME | own | {"model_name_or_path": str(base), "dataset_dir": str(folder), "max_steps": steps}
    settings |= {"output_dir": str(out), "overwrite_output_dir": True, "include_num_input_tokens_seen": True}
    recipe.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    found = measure([*command, str(recipe)], out)
    states = sorted(out.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text(encoding="utf-8"))
    losses = [line["loss"] for line in history["log_history"] if "loss" in line]
    return found | {"tokens": history["num_input_tokens_seen"], "loss": sum(losses) / len(losses)}


if __name__ == "__main__":
    main(sys.argv[1:])
