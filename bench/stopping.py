"""A fixed number of steps (the tutorial: thousands on some 80 rows) against early stopping, on the same rows.

  python bench/stopping.py [STEPS]        1000 by default; about 60 CPU-minutes on the embedded model

Both runs train on the same 80 rows of the fraud task (in words, windows of 5 transactions) in batches of 4, with the
same settings and learning-rate schedule; one goes through all the steps, the other holds 10 more rows out and may stop.
Both are then tested on the same 300 rows of other accounts and a later time. Prints one table.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs.files import read_json, write_json  # noqa: E402

TRAINED, HELD_OUT, TESTED = 80, 10, 300
MADE = "--accounts 1400 --window 5 --min-transactions 5 --form words --balance 1 --split-time 2024-06-01"
SETTINGS = (
    "template=chatml", "cutoff_len=64", "per_device_train_batch_size=4", "gradient_accumulation_steps=1",
    "per_device_eval_batch_size=10", "learning_rate=5e-4", "lora_rank=8", "lora_alpha=16", "save_strategy=steps",
)  # fmt: skip


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        rows = [
            ("all steps", *train(folder, "all", steps, "early_stopping=no", "eval_strategy=no", "val_size=0")),
            ("this kit", *train(folder, "kit", steps, f"eval_dataset={folder / 'held_out.json'}")),
        ]
    print(f"{'':<12}{'steps':>12}{'CPU s':>9}{'train loss':>12}{'test log loss':>15}{'test AUC':>10}  95 % interval")
    for title, used, seconds, loss, log_loss, auc, (low, high) in rows:
        count = f"{used} of {steps}"
        print(
            f"{title:<12}{count:>12}{seconds:>9.0f}{loss:>12.3f}{log_loss:>15.3f}{auc:>10.3f}  {low:.3f} to {high:.3f}"
        )


def make_data(folder: Path) -> None:
    """80 rows to train on, 10 held out, and the test rows of other accounts and a later time."""
    run("data/make_diy.py", *MADE.split(), "--out", str(folder / "made"))
    made = read_json(folder / "made.json")
    write_json(folder / "train.json", made[:TRAINED])
    write_json(folder / "held_out.json", made[TRAINED : TRAINED + HELD_OUT])
    write_json(folder / "test.json", read_json(folder / "made_test.json")[:TESTED])


def train(
    folder: Path, title: str, steps: int, *more: str
) -> tuple[int, float, float, float, float, tuple[float, float]]:
    """Trains and tests: steps used, CPU seconds of training, last training loss, and on the test rows the mean of
    -log p(right answer) and the ROC AUC with its interval."""
    saved = folder / title
    before = cpu_seconds()
    run("train.py", *SETTINGS, f"dataset={folder / 'train.json'}", f"max_steps={steps}", f"output_dir={saved}", *more)
    seconds = cpu_seconds() - before
    run("evaluate.py", str(saved), f"dataset={folder / 'test.json'}", "--no-base")
    state = read_json(saved / "run.json")
    figures = read_json(saved / "eval" / "test" / "metrics.json")["models"]["trained"]
    low, high = figures["roc_auc_interval"]
    return state["steps"], seconds, state["last_loss"], figures["log_loss"], figures["roc_auc"], (low, high)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, cwd=ROOT, stdout=sys.stderr)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
