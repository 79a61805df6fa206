"""The trainer of each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.arguments import Precision
    from training.prepare import Prepared
    from training.trainer import RunTrainer


def make_trainer(prepared: Prepared, model: Any, precision: Precision) -> RunTrainer:
    """TRL's trainer of the stage, sped up by Unsloth, which must be imported."""
    stage = prepared.config.stage
    if stage == "grpo":
        from training.grpo import GrpoTrainer

        return GrpoTrainer(prepared, model, precision)
    if stage in ("dpo", "kto"):
        from training.preferences import DpoTrainer, KtoTrainer

        return {"dpo": DpoTrainer, "kto": KtoTrainer}[stage](prepared, model, precision)
    from training.sft import Trainer

    return Trainer(prepared, model, precision)
