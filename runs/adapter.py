"""An adapter's files: its settings and tensors, and the place of each in the base model.

`find_places` is the one check that merging, answering and further training share: every tensor has its place, with the
shape and the rank that it needs there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common import UserError
from runs.files import read_object
from runs.weights import DTYPES, Tensor, read_header, same_values

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
# What of a LoraConfig (peft 0.21) is obeyed, or changes nothing in a merge; any other setting that is set is refused.
KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_bias", "lora_dropout", "init_lora_weights", "eva_config", "ensure_weight_tying", "qalora_group_size"),
    *("megatron_core", "runtime_config", "target_parameters"),
}
# The other ways to initialize an adapter change the base's weights too: such an adapter does not fit the plain base.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# How PEFT names an adapter's tensors, after "base_model.model.": low-rank parts of a module, or whole tensors.
PART = re.compile(r"(.+)\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.default)?(\.weight|\.bias)?")
WHOLE = re.compile(r"(.+?)(?:\.(base_layer|original_module|modules_to_save))?(?:\.default)?\.(weight|bias)")
# What torch.compile, FSDP and activation checkpointing put around a module, and DDP in front of the model.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")


@dataclass(frozen=True)
class Update:
    """What is added to a weight: `b @ a * scale`; for DoRA each output's weights get the length `magnitude` then.

    `a` is (rank, inputs) and `b` (outputs, rank). Without `a`, for a bias, `b` (outputs) itself is added. With
    `experts` the weight is (experts, outputs, inputs), `a` (experts * rank, inputs), `b` (outputs, rank * experts).
    """

    a: Tensor | None
    b: Tensor
    scale: float
    transposed: bool = False  # the weight is stored as (inputs, outputs): an embedding, Conv1D, gpt-oss's experts
    magnitude: Tensor | None = None
    experts: int = 0


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a complete adapter."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError("{folder} has no adapter_model.safetensors; copy it whole, or save it with PEFT", folder=folder)
    return read_object(folder / "adapter_config.json")


class Adapter:
    """An adapter's settings and tensors; `used` counts how often each has found its place.

    `parts` has for each module the names of its low-rank tensors by kind ("lora_A", "lora_B.bias", ...), `whole` for
    each tensor of the base the names of what replaces it, by how PEFT wrapped it ("" where it did not). Names are
    without the prefixes of wrappers (`_orig_mod.`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "adapter_model.safetensors"
        self.settings = adapter_settings(folder)
        for key in ("peft_type", "task_type"):  # written as str(PeftType.LORA) by some programs
            if isinstance(self.settings.get(key), str):
                self.settings[key] = self.settings[key].rpartition(".")[2]
        self.tensors: dict[str, Tensor] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, dict[str, str]] = {}
        self.unknown: list[str] = []  # names of another kind of adapter
        self.used: Counter[str] = Counter()
        for tensor in read_header(self.file).values():
            name = WRAPPERS.sub("", tensor.name)
            self._check_tensor(tensor, name)
            self.tensors[name] = tensor
            inner = name.removeprefix("base_model.model.")
            if part := PART.fullmatch(inner):
                kind = part[2] + (".bias" if part[3] == ".bias" else "")
                self.parts.setdefault(part[1], {})[kind] = name
            elif (whole := WHOLE.fullmatch(inner)) and "lora_" not in inner:
                self.whole.setdefault(f"{whole[1]}.{whole[3]}", {})[whole[2] or ""] = name
            else:
                self.unknown.append(name)

    def _check_tensor(self, tensor: Tensor, name: str) -> None:
        file = self.file
        if name in self.tensors:
            raise UserError("{file} has {tensor} under two names; save the adapter again", file=file, tensor=name)
        if tensor.dtype not in DTYPES.values():
            text = "{file}: {tensor} is in {dtype}; save it in {known}"
            raise UserError(text, file=file, tensor=name, dtype=tensor.dtype, known=[*DTYPES])
        if tensor.count == 0:
            text = "{file}: {tensor} is empty, as ZeRO-3 saves it; convert the checkpoint with zero_to_fp32.py"
            raise UserError(text, file=file, tensor=name)

    @cached_property
    def unsupported(self) -> list[str]:
        """What of it only PEFT understands: settings as "key: value", names of tensors."""
        found = [f"{key}: {value!r}" for key, value in self.settings.items() if key not in KNOWN and value]
        if self.settings.get("init_lora_weights") not in INITIALIZATIONS:
            found.append(f"init_lora_weights: {self.settings['init_lora_weights']!r}")
        if self.settings.get("peft_type") != "LORA":
            found.insert(0, f"peft_type: {self.settings.get('peft_type')!r}")
        return found + self.unknown

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
        first, *others = taken.values()
        if not all(same_values(first, other) for other in others):
            text = "{file} has two different values of {tensor}; save the adapter again"
            raise UserError(text, file=self.file, tensor=target)
        return first, copied

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module. A pattern matches its whole name or the end of it; the first wins, as in PEFT."""

        def lookup(patterns: dict[str, int] | None, default: int) -> int:
            return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

        rank = lookup(self.settings.get("rank_pattern"), self.settings.get("r"))
        alpha = lookup(self.settings.get("alpha_pattern"), self.settings.get("lora_alpha"))
        for key, value in (("r", rank), ("lora_alpha", alpha)):
            if type(value) not in (int, float) or (key == "r" and value <= 0):
                file = self.folder / "adapter_config.json"
                raise UserError("{file} has no valid number {key}; save the adapter again", file=file, key=key)
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A (rank, inputs) and lora_B (outputs, rank) of a module, or those of an embedding."""
        parts, file = self.parts[module], self.file
        embedding = "embedding_" if "lora_embedding_A" in parts else ""
        kinds = (f"lora_{embedding}A", f"lora_{embedding}B")
        for kind in kinds:
            if kind not in parts:
                raise UserError("{file} lacks {part} of {module}; copy it again", file=file, module=module, part=kind)
        a, b = (self.take(parts[kind]) for kind in kinds)
        if not len(a.shape) == len(b.shape) == 2:
            text = "{file}: {module} is neither a linear layer nor an embedding; use PEFT's merge_and_unload"
            raise UserError(text, file=file, module=module)
        return a, b

    def update(self, module: str, shape: tuple[int, ...], transposed: bool) -> Update:
        """The update of a module's weight of `shape`; raises UserError where a shape or rank does not fit.

        `transposed` is for square weights, whose shape does not tell that they are stored as (inputs, outputs).
        """
        (a, b), parts = self.pair(module), self.parts[module]
        rank, scale = self.scaling(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            text = "{file}: {module} has rank {rank}, adapter_config.json {configured}; take both from one training"
            raise UserError(text, file=self.file, module=module, rank=a.shape[0], configured=rank)
        trained = (b.shape[0], a.shape[1])
        embedding = "lora_embedding_A" in parts
        transposed = embedding or (transposed if trained[0] == trained[1] else shape == trained[::-1])
        if shape != (trained[::-1] if transposed else trained):
            raise self.wrong_shape(module, trained, shape)
        magnitude = parts.get("lora_magnitude_vector")
        if bool(self.settings.get("use_dora")) != bool(magnitude):
            text = "{file}: {module} contradicts use_dora of adapter_config.json; take both from one training"
            raise UserError(text, file=self.file, module=module)
        return Update(a, b, scale, transposed, self.take(magnitude) if magnitude else None)

    def wrong_shape(self, tensor: str, trained: tuple[int, ...], base: tuple[int, ...]) -> UserError:
        text = "{file}: {tensor} was trained on shape {trained}, not {base}; set model_name_or_path to its base"
        return UserError(text, file=self.file, tensor=tensor, trained=str(trained), base=str(base))

    def trained_shape(self, module: str) -> tuple[int, int] | None:
        """(outputs, inputs) of the linear layer that a module's pair was trained on; None where it has no pair."""
        parts = self.parts[module]
        if not {"lora_A", "lora_B"} <= parts.keys():
            return None
        return self.tensors[parts["lora_B"]].shape[0], self.tensors[parts["lora_A"]].shape[-1]


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that is about the language model."""
    part = config.get("text_config", config)
    return part if isinstance(part, dict) else config


# ---------------------------------------------------------------------------------------------------------------------
# The place of every tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Places:
    """Where an adapter's tensors belong, by the names of the base's tensors."""

    updates: dict[str, Update] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)  # the base's tensor as it became: grown embedding, bias
    copied: dict[str, Tensor] = field(default_factory=dict)  # trained as a copy beside it (modules_to_save)
    embedding: str | None = None
    head: str = "lm_head.weight"
    vocabulary: int | None = None  # rows of the embedding, which the adapter may have made longer


def find_places(
    adapter: Adapter, shapes: Shapes, *, tied: bool, multimodal: bool = False, merging: bool = True
) -> Places:
    """The place of each of the adapter's tensors in a base with tensors of these names and shapes.

    `tied`: the output layer is the embedding. `merging`: a bias needs one of the base that it is added to. Raises
    UserError, by name, where a tensor has no place, is used twice, or has a shape or rank that does not fit.
    """
    if adapter.unsupported:
        text = "{folder} cannot be merged here ({reasons}); use PEFT's merge_and_unload"
        raise UserError(text, folder=adapter.folder, reasons=adapter.unsupported)
    base, places = dict(shapes), Places()
    modules = {_place(f"{module}.weight", base): module for module in adapter.parts if not _experts(module, base)}
    for target in adapter.whole:
        tensor, is_copy = adapter.replacement(target)
        (places.copied if is_copy else places.own)[_place(target, base)] = tensor
    _find_ends(adapter, places, base, modules, tied)
    replaced = {**places.own, **places.copied}
    if unknown := next((name for name in [*replaced, *modules] if name not in base), None):
        if multimodal:
            text = "{file} changes {tensor}, named otherwise in a multimodal base; use PEFT's merge_and_unload"
            raise UserError(text, file=adapter.file, tensor=unknown)
        text = "{file} changes {tensor}, which the base lacks; set model_name_or_path to the adapter's base"
        raise UserError(text, file=adapter.file, tensor=unknown)
    for name, tensor in replaced.items():
        grown = name.endswith(EMBEDDINGS + HEADS) and tensor.shape[0] > base[name][0]
        if tensor.shape[1:] != base[name][1:] or (tensor.shape != base[name] and not grown):
            raise adapter.wrong_shape(name, tensor.shape, base[name])
        base[name] = tensor.shape
    rows = {base[name][0] for name in (places.embedding, places.head) if name in base}
    if len(rows) > 1:
        text = "{file}: the embedding and the output layer have different lengths; train both with the same new tokens"
        raise UserError(text, file=adapter.file)
    places.vocabulary = rows.pop() if rows else None
    places.updates = {**_linear_updates(adapter, modules, base, merging), **_expert_updates(adapter, base)}
    if wrong := [name for name in adapter.tensors if adapter.used[name] != 1]:
        text = "{file}: {tensor} fits {count} tensors of the base; set model_name_or_path to the adapter's base"
        raise UserError(text, file=adapter.file, tensor=wrong[0], count=adapter.used[wrong[0]])
    return places


def _place(target: str, base: Shapes) -> str:
    """The base's name of a tensor; some checkpoints leave out the first word ("transformer.")."""
    return target if target in base or (short := target.partition(".")[2]) not in base else short


def _find_ends(
    adapter: Adapter, places: Places, base: dict[str, tuple[int, ...]], modules: Mapping[str, str], tied: bool
) -> None:
    """Finds embedding and output layer. What a tied one of them became, both became."""
    own = places.own
    places.embedding = embedding = next((name for name in base if name.endswith(EMBEDDINGS)), None)
    places.head = head = next((n for n in (*base, *modules, *places.copied, *own) if n.endswith(HEADS)), places.head)
    if not tied or embedding is None:
        return
    if {embedding, head} <= own.keys() and not same_values(own[embedding], own[head]):
        text = "{file}: {embedding} and {head} differ, the base ties them; set model_name_or_path to the adapter's base"
        raise UserError(text, file=adapter.file, embedding=embedding, head=head)
    base.setdefault(head, base[embedding])
    if new := own.get(embedding, own.get(head)):
        own[embedding] = own[head] = new


def _linear_updates(adapter: Adapter, modules: Mapping[str, str], base: Shapes, merging: bool) -> dict[str, Update]:
    """The update of each weight and bias that the adapter's modules (by their weight's name) change."""
    # PEFT corrects a wrong fan_in_fan_out as it loads an adapter, so one weight that is stored transposed tells of all
    shapes = [(adapter.trained_shape(module), base[weight]) for weight, module in modules.items()]
    transposed = bool(adapter.settings.get("fan_in_fan_out")) or any(
        trained and trained[0] != trained[1] and trained[::-1] == shape for trained, shape in shapes
    )
    updates = {}
    for weight, module in modules.items():
        updates[weight] = adapter.update(module, base[weight], transposed)
        if added := adapter.parts[module].get("lora_B.bias"):
            bias = _place(f"{module}.bias", base)
            if bias not in base and merging:
                text = "{file}: {module} has a bias, the base none; use it unmerged, or train without lora_bias"
                raise UserError(text, file=adapter.file, module=module)
            updates[bias] = Update(None, adapter.take(added), updates[weight].scale)
    return updates


# Experts: tensors of three dimensions, (experts, out, in) or (experts, in, out), which PEFT's target_parameters adapt.
# Several of one module are wrapped in each other: the inner one's name has ".base_layer".


def _owner(module: str) -> str:
    return module.replace(".base_layer", "")


def _experts(module: str, base: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of experts in a module, by name."""
    owner = f"{_owner(module)}."
    if f"{owner}weight" in base:
        return {}
    return {n: s for n, s in base.items() if n.startswith(owner) and "." not in n[len(owner) :] and len(s) == 3}


def _expert_updates(adapter: Adapter, base: Shapes) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for module in adapter.parts:
        tensors = {name: shape for name, shape in _experts(module, base).items() if name not in updates}
        if not tensors:
            continue
        a, b = adapter.pair(module)
        trained = (b.shape[0], a.shape[1])
        for name, shape in tensors.items():
            rank, scale = adapter.scaling(name)
            if trained in (shape[1:], shape[:0:-1]) and a.shape[0] == b.shape[1] == rank * shape[0]:
                break
        else:
            raise adapter.wrong_shape(module, trained, shape)
        transposed = trained != shape[1:] if trained[0] != trained[1] else _experts_transposed(adapter, module, base)
        updates[name] = Update(a, b, scale, transposed, experts=shape[0])
    return updates


def _experts_transposed(adapter: Adapter, module: str, base: Shapes) -> bool:
    """How a module's experts are stored, told by another of its tensors that is not square."""
    shapes = [shape[1:] for shape in _experts(module, base).values()]
    for other in adapter.parts:
        trained = adapter.trained_shape(other) if _owner(other) == _owner(module) else None
        if trained and trained[0] != trained[1] and (trained in shapes or trained[::-1] in shapes):
            return trained not in shapes
    text = "{file}: the experts of {module} are square: how they are stored is unknown; use PEFT's merge_and_unload"
    raise UserError(text, file=adapter.file, module=module)
