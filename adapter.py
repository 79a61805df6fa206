"""An adapter, the base model's tensors on the disk, and what the one does to the other, tensor by tensor.

Nothing here loads a model: a base's files are streamed, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import UserError

if TYPE_CHECKING:
    import numpy as np

# numpy reads it as it is imported; pieces are computed in threads of ours, where OpenBLAS's own would only wait.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ---------------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes of length, a JSON header, raw tensors. https://github.com/huggingface/safetensors#format

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


# ---------------------------------------------------------------------------------------------------------------------
# The base model

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-(4|8)bit$|-(4|8)bit$", re.IGNORECASE)


def find_base(name: str) -> tuple[Path, str, dict[str, Any]]:
    """Folder, name and config.json of the 16-bit base; for one quantized by bitsandbytes, of what it was made of."""
    if name.endswith(".gguf"):
        raise UserError(
            f"{name} is a GGUF, which is quantized; give model_name_or_path=the 16-bit model it was made of"
        )
    folder = common.find_model(name)
    whole = QUANTIZED_NAME.sub("", name)
    if whole != name and (original := common.find_model(whole)):
        folder, name = original, whole
    if folder is None:
        fetch = f"fetch it: python download.py {whole}" if HUB_NAME.fullmatch(whole) else "is it moved?"
        raise UserError(f"the base model {whole} is not on this disk; {fetch}, or give model_name_or_path=FOLDER")
    config = read_json(folder / "config.json")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "")
        raise UserError(
            f"{folder} is quantized ({method}): merging would bake its rounding errors in, and most runtimes could not "
            f"read the result; give model_name_or_path=the 16-bit model it was made of"
            + (f" ({whole})" if whole != name else "")
        )
    return folder, name, config


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what becomes of each of the base's tensors


@dataclass(frozen=True)
class Update:
    """What is added to a weight, `left @ right * scale`, and for DoRA the length each output's weights get then.

    `left` is (rows, rank) and `right` (rank, columns) once transposed if `turned`; without `right`, the bias of lora_B,
    `left` itself is added.
    """

    left: Tensor
    right: Tensor | None
    scale: float
    turned: bool = False  # the weight is stored as (in, out): an embedding, or GPT-2's Conv1D
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """One tensor of the merged model: its name and type, where its values come from, what is added to them."""

    name: str
    dtype: str
    source: Tensor
    update: Update | None

    @property
    def size(self) -> int:
        """Bytes in the merged file."""
        return self.source.count * SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """All pieces in the order of the base's files, and what the merge changes in config.json."""

    pieces: list[Piece]
    untied: bool  # the output layer no longer equals the embedding
    vocabulary: int | None  # rows of the embedding

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size for piece in self.pieces)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")

# What of a LoraConfig (peft 0.21) is obeyed, or changes nothing in a merge; any other setting that is set is refused.
KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_bias", "lora_dropout", "init_lora_weights", "eva_config", "ensure_weight_tying", "qalora_group_size"),
    *("megatron_core", "runtime_config"),
}
# The other ways to initialize an adapter change the base's weights too: such an adapter does not fit the plain base.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

# How peft names an adapter's tensors, after "base_model.model.": low-rank parts of a module, or whole tensors.
PART = re.compile(r"(.+)\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.default)?(\.weight|\.bias)?")
WHOLE = re.compile(r"(.+?)(?:\.(base_layer|original_module|modules_to_save))?(?:\.default)?\.(weight|bias)")


class Adapter:
    """An adapter's settings and tensors; `used` counts how often each has found its place.

    `parts` has for each module the names of its low-rank tensors by kind ("lora_A", "lora_B.bias", ...), `whole` for
    each tensor of the base the names of what replaces it, by how peft wrapped it ("" where it did not).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "adapter_model.safetensors"
        if not self.file.exists():
            raise UserError(f"{self.file} is missing; only safetensors are read: save the adapter again with peft")
        self.settings = read_json(folder / "adapter_config.json")
        check_settings(self.settings, folder)
        self.tensors = read_header(self.file)
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise UserError(
                    f"{self.file}: {name} is stored as {tensor.dtype}, and {', '.join(DTYPES)} are read; "
                    "save the adapter in one of these"
                )
        self.parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, dict[str, str]] = {}
        self.used: Counter[str] = Counter()
        for name in self.tensors:
            inner = name.removeprefix("base_model.model.")
            if part := PART.fullmatch(inner):
                kind = part[2] + (".bias" if part[3] == ".bias" else "")
                self.parts.setdefault(part[1], {})[kind] = name
            elif (whole := WHOLE.fullmatch(inner)) and "lora_" not in inner:
                self.whole.setdefault(f"{whole[1]}.{whole[3]}", {})[whole[2] or ""] = name
            else:
                raise UserError(f"{self.file}: {name} is of a kind that merge.py does not merge; use peft for it")

    def take(self, name: str) -> Tensor:
        """A tensor of the file, counted as used."""
        self.used[name] += 1
        return self.tensors[name]

    def replacement(self, target: str) -> tuple[Tensor, bool]:
        """What replaces a tensor of the base, and whether it was trained as a copy beside it (modules_to_save).

        Else it is the base's own tensor as it became: a resized embedding, a trained bias.
        """
        names, module = self.whole[target], target.rpartition(".")[0]
        copied = "modules_to_save" in names or any(
            f".{module}".endswith(f".{name}") for name in self.settings.get("modules_to_save") or ()
        )
        # a resized and trained embedding is saved three times: trained, trained, and as it was
        taken = {kind: self.take(name) for kind, name in names.items()}
        if copied:
            taken.pop("original_module", None)
        if len({digest(tensor) for tensor in taken.values()}) != 1:
            raise UserError(f"{self.file} has {target} with two different values; merge it with peft")
        return next(iter(taken.values())), copied

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module. A pattern matches its whole name or the end of it; the first wins, as in peft."""

        def lookup(patterns: dict[str, int] | None, default: int) -> int:
            return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

        rank = lookup(self.settings.get("rank_pattern"), self.settings["r"])
        alpha = lookup(self.settings.get("alpha_pattern"), self.settings["lora_alpha"])
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def update(self, module: str, weight: Tensor, turned: bool) -> Update:
        """The update of a module's weight; raises UserError where a shape or rank does not fit.

        `turned` is for square weights, whose shape does not tell that they are stored as (in, out).
        """
        parts = self.parts[module]
        embedding = "lora_embedding_A" in parts
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if not {first, second} <= parts.keys():
            raise UserError(f"{self.file}: {module} lacks its {first} or {second}; the file is damaged")
        a, b = self.take(parts[first]), self.take(parts[second])
        if not len(a.shape) == len(b.shape) == len(weight.shape) == 2:
            raise UserError(f"{self.file}: {module} is neither linear nor an embedding; merge it with peft")
        rank, scale = self.scaling(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(f"{self.file}: {module} has rank {a.shape[0]}, adapter_config.json says {rank}")
        shape = (b.shape[0], a.shape[1])
        turned = embedding or (turned if shape[0] == shape[1] else weight.shape == shape[::-1])
        if weight.shape != (shape[::-1] if turned else shape):
            raise UserError(
                f"{self.file}: {module} was trained on a weight of {shape}, not {weight.shape}; {OTHER_BASE}"
            )
        if bool(self.settings.get("use_dora")) != ("lora_magnitude_vector" in parts):
            raise UserError(f"{self.file}: {module} and use_dora contradict each other; the file is damaged")
        magnitude = self.take(parts["lora_magnitude_vector"]) if "lora_magnitude_vector" in parts else None
        return Update(a if turned else b, b if turned else a, scale, turned, magnitude)

    def is_turned(self, module: str, weight: Tensor) -> bool:
        """Whether the shape tells that the weight of a linear module is stored as (in, out)."""
        parts = self.parts[module]
        if not {"lora_A", "lora_B"} <= parts.keys():
            return False
        shape = (self.tensors[parts["lora_A"]].shape[-1], self.tensors[parts["lora_B"]].shape[0])
        return weight.shape == shape and shape[0] != shape[1]


OTHER_BASE = "give model_name_or_path=the model it was trained on"
MULTIMODAL = "a multimodal model's tensors have other names on the disk than in memory: merge it with peft"


def check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Raises UserError for everything in adapter_config.json that this merge would not do rightly, by name."""
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder} is a {settings.get('peft_type')} adapter, and merge.py merges LoRA, rsLoRA and DoRA; "
            "merge it with peft's merge_and_unload"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float):
            raise UserError(f"{folder / 'adapter_config.json'} has no number {key}; save the adapter again with peft")
    faults = [f"{key}: {value!r}" for key, value in settings.items() if key not in KNOWN and value]
    if settings.get("init_lora_weights") not in INITIALIZATIONS:
        faults.append(f"init_lora_weights: {settings['init_lora_weights']!r} (it changed the base's weights as well)")
    if faults:
        raise UserError(
            f"{folder / 'adapter_config.json'} has what merge.py does not merge: {', '.join(faults)}; "
            "merge it with peft's merge_and_unload"
        )


def make_plan(base: dict[str, Tensor], config: dict[str, Any], adapter: Adapter, export_dtype: str | None) -> Plan:
    """Gives every tensor of the adapter its place; raises UserError, by name, where one has none.

    `base` and `config` are the base's tensors and config.json.
    """
    base = dict(base)

    def place(target: str) -> str:
        """The base's name of a tensor; some checkpoints leave out the first word ("transformer.")."""
        return target if target in base or (short := target.partition(".")[2]) not in base else short

    modules = {place(f"{module}.weight"): module for module in adapter.parts}
    copied: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for target in adapter.whole:
        tensor, is_copy = adapter.replacement(target)
        (copied if is_copy else own)[place(target)] = tensor
    embedding = next((name for name in base if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in (*base, *modules, *copied, *own) if name.endswith(HEADS)), "lm_head.weight")
    untied = False
    if embedding and language_config(config).get("tie_word_embeddings", head not in base):
        # one tensor in the base; it stays one unless the adapter changes its two uses differently
        if {embedding, head} <= own.keys() and digest(own[embedding]) != digest(own[head]):
            raise UserError(
                f"{adapter.file} has {embedding} and {head} with different values, which are one tensor in the base; "
                + OTHER_BASE
            )
        own[head] = own[embedding] = own.get(embedding, own.get(head, base[embedding]))
        ends = [digest(copied[name]) if name in copied else name in modules for name in (embedding, head)]
        untied = ends[0] != ends[1] or True in ends
        base[head] = base[embedding]
        if not untied:
            for tensors in (base, own, copied):
                tensors.pop(head, None)

    sources = {**base, **own, **copied}
    missing = [name for name in (*own, *copied) if name not in base] + [name for name in modules if name not in sources]
    if missing:
        mend = MULTIMODAL if language_config(config) is not config else OTHER_BASE
        raise UserError(f"{adapter.file} changes {missing[0]}, which the base has not; {mend}")
    for name, tensor in {**own, **copied}.items():
        check_replacement(adapter, name, tensor, base[name])
    rows = {sources[name].shape[0] for name in (embedding, head) if name in sources}
    if len(rows) > 1:
        raise UserError(f"{adapter.file} has {embedding} and {head} of different lengths; merge it with peft")
    updates = find_updates(adapter, modules, sources, place)
    if strays := [name for name in adapter.tensors if adapter.used[name] != 1]:
        raise UserError(f"{adapter.file}: {strays[0]} was used {adapter.used[strays[0]]} times; merge it with peft")
    wanted = DTYPES[export_dtype] if export_dtype else None
    pieces = [Piece(n, out_dtype(n, base[n], wanted), tensor, updates.get(n)) for n, tensor in sources.items()]
    return Plan(pieces, untied, rows.pop() if rows else None)


def check_replacement(adapter: Adapter, name: str, tensor: Tensor, base: Tensor) -> None:
    """Raises UserError where the adapter's tensor cannot stand for the base's: only an embedding may grow."""
    grown = name.endswith(EMBEDDINGS + HEADS) and (tensor.shape[0], *base.shape[1:]) == tensor.shape
    if tensor.shape != base.shape and not (grown and tensor.shape[0] > base.shape[0]):
        raise UserError(f"{adapter.file}: {name} has the shape {tensor.shape}, not {base.shape}; {OTHER_BASE}")


def find_updates(
    adapter: Adapter, modules: dict[str, str], sources: dict[str, Tensor], place: Callable[[str], str]
) -> dict[str, Update]:
    """The update of each weight and bias that the adapter's modules (by their weight's name) change."""
    # peft mends a wrong fan_in_fan_out as it loads an adapter, so one weight that is stored turned tells of all
    turned = bool(adapter.settings.get("fan_in_fan_out")) or any(
        adapter.is_turned(module, sources[weight]) for weight, module in modules.items()
    )
    updates = {}
    for weight, module in modules.items():
        updates[weight] = adapter.update(module, sources[weight], turned)
        if "lora_B.bias" in adapter.parts[module]:
            bias = place(f"{module}.bias")
            if bias not in sources:
                raise UserError(
                    f"{adapter.file}: {module} has a lora_bias, but no bias in the base to add it to; use peft"
                )
            updates[bias] = Update(adapter.take(adapter.parts[module]["lora_B.bias"]), None, updates[weight].scale)
    return updates


def out_dtype(name: str, tensor: Tensor, wanted: str | None) -> str:
    """The type in which a tensor of the base is written; raises UserError for a quantized or unknown one."""
    if tensor.dtype in DTYPES.values():
        return wanted or tensor.dtype
    if tensor.dtype in SIZES and tensor.dtype != "F64":
        return tensor.dtype  # whole numbers are tables, not weights
    raise UserError(f"{tensor.file}: {name} is stored as {tensor.dtype}; give model_name_or_path=the 16-bit model")


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that is about the language model."""
    return config.get("text_config", config)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that has to be there; raises UserError where it is not, or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); is {path.parent} whole?") from None


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic: in float32, in blocks that fit into a core's cache, cast once

BLOCK = 1 << 17  # elements


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


LARGEST = {"F32": 3.4028234e38, "BF16": 3.3895313e38, "F16": 65504.0}


def write_piece(piece: Piece, file: int, start: int) -> int:
    """Computes a piece and writes it into the open file at `start`; returns its bytes."""
    if piece.update is None and piece.dtype == piece.source.dtype:
        copy(piece.source, file, start)
        return piece.size
    rows = piece.source.shape[0] if piece.source.shape else 1
    step = max(1, BLOCK // max(1, piece.source.count // max(rows, 1)))
    change = Change(piece.update, piece.source) if piece.update else None
    for first in range(0, rows, step):
        last = min(rows, first + step)
        values = read_rows(piece.source, first, last)
        if change:
            change.apply(values, first, last)
        if not max(values.max(), -values.min()) <= LARGEST[piece.dtype]:  # a NaN compares false
            raise UserError(
                f"{piece.name} has values that are no numbers, or too large for {piece.dtype}, once merged; "
                "export_dtype=bfloat16 has room for large ones, else the adapter is broken: train with a lower rate"
            )
        packed = pack(values, piece.dtype)
        start += os.pwrite(file, packed.data, start)
    return piece.size


class Change:
    """An Update with its matrices read, as float32."""

    def __init__(self, update: Update, source: Tensor) -> None:
        import numpy as np

        self.left = read_rows(update.left)
        self.right = np.ones((1, 1), np.float32) if update.right is None else read_rows(update.right)
        if update.turned:
            self.left, self.right = np.ascontiguousarray(self.left.T), np.ascontiguousarray(self.right.T)
        self.left *= np.float32(update.scale)
        self.magnitude = self.columns = None
        if update.magnitude is not None:
            self.magnitude = read_rows(update.magnitude)  # (outputs, 1)
            if update.turned:  # an output's weights are a column, over all blocks
                self.columns = self.magnitude.T / self.column_lengths(source)

    def column_lengths(self, source: Tensor) -> np.ndarray:
        """Length of each column of the changed weight (1 x columns)."""
        import numpy as np

        squares = np.zeros((1, source.shape[1]))
        step = max(1, BLOCK // source.shape[1])
        for first in range(0, source.shape[0], step):
            last = min(source.shape[0], first + step)
            values = read_rows(source, first, last)
            values += self.left[first:last] @ self.right
            squares += np.square(values).sum(axis=0, dtype=np.float64)
        return np.sqrt(squares).astype(np.float32)

    def apply(self, values: np.ndarray, first: int, last: int) -> None:
        """Changes rows `first` to `last` of the weight in place."""
        import numpy as np

        values += self.left[first:last] @ self.right
        if self.columns is not None:
            values *= self.columns
        elif self.magnitude is not None:
            values *= self.magnitude[first:last] / np.linalg.norm(values, axis=1, keepdims=True)


def copy(tensor: Tensor, file: int, start: int) -> None:
    """Copies a tensor's bytes into the open file at `start`."""
    with open(tensor.file, "rb", buffering=0) as stream:
        stream.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = stream.read(min(left, 1 << 22))
            start += os.pwrite(file, chunk, start)
            left -= len(chunk)


def write_shards(plan: Plan, folder: Path, largest: int) -> None:
    """Writes all pieces into files of at most `largest` bytes (or one tensor), and an index where there are several."""
    from tqdm import tqdm

    shards: list[list[Piece]] = [[]]
    for piece in plan.pieces:
        if shards[-1] and sum(p.size for p in shards[-1]) + piece.size > largest:
            shards.append([])
        shards[-1].append(piece)
    weight_map = {}
    with tqdm(total=plan.size, desc="merge", unit="B", unit_scale=True, file=sys.stderr) as bar:
        for number, pieces in enumerate(shards, 1):
            one = len(shards) == 1
            name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update({piece.name: name for piece in pieces})
            write_shard(pieces, folder / name, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.size}, "weight_map": weight_map}
        common.write_json(folder / "model.safetensors.index.json", index)


def write_shard(pieces: list[Piece], path: Path, bar: Any) -> None:
    """Writes one safetensors file, several pieces at a time."""
    pieces = sorted(pieces, key=lambda piece: -SIZES[piece.dtype])  # keeps every tensor aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += piece.size
        entry = {"dtype": piece.dtype, "shape": piece.source.shape, "data_offsets": [starts[-1], end]}
        header[piece.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        offset = 8 + len(text)
        tasks = [
            pool.submit(write_piece, piece, stream.fileno(), offset + start)
            for piece, start in zip(pieces, starts, strict=True)
        ]
        try:
            for task in tasks:
                bar.update(task.result())
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(stream.fileno())
