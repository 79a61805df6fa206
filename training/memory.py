"""How large a model is, from config.json and the headers of its weights, and how much memory training it needs."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Config, Gpu, Message
from runs.adapter import EMBEDDINGS, HEADS
from runs.files import read_object
from runs.weights import read_header

GB = 1e9
# The matrices that `lora_target: all` leaves out: embeddings, the output layer, the routers of experts.
NOT_ADAPTED = r"embed|lm_head|norm|\bw[tp]e\b|\bgate\.weight"
# What Unsloth calls the matrices of fused experts, which are no linear layers.
EXPERTS = {"gate_proj", "up_proj", "down_proj"}
# model_type of those whose attention Unsloth replaces (unsloth/models/loader.py); it needs no mask for flat batches.
OWN_ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"}
BYTES_A_WEIGHT = {4: 0.53, 8: 1.03}  # of quantized matrices, with the quantization constants
NEEDED = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
PARTS = {
    "weights": Message("weights"),
    "adapter": Message("adapter"),
    "activations": Message("activations"),
    "logits": Message("logits"),
    "attention": Message("attention mask"),
    "replies": Message("replies"),
    "runtime": Message("runtime"),
}
Shapes = dict[str, tuple[int, ...]]  # of a model's tensors, by name
# config.json of the embedded model, as far as its size depends on it
EMBEDDED_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class ModelSize:
    """What time and memory depend on: config.json, the shapes of the tensors, and the bytes of the weights.

    `folder` is None for a model that is not on the disk yet.
    """

    settings: dict[str, Any]
    shapes: Shapes
    bytes: int
    folder: Path | None

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def read_model(folder: Path) -> ModelSize:
    """The size of a model on the disk; raises UserError where config.json cannot be read."""
    settings = read_object(folder / "config.json")
    settings |= settings.get("text_config") or {}  # of a model with vision
    return ModelSize(settings, tensor_shapes(folder), model_bytes(folder), folder)


def model_like(settings: dict[str, Any]) -> ModelSize | None:
    """The size of a 16-bit model of which only config.json is known; None where that does not describe a Llama."""
    settings = settings | (settings.get("text_config") or {})
    has_experts = any("experts" in name for name in settings)
    if has_experts or "quantization_config" in settings or not settings.keys() >= set(NEEDED):
        return None
    hidden, inner, vocabulary = (settings[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = _attention_widths(settings)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if not settings.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    matrices = {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
    matrices |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (keys, hidden))
    matrices |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)) | {"mlp.down_proj": (hidden, inner)}
    for layer in range(settings["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in matrices.items()}
    return ModelSize(settings, shapes, 2 * sum(map(math.prod, shapes.values())), None)


def tensor_shapes(folder: Path) -> Shapes:
    """Name → shape of every tensor of a safetensors model, from the files' headers alone."""
    return {
        name: tensor.shape
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_header(file).items()
    }


def model_bytes(folder: Path) -> int:
    """Size of a model's weights on the disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def linear_modules(model: ModelSize) -> set[str]:
    """Last names of the modules that `lora_target: all` means ("q_proj", ...)."""
    return {name.split(".")[-2] for name, shape in model.shapes.items() if _is_linear(name, shape)}


def has_experts(model: ModelSize) -> bool:
    """Whether it is a mixture of experts, by config.json's num_experts, num_local_experts or n_routed_experts."""
    counts = [value for name, value in model.settings.items() if name.endswith("experts") and name.startswith("n")]
    return any(isinstance(count, int) and count > 1 for count in counts)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and not re.search(NOT_ADAPTED, name)


def _attention_widths(settings: dict[str, Any]) -> tuple[int, int]:
    """Numbers a token of the queries, and of the keys (as of the values)."""
    heads = settings["num_attention_heads"]
    head = settings.get("head_dim") or settings["hidden_size"] // heads
    return head * heads, head * (settings.get("num_key_value_heads") or heads)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter


def adapted_weights(config: Config, shapes: Shapes) -> list[str]:
    """The names of the weights that get an adapter."""
    targets = config.lora_target
    return [
        name
        for name, shape in shapes.items()
        if _is_linear(name, shape) and (targets == ("all",) or name.split(".")[-2] in targets)
    ]


def whole_tensors(targets: tuple[str, ...], shapes: Shapes) -> Shapes:
    """The tensors trained in full; as in PEFT, a target names every module whose name ends with it."""
    found = {name: shape for name, shape in shapes.items() if _is_named(name, targets)}
    embedding = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if _is_named("lm_head.weight", targets) and embedding and not any(name.endswith(HEADS) for name in shapes):
        found.setdefault(embedding, shapes[embedding])  # a tied output layer, of which a copy is trained
    return found


def _is_named(tensor: str, targets: tuple[str, ...]) -> bool:
    return tensor.rpartition(".")[0].endswith(targets)


def adapter_parameters(config: Config, shapes: Shapes) -> int:
    """Trained parameters: rank × (in + out) of every module that gets an adapter, biases, and modules_to_save."""
    adapted = adapted_weights(config, shapes)
    biases = sum(shapes[name][0] for name in adapted) if config.lora_bias == "true" else 0
    if config.lora_bias in ("all", "lora_only"):
        biases = sum(shape[0] for name, shape in shapes.items() if name.endswith(".bias"))
    whole = sum(map(math.prod, whole_tensors(config.additional_target, shapes).values()))
    return sum(config.lora_rank * sum(shapes[name]) for name in adapted) + biases + whole


def adapter_bytes(config: Config, shapes: Shapes) -> int:
    """float32 weight, gradient and two moments of each trained parameter."""
    return 16 * adapter_parameters(config, shapes)


def checkpoint_bytes(config: Config, model: ModelSize) -> int:
    """About the size of a checkpoint: the adapter's weights and the optimizer's two moments in float32, and 20 MB of
    tokenizer and random states."""
    numbers = 4 if config.pissa_init else 3  # saved at twice the rank
    return 4 * numbers * adapter_parameters(config, model.shapes) + 20_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def sequences(config: Config) -> int:
    """How many sequences of up to cutoff_len tokens a sample has."""
    return 2 if config.stage == "dpo" else 1


def longest_row(config: Config, longest: int | None) -> int:
    """Tokens of the longest row of a batch, given those of the longest sample (None: not known)."""
    limit = config.cutoff_len * sequences(config)
    return limit if longest is None or config.packing else min(longest, limit)


def estimate_memory(
    config: Config, model: ModelSize, gpu: Gpu | None, longest: int | None = None
) -> dict[str, float] | None:
    """Bytes that a training needs at its peak, by what they are for; None where config.json is not like Llama's.

    `longest` is the longest sample's length in tokens, of a pair that of both sequences. On a card the peak is in a
    layer's backward pass, or, where nothing is recomputed, in the loss.
    """
    shapes, settings = model.shapes, model.settings
    if not settings.keys() >= set(NEEDED):
        return None
    row = longest_row(config, longest) + (config.max_completion_length if config.stage == "grpo" else 0)
    tokens = config.per_device_train_batch_size * row  # of the largest forward pass
    linear = [math.prod(shape) for name, shape in shapes.items() if _is_linear(name, shape)]
    width = 2 if gpu or config.bf16 else 4
    hidden, vocabulary, layers = settings["hidden_size"], settings["vocab_size"], settings["num_hidden_layers"]
    if gpu:
        layer = tokens * (saved_by_layer(settings) + working_in_layer(settings)) * width
        logits, attention = loss_memory(tokens, hidden, vocabulary), mask_memory(config, settings, tokens)
        if config.gradient_checkpointing == "false":
            activations = layer + (layers - 1) * tokens * saved_by_layer(settings) * width
        else:  # the layers' inputs are kept in main memory, and the loss is over before the first layer is recomputed
            activations, logits = layer, max(0.0, logits - layer)
        activations += max(linear, default=0) * width if config.quantization_bit else 0  # a matrix as it is multiplied
    else:
        layer = tokens * (10 * hidden + 5 * settings["intermediate_size"]) * width
        recomputed = config.gradient_checkpointing == "true"
        activations = 2 * layer + layers * tokens * hidden * width if recomputed else layers * layer
        logits, attention = min(3 * 4 * tokens * vocabulary, 0.2 * GB), 0.0
    others = model.parameters - sum(linear)
    return {
        "weights": sum(linear) * BYTES_A_WEIGHT.get(config.quantization_bit or 0, width) + others * width,
        "adapter": adapter_bytes(config, shapes),
        "activations": activations,
        "logits": logits,
        "attention": attention,
        "replies": replies_memory(config, settings, row) * width,
        "runtime": 1.2 * GB,  # CUDA context, or Python with torch and Unsloth
    }


def saved_by_layer(settings: dict[str, Any]) -> int:
    """Numbers a token that a layer of Unsloth's Llama keeps for its backward pass (7.6·hidden + 2·intermediate of a
    Llama-3): two inputs of norms and their outputs, queries, keys, values, the attention's output twice, gate and up;
    in float32 the scales of two norms and each head's logsumexp. tests/training/count_saved.py counts the same.
    """
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    queries, keys = _attention_widths(settings)
    return 2 * settings["intermediate_size"] + 4 * hidden + 3 * queries + 2 * keys + 2 * heads + 4


def working_in_layer(settings: dict[str, Any]) -> int:
    """Numbers a token that a layer's backward pass needs in addition: gradients of the MLP or of the attention.

    From the source of unsloth/kernels/fast_lora.py, which writes most gradients over what it no longer needs.
    """
    hidden = settings["hidden_size"]
    queries, keys = _attention_widths(settings)
    return max(settings["intermediate_size"] + 3 * hidden, 3 * queries + 2 * keys + 2 * hidden)


def loss_memory(tokens: int, hidden: int, vocabulary: int) -> float:
    """Bytes of Unsloth's fused loss on a card: a piece of the logits in float32, the hidden states and their gradient.

    A piece has a power of two of rows (unsloth_zoo/fused_losses/fused_linear.py, fused_linear_rows). Only labelled
    rows have logits; `tokens` is the most that there can be.
    """
    at_least = min(max(_power_of_two(512 * 151936 / vocabulary), 512), 4096)
    rows = min(max(_power_of_two(tokens * hidden / vocabulary), at_least), 4096)
    rows = max(min(rows, (2 << 30) // (4 * vocabulary), tokens), 1)
    return 4 * rows * vocabulary + 3 * 2 * tokens * hidden


def _power_of_two(number: float) -> int:
    """The largest that is not above `number`."""
    return 1 << max(int(number).bit_length() - 1, 0)


def mask_memory(config: Config, settings: dict[str, Any], tokens: int) -> float:
    """Bytes of the mask over a flat batch, which models that Unsloth has no attention of its own for build."""
    return 0.0 if is_own(config, settings) else float(tokens * tokens)


def is_own(config: Config, settings: dict[str, Any]) -> bool:
    """Whether Unsloth trains a model with attention and LoRA kernels of its own; `settings` are its config.json."""
    return settings.get("model_type", "llama") in OWN_ATTENTION and config.quantization_bit != 8


def replies_memory(config: Config, settings: dict[str, Any], tokens: int) -> int:
    """Keys and values, in numbers, of a step's replies (stage grpo), all generated at once, each row of `tokens`."""
    if config.stage != "grpo":
        return 0
    replies = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return 2 * replies * tokens * _attention_widths(settings)[1] * settings["num_hidden_layers"]


def smallest_change(
    config: Config, model: ModelSize, gpu: Gpu | None, longest: int | None, free: float
) -> dict[str, str | int] | None:
    """The settings to change, the least harmful first, with which a recipe fits by the estimate; None where none do."""
    batch = config.per_device_train_batch_size
    accumulation = batch * config.gradient_accumulation_steps
    changes: list[dict[str, str | int]] = []
    if config.gradient_checkpointing == "false" or (not gpu and config.gradient_checkpointing != "true"):
        changes.append({"gradient_checkpointing": "true"})
    if batch > 1:
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
        changes += [one, *({**change, **one} for change in changes)]
    if gpu and config.quantization_bit is None:
        changes += [{**change, "quantization_bit": 4} for change in ({}, *changes)]
    most = changes[-1] if changes else {}
    cutoff = longest_row(config, longest) // 2 // sequences(config)
    while cutoff >= 256:
        changes.append({**most, "cutoff_len": cutoff})
        cutoff //= 2
    for change in changes:
        parts = estimate_memory(dataclasses.replace(config, **change), model, gpu, longest)
        if sum((parts or {}).values()) <= free:
            return change
    return None
