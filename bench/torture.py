"""The long versions of the tests that try to break the kit, and one table of what it survived.

python bench/torture.py [WHAT ...] [--share 1.0] [--seed 0]

WHAT: names of the table's first column, as "recipes" or "kills: train"; unset: all of them, on two CPU cores about
an hour. --share 0.1 makes a tenth of each. Ends with status 1 where something was lost; its input is kept in
.cache/torture. The load of api.py is a test of its own: python bench/api_load.py
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads of OpenMP do not survive a fork; such small models gain nothing by them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "torture"), str(ROOT / "tests"), str(ROOT)]

FUZZ = {
    "recipes": 2000,
    "data files": 2000,
    "registries": 500,
    "chat requests": 500,
    "chat templates": 500,
    "safetensors": 100,
    "GGUF headers": 50,
}
KILLS = {"train": 100, "train, pt": 100, "train, dpo": 100, "train, kto": 100, "train, grpo": 100}
KILLS |= {"merge": 30, "quantize": 30, "evaluate": 30, "download": 30}
COUNTS = {**FUZZ, **{f"kills: {name}": count for name, count in KILLS.items()}}
COUNTS |= {f"full disk: {name}": 10 for name in ("train", "merge", "quantize", "evaluate", "download")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the folder to work in, of a child
    args = parser.parse_args()
    if unknown := set(args.what) - set(COUNTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(COUNTS)}")
    if args.inside:
        return one(args.what[0], args.share, args.seed, args.inside)
    cores = len(os.sched_getaffinity(0))
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {cores} CPU cores, Python {platform.python_version()}")
    print(f"{'what':<22}{'how many':>9}{'survived':>10}{'lost':>6}{'seconds':>9}", flush=True)
    status = 0
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        for number, what in enumerate(
            args.what or COUNTS
        ):  # each in a process of its own, so that none leans on another
            place = Path(folder) / str(number)
            place.mkdir()
            command = [sys.executable, __file__, what, f"--share={args.share}", f"--seed={args.seed}"]
            status |= subprocess.run([*command, f"--inside={place}"]).returncode
    return 1 if status else 0


def one(what: str, share: float, seed: int, folder: Path) -> int:
    """Makes one line of the table; returns 1 where something was lost."""
    import conftest
    import fuzz
    import kills

    count, started = math.ceil(COUNTS[what] * share), time.monotonic()
    model = conftest.make_tiny_model(folder / "tiny")
    if what in FUZZ:
        tally = fuzz.fuzz(what, count, folder, model, seed)
    else:
        disturbance, _, name = what.partition(": ")
        series = kills.kill_series if disturbance == "kills" else kills.full_disk_series
        tally = series(name, count, folder, model, seed)
    survived = tally.worked + tally.refused
    seconds = time.monotonic() - started
    print(f"{what:<22}{tally.tried:>9,}{survived:>10,}{tally.tried - survived:>6}{seconds:>9.0f}", flush=True)
    for line in tally.lost:
        print(f"    {line}", file=sys.stderr)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
