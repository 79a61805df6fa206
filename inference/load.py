"""Loads what answers: a run, an adapter, a merged or plain model folder, or a GGUF."""

from __future__ import annotations

from collections.abc import Sequence

from common import UserError
from inference.engine import Engine
from runs.target import Source, find


def load(target: str | Source | None = None, settings: Sequence[str] = (), *, with_base: bool = False) -> Engine:
    """The engine of a target (see `find`). `with_base`: its `.base` answers as before training, on the same weights.

    Takes the seconds that loading takes. Raises UserError where the target cannot be loaded.
    """
    source = target if isinstance(target, Source) else find(target, settings)
    if with_base and source.adapter is None:
        raise UserError(
            f"{source.name} has its training in its weights, so the model before it is not there; "
            "talk to the run with --base"
        )
    if source.model.endswith(".gguf"):
        from inference.llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(source)
    from inference import transformers_engine

    return transformers_engine.load(source, with_base)
