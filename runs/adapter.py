"""An adapter's files: its settings and tensors, and the place of each in the base model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from runs.target import find_model
from runs.weights import DTYPES, Tensor, digest, read_header

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-(4|8)bit$|-(4|8)bit$", re.IGNORECASE)
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
OTHER_BASE = "give model_name_or_path=the model it was trained on"
MULTIMODAL = "a multimodal model's tensors have other names on the disk than in memory: merge it with peft"


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


def find_base(name: str) -> tuple[Path, str, dict[str, Any]]:
    """Folder, name and config.json of the 16-bit base; for one quantized by bitsandbytes, of what it was made of."""
    if name.endswith(".gguf"):
        raise UserError(
            f"{name} is a GGUF, which is quantized; give model_name_or_path=the 16-bit model it was made of"
        )
    folder = find_model(name)
    whole = QUANTIZED_NAME.sub("", name)
    if whole != name and (original := find_model(whole)):
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


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that is about the language model."""
    return config.get("text_config", config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that has to be there; raises UserError where it is not, or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); is {path.parent} whole?") from None
