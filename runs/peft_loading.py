"""A trained adapter on a loaded base, by peft; nothing of it is left out in silence."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError
from runs.adapter import Adapter, find_places
from runs.files import read_object, write_json


def check_against_model(adapter: Adapter, model: Any) -> int | None:
    """Checks every tensor of an adapter against a loaded base; returns the rows of the embedding with the adapter.

    None, and nothing is checked, for a kind of adapter that only peft knows.
    """
    if not adapter.is_plain():
        return None
    shapes = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        state = getattr(weight, "quant_state", None)  # of bitsandbytes: the weight itself is packed
        shapes[name] = tuple(state.shape if state is not None else weight.shape)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    return find_places(adapter, shapes, tied=tied, merging=False).vocabulary


def resize_embedding(model: Any, rows: int | None) -> None:
    """Makes the embedding as long as the adapter's, which was trained with new tokens."""
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def load_peft_model(model: Any, folder: Path, trainable: bool = False) -> Any:
    """The base with the adapter of a folder beside its weights, as a PeftModel.

    Raises UserError where a tensor of the adapter has no place in the base, or a place of the adapter no tensor.
    """
    from peft import PeftConfig, PeftModel

    adapter = Adapter(folder)
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")  # merge.py says it where it matters
    resize_embedding(model, check_against_model(adapter, model))
    with _readable_by_peft(adapter) as readable:
        try:
            config = PeftConfig.from_pretrained(readable)
            config.inference_mode = not trainable
            loaded = PeftModel(model, config)
            result = loaded.load_adapter(readable, "default", is_trainable=trainable)
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                "peft cannot load {folder} into this base: {reason}; give model_name_or_path=the model it was "
                "trained on",
                folder=folder,
                reason=reason,
            ) from None
    # a grown and trained embedding is saved three times, of which peft reads one: find_places has looked at all
    names = [*result.missing_keys, *([] if adapter.is_plain() else result.unexpected_keys)]
    if names:
        raise UserError(
            "{folder} does not fit this base: {count} of the adapter's tensors have no counterpart, such as "
            "{tensor}; give model_name_or_path=the model it was trained on",
            folder=folder,
            tensor=names[0],
            count=len(names),
        )
    return loaded


@contextlib.contextmanager
def _readable_by_peft(adapter: Adapter) -> Iterator[Path]:
    """The adapter's folder; where peft would not know its names or settings, a copy with those it knows."""
    if not adapter.renamed and read_object(adapter.folder / "adapter_config.json") == adapter.settings:
        yield adapter.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        write_readable(adapter, Path(folder))
        yield Path(folder)


def write_readable(adapter: Adapter, folder: Path, **settings: Any) -> None:
    """A copy of an adapter under the names and with the settings that peft knows, and `settings` changed."""
    if adapter.renamed:
        from safetensors.torch import load_file, save_file

        stored = load_file(adapter.file)
        tensors = {name: stored[adapter.renamed.get(name, name)] for name in adapter.tensors}
        save_file(tensors, folder / adapter.file.name)
    else:
        shutil.copy(adapter.file, folder)
    write_json(folder / "adapter_config.json", {**adapter.settings, **settings})
