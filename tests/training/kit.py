"""A trainer of the kit for samples that are tokens already; for the scripts that measure what it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common import Config
from training.arguments import Precision, choose_precision
from training.hardware import on_card
from training.model import import_unsloth, load_model
from training.stages import make_trainer

__all__ = ["import_unsloth", "make", "table"]


def table(rows: list[dict[str, Any]], lengths: Sequence[int], held_out: int = 0) -> SimpleNamespace:
    """What preprocessing.dataset returns: all rows to train on, the first of them held out, too."""
    import datasets
    import numpy as np

    all_rows, counts = datasets.Dataset.from_list(rows), np.array(lengths)
    kept = (all_rows.select(range(held_out)), counts[:held_out]) if held_out else (None, None)
    return SimpleNamespace(train=all_rows, train_lengths=counts, eval=kept[0], eval_lengths=kept[1])


def make(
    config: Config, data: Any, *, rewards: Sequence[Any] = (), stop: Sequence[str] = (), prepare: Any = None
) -> Any:
    """The trainer, in float32 on a CPU and in a GPU's own precision on a GPU; `prepare` changes the model before."""
    import torch
    from transformers import AutoTokenizer

    from training.plan import make_plan

    precision = choose_precision(Config()) if on_card() else Precision(torch.float32, None)
    model = load_model(config, precision)
    if prepare:
        prepare(model)
    prepared = SimpleNamespace(
        config=config,
        tokenizer=AutoTokenizer.from_pretrained(config.model_name_or_path),
        template=SimpleNamespace(stop=stop),
        data=data,
        plan=make_plan(config, data),
        rewards=rewards,
    )
    return make_trainer(prepared, model, precision)
