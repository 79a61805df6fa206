"""Counts what a layer of Unsloth's CUDA branch keeps for its backward pass, on a machine without a card.

    python tests/training/count_saved.py FOLDER      makes tiny models there; prints a list of counts as JSON

Each of SHAPES is loaded with one and with two layers and without checkpointing (through training/model.py, on
cuda_on_cpu.py's stand-in for a card), and the bytes are counted of all storages that a forward pass saves, the
weights' left out. The difference is a layer's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import cuda_on_cpu  # noqa: E402

TOKENS = 16
# hidden, intermediate, heads, heads of keys and values: the ratios of Llama-3-8B, Llama-3.2-3B, Llama-2-7B,
# Mistral-Small-24B (heads narrower than hidden) and Qwen2.5-32B
SHAPES = (
    (128, 448, 4, 1, None), (96, 256, 3, 1, None), (128, 344, 4, 4, None), (160, 1024, 4, 1, 32),
    (160, 864, 5, 1, None),
)  # fmt: skip


def settings_of(shape: tuple[Any, ...], layers: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    named = {name: value for name, value in zip(names, shape, strict=True) if value is not None}
    return {**named, "num_hidden_layers": layers, "vocab_size": 320, "tie_word_embeddings": False}


def saved_bytes(model: Any) -> int:
    """Bytes of the storages that one forward pass over TOKENS tokens keeps, without the model's own."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.arange(TOKENS)[None]
    places = {"position_ids": ids.clone(), "packed_seq_lengths": torch.tensor([TOKENS], dtype=torch.int32)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids.clone(), **places).loss
    found = sum(storage.nbytes() for storage in kept.values())
    del loss
    return found


def count(folder: Path) -> list[dict[str, Any]]:
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder / "compiled")
    cuda_on_cpu.pretend()
    import torch
    from conftest import make_tiny_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from runs.configuration import load_config
    from training import model as training
    from training.arguments import Precision

    training.checkpointing_setting = lambda *_: False
    found = []
    for number, shape in enumerate(SHAPES):
        counts = []
        for layers in (1, 2):
            place = make_tiny_model(folder / f"{number}-{layers}")
            (place / "config.json").unlink()
            LlamaForCausalLM(LlamaConfig(**settings_of(shape, layers))).save_pretrained(place)
            config = load_config([f"model_name_or_path={place}", "cutoff_len=64", "lora_rank=2"]).config
            model = training.load_model(config, Precision(torch.float16, None))
            counts.append(saved_bytes(model.train()))
        found.append({"shape": settings_of(shape, 2), "bytes_a_layer": counts[1] - counts[0]})
    return found


if __name__ == "__main__":
    print(json.dumps({"tokens": TOKENS, "counts": count(Path(sys.argv[1]))}))
