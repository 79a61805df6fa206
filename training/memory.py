"""How large a model is, from config.json and the headers of its weights, and how much memory training it needs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Config, Gpu
from runs.weights import read_header
from training.whole_modules import whole_tensors

GB = 1e9
# The matrices that `lora_target: all` leaves out: embeddings, the output layer, the routers of experts.
NOT_ADAPTED = r"embed|lm_head|norm|\bw[tp]e\b|\bgate\.weight"
# What Unsloth calls the matrices of fused experts, which are no linear layers.
EXPERTS = {"gate_proj", "up_proj", "down_proj"}
# model_type of those whose attention Unsloth replaces (unsloth/models/loader.py); it needs no mask for flat batches.
OWN_ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"}
# config.json of the embedded model, so far as its size depends on it
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


@dataclass(frozen=True)
class ModelSize:
    """What time and memory depend on: config.json, the shapes of the tensors, and the bytes of the weights.

    `folder` is None for a model that is not on the disk yet.
    """

    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    bytes: int
    folder: Path | None

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def read_model(folder: Path) -> ModelSize:
    """The size of a model on the disk."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config", settings)  # of a model that also sees
    return ModelSize(settings, tensor_shapes(folder), model_bytes(folder), folder)


def model_like(settings: dict[str, Any]) -> ModelSize | None:
    """The size of a 16-bit model of which only config.json is known.

    None where that does not describe one of Llama's kind: attention and a gated MLP, no experts.
    """
    settings = settings.get("text_config", settings)
    experts = [name for name in settings if "experts" in name]
    try:
        hidden, inner, vocabulary = (settings[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
        layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
    except KeyError:
        return None
    if experts or "quantization_config" in settings:
        return None
    head = settings.get("head_dim") or hidden // heads
    keys = head * settings.get("num_key_value_heads", heads)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if not settings.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", head * heads, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, head * heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
    return ModelSize(settings, shapes, 2 * sum(map(math.prod, shapes.values())), None)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
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


def adapter_parameters(config: Config, shapes: dict[str, tuple[int, ...]]) -> int:
    """Trained parameters: rank × (in + out) of every module that gets an adapter, and modules that learn whole."""
    adapted = adapted_weights(config, shapes)
    biases = sum(shapes[name][0] for name in adapted) if config.lora_bias == "true" else 0
    if config.lora_bias in ("all", "lora_only"):
        biases = sum(shape[0] for name, shape in shapes.items() if name.endswith(".bias"))
    whole = sum(map(math.prod, whole_tensors(config.additional_target, shapes).values()))
    return sum(config.lora_rank * sum(shapes[name]) for name in adapted) + biases + whole


def adapted_weights(config: Config, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of the weights that get an adapter."""
    targets = config.lora_target
    return [
        name
        for name, shape in shapes.items()
        if _is_linear(name, shape) and (targets == ("all",) or name.split(".")[-2] in targets)
    ]


def checkpoint_bytes(config: Config, model: ModelSize) -> int:
    """About the size of a checkpoint: the adapter's weights and the optimizer's two moments in float32, and 20 MB of
    tokenizer and random states."""
    numbers = 4 if config.pissa_init else 3  # saved at twice the rank
    return 4 * numbers * adapter_parameters(config, model.shapes) + 20_000_000


def estimate_memory(config: Config, model: ModelSize, tokens: int, gpu: Gpu | None) -> dict[str, float]:
    """Bytes a training needs at its peak, by what they are for.

    `tokens` are those of the largest forward pass. On a card the peak is in a layer's backward pass, or, where nothing
    is recomputed, in the loss. Raises KeyError where config.json has other keys than Llama's.
    """
    shapes, settings = model.shapes, model.settings
    total = model.parameters
    linear = [math.prod(shape) for name, shape in shapes.items() if _is_linear(name, shape)]
    width = 2 if gpu or config.bf16 else 4
    by_bits = {4: 0.53, 8: 1.03}  # bytes a weight, with the quantization constants
    weights = sum(linear) * by_bits.get(config.quantization_bit or 0, width) + (total - sum(linear)) * width
    hidden, vocabulary, layers = settings["hidden_size"], settings["vocab_size"], settings["num_hidden_layers"]
    if gpu:
        layer = tokens * (saved_by_layer(settings) + working_in_layer(settings)) * width
        logits, attention = loss_memory(tokens, hidden, vocabulary), mask_memory(config, settings, tokens)
        dequantized = max(linear, default=0) * width if config.quantization_bit else 0
        if config.gradient_checkpointing == "false":
            activations = layer + (layers - 1) * tokens * saved_by_layer(settings) * width
        else:  # the layers' inputs are kept in main memory, and the loss is over before the first layer is recomputed
            activations, logits = layer, max(0.0, logits - layer)
        activations += dequantized
    else:
        one_layer = tokens * (10 * hidden + 5 * settings["intermediate_size"]) * width
        recomputed = config.gradient_checkpointing == "true"
        activations = 2 * one_layer + layers * tokens * hidden * width if recomputed else one_layer * layers
        logits, attention = min(3 * 4 * tokens * vocabulary, 0.2 * GB), 0.0
    return {
        "weights": weights,
        "adapter": adapter_parameters(config, shapes) * 16,  # float32 weight, gradient and two moments
        "activations": activations,
        "logits": logits,
        "attention": attention,
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
    """Numbers a token that a layer's backward pass has beside what is kept: gradients of the MLP or of the attention.

    From the source of unsloth/kernels/fast_lora.py, which writes most gradients over what it no longer needs.
    """
    hidden = settings["hidden_size"]
    queries, keys = _attention_widths(settings)
    return max(settings["intermediate_size"] + 3 * hidden, 3 * queries + 2 * keys + 2 * hidden)


def _attention_widths(settings: dict[str, Any]) -> tuple[int, int]:
    heads = settings["num_attention_heads"]
    head = settings.get("head_dim") or settings["hidden_size"] // heads
    return head * heads, head * (settings.get("num_key_value_heads") or heads)


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
    has_own = settings.get("model_type", "llama") in OWN_ATTENTION and config.quantization_bit != 8
    return 0.0 if has_own else float(tokens * tokens)


def sequences(config: Config) -> int:
    """How many sequences of up to cutoff_len tokens a sample has."""
    return 2 if config.stage == "dpo" else 1


def forward_tokens(config: Config, longest: int, gpu: Gpu | None) -> int:
    """Tokens of the largest forward pass with gradients, where the longest sample has `longest` tokens.

    Of stage grpo that is a prompt: without a card each is computed once for its replies (shared_prompts.py).
    """
    batch, reply = config.per_device_train_batch_size, config.max_completion_length
    if config.stage != "grpo":
        return batch * longest
    return batch * (longest + reply) if gpu else math.ceil(batch / config.num_generations) * longest + batch * reply


def replies_memory(config: Config, model: ModelSize, longest: int, gpu: Gpu | None) -> float:
    """Bytes of keys and values while the replies of a step are generated (stage grpo), all at the same time."""
    if config.stage != "grpo":
        return 0.0
    replies = config.per_device_train_batch_size * config.gradient_accumulation_steps
    _, keys = _attention_widths(model.settings)
    width = 2 if gpu or config.bf16 else 4
    tokens = replies * (longest + config.max_completion_length)
    return 2.0 * tokens * keys * model.settings["num_hidden_layers"] * width


def needs(config: Config, model: ModelSize, longest: int, gpu: Gpu | None) -> float:
    """Bytes at the peak, where the longest sample has `longest` tokens."""
    tokens = forward_tokens(config, longest, gpu)
    parts = estimate_memory(config, model, tokens, gpu).values()
    return sum(parts) + replies_memory(config, model, longest, gpu)


def smallest_change(
    config: Config, model: ModelSize, longest: int, gpu: Gpu | None, free: float
) -> dict[str, str | int] | None:
    """The settings to change, the least harmful first, with which a recipe fits by the estimate; None where none do."""
    batch = config.per_device_train_batch_size
    accumulation = batch * config.gradient_accumulation_steps
    harmless: list[dict[str, str | int]] = []
    if config.gradient_checkpointing == "false" or (not gpu and config.gradient_checkpointing != "true"):
        harmless.append({"gradient_checkpointing": "true"})
    if batch > 1:
        harmless.append({"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation})
    every = {name: value for change in harmless for name, value in change.items()}
    changes = [*harmless, *([every] if len(harmless) > 1 else [])]
    if gpu and config.quantization_bit is None:
        changes = [*changes, *({**change, "quantization_bit": 4} for change in ({}, *changes))]
    most = changes[-1] if changes else {}
    shorter, cutoff = [], longest // 2 // sequences(config)
    while cutoff >= 256:
        shorter.append({**most, "cutoff_len": cutoff})
        cutoff //= 2
    for change in (*changes, *shorter):
        changed = dataclasses.replace(config, **change)
        if needs(changed, model, min(longest, changed.cutoff_len * sequences(config)), gpu) <= free:
            return change
    return None
