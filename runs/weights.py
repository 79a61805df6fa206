"""Tensors of safetensors files: where each lies, and its rows as float32."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError
from runs.files import read_object, sha256

if TYPE_CHECKING:
    import numpy as np

# numpy reads it as it is imported; tensors are computed in threads of ours, where OpenBLAS's own would only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be computed with, and its name in a file
STORED = {"F32": "float32", "BF16": "uint16", "F16": "uint16"}  # numpy's name of what is read from a file
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on the disk: file, type, shape, and its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * SIZES[self.dtype]


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, its only parser here: the library tells no offsets.

    Raises UserError where the header is not one, or the file is not as long as it says.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        tensors, end = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name], end = _read_entry(file, name, entry, 8 + length, end)
        if end != size:
            raise ValueError(f"it has {size} bytes, its header says {end}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # a JSON error is a ValueError
        raise UserError(
            "{file} is not a complete safetensors file ({error}); fetch or train it again", file=file, error=str(error)
        ) from None
    return {name: tensors[name] for name in header}


def _read_entry(file: Path, name: str, entry: Any, first: int, expected: int) -> tuple[Tensor, int]:
    """A tensor of the header, and where it ends; ValueError where it is not what a header may say.

    `first` is where the file's data begin, `expected` where this tensor has to.
    """
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has no valid type, shape or place")
    tensor = Tensor(file, dtype, shape, first + start)
    if tensor.start != expected or end < start:
        raise ValueError(f"{name} does not begin where the tensor before it ends")
    if dtype in SIZES and end - start != tensor.size:
        raise ValueError(f"{name} has the wrong size")
    return tensor, first + end


def weight_files(folder: Path) -> list[str]:
    """The names of a model's weight files: those of its index, or model.safetensors; UserError for a bad index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    names = read_object(index).get("weight_map")
    values = set(names.values()) if isinstance(names, dict) and all(type(n) is str for n in names.values()) else set()
    if not values or any(name != Path(name).name or not name.endswith(".safetensors") for name in values):
        raise UserError(
            "{file} names no weight files of its folder; fetch the model again", file=index
        )  # a path could lead out of the folder
    return sorted(values)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, in the order of its files."""
    files = weight_files(folder)
    if files == ["model.safetensors"] and not (folder / files[0]).exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                "{folder} has its weights in pytorch_model.bin, a pickle, which this kit does not open; load it "
                "with transformers and save_pretrained it again",
                folder=folder,
            )
        raise UserError(
            "{folder} has no model.safetensors; give model_name_or_path=a folder with the 16-bit model", folder=folder
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_header(folder / file))
    return tensors


def digest(tensor: Tensor) -> str:
    """A hash of type, shape and values."""
    return sha256(tensor.file, tensor.start, tensor.size, f"{tensor.dtype} {tensor.shape}")


def read_rows(tensor: Tensor, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows `first` to `last` of a tensor as float32 (rows x the rest; a vector is a column)."""
    import numpy as np

    rows = tensor.shape[0] if tensor.shape else 1
    width = tensor.count // max(rows, 1)
    count = ((rows if last is None else last) - first) * width
    offset = tensor.start + first * width * SIZES[tensor.dtype]
    values = np.fromfile(tensor.file, STORED[tensor.dtype], count, offset=offset)
    return unpack(values, tensor.dtype).reshape(-1, width)


def unpack(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 of values as they are stored in `dtype` (see STORED); not a copy of float32."""
    import numpy as np

    if dtype == "F32":
        return stored
    if dtype == "BF16":  # the upper half of a float32
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    bits = stored.view(np.int16).astype(np.int32)  # numpy's own conversion of float16 takes three times as long
    bits <<= 13  # mantissa and exponent in their places, the sign spread over the upper bits
    bits &= -0x70002000  # 0x8fffe000: one bit of the sign is enough
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)  # the exponents' biases are 15 and 127
    return values


def pack(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the bytes of `dtype`, rounded to nearest, ties to even."""
    import numpy as np

    if dtype == "F32":
        return values
    low = 16 if dtype == "BF16" else 13  # bits to drop
    bits = (values if dtype == "BF16" else values * np.float32(2.0**-112)).view(np.uint32)
    rounded = bits >> low
    rounded &= 1
    rounded += (1 << (low - 1)) - 1
    rounded += bits
    upper = rounded.view(np.uint16)[..., 1::2]  # of a little-endian number
    if dtype == "BF16":
        return np.ascontiguousarray(upper)
    packed = (rounded >> low).astype(np.uint16)
    packed |= upper & np.uint16(0x8000)  # the sign
    tiny = np.flatnonzero((packed & 0x7FFF) <= 0x400)  # few: below 2^-14 the product above has rounded once already
    packed.reshape(-1)[tiny] = values.reshape(-1)[tiny].astype(np.float16).view(np.uint16)
    return packed
