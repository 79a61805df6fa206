"""The engine for models of transformers, with an adapter merged into the weights where that changes nothing else."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from common import Config, UserError
from inference.backend import Backend
from inference.engine import ChatMessage, Engine
from preprocessing.prompts import prompt_ids
from preprocessing.template import load_template
from preprocessing.tokenizer import load_tokenizer
from runs.causal_models import register_class, tie_word_embeddings
from runs.files import read_object
from runs.peft_loading import load_peft_model
from runs.process import quick_imports
from runs.target import Target


class TransformersEngine(Engine):
    """A model of transformers; with an AdapterSwitch, one that answers with its adapter on (`trained`) or off."""

    def __init__(
        self, target: Target, model: Any, tokenizer: Any, switch: AdapterSwitch | None = None, trained: bool = True
    ) -> None:
        self.name, self.config, self.model, self.tokenizer = target.name, target.config, model, tokenizer
        self.device = model.device
        self.template = load_template(target.template, tokenizer)
        ends = model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        ends += tokenizer.convert_tokens_to_ids(list(self.template.stop))
        self.stop_ids = frozenset(end for end in ends if end is not None)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.vocabulary_size = model.get_output_embeddings().weight.shape[0]
        self._switch, self._trained = switch, trained
        keeps = "logits_to_keep" in signature(model.forward).parameters
        self.last_logits_only = {"logits_to_keep": 1} if keeps else {}  # arguments of `model.forward`

    def prompt_ids(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None
    ) -> list[int]:
        return prompt_ids(
            messages,
            self.tokenizer,
            template_text=self.template.saved,
            tools=tools,
            enable_thinking=self.config.enable_thinking if thinking is None else thinking,
        )

    def text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        return {token.content: i for i, token in added.items() if token.special}

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()}

    @functools.cached_property
    def croppable(self) -> bool:
        """Whether the model keeps the keys and values of its tokens and nothing else, such as a recurrence's state."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        kinds = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not self.model._is_stateful

    def backend(self, slots: int) -> Backend:
        from inference.transformers_backend import make_backend

        return make_backend(self, slots)

    @functools.cached_property
    def grammar_vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self.tokenizer, n_vocab=max(self.vocabulary_size, len(self.tokenizer)), eos_token=sorted(self.stop_ids)
        )

    def detokenizer(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        return lambda token: stream.step(backend, token) or ""

    def set_adapter(self) -> None:
        """Turns the adapter of the model on or off as this engine needs it; before each forward pass."""
        if self._switch:
            self._switch.turn(self._trained)


class AdapterSwitch:
    """Turns the adapter of a PeftModel on and off, for two engines on the same weights."""

    def __init__(self, peft: Any) -> None:
        self.layers, self.on = peft.base_model, True

    def turn(self, on: bool) -> None:
        if self.on is not on:
            self.layers.enable_adapter_layers() if on else self.layers.disable_adapter_layers()
            self.on = on


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_transformers(target: Target, with_base: bool) -> TransformersEngine:
    """The model on the GPU, where there is one, else on the CPU. See `load`."""
    _read_ahead(Path(target.model))
    with quick_imports():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        tokenizer = load_tokenizer(target.tokenizer, trust_remote_code=target.config.trust_remote_code)
        model = _load_model(target)
        if target.adapter is None:
            return TransformersEngine(target, model, tokenizer)
        peft = load_peft_model(model, target.adapter).eval()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            "{folder}: the tokenizer has {tokens} tokens, the embedding {rows} rows; "
            "train the embedding of the new tokens (modules_to_save)",
            folder=target.tokenizer,
            tokens=len(tokenizer),
            rows=rows,
        )
    if with_base:
        switch = AdapterSwitch(peft)
        engine = TransformersEngine(target, model, tokenizer, switch)
        engine.base = TransformersEngine(target, model, tokenizer, switch, trained=False)
        return engine
    return TransformersEngine(target, peft.merge_and_unload() if _can_merge(target, model) else model, tokenizer)


def _read_ahead(folder: Path) -> None:
    """Asks the system to read the weights from the disk while the libraries are imported."""
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(AttributeError), open(file, "rb") as opened:  # a system without posix_fadvise
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _load_model(target: Target) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config, gpu = target.config, torch.cuda.is_available()
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    if gpu:
        options["device_map"] = {"": 0}
    if config.quantization_bit:
        options["quantization_config"] = quantization(config.quantization_bit, _dtype(config))
    register_class(target.model, config.trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(target.model, dtype=_dtype(config), **options).eval()


def _can_merge(target: Target, model: Any) -> bool:
    """Whether merging the adapter changes nothing but the speed."""
    # input and output share one weight, and the adapter changes one of them: PEFT would merge it into both
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = tie_word_embeddings(model) and any(hasattr(layer, "base_layer") for layer in ends)
    # a bias of lora_B cannot be merged where the base has none
    biased = read_object(target.adapter / "adapter_config.json").get("lora_bias")
    return not (hasattr(model, "hf_quantizer") or shared or biased)


def _dtype(config: Config) -> Any:
    """The fastest type that the device computes with natively; bfloat16 without that is many times slower."""
    import torch

    if config.infer_dtype != "auto":
        return getattr(torch, config.infer_dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def quantization(bits: int, dtype: Any) -> Any:
    """How a base is quantized to 8 or 4 `bits`, as for its training, and multiplied in the torch type `dtype`."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
