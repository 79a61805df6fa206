"""An adapter's files: its settings and tensors, and the place of each in the base model.

`find_places` is the one check that merging, answering and further training share: every tensor has its place, with the
shape and the rank that it needs there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Message, UserError
from runs.files import read_object
from runs.weights import DTYPES, Tensor, digest, read_header

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
# How peft names an adapter's tensors, after "base_model.model.": low-rank parts of a module, or whole tensors.
PART = re.compile(r"(.+)\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.default)?(\.weight|\.bias)?")
WHOLE = re.compile(r"(.+?)(?:\.(base_layer|original_module|modules_to_save))?(?:\.default)?\.(weight|bias)")
# What torch.compile, FSDP and activation checkpointing put around a module, and DDP in front of the model.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")


@dataclass(frozen=True)
class Update:
    """What is added to a weight, `left @ right * scale`, and for DoRA the length each output's weights get then.

    `left` is (rows, rank) and `right` (rank, columns) once transposed if `transposed`; without `right`, the bias of
    lora_B, `left` itself is added. With `experts` the weight is (experts, rows, columns), and `left` and `right` are
    lora_B (outputs, rank x experts) and lora_A (experts x rank, inputs), in the other order if `transposed`.
    """

    left: Tensor
    right: Tensor | None
    scale: float
    transposed: bool = False  # the weight is stored as (in, out): an embedding, GPT-2's Conv1D, gpt-oss's experts
    magnitude: Tensor | None = None
    experts: int = 0


@dataclass
class Places:
    """Where an adapter's tensors belong, by the names of the base's tensors."""

    updates: dict[str, Update] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)  # the base's tensor as it became: grown embedding, bias
    copied: dict[str, Tensor] = field(default_factory=dict)  # trained as a copy beside it (modules_to_save)
    embedding: str | None = None
    head: str = "lm_head.weight"
    vocabulary: int | None = None  # rows of the embedding, which the adapter may have made longer


class Adapter:
    """An adapter's settings and tensors; `used` counts how often each has found its place.

    `parts` has for each module the names of its low-rank tensors by kind ("lora_A", "lora_B.bias", ...), `whole` for
    each tensor of the base the names of what replaces it, by how peft wrapped it ("" where it did not). Names are
    without the prefixes of wrappers (`_orig_mod.`): `renamed` has the file's for those that had one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "adapter_model.safetensors"
        if not self.file.exists():
            raise UserError(
                "{folder} lacks adapter_model.safetensors, the only format read here; copy the whole folder, or "
                "save the adapter again with peft",
                folder=folder,
            )
        self.settings = read_object(folder / "adapter_config.json")
        for key in ("peft_type", "task_type"):  # written as str(PeftType.LORA) by some programs
            if isinstance(self.settings.get(key), str):
                self.settings[key] = self.settings[key].rpartition(".")[2]
        self.tensors: dict[str, Tensor] = {}
        self.renamed: dict[str, str] = {}
        self._read_tensors()
        self.parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, dict[str, str]] = {}
        self.unknown: list[str] = []  # names of another kind of adapter
        self.used: Counter[str] = Counter()
        for name in self.tensors:
            inner = name.removeprefix("base_model.model.")
            if part := PART.fullmatch(inner):
                kind = part[2] + (".bias" if part[3] == ".bias" else "")
                self.parts.setdefault(part[1], {})[kind] = name
            elif (whole := WHOLE.fullmatch(inner)) and "lora_" not in inner:
                self.whole.setdefault(f"{whole[1]}.{whole[3]}", {})[whole[2] or ""] = name
            else:
                self.unknown.append(name)

    def _read_tensors(self) -> None:
        for stored, tensor in read_header(self.file).items():
            name = WRAPPERS.sub("", stored)
            if name in self.tensors:
                raise UserError(
                    "{file} has {tensor} twice, once under a name with a prefix; save the adapter again with peft",
                    file=self.file,
                    tensor=name,
                )
            if tensor.dtype not in DTYPES.values():
                raise UserError(
                    "{file}: {tensor} is stored as {dtype}; an adapter is read in {known}: save it again in one of "
                    "these",
                    file=self.file,
                    tensor=stored,
                    dtype=tensor.dtype,
                    known=[*DTYPES],
                )
            if tensor.count == 0:
                raise UserError(
                    "{file}: {tensor} is empty, as DeepSpeed ZeRO-3 saves an adapter that it has not gathered; "
                    "save it again with stage3_gather_16bit_weights_on_model_save, or convert the checkpoint with "
                    "zero_to_fp32.py",
                    file=self.file,
                    tensor=stored,
                )
            self.tensors[name] = tensor
            if name != stored:
                self.renamed[name] = stored

    def settings_not_merged(self) -> list[str]:
        """Everything in adapter_config.json that only peft obeys, as "key: value"."""
        found = [f"{key}: {value!r}" for key, value in self.settings.items() if key not in KNOWN and value]
        if self.settings.get("init_lora_weights") not in INITIALIZATIONS:
            found.append(f"init_lora_weights: {self.settings['init_lora_weights']!r}")
        return found

    def is_plain(self) -> bool:
        """Whether `find_places` understands all of it."""
        return self.settings.get("peft_type") == "LORA" and not self.settings_not_merged() and not self.unknown

    def check_mergeable(self) -> None:
        """Raises UserError for everything that a merge here would not do rightly, by name."""
        if self.settings.get("peft_type") != "LORA":
            raise UserError(
                "{folder} is a {kind} adapter, and merge.py merges LoRA, rsLoRA and DoRA; merge it with peft's "
                "merge_and_unload",
                folder=self.folder,
                kind=self.settings.get("peft_type"),
            )
        if found := self.settings_not_merged():
            raise UserError(
                "{file} has what merge.py does not merge: {settings}; merge it with peft's merge_and_unload",
                file=self.folder / "adapter_config.json",
                settings=found,
            )
        if self.unknown:
            raise UserError(
                "{file}: {tensor} is of a kind that merge.py does not merge; merge it with peft's merge_and_unload",
                file=self.file,
                tensor=self.unknown[0],
            )

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
            raise UserError(
                "{file} has {tensor} with two different values; save the adapter again from the trained model",
                file=self.file,
                tensor=target,
            )
        return next(iter(taken.values())), copied

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module. A pattern matches its whole name or the end of it; the first wins, as in peft."""

        def lookup(patterns: dict[str, int] | None, default: int) -> int:
            return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

        rank = lookup(self.settings.get("rank_pattern"), self.settings.get("r"))
        alpha = lookup(self.settings.get("alpha_pattern"), self.settings.get("lora_alpha"))
        for key, value in (("r", rank), ("lora_alpha", alpha)):
            if type(value) not in (int, float) or (key == "r" and value <= 0):
                raise UserError(
                    "{file} has no valid number {key}; save the adapter again with peft",
                    file=self.folder / "adapter_config.json",
                    key=key,
                )
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of a module, or those of an embedding; raises UserError where one is missing."""
        parts = self.parts[module]
        first, second = (
            ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
        )
        for part in (first, second):
            if part not in parts:
                raise UserError(
                    "{file}: {module} lacks its {part}; the file is damaged: copy or save it again",
                    file=self.file,
                    module=module,
                    part=part,
                )
        a, b = self.take(parts[first]), self.take(parts[second])
        if not len(a.shape) == len(b.shape) == 2:
            raise UserError(
                "{file}: {module} is neither a linear layer nor an embedding; merge it with peft's merge_and_unload",
                file=self.file,
                module=module,
            )
        return a, b

    def update(self, module: str, shape: tuple[int, ...], transposed: bool) -> Update:
        """The update of a module's weight of `shape`; raises UserError where a shape or rank does not fit.

        `transposed` is for square weights, whose shape does not tell that they are stored as (in, out).
        """
        a, b = self.factors(module)
        parts = self.parts[module]
        if len(shape) != 2:
            raise UserError(
                "{file}: {module} is neither a linear layer nor an embedding; merge it with peft's merge_and_unload",
                file=self.file,
                module=module,
            )
        rank, scale = self.scaling(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(
                "{file}: {module} has rank {rank}, adapter_config.json says {configured}; take both files from one "
                "training",
                file=self.file,
                module=module,
                rank=a.shape[0],
                configured=rank,
            )
        trained = (b.shape[0], a.shape[1])
        embedding = "lora_embedding_A" in parts
        transposed = embedding or (transposed if trained[0] == trained[1] else shape == trained[::-1])
        if shape != (trained[::-1] if transposed else trained):
            raise UserError(
                "{file}: {tensor} was trained on a weight of shape {trained}, not {base}; give "
                "model_name_or_path=the model it was trained on",
                file=self.file,
                tensor=module,
                trained=str(trained),
                base=str(shape),
            )
        if bool(self.settings.get("use_dora")) != ("lora_magnitude_vector" in parts):
            raise UserError(
                "{file}: {module} and use_dora of adapter_config.json contradict each other; take both files from "
                "one training",
                file=self.file,
                module=module,
            )
        magnitude = self.take(parts["lora_magnitude_vector"]) if "lora_magnitude_vector" in parts else None
        return Update(a if transposed else b, b if transposed else a, scale, transposed, magnitude)

    def is_transposed(self, module: str, shape: tuple[int, ...]) -> bool:
        """Whether the shape tells that the weight of a linear module is stored as (in, out)."""
        parts = self.parts[module]
        if not {"lora_A", "lora_B"} <= parts.keys():
            return False
        trained = (self.tensors[parts["lora_A"]].shape[-1], self.tensors[parts["lora_B"]].shape[0])
        return shape == trained and trained[0] != trained[1]


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that is about the language model."""
    part = config.get("text_config", config)
    return part if isinstance(part, dict) else config


# ---------------------------------------------------------------------------------------------------------------------
# The place of every tensor


def find_places(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: bool,
    multimodal: bool = False,
    merging: bool = True,
) -> Places:
    """The place of each of the adapter's tensors in a base with tensors of these names and shapes.

    `tied`: the output layer is the embedding. `merging`: a bias needs one of the base that it is added to. Raises
    UserError, by name, where a tensor has no place, is used twice, or has a shape or rank that does not fit.
    """
    adapter.check_mergeable()
    base = dict(shapes)
    modules = {_place(f"{module}.weight", base): module for module in adapter.parts if not _experts(module, base)}
    places = Places()
    for target in adapter.whole:
        tensor, is_copy = adapter.replacement(target)
        (places.copied if is_copy else places.own)[_place(target, base)] = tensor
    _find_ends(adapter, places, base, modules, tied)
    replaced = {**places.own, **places.copied}
    for name in [*replaced, *modules]:
        if name not in base:
            code = (
                Message(
                    "a multimodal model's tensors have other names on the disk than in memory: merge it with peft's "
                    "merge_and_unload"
                )
                if multimodal
                else Message("give model_name_or_path=the model it was trained on")
            )
            raise UserError(
                "{file} changes {tensor}, which the base does not have; {what}",
                file=adapter.file,
                tensor=name,
                what=code,
            )
    for name, tensor in replaced.items():
        _check_replacement(adapter, name, tensor, base[name])
        base[name] = tensor.shape
    rows = {base[name][0] for name in (places.embedding, places.head) if name in base}
    if len(rows) > 1:
        raise UserError(
            "{file} has {embedding} and {head} of different lengths; train both with the same new tokens",
            file=adapter.file,
            embedding=places.embedding,
            head=places.head,
        )
    places.vocabulary = rows.pop() if rows else None
    places.updates = {**_linear_updates(adapter, modules, base, merging), **_expert_updates(adapter, base)}
    if wrong := [name for name in adapter.tensors if adapter.used[name] != 1]:
        raise UserError(
            "{file}: {tensor} matches {count} tensors of the base instead of one; give model_name_or_path=the "
            "model it was trained on",
            file=adapter.file,
            tensor=wrong[0],
            count=adapter.used[wrong[0]],
        )
    return places


def _place(target: str, base: Mapping[str, Any]) -> str:
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
    if {embedding, head} <= own.keys() and digest(own[embedding]) != digest(own[head]):
        raise UserError(
            "{file} has {embedding} and {head} with different values, which are one tensor in the base; give "
            "model_name_or_path=the model it was trained on",
            file=adapter.file,
            embedding=embedding,
            head=head,
        )
    base.setdefault(head, base[embedding])
    if new := own.get(embedding, own.get(head)):
        own[embedding] = own[head] = new


def _check_replacement(adapter: Adapter, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError where the adapter's tensor cannot stand for the base's: only an embedding may grow."""
    grown = name.endswith(EMBEDDINGS + HEADS) and (tensor.shape[0], *shape[1:]) == tensor.shape
    if tensor.shape != shape and not (grown and tensor.shape[0] > shape[0]):
        raise UserError(
            "{file}: {tensor} was trained on a weight of shape {trained}, not {base}; give model_name_or_path=the "
            "model it was trained on",
            file=adapter.file,
            tensor=name,
            trained=str(tensor.shape),
            base=str(shape),
        )


def _linear_updates(
    adapter: Adapter, modules: Mapping[str, str], base: Mapping[str, tuple[int, ...]], merging: bool
) -> dict[str, Update]:
    """The update of each weight and bias that the adapter's modules (by their weight's name) change."""
    # peft corrects a wrong fan_in_fan_out as it loads an adapter, so one weight that is stored transposed tells of all
    transposed = bool(adapter.settings.get("fan_in_fan_out")) or any(
        adapter.is_transposed(module, base[weight]) for weight, module in modules.items()
    )
    updates = {}
    for weight, module in modules.items():
        updates[weight] = adapter.update(module, base[weight], transposed)
        if "lora_B.bias" in adapter.parts[module]:
            bias = _place(f"{module}.bias", base)
            if bias not in base and merging:
                raise UserError(
                    "{file}: {module} has a bias (lora_bias), and the base has none there to add it to; chat.py "
                    "answers with this adapter as it is, for a merge train without lora_bias",
                    file=adapter.file,
                    module=module,
                )
            updates[bias] = Update(adapter.take(adapter.parts[module]["lora_B.bias"]), None, updates[weight].scale)
    return updates


# Experts: tensors of three dimensions, (experts, out, in) or (experts, in, out), which peft's target_parameters adapt.
# Several of one module are wrapped in each other: the inner one's name has ".base_layer".


def _experts(module: str, base: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of experts in a module, by name."""
    owner = module.replace(".base_layer", "") + "."
    if f"{owner}weight" in base:
        return {}
    return {n: s for n, s in base.items() if n.startswith(owner) and "." not in n[len(owner) :] and len(s) == 3}


def _expert_updates(adapter: Adapter, base: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for module in adapter.parts:
        tensors = {name: shape for name, shape in _experts(module, base).items() if name not in updates}
        if not tensors:
            continue
        a, b = adapter.factors(module)
        trained = (b.shape[0], a.shape[1])
        for name, shape in tensors.items():
            rank, scale = adapter.scaling(name)
            if trained in (shape[1:], shape[:0:-1]) and a.shape[0] == b.shape[1] == rank * shape[0]:
                break
        else:
            raise UserError(
                "{file}: {tensor} was trained on a weight of shape {trained}, not {base}; give "
                "model_name_or_path=the model it was trained on",
                file=adapter.file,
                tensor=module,
                trained=str(trained),
                base=str(shape),
            )
        transposed = trained != shape[1:] if trained[0] != trained[1] else _experts_transposed(adapter, module, base)
        first, second = (a, b) if transposed else (b, a)
        updates[name] = Update(first, second, scale, transposed, experts=shape[0])
    return updates


def _experts_transposed(adapter: Adapter, module: str, base: Mapping[str, tuple[int, ...]]) -> bool:
    """How a module's experts are stored, told by another of its tensors that is not square."""
    owner = module.replace(".base_layer", "")
    for other in adapter.parts:
        if other.replace(".base_layer", "") != owner or other == module:
            continue
        parts = adapter.parts[other]
        if {"lora_A", "lora_B"} <= parts.keys():
            trained = (adapter.tensors[parts["lora_B"]].shape[0], adapter.tensors[parts["lora_A"]].shape[1])
            shapes = [shape[1:] for shape in _experts(module, base).values()]
            if trained[0] != trained[1] and (trained in shapes or trained[::-1] in shapes):
                return trained not in shapes
    raise UserError(
        "{file}: the experts of {module} are square, so their shape does not tell how they are stored; merge it "
        "with peft's merge_and_unload",
        file=adapter.file,
        module=module,
    )
