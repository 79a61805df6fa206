"""How time and memory of a training grow with samples, length, rank and batch, on the CPU.

    python bench/scale.py [--parts samples length rank batch threads] [--most 1000000] [--plot FILE.png]

One thread, the embedded model, the precision that train.py chooses; prints a table for each part, and draws the
tables that have grown. `samples`: rows of about 40 tokens, start to the first batch without and with a cache of the
tokens. `length`, `rank`, `batch`: raw text in samples of exactly so many tokens, all learned; the first step is left
out. `threads`: seconds in which 10⁵ rows are tokenized.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import Result, watch
from tokenize_speed import MODEL, ROOT

sys.path.insert(0, str(ROOT))

from runs.charts import COLORS, picture

VARIED = {
    "length": ("cutoff_len", [64, 256, 1024, 4096], {"per_device_train_batch_size": 1}),
    "rank": ("lora_rank", [4, 16, 64, 256], {"cutoff_len": 256, "per_device_train_batch_size": 4}),
    "batch": ("per_device_train_batch_size", [1, 2, 4, 8, 16], {"cutoff_len": 128}),
}
STEPS = 4


def train(folder: Path, settings: dict[str, Any]) -> Result:
    """A few steps in a process of its own; the tokens are kept in `folder`."""
    common = {"model_name_or_path": MODEL, "output_dir": folder / "run", "dataset_dir": folder, "val_size": 0}
    common |= {"gradient_accumulation_steps": 1, "overwrite_output_dir": "true", "plot_loss": "false"}
    common |= {"max_steps": STEPS, "save_strategy": "no"}
    words = [f"{key}={value}" for key, value in (common | settings).items()]
    environment = {"OMP_NUM_THREADS": "1", "ONECARD_CACHE": str(folder / "cache")}
    result = watch([sys.executable, str(ROOT / "train.py"), *words], folder, environment)
    return sys.exit(result) if isinstance(result, str) else result


def write_rows(folder: Path, count: int) -> dict[str, Any]:
    """Rows of about 40 tokens, each another one, and the settings that train on them."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"Invoice {number}: {number * 7 % 9973} items at {number % 89 + 1} each. What is the total?"
            row = {"instruction": question, "input": "", "output": str(number * 7 % 9973 * (number % 89 + 1))}
            file.write(json.dumps(row) + "\n")
    registry = {"rows": {"file_name": "rows.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return {"dataset": "rows", "template": "chatml", "cutoff_len": 128, "per_device_train_batch_size": 8}


def samples(most: int) -> list[list[float]]:
    print("\n| samples | start without a cache, s | with, s | peak MB |\n|---|---|---|---|")
    table = []
    for count in [10**power for power in range(2, 7) if 10**power <= most]:
        with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
            settings = write_rows(Path(temporary), count)
            cold, warm = (train(Path(temporary), settings) for _ in range(2))
        table.append([count, cold.startup, warm.startup, max(cold.memory, warm.memory)])
        print(f"| {count:,} | {cold.startup:.1f} | {warm.startup:.1f} | {table[-1][3]:,.0f} |", flush=True)
    return table


def varied(part: str) -> list[list[float]]:
    """Rows of value, tokens a CPU second, peak MB."""
    key, values, settings = VARIED[part]
    print(f"\n| {part} | tokens/CPU s | peak MB |\n|---|---|---|")
    table = []
    for value in values:
        with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
            length = value if part == "length" else settings["cutoff_len"]
            write_text(Path(temporary), length, samples=value if part == "batch" else 4)
            found = train(Path(temporary), {"stage": "pt", "dataset": "text", **settings, key: value})
        table.append([value, found.tokens / found.cpu, found.memory])
        print(f"| {value:,} | {table[-1][1]:.0f} | {found.memory:,.0f} |", flush=True)
    return table


def write_text(folder: Path, length: int, samples: int) -> None:
    """Raw text for steps of so many samples: this kit's documentation, repeated."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    wanted = (STEPS + 1) * samples * length * 6  # characters; a token of it has less
    (folder / "text.txt").write_text((text * (wanted // len(text) + 1))[:wanted], encoding="utf-8")
    registry = {"text": {"file_name": "text.txt", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")


def threads() -> None:
    print("\n| threads | 100,000 rows to the first batch, s |\n|---|---|")
    for count in range(1, (os.cpu_count() or 1) + 1):
        with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
            settings = write_rows(Path(temporary), 100_000) | {"preprocessing_num_workers": count}
            print(f"| {count} | {train(Path(temporary), settings).startup:.1f} |", flush=True)


def draw(tables: dict[str, list[list[float]]], file: Path) -> None:
    """A panel for each part: seconds or speed on the left, memory on the right, both against what was varied."""
    with picture(file, columns=len(tables), size=(4 * len(tables), 3.6)) as panels:
        for axes, (part, table) in zip(panels, tables.items(), strict=True):
            values, *columns, memory = zip(*table, strict=True)
            names = ["start, no cache", "start, cached"] if part == "samples" else ["tokens/CPU s"]
            for column, name, color in zip(columns, names, COLORS, strict=False):
                axes.plot(values, column, marker="o", color=color, label=name)
            axes.set(xscale="log", xlabel=part, ylabel="s" if part == "samples" else "tokens a CPU second")
            axes.set_ylim(bottom=0)
            beside = axes.twinx()
            beside.plot(values, [mb / 1000 for mb in memory], "--", color=COLORS[5], label="peak GB")
            beside.set_ylim(bottom=0)
            lines = axes.lines[:] + beside.lines[:]
            axes.legend(lines, [line.get_label() for line in lines], fontsize=8)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["samples", *VARIED, "threads"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--most", type=int, default=10**6, help="of the samples; a million take minutes")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, one thread; load {os.getloadavg()[0]:.1f}")
    tables = {part: varied(part) for part in options.parts if part in VARIED}
    if "samples" in options.parts:
        tables["samples"] = samples(options.most)
    if "threads" in options.parts:
        threads()
    if options.plot and tables:
        draw(tables, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
