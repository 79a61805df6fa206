"""The engine for llama.cpp: a GGUF answers, with the chat template and the ends of a turn that are in the file."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import functools
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import common
from common import Message, UserError
from inference import llamacpp_build
from inference.backend import Backend, Sequence
from inference.engine import ChatMessage, Engine
from preprocessing.faults import Fault
from preprocessing.prompts import UnsuitableMessages, complete_prompt
from preprocessing.rendering import compile_template, render, without_generation_tags
from preprocessing.template import plain_conversation
from preprocessing.tokens import NONCHARACTERS, Marker, any_of, map_texts
from runs.target import Target

MAX_CONTEXT = 8192  # tokens: llama.cpp allocates the whole context at the start
COMPUTE_BYTES = 512 << 20  # of the card, for what llama.cpp computes with
LOG_ERROR = 4  # ggml_log_level
SHARED_CONTEXTS = 2  # contexts of memory that replies side by side share
MAX_STEP = 2048  # tokens of prompts in one step


class LlamaCppEngine(Engine):
    """A GGUF by llama.cpp; the chat template and the ends of a turn are those in the file."""

    def __init__(self, source: Target) -> None:
        self.name, self.config, file = source.name, source.config, source.model
        self._lib = lib = llamacpp_build.runtime()
        with _collect_errors(lib) as errors:
            try:
                about = lib.Llama(file, vocab_only=True, verbose=False).metadata
                architecture = about["general.architecture"]
                self.context = min(int(about[f"{architecture}.context_length"]), MAX_CONTEXT)
                layers = _layers_on_card(lib, Path(file), about, self.context)
                # of its own context nothing is used
                self.model = lib.Llama(file, n_ctx=32, n_batch=32, n_gpu_layers=layers, verbose=False)
            except (ValueError, KeyError) as error:
                reason = errors[0] if errors else error
                raise UserError(
                    "llama.cpp cannot load {file} ({reason}); run quantize.py again", file=file, reason=reason
                ) from None
        self._vocabulary = lib.llama_model_get_vocab(self.model.model)
        tokens = range(self.model.n_vocab())
        kinds = {i: lib.llama_vocab_get_attr(self._vocabulary, i) for i in tokens}
        whole = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        self.stop_ids = frozenset(i for i in tokens if self._is(i, "eog"))
        self.added_tokens = {self._spelling(i): i for i, kind in kinds.items() if kind & whole}
        self.control_tokens = {text: i for text, i in self.added_tokens.items() if self._is(i, "control")}
        self.vocabulary_size = self.model.n_vocab()
        self._template = self._compile(self.model.metadata.get("tokenizer.chat_template"), file)

    def _is(self, token: int, kind: str) -> bool:
        return getattr(self._lib, f"llama_vocab_is_{kind}")(self._vocabulary, token)

    def _compile(self, text: str | None, file: str) -> str:
        """The chat template as plain Jinja, without generation tags; raises UserError where it is none."""
        if text is None:
            raise UserError("{file} has no chat template; make the file with quantize.py", file=file)
        text = without_generation_tags(text)
        try:
            compile_template(text)
        except Fault as fault:
            raise UserError(
                "the chat template in {file} cannot be used: {reason}.\nRun quantize.py again",
                file=file,
                reason=fault.message,
            ) from None
        return text

    def prompt_ids(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None
    ) -> list[int]:
        """As with transformers: only the template's own control tokens are control tokens, a message's text is text.

        In the messages each look-alike is a number between two Unicode noncharacters while the template renders.
        Raises UserError where the template refuses the messages or would leave a part of them out.
        """
        names = sorted(self.control_tokens, key=len, reverse=True)
        control = any_of(names)
        try:
            if NONCHARACTERS.search(json.dumps([messages, tools], ensure_ascii=False)):
                raise Fault("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them")
            text = self._prompt_text(messages, tools, thinking, lambda m: f"\ufdd0{names.index(m[0])}\ufdd1", control)
        except Fault as fault:
            raise UnsuitableMessages(
                "these messages cannot be put to the model: {reason}.\nChange them.", reason=fault.message
            ) from None
        ids: list[int] = []
        for part in re.split(f"({control.pattern})", text):
            if part in self.control_tokens:
                ids.append(self.control_tokens[part])
            elif part:
                part = re.sub("\ufdd0(\\d+)\ufdd1", lambda m: names[int(m[1])], part)
                ids += self.model.tokenize(part.encode(), add_bos=False, special=False)
        return ids

    def _prompt_text(
        self,
        messages: list[ChatMessage],
        tools: list[dict[str, Any]] | None,
        thinking: bool | None,
        escape: Callable[[re.Match[str]], str],
        control: re.Pattern[str],
    ) -> str:
        """The prompt, with every look-alike of a control token escaped."""
        conversation = plain_conversation({"messages": messages, "tools": tools})
        conversation = map_texts(conversation, lambda text: control.sub(escape, text))
        spelled = {f"{kind}_token": self._spelled(kind) for kind in ("bos", "eos")}

        thinks = self.config.enable_thinking if thinking is None else thinking

        def write(some: list[ChatMessage], header: bool) -> str:
            changed = {**conversation, "messages": some}
            return render(self._template, changed, spelled, thinking=thinks, prompt=header)

        return complete_prompt(conversation["messages"], write, Marker(self.added_tokens), control.search)

    def text_ids(self, text: str) -> list[int]:
        return self.model.tokenize(
            text.encode(), add_bos=self._lib.llama_vocab_get_add_bos(self._vocabulary), special=True
        )

    def text_of(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return self._piece(token, special=True)

    def _piece(self, token: int, special: bool) -> bytes:
        """What a token spells; a control token spells nothing unless `special`.

        The binding's own detokenize has a buffer of 32 bytes and leaves longer tokens out.
        """
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @functools.cached_property
    def grammar_vocabulary(self) -> Any:
        from llguidance.llamacpp import lltokenizer_from_vocab

        return lltokenizer_from_vocab(self._vocabulary, n_vocab=self.vocabulary_size, eos_token=sorted(self.stop_ids))

    def backend(self, slots: int) -> LlamaCppBackend:
        return LlamaCppBackend(self, slots)

    def _spelled(self, kind: str) -> str:
        token = getattr(self._lib, f"llama_vocab_{kind}")(self._vocabulary)
        return self._spelling(token) if token >= 0 else ""

    def _spelling(self, token: int) -> str:
        return self._lib.llama_vocab_get_text(self._vocabulary, token).decode()

    def detokenizer(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self._piece(token, special=False))


class LlamaCppBackend(Backend):
    """Computes sequences in one llama.cpp context, with a memory that all of them share.

    Sequences share the cells of what they have in common, so keeping a finished one costs only what is its own.
    """

    def __init__(self, engine: LlamaCppEngine, slots: int) -> None:
        super().__init__(slots, capacity=engine.context * min(slots, SHARED_CONTEXTS))
        self.lib, self.engine = engine._lib, engine
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = self.capacity, 2 * slots + 1, True
        settings.n_batch = MAX_STEP + slots
        settings.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        model = engine.model.model
        with _collect_errors(self.lib):
            self.context = self.lib.llama_init_from_model(model, settings)
        if not self.context:
            raise UserError(
                "no memory for {tokens} tokens of {slots} replies at once; set MAX_CONCURRENT lower",
                tokens=self.capacity,
                slots=slots,
            )
        self.memory = self.lib.llama_get_memory(self.context)
        self.batch = self.lib.llama_batch_init(MAX_STEP + slots, 0, 1)
        weakref.finalize(self, self.lib.llama_free, self.context)
        weakref.finalize(self, self.lib.llama_batch_free, self.batch)
        self.attends = not (self.lib.llama_model_is_recurrent(model) or self.lib.llama_model_is_hybrid(model))
        self.free = list(range(2 * slots + 1))  # numbers of sequences; a sequence's cache is its number

    def new_cache(self) -> int:
        return self.free.pop()

    def copy_cache(self, cache: int) -> int:
        number = self.free.pop()
        self.lib.llama_memory_seq_cp(self.memory, cache, number, 0, -1)
        return number

    def can_take(self, other: Sequence, length: int) -> bool:
        return self.attends or length == len(other.ids)

    def crop(self, sequence: Sequence, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, sequence.cache, length, -1)

    def drop(self, sequence: Sequence) -> None:
        self.crop(sequence, 0)
        self.free.append(sequence.cache)

    def forward(self, work: list[tuple[Sequence, list[int], bool]]) -> list[Any]:
        batch, ends = self.batch, []
        batch.n_tokens = 0
        for sequence, tokens, wanted in work:
            for i, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, len(sequence.ids) + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence.cache
                batch.logits[at] = wanted and i == len(tokens) - 1
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        status = self.lib.llama_decode(self.context, batch)
        if status:
            for sequence, *_ in work:
                self.crop(sequence, len(sequence.ids))
            raise RuntimeError(f"llama_decode failed with status {status}")
        for sequence, tokens, _ in work:
            sequence.ids += tokens
        return [self._logits(end) if wanted else None for (_, _, wanted), end in zip(work, ends, strict=True)]

    def _logits(self, place: int) -> Any:
        import torch

        found = self.lib.llama_get_logits_ith(self.context, place)
        return torch.from_numpy(np.ctypeslib.as_array(found, shape=(self.engine.vocabulary_size,)).copy())


@contextlib.contextmanager
def _collect_errors(lib: Any) -> Iterator[list[str]]:
    """Collects the errors that llama.cpp logs while the block runs; its warnings are not shown."""
    errors: list[str] = []

    @lib.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level == LOG_ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    lib.llama_log_set(log, None)
    try:
        yield errors
    finally:  # the library holds only a pointer: ours must not outlive this block
        lib.llama_log_set(lib._logger.llama_log_callback, None)


def _layers_on_card(lib: Any, file: Path, about: dict[str, str], cells: int) -> int:
    """How many layers of a GGUF fit on the card with their keys and values; -1: all; 0 without a card."""
    gpu = common.find_gpu()
    if gpu is None:
        return 0
    if not lib.llama_supports_gpu_offload():
        text = Message("llama.cpp is built without CUDA, so the GGUF runs on the CPU (CMAKE_ARGS=-DGGML_CUDA=on)")
        print(Message("note: {text}", text=text), file=sys.stderr)
        return 0
    share = (gpu.free_memory - COMPUTE_BYTES) / (file.stat().st_size + _cache_bytes(about, cells))
    return -1 if share >= 1 else max(0, int(int(about[f"{about['general.architecture']}.block_count"]) * share))


def _cache_bytes(about: dict[str, str], cells: int) -> int:
    """The keys and values of `cells` tokens, in 16 bit; `about` is the metadata of a GGUF."""

    def known(key: str) -> Any:  # a number, a list with one for each layer, or None
        return json.loads(about.get(f"{about['general.architecture']}.{key}", "null"))

    heads, layers = known("attention.head_count"), known("block_count")
    most = max(heads) if isinstance(heads, list) else heads
    if not most:  # a model without attention
        return 0
    shared = known("attention.head_count_kv") or heads
    shared = sum(shared) if isinstance(shared, list) else shared * layers
    size = known("embedding_length") // most
    sizes = (known("attention.key_length") or size) + (known("attention.value_length") or size)
    return shared * sizes * 2 * cells
