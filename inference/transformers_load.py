"""Loads a model of transformers, with its adapter merged into the weights where that can be done exactly.

Merged, a reply costs no more than the base's. To import PEFT and to wrap every layer takes longer than to load a small
model, so a plain LoRA adapter is added to the weights here; any other, and one that is switched off and on, is PEFT's.
"""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common import Config, UserError
from inference.engine import Engine
from inference.quick_start import make_model, read_tensors, reply_imports
from inference.transformers_engine import AdapterSwitch, TransformersEngine
from preprocessing.tokenizer import load_tokenizer
from runs.adapter import Adapter
from runs.files import read_object
from runs.peft_loading import check_against_model, load_peft_model, resize_embedding
from runs.target import Target


def load_transformers(source: Target, with_base: bool, only_replies: bool) -> Engine:
    """The model on the GPU, where there is one, else on the CPU; see `load.load`.

    Raises UserError where the adapter or the tokenizer does not fit the base.
    """
    adapter = Adapter(source.adapter) if source.adapter else None
    merged = adapter is None or (_is_low_rank_pairs(adapter) and not with_base)
    plain_base = "quantization_config" not in read_object(Path(source.model) / "config.json")
    quick = only_replies and merged and plain_base and not torch.cuda.is_available()
    quick = quick and not source.config.trust_remote_code and "transformers" not in sys.modules
    dtype, folder = _dtype(source.config), Path(source.model)
    with reply_imports() if quick else contextlib.nullcontext(), ThreadPoolExecutor(1, "weights") as beside:
        tensors = beside.submit(read_tensors, folder, dtype) if quick else None
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        tokenizer = load_tokenizer(source.tokenizer, trust_remote_code=source.config.trust_remote_code)
        model = make_model(folder, tensors.result(), dtype) if tensors else None
        del tensors
        model = _from_pretrained(source) if model is None else model
    if adapter is None:
        return TransformersEngine(source, model, tokenizer)
    resize_embedding(model, check_against_model(adapter, model))
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise UserError(
            "the tokenizer of {folder} has {tokens} tokens, the embedding {rows} rows; the adapter was saved "
            "without the embedding of its new tokens: train it with modules_to_save",
            folder=source.tokenizer,
            tokens=len(tokenizer),
            rows=rows,
        )
    quantized = hasattr(model, "hf_quantizer")
    if merged and not quantized and _merge(model, adapter):
        return TransformersEngine(source, model, tokenizer)
    return _with_peft(source, model, tokenizer, with_base, quantized)


def _from_pretrained(source: Target) -> Any:
    from transformers import AutoModelForCausalLM

    config, gpu = source.config, torch.cuda.is_available()
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    if gpu:
        options["device_map"] = {"": 0}
    if gpu and config.quantization_bit:  # without a GPU it would only be slower
        options["quantization_config"] = _quantization(config)
    return AutoModelForCausalLM.from_pretrained(source.model, dtype=_dtype(config), **options).eval()


def _with_peft(source: Target, model: Any, tokenizer: Any, with_base: bool, quantized: bool) -> Engine:
    """The adapter as PEFT loads it: merged where that is exact, beside the weights with `with_base`."""
    peft = load_peft_model(model, source.adapter).eval()
    if not with_base:
        # input and output share one weight, and the adapter changes one of them: PEFT would merge it into both
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        shared = model.config.tie_word_embeddings and any(hasattr(layer, "base_layer") for layer in ends)
        # a bias of lora_B cannot be merged where the base has none
        apart = quantized or shared or read_object(source.adapter / "adapter_config.json").get("lora_bias")
        return TransformersEngine(source, model if apart else peft.merge_and_unload(), tokenizer)
    switch = AdapterSwitch(peft)
    engine = TransformersEngine(source, model, tokenizer, switch)
    engine.base = TransformersEngine(source, model, tokenizer, switch, trained=False)
    return engine


def _dtype(config: Config) -> Any:
    """The fastest type that the device computes with natively; bfloat16 without that is many times slower."""
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


def _is_low_rank_pairs(adapter: Adapter) -> bool:
    """Whether an adapter has nothing but pairs of low-rank matrices."""
    pairs = all(parts.keys() == {"lora_A", "lora_B"} for parts in adapter.parts.values())
    return adapter.is_plain() and pairs and not adapter.whole


def _merge(model: Any, adapter: Adapter) -> bool:
    """Adds a plain LoRA adapter to the weights; False, and nothing is changed, where only PEFT can do it."""
    from safetensors.torch import load_file

    try:
        linear = {module: model.get_submodule(module) for module in adapter.parts}
    except AttributeError:  # a part of a PEFT wrapper, such as the inner one of experts
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
