"""Runs a training script and writes down when each batch was handed out and what was in it.

    python probe.py REPORT.json SCRIPT [ARGUMENTS ...]

All contestants take their batches and their optimizer from accelerate: these two are watched, nothing else is changed.
REPORT.json holds one object a batch: tokens without padding, learned tokens, and the wall time (`time.time()`) and the
CPU seconds of the process at its beginning and when the optimizer had made its step.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

NEWLINE = 198  # SmolLM2's
batches: list[dict[str, float]] = []


class Finder(importlib.abc.MetaPathFinder):
    """Wraps accelerate's classes when the script imports them: imported earlier, Unsloth would come too late."""

    def find_spec(self, name: str, *_: Any) -> Any:
        if name not in WATCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def execute_and_watch(module: Any) -> None:
            execute(module)
            WATCH[name](module)

        spec.loader.exec_module = execute_and_watch
        return spec


def watch_batches(module: Any) -> None:
    plain = module.DataLoaderShard.__iter__

    def watching(self: Any) -> Any:
        for batch in plain(self):
            batches.append(describe(batch))
            yield batch

    module.DataLoaderShard.__iter__ = watching


def watch_steps(module: Any) -> None:
    plain = module.AcceleratedOptimizer.step

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = plain(self, *args, **kwargs)
        batches[-1] |= {"end": time.time(), "cpu_end": time.process_time()}
        return done

    module.AcceleratedOptimizer.step = watching


WATCH = {"accelerate.data_loader": watch_batches, "accelerate.optimizer": watch_steps}


def describe(batch: dict[str, Any]) -> dict[str, float]:
    """Counts of a batch. A flat batch has no mask; that of neat_packing has the samples' numbers in it.

    The newline that train.py keeps after the last turn, which is not learned, is left out: the others have none.
    """
    labels, mask = batch["labels"], batch.get("attention_mask")
    tokens = labels.numel() if mask is None or mask.dim() != 2 else int((mask > 0).sum())
    learned = labels != -100
    newline = learned[..., :-1] & ~learned[..., 1:] & (batch["input_ids"][..., 1:] == NEWLINE)
    times = {"begin": time.time(), "cpu_begin": time.process_time()}
    return times | {"tokens": tokens - int(newline.sum()), "learned": int(learned[..., 1:].sum())}


if __name__ == "__main__":
    report, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    sys.meta_path.insert(0, Finder())
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        report.write_text(json.dumps(batches), encoding="utf-8")
