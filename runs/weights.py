"""Tensors of safetensors files: what a file's header says of each, and its values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import UserError
from runs.files import read_object

if TYPE_CHECKING:
    import torch

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be computed with, and its name in a file


@dataclass(frozen=True)
class Tensor:
    """A tensor on the disk: its file, its name there, type and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in its order; raises UserError where it is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            return {name: Tensor(file, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        text = "{file} is not a complete safetensors file ({error}); download or train it again"
        raise UserError(text, file=file, error=error) from None


def weight_files(folder: Path) -> list[str]:
    """The names of a model's weight files: those of its index, or model.safetensors; UserError for a bad index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    names = read_object(index).get("weight_map")
    values = set(names.values()) if isinstance(names, dict) and all(type(n) is str for n in names.values()) else set()
    if not values or any(name != Path(name).name or not name.endswith(".safetensors") for name in values):
        # a path could lead out of the folder
        raise UserError("{file} names no weight files of its folder; fetch the model again", file=index)
    return sorted(values)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, in the order of its files."""
    files = weight_files(folder)
    if files == ["model.safetensors"] and not (folder / files[0]).exists():
        if any(folder.glob("pytorch_model*.bin")):
            text = "{folder} has its weights in pytorch_model.bin; save it again as safetensors"
            raise UserError(text, folder=folder)
        raise UserError("{folder} has no model.safetensors; set model_name_or_path to a 16-bit model", folder=folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_header(folder / file))
    return tensors


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """A tensor's values, in its own type."""
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as opened:
        return opened.get_tensor(tensor.name)


def read_rows(tensor: Tensor, indices: list[int]) -> dict[int, torch.Tensor]:
    """Rows of a matrix, by their index."""
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as opened:
        rows = opened.get_slice(tensor.name)
        return {index: rows[index] for index in indices if index < tensor.shape[0]}


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values."""
    import torch

    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return first == second or torch.equal(read_tensor(first), read_tensor(second))
