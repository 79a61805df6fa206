"""Training a LoRA adapter: this kit beside LLaMA-Factory, TRL with PEFT, and Unsloth's notebooks, at the same job.

    python bench/compare.py [--jobs identity general fraud] [--precisions float32 bfloat16] [--only NAME ...]
                            [--steps N] [--threads N]

Every contestant gets the same rows in the same order, the same first adapter (rank 8 on all projections), batch,
learning rate, optimizer and ChatML in which the end of the turn is the last learned token; the probe (peers/probe.py)
counts what each of them really sees. A row counts where every step has as many tokens and learned tokens as train.py's
and its loss lies within TOLERANCE of train.py's in float32. Otherwise the contestants run as they come.

Start-up is from the process's start to its first batch. Speed leaves out the first step. The ceiling is what plain
products of this model's shapes reach, measured after the first contestant of each table; the share counts only
operations that must be done: no gradient of a frozen weight, and the output layer for learned tokens alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merge_speed import llamafactory_python
from tokenize_speed import MODEL, ROOT

PEERS = Path(__file__).resolve().parent / "peers"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
OF_PEERS: dict[str, Any] = {"data_seed": 42, "use_cpu": True}  # else they refuse bfloat16 without a card
TOLERANCE = {"float32": 0.01, "bfloat16": 0.03}  # relative, of a step's loss
PREPARE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
source, base, adapter, rank, *targets = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
model.save_pretrained(base)
AutoTokenizer.from_pretrained(source).save_pretrained(base)
torch.manual_seed(0)
lora = LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules=targets, task_type="CAUSAL_LM")
lora.base_model_name_or_path = base
get_peft_model(model, lora).save_pretrained(adapter)
"""
CEILING = """
import json, sys, time, torch
dtype, shapes = getattr(torch, sys.argv[1]), json.loads(sys.argv[2])
flops = seconds = 0
for rows, inner, columns, times in shapes:
    x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    x @ w.t()
    begin = time.process_time()
    for _ in range(5):
        x @ w.t()
    seconds += times * (time.process_time() - begin) / 5
    flops += times * 2 * rows * inner * columns
print(flops / seconds)
"""


HEADER = """\
| | start-up s | tokens/s | tokens/CPU s | peak MB | of the ceiling | loss: first, middle, last | counts |
|---|---|---|---|---|---|---|---|"""


class Job(NamedTuple):
    title: str
    batch: int
    length: int
    steps: int
    packed: bool  # whether packing has something to do


JOBS = {
    "identity": Job("identity rows", 8, 256, 8, True),
    "general": Job("general instructions", 2, 2048, 5, True),
    "fraud": Job("fraud prompts", 1, 4096, 3, False),
}


@dataclass
class Result:
    """A training that the probe has watched."""

    startup: float  # seconds
    memory: float  # MB
    batches: list[dict[str, float]]
    losses: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """Seconds of all steps but the first."""
        return self.batches[-1]["end"] - self.batches[1]["begin"]

    @property
    def cpu(self) -> float:
        return self.batches[-1]["cpu_end"] - self.batches[1]["cpu_begin"]

    @property
    def tokens(self) -> int:
        """Of these steps, without padding."""
        return sum(batch["tokens"] for batch in self.batches[1:])

    @property
    def counts(self) -> list[tuple[float, float]]:
        return [(batch["tokens"], batch["learned"]) for batch in self.batches]


# ---------------------------------------------------------------------------------------------------------------------
# The jobs' rows


def make_rows(job: str, count: int, folder: Path) -> list[dict[str, str]]:
    """`count` rows with "instruction" and "output"; the same at every call."""
    if job == "identity":
        text = (ROOT / "data" / "identity.json").read_text(encoding="utf-8")
        rows = json.loads(text.replace("{{name}}", "onecard").replace("{{author}}", "its authors"))
    elif job == "general":
        rows = general_rows(count)
    else:
        make = [sys.executable, str(ROOT / "data" / "make_diy.py"), "--out", str(folder / "fraud"), "--overwrite"]
        subprocess.run(
            [*make, "--accounts", "200", "--max-tokens", "4000", "--window", "80"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = json.loads((folder / "fraud.json").read_text(encoding="utf-8"))
        rows.sort(key=lambda row: -len(row["instruction"]))
    if len(rows) < count:
        sys.exit(f"{job} has {len(rows)} rows, not {count}: fewer --steps")
    asked = ["\n".join(filter(None, (row["instruction"], row.get("input")))) for row in rows[:count]]
    return [
        {"instruction": question, "input": "", "output": row["output"]}
        for question, row in zip(asked, rows, strict=False)
    ]


def general_rows(count: int) -> list[dict[str, str]]:
    """Questions whose answers are passages of this kit's own documentation, of 250 to 8,000 characters."""
    import random

    text = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")) if "zh" not in path.name
    )
    text = text.replace("<|", "< |")  # a control token in a text is text to train.py, and one token to the others
    draw, rows = random.Random(0), []
    for number in range(count):
        length = int(min(max(draw.lognormvariate(7.4, 0.8), 250), 8000))
        begin = draw.randrange(len(text) - length)
        rows.append(
            {"instruction": f"Write passage {number} of the manual.", "output": text[begin : begin + length].strip()}
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The contestants


class Task(NamedTuple):
    """One job in one precision, and the folder with everything that it reads."""

    folder: Path
    job: Job
    precision: str
    steps: int

    @property
    def common(self) -> dict[str, Any]:
        """Settings that transformers, the kit and LLaMA-Factory call by the same names."""
        return {
            "output_dir": str(self.folder / "out"),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.job.batch,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "seed": 42,
            "bf16": self.precision == "bfloat16",
            "logging_steps": 1,
            "report_to": "none",
        }

    def recipe(self, **own: Any) -> Path:
        """The recipe for the kit and for LLaMA-Factory."""
        settings = self.common | own
        settings |= {
            "model_name_or_path": str(self.folder / "base"),
            "adapter_name_or_path": str(self.folder / "adapter"),
        }
        settings |= {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": RANK,
            "lora_target": "all",
        }
        settings |= {"template": "chatml", "dataset": "rows", "dataset_dir": str(self.folder), "val_size": 0}
        settings |= {"cutoff_len": self.job.length, "overwrite_output_dir": True, "plot_loss": False}
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        return path

    def settings(self) -> Path:
        """The settings of the two scripts in peers/."""
        rows = json.loads((self.folder / "rows.json").read_text(encoding="utf-8"))
        turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        found = {
            "model": str(self.folder / "base"),
            "adapter": str(self.folder / "adapter"),
            "targets": TARGETS,
            "length": self.job.length,
            "arguments": self.common | OF_PEERS,
            "rows": [
                {"prompt": turn.format(row["instruction"]), "completion": row["output"] + "<|im_end|>"} for row in rows
            ],
        }
        path = self.folder / "settings.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        return path


def command(name: str, task: Task) -> list[str]:
    """The interpreter, script and file of a contestant."""
    if name == "train.py":
        return [sys.executable, str(ROOT / "train.py"), str(task.recipe())]
    if name == "train.py, packing":
        return [sys.executable, str(ROOT / "train.py"), str(task.recipe(packing=True))]
    peer = llamafactory_python(Path(tempfile.gettempdir()) / "lf-merge-venv")
    if name.startswith("LLaMA-Factory"):
        own = dict(OF_PEERS)
        if "no checkpointing" in name:
            own["disable_gradient_checkpointing"] = True
        if "neat_packing" in name:
            own |= {"packing": True, "neat_packing": True}
        return [peer, str(PEERS / "llama_factory.py"), str(task.recipe(**own))]
    if name == "TRL + PEFT":
        return [peer, str(PEERS / "trl_peft.py"), str(task.settings())]
    return [sys.executable, str(PEERS / "unsloth_notebook.py"), str(task.settings())]


CONTESTANTS = [
    "train.py",
    "LLaMA-Factory",
    "LLaMA-Factory, no checkpointing",
    "TRL + PEFT",
    "Unsloth notebook",
    "train.py, packing",
    "LLaMA-Factory, neat_packing",
]


def train(name: str, task: Task, threads: int) -> Result | str:
    """Runs a contestant; the end of what it printed if it failed."""
    shutil.rmtree(task.folder / "out", ignore_errors=True)
    environment = {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    environment |= {"UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = watch(command(name, task), task.folder, environment)
    if isinstance(result, Result):
        (state,) = (task.folder / "out").glob("checkpoint-*/trainer_state.json")
        log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        result.losses = [line["loss"] for line in log if "loss" in line]
    return result


def watch(command: list[str], folder: Path, environment: dict[str, str]) -> Result | str:
    """Runs a training script in `folder` under the probe; the end of what it printed if it failed."""
    (python, *words), report, begin = command, folder / "batches.json", time.time()
    report.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [python, str(PEERS / "probe.py"), str(report), *words],
            stdout=printed,
            stderr=printed,
            env=os.environ | environment,
            cwd=folder,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            printed.seek(0)
            return printed.read().decode()[-6000:]
    batches = [batch for batch in json.loads(report.read_text(encoding="utf-8")) if "end" in batch]
    return Result(batches[0]["begin"] - begin, usage.ru_maxrss / 1024, batches)


# ---------------------------------------------------------------------------------------------------------------------
# The ceiling, and the table


def shapes_of(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one block."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    keys = size * config["num_key_value_heads"]
    attention = [(hidden, size * heads), (hidden, keys), (hidden, keys), (size * heads, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def needed_flops(config: dict[str, Any], tokens: int, learned: int, rows: int) -> float:
    """Operations of a training step that no implementation can leave out, for `rows` samples of equal length.

    Frozen layers: forward and the inputs' gradient. LoRA: forward and both gradients. Attention: the lower triangle.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    frozen = sum(inputs * outputs for inputs, outputs in shapes_of(config)) * layers
    lora = sum(RANK * (inputs + outputs) for inputs, outputs in shapes_of(config)) * layers
    attention = 6 * layers * hidden * tokens**2 / rows
    return 4 * frozen * tokens + 6 * lora * tokens + attention + 4 * config["vocab_size"] * hidden * learned


def measure_ceiling(precision: str, config: dict[str, Any], rows: int, threads: int) -> float:
    """Operations a CPU second of this model's products, forward and backward, for batches of `rows` tokens."""
    wanted = shapes_of(config)
    shapes = [(rows, i, o, config["num_hidden_layers"]) for i, o in wanted + [(o, i) for i, o in wanted]]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    asked = [sys.executable, "-c", CEILING, precision, json.dumps(shapes)]
    return float(subprocess.run(asked, check=True, capture_output=True, text=True, env=environment).stdout)


def judge(result: Result, reference: Result | None, precision: str) -> str:
    """ "" where the row counts, else why it does not."""
    if reference is None:
        return "no float32 run of train.py to compare with"
    for counts, expected in zip(result.counts, reference.counts, strict=False):
        if counts != expected:
            return f"a step has other tokens and labels: {counts}, not {expected}"
    if len(result.counts) != len(reference.counts):
        return f"{len(result.counts)} steps, not {len(reference.counts)}"
    pairs = zip(result.losses, reference.losses, strict=True)
    away = max(abs(loss - expected) / expected for loss, expected in pairs)
    return "" if away <= TOLERANCE[precision] else f"losses up to {away:.1%} away"


def print_title(task: Task, result: Result, ceiling: float) -> None:
    steps, job = len(result.batches) - 1, task.job
    learned = sum(batch["learned"] for batch in result.batches[1:]) / steps
    print(f"\n{job.title}, {task.precision}: {task.steps} steps of {job.batch}, {result.tokens / steps:.0f} tokens")
    speed = f"ceiling {ceiling / 1e9:.0f} GFLOP a CPU second"
    print(f"and {learned:.0f} learned a step; {speed}; load {os.getloadavg()[0]:.1f}\n")
    print(HEADER, flush=True)


def print_row(name: str, result: Result, share: float, verdict: str) -> None:
    middle = len(result.losses) // 2
    losses = " ".join(f"{result.losses[step]:.4f}" for step in (0, middle, -1))
    cells = [name, f"{result.startup:.1f}", f"{result.tokens / result.wall:.0f}", f"{result.tokens / result.cpu:.0f}"]
    cells += [f"{result.memory:,.0f}", f"{share:.2f}", losses, f"does not count: {verdict}" if verdict else "yes"]
    print("| " + " | ".join(cells) + " |", flush=True)


def compare(task: Task, names: list[str], threads: int, reference: Result | None) -> Result | None:
    """Prints the table of one job in one precision; returns train.py's run."""
    config = json.loads((task.folder / "base" / "config.json").read_text(encoding="utf-8"))
    first, ceiling = None, 0.0
    for name in names:
        if "packing" in name and not task.job.packed:
            continue
        result = train(name, task, threads)
        if isinstance(result, str):
            print(f"| {name} | failed: {' '.join(result.split())[-400:]} |", flush=True)
            continue
        if name == "train.py":
            first = result
            reference = reference or (result if task.precision == "float32" else None)
        if not ceiling:
            steps = len(result.batches) - 1
            ceiling = measure_ceiling(task.precision, config, round(result.tokens / steps), threads)
            print_title(task, result, ceiling)
        flops = sum(
            needed_flops(config, batch["tokens"], batch["learned"], task.job.batch) for batch in result.batches[1:]
        )
        print_row(name, result, flops / result.cpu / ceiling, judge(result, reference, task.precision))
    return first


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--precisions", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--steps", type=int, help="instead of each job's own number; at least 2")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, {options.threads} thread(s)", flush=True)
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        folder = Path(temporary)
        prepare = [sys.executable, "-c", PREPARE, MODEL, folder / "base", folder / "adapter", str(RANK), *TARGETS]
        subprocess.run(prepare, check=True, stderr=subprocess.DEVNULL)
        (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
        for name in options.jobs:
            job, reference = JOBS[name], None
            steps = max(options.steps or job.steps, 2)
            rows = make_rows(name, steps * job.batch, folder)
            (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
            for precision in options.precisions:
                first = compare(Task(folder, job, precision, steps), options.only, options.threads, reference)
                reference = reference or (first if precision == "float32" else None)


if __name__ == "__main__":
    main(sys.argv[1:])
