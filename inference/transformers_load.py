"""Loads a model of transformers, with its adapter merged into the weights where that can be done exactly.

Merged, a reply costs no more than the base's. To import PEFT and to wrap every layer takes longer than to load a small
model, so a plain LoRA adapter is added to the weights here; any other, and one that is switched off and on, is PEFT's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Config, UserError
from inference.engine import Engine
from inference.transformers_engine import AdapterSwitch, TransformersEngine
from runs.adapter import Adapter
from runs.files import read_object
from runs.peft_loading import check_against_model, load_peft_model, resize_embedding
from runs.target import Source


def load_transformers(source: Source, with_base: bool) -> Engine:
    """The model on the card, where there is one, else on the CPU."""
    import torch

    config, gpu = source.config, torch.cuda.is_available()
    plain = not gpu and "quantization_config" not in read_object(Path(source.model) / "config.json")
    plain = plain and "transformers" not in sys.modules  # else there is nothing to gain
    with _without("torchao", "sklearn", "bitsandbytes") if plain else contextlib.nullcontext():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from preprocessing.tokenizer import load_tokenizer

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        options = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
        tokenizer = load_tokenizer(source.tokenizer, trust_remote_code=config.trust_remote_code)
        if gpu:
            options["device_map"] = {"": 0}
        if gpu and config.quantization_bit:  # without a card it would only be slower
            options["quantization_config"] = _quantization(config)
        model = AutoModelForCausalLM.from_pretrained(source.model, dtype=_dtype(config), **options).eval()
        if source.adapter is None:
            return TransformersEngine(source, model, tokenizer)
        adapter = Adapter(source.adapter)
        resize_embedding(model, check_against_model(adapter, model))
        if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
            raise UserError("tokens_without_rows", folder=source.tokenizer, tokens=len(tokenizer), rows=rows)
        quantized = "quantization_config" in options or hasattr(model, "hf_quantizer")
        if not with_base and not quantized and _merge(model, adapter):
            return TransformersEngine(source, model, tokenizer)
        peft = load_peft_model(model, source.adapter).eval()
    if not with_base:
        # input and output share one weight, and the adapter changes one of them: peft would merge it into both
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        shared = model.config.tie_word_embeddings and any(hasattr(layer, "base_layer") for layer in ends)
        # a bias of lora_B cannot be merged where the base has none
        apart = quantized or shared or adapter.settings.get("lora_bias")
        return TransformersEngine(source, model if apart else peft.merge_and_unload(), tokenizer)
    switch = AdapterSwitch(peft)
    engine = TransformersEngine(source, model, tokenizer, switch)
    engine.base = TransformersEngine(source, model, tokenizer, switch, trained=False)
    return engine


def _dtype(config: Config) -> Any:
    """The fastest type that the device computes with natively; bfloat16 without that is many times slower."""
    import torch

    if config.infer_dtype != "auto":
        return getattr(torch, config.infer_dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _quantization(config: Config) -> Any:
    from transformers import BitsAndBytesConfig

    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(config),
    )


@contextlib.contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Hides packages that transformers and peft import wherever they are installed, and that no reply needs.

    It saves seconds of every start. A package that is loaded already stays.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _merge(model: Any, adapter: Adapter) -> bool:
    """Adds a plain LoRA adapter to the weights; False, and nothing is changed, where only peft can do it."""
    import torch
    from safetensors.torch import load_file

    if not adapter.is_plain() or adapter.whole or any(p.keys() != {"lora_A", "lora_B"} for p in adapter.parts.values()):
        return False
    try:
        linear = {module: model.get_submodule(module) for module in adapter.parts}
    except AttributeError:  # a part of a peft wrapper, such as the inner one of experts
        return False
    tied = model.get_input_embeddings().weight
    if any(type(layer) is not torch.nn.Linear or layer.weight is tied for layer in linear.values()):
        return False
    tensors = load_file(adapter.file)
    with torch.no_grad():
        for module, parts in adapter.parts.items():
            weight, (_, scale) = linear[module].weight, adapter.scaling(module)
            names = [adapter.renamed.get(parts[kind], parts[kind]) for kind in ("lora_A", "lora_B")]
            a, b = (tensors[name].to(weight.device, torch.float32) for name in names)
            weight.copy_(weight.float().addmm_(b, a, alpha=scale))  # added in float32, rounded once
    return True
