"""The engine for models of transformers."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

from inference.backend import Backend
from inference.engine import ChatMessage, Engine
from inference.transformers_backend import make_backend
from preprocessing.prompts import prompt_ids
from preprocessing.template import load_template
from runs.target import Target


class TransformersEngine(Engine):
    """A model of transformers, with the adapter merged into its weights or beside them (`with_base`)."""

    def __init__(
        self, source: Target, model: Any, tokenizer: Any, switch: AdapterSwitch | None = None, trained: bool = True
    ) -> None:
        self.name, self.config, self.model, self.tokenizer = source.name, source.config, model, tokenizer
        self.device = model.device
        self.template = load_template(source.template, tokenizer)
        ends = model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        ends += tokenizer.convert_tokens_to_ids(list(self.template.stop))
        self.stop_ids = frozenset(end for end in ends if end is not None)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.vocabulary_size = model.get_output_embeddings().weight.shape[0]
        self._switch, self._trained = switch or AdapterSwitch(), trained
        keeps = "logits_to_keep" in signature(model.forward).parameters
        self.last_logits_only = {"logits_to_keep": 1} if keeps else {}  # arguments of `model.forward`

    def prompt_ids(self, messages: list[ChatMessage], tools: list[dict[str, Any]] | None = None) -> list[int]:
        return prompt_ids(
            messages,
            self.tokenizer,
            template_text=self.template.saved,
            tools=tools,
            enable_thinking=self.config.enable_thinking,
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

    def backend(self, slots: int) -> Backend:
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

    def adapter_state(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, the model's adapter is on or off, as this engine needs it."""
        return self._switch.set_to(self._trained)


class AdapterSwitch:
    """Switches the adapter of a model on and off, as two engines on the same weights need it."""

    def __init__(self, peft: Any = None) -> None:
        self.peft, self.on, self.lock = peft, True, threading.Lock()

    @contextlib.contextmanager
    def set_to(self, on: bool) -> Iterator[None]:
        """While the block runs, the adapter is `on` or not."""
        if self.peft is None:
            yield
            return
        with self.lock:
            if self.on is not on:
                switch = self.peft.base_model
                switch.enable_adapter_layers() if on else switch.disable_adapter_layers()
                self.on = on
            yield
