"""Loads what answers: a run, an adapter, a merged or plain model folder, or a GGUF."""

from __future__ import annotations

from collections.abc import Sequence

from common import UserError
from inference.engine import Engine
from runs.target import Target, find_target


def load(
    target: str | Target | None = None,
    settings: Sequence[str] = (),
    *,
    with_base: bool = False,
    only_replies: bool = False,
) -> Engine:
    """The engine of a target (`find_target`). `with_base`: its `.base` answers as before training, on the same weights.

    `only_replies`: this process does nothing else with the model, so the start may be quicker (quick_start.py).

    Takes the seconds that loading takes. Raises UserError where the target cannot be loaded.
    """
    source = target if isinstance(target, Target) else find_target(target, settings)
    if with_base and source.adapter is None:
        raise UserError(
            "{name} has the training in its weights, so the model before training is not there; use --base with a run",
            name=source.name,
        )
    if source.is_gguf:
        from inference.llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(source)
    from inference.transformers_load import load_transformers
    from runs.imports import paused_garbage_collection

    with paused_garbage_collection():
        return load_transformers(source, with_base, only_replies)
