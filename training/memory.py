"""How large a model is, from config.json and the headers of its weights, and how much memory training it needs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Config, Gpu
from runs.weights import read_header

GB = 1e9
# The matrices that `lora_target: all` leaves out: embeddings, the output layer, the routers of experts.
NOT_ADAPTED = r"embed|lm_head|norm|\bw[tp]e\b|\bgate\.weight"
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


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and not re.search(NOT_ADAPTED, name)


def adapter_parameters(config: Config, shapes: dict[str, tuple[int, ...]]) -> int:
    """Trained parameters: rank × (in + out) of every module that gets an adapter."""
    targets = config.lora_target
    adapted = [
        shape
        for name, shape in shapes.items()
        if _is_linear(name, shape) and (targets == ("all",) or name.split(".")[-2] in targets)
    ]
    return sum(config.lora_rank * sum(shape) for shape in adapted)


def checkpoint_bytes(config: Config, model: ModelSize) -> int:
    """About the size of a checkpoint: the adapter's weights and the optimizer's two moments in float32, and 20 MB of
    tokenizer and random states."""
    return 12 * adapter_parameters(config, model.shapes) + 20_000_000


def estimate_memory(config: Config, model: ModelSize, tokens: int, gpu: Gpu | None) -> dict[str, float]:
    """Bytes a training needs at its peak, by what they are for.

    `tokens` are those of the largest forward pass. The parts are counted from the model's shapes; the activations are
    those of a Llama layer (attention and a gated MLP), all layers' where nothing is recomputed, else one layer's and
    every layer's input. Raises KeyError where config.json has other keys than Llama's.
    """
    shapes, settings = model.shapes, model.settings
    total = model.parameters
    linear = sum(math.prod(shape) for name, shape in shapes.items() if _is_linear(name, shape))
    width = 2 if gpu or config.bf16 else 4
    by_bits = {4: 0.53, 8: 1.03}  # bytes a weight, with the quantization constants
    weights = linear * by_bits.get(config.quantization_bit or 0, width) + (total - linear) * width
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    layers, vocabulary = settings["num_hidden_layers"], settings["vocab_size"]
    one_layer = tokens * (10 * hidden + 5 * inner) * width
    if gpu and config.gradient_checkpointing != "false":
        # recomputed; Unsloth's kernels write most gradients over them, and it keeps the layers' inputs in main memory
        activations = one_layer
    elif config.gradient_checkpointing == "true":
        activations = 2 * one_layer + layers * tokens * hidden * width
    else:
        activations = one_layer * layers
    adapter = adapter_parameters(config, shapes) * 16  # float32 weight, gradient and two moments
    runtime = 1.2 * GB  # CUDA context, or Python with torch and Unsloth
    left = gpu.free_memory - weights - adapter - activations - runtime if gpu else None
    return {
        "weights": weights,
        "adapter": adapter,
        "activations": activations,
        "logits": logits_memory(tokens, vocabulary, left),
        "runtime": runtime,
    }


def logits_memory(tokens: int, vocabulary: int, left: float | None) -> float:
    """Bytes of the logits with their gradient and what lies between; both of Unsloth's backends compute them in pieces.

    On a card it makes pieces (a multiple of four) of at most half the memory that is `left` there, and at most 4 GiB,
    at 16 bytes a logit (unsloth_zoo/fused_losses/cross_entropy_loss.py): the larger the card, the higher the peak.
    """
    if left is None:
        return min(3 * 4 * tokens * vocabulary, 0.2 * GB)
    whole, limit = 16 * tokens * vocabulary, max(0.2 * GB, min(left / 2, 4 << 30))
    return whole if whole <= limit else whole / (4 * math.ceil(whole / limit / 4))
