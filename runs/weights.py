"""Tensors of safetensors files: where each lies, and its rows as float32."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import UserError

if TYPE_CHECKING:
    import numpy as np

# numpy reads it as it is imported; pieces are computed in threads of ours, where OpenBLAS's own would only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what can be computed with, and its name in a file


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
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * SIZES[self.dtype]


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; raises UserError where it is broken or cut off."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start)
            if entry["dtype"] in SIZES and end - start != tensors[name].size:
                raise ValueError(f"{name} has the wrong size")
            if 8 + length + end > file.stat().st_size:
                raise ValueError("it is cut off")
    except (OSError, ValueError, KeyError) as error:  # a JSON error is a ValueError
        raise UserError(f"{file} is not a whole safetensors file ({error}); fetch or train it again") from None
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, in the order of its files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    if not (folder / files[0]).exists() and not index.exists():
        raise UserError(f"{folder} has no model.safetensors; {_other_format(folder)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_header(folder / file))
    return tensors


def _other_format(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return "a GGUF cannot be merged into: it is quantized; give model_name_or_path=the 16-bit model it was made of"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "its pytorch_model.bin is a pickle, which this kit does not open; load it with transformers and "
            "save_pretrained it again"
        )
    return "give model_name_or_path=a folder with the base model"


def digest(tensor: Tensor) -> str:
    """A hash of type, shape and values."""
    return sha256(tensor.file, tensor.start, tensor.size, f"{tensor.dtype} {tensor.shape}")


def sha256(file: Path, start: int = 0, size: int = sys.maxsize, before: str = "") -> str:
    """SHA-256 of `before` and `size` bytes of a file."""
    found = hashlib.sha256(before.encode())
    with open(file, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(min(size, 1 << 22)):
            found.update(chunk)
            size -= len(chunk)
    return found.hexdigest()


def read_rows(tensor: Tensor, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows `first` to `last` of a tensor as float32 (rows x the rest; a vector is a column)."""
    import numpy as np

    rows = tensor.shape[0] if tensor.shape else 1
    width = tensor.count // max(rows, 1)
    count = ((rows if last is None else last) - first) * width
    offset = tensor.start + first * width * SIZES[tensor.dtype]
    if tensor.dtype == "F32":
        values = np.fromfile(tensor.file, np.float32, count, offset=offset)
    elif tensor.dtype == "BF16":  # the upper half of a float32
        bits = np.fromfile(tensor.file, np.uint16, count, offset=offset).astype(np.uint32)
        bits <<= 16
        values = bits.view(np.float32)
    else:  # numpy's own conversion of float16 takes three times as long
        bits = np.fromfile(tensor.file, np.int16, count, offset=offset).astype(np.int32)
        bits <<= 13  # mantissa and exponent in their places, the sign spread over the upper bits
        bits &= -0x70002000  # 0x8fffe000: one bit of the sign is enough
        values = bits.view(np.float32)
        values *= np.float32(2.0**112)  # the exponents' biases are 15 and 127
    return values.reshape(-1, width)


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
