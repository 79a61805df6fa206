"""The private members of transformers and TRL that the kit overrides or reads are still there.

Why each is needed stands in training/trainer.py, training/preferences.py and training/grpo.py.
"""

from __future__ import annotations

import inspect

import pytest

TRANSFORMERS = (
    "_run_epoch", "_evaluate", "_maybe_log_save_evaluate", "_load_from_checkpoint", "_load_best_model",
    "_save_checkpoint", "_determine_best_metric", "_tr_loss", "_globalstep_last_logged",
)  # fmt: skip
PREFERENCES = ("_prepare_dataset", "_compute_loss", "_metrics")
GRPO = ("_get_train_sampler", "_generate_and_score_completions", "_tokenize_prompts", "_generate_single_turn",
        "_logs", "_metrics")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "members"),
    [
        ("transformers", "Trainer", TRANSFORMERS),
        ("transformers", "TrainingArguments", ("_setup_devices",)),
        ("transformers", "PreTrainedModel", ("_is_stateful",)),  # inference/engine.py
        ("transformers", "PreTrainedConfig", ("_attn_implementation",)),  # training/cpu.py
        ("trl", "DPOTrainer", PREFERENCES),
        ("trl", "KTOTrainer", PREFERENCES),
        ("trl", "GRPOTrainer", GRPO),
    ],
)
def test_the_members_are_there(module: str, name: str, members: tuple[str, ...]):
    trainer = getattr(pytest.importorskip(module), name)
    source = inspect.getsource(trainer)
    assert [member for member in members if not hasattr(trainer, member) and f"self.{member}" not in source] == []
