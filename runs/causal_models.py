"""The class that loads the language model of a checkpoint: also of one that sees or hears."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def register_class(folder: str | Path, trust_remote_code: bool = False) -> None:
    """Lets transformers' AutoModelForCausalLM load the checkpoint in `folder`.

    It knows no class for many models that see or hear, of which text alone is trained and asked here; other auto
    classes do. Its method `register` takes no configuration of transformers' own.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    kind = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).model_type
    for names in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        if kind in names:
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(kind, names[kind])


def tie_word_embeddings(model: Any) -> bool:
    """Whether a model's output layer is its embedding; of a model that sees, the whole configuration may say so."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", model.config.tie_word_embeddings))
