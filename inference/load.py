"""Loads what answers: a run, an adapter, a merged or plain model folder, or a GGUF."""

from __future__ import annotations

from collections.abc import Sequence

from common import UserError
from inference.engine import Engine
from runs.target import Target, find_target


def load(target: str | Target | None = None, settings: Sequence[str] = (), *, with_base: bool = False) -> Engine:
    """The engine of a target (`find_target`). `with_base`: its `.base` answers as before training, on the same weights.

    Takes the seconds that loading takes. Raises UserError where the target cannot be loaded.
    """
    found = target if isinstance(target, Target) else find_target(target, settings)
    if with_base and found.adapter is None:
        raise UserError("{name} has no adapter to switch off; use --base with a run", name=found.name)
    if found.is_gguf:
        from inference.llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(found)
    from inference.transformers_engine import load_transformers

    return load_transformers(found, with_base)
