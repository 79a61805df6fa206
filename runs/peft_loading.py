"""A trained adapter on a loaded base, by peft; nothing of it is left out in silence."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError
from runs.adapter import Adapter, find_places
from runs.causal_models import tie_word_embeddings
from runs.files import read_object, write_json
from runs.weights import read_tensor


def load_peft_model(model: Any, folder: Path, trainable: bool = False) -> Any:
    """The base with the adapter of a folder beside its weights, as a PeftModel.

    Raises UserError where a tensor of the adapter has no place in the base, or a place of the adapter no tensor.
    """
    from peft import PeftConfig, PeftModel

    adapter = Adapter(folder)
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")  # merge.py says it where it matters
    if not adapter.unsupported:
        _check_places(adapter, model)
    with _readable_by_peft(adapter) as readable:
        try:
            config = PeftConfig.from_pretrained(readable)
            config.inference_mode = not trainable
            loaded = PeftModel(model, config)
            result = loaded.load_adapter(readable, "default", is_trainable=trainable)
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            text = "PEFT cannot load {folder} ({reason}); set model_name_or_path to its base"
            raise UserError(text, folder=folder, reason=reason) from None
    # a grown and trained embedding is saved three times, of which PEFT reads one: find_places has looked at all
    names = [*result.missing_keys, *(result.unexpected_keys if adapter.unsupported else [])]
    if names:
        text = "{folder} does not fit the base ({tensor}); set model_name_or_path to its base"
        raise UserError(text, folder=folder, tensor=names[0])
    return loaded


def _check_places(adapter: Adapter, model: Any) -> None:
    """Raises UserError where a tensor of the adapter has no place; makes the embedding as long as the adapter's."""
    shapes = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        state = getattr(weight, "quant_state", None)  # of bitsandbytes: the weight itself is packed
        shapes[name] = tuple(state.shape if state is not None else weight.shape)
    tied = tie_word_embeddings(model)
    rows = find_places(adapter, shapes, tied=tied, merging=False).vocabulary
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


@contextlib.contextmanager
def _readable_by_peft(adapter: Adapter) -> Iterator[Path]:
    """The adapter's folder; where peft would not know its names or settings, a copy with those it knows."""
    renamed = any(name != tensor.name for name, tensor in adapter.tensors.items())
    if not renamed and read_object(adapter.folder / "adapter_config.json") == adapter.settings:
        yield adapter.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        write_readable(adapter, Path(folder))
        yield Path(folder)


def write_readable(adapter: Adapter, folder: Path, **settings: Any) -> None:
    """A copy of an adapter under the names and with the settings that PEFT knows, and `settings` changed."""
    from safetensors.torch import save_file

    save_file({name: read_tensor(tensor) for name, tensor in adapter.tensors.items()}, folder / adapter.file.name)
    write_json(folder / "adapter_config.json", {**adapter.settings, **settings})
