"""The engine's half for transformers: a model's own loop, with the conversation's keys and values kept between turns.

The adapter is merged into the weights where it can be, so that an answer costs no more than the base's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from common import Config, UserError
from inference.engine import Engine, Matcher, Message, Reply, Settings, TokenLogprob
from runs.target import Source, read_json

PREFILL = 512  # tokens of a prompt computed at once: a cancelled reply ends within one such piece


class TransformersEngine(Engine):
    """A model of transformers, with the adapter merged into its weights or beside them (`with_base`)."""

    def __init__(
        self, source: Source, model: Any, tokenizer: Any, adapters: Adapters | None = None, trained: bool = True
    ) -> None:
        from preprocessing.chat_template import load_template

        self.name, self.config, self.model, self.tokenizer = source.name, source.config, model, tokenizer
        self.template = load_template(source.template, tokenizer)
        ends = model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        ends += tokenizer.convert_tokens_to_ids(list(self.template.stop))
        self.stop_ids = frozenset(end for end in ends if end is not None)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.vocabulary_size = model.get_output_embeddings().weight.shape[0]
        self._adapters, self._trained = adapters or Adapters(), trained
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._cache: tuple[list[int], Any] | None = None  # ids, and their keys and values

    def prompt_ids(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        from preprocessing.chat_template import prompt_ids

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

    def rows(self, _: int) -> Any:
        from inference.scheduler import transformers_rows

        return transformers_rows(self)

    def _vocabulary_of_grammars(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self.vocabulary_size, eos_token=sorted(self.stop_ids))

    def draw(self, settings: Settings, prompt_tokens: int) -> Draw:
        """What draws the tokens of one reply."""
        return Draw(settings, prompt_tokens, self.model.device, self.vocabulary if settings.grammar else None)

    def _detokenizer(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        return lambda token: stream.step(backend, token) or ""

    def _tokens(self, ids: list[int], settings: Settings, reply: Reply) -> Iterator[int]:
        done, cache = self._take_cache(ids)
        reply.cached_tokens, todo = len(done), ids[len(done) :]
        draw, whole = self.draw(settings, len(ids)), True
        try:
            while True:
                while todo:
                    if reply.cancelled:
                        return
                    piece, todo, whole = todo[:PREFILL], todo[PREFILL:], False
                    logits = self._forward(piece, cache)
                    done, whole = done + piece, True
                token = draw(done, logits, reply)
                yield token
                todo = [token]
        finally:
            if whole:  # else it was interrupted: some layers have seen a token that others have not
                self._cache = (done, cache)

    def _take_cache(self, ids: list[int]) -> tuple[list[int], Any]:
        """The ids at the start of `ids` that need not be computed again, at most all but one, and their cache.

        The engine has no cache until the reply gives it back, so a second reply at the same time makes its own.
        """
        from transformers import DynamicCache

        kept, self._cache = self._cache, None
        if kept is not None:
            done, cache = kept
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(done, ids[:-1], strict=False))
            )
            if same and cache.is_croppable:
                cache.crop(same - len(done))  # negative: so many from the end
                return done[:same], cache
        cache = DynamicCache(config=self.model.config)
        if not any(cache.is_linear):
            cache = DynamicCache()  # keeps what a sliding window would drop: else it could not be cropped
        return [], cache

    def _forward(self, ids: list[int], cache: Any) -> Any:
        """The logits after `ids` (vocabulary, float32); their keys and values go into the cache."""
        import torch

        with torch.inference_mode(), self._adapters.switched(self._trained):
            inputs = torch.tensor([ids], device=self.model.device)
            output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, **self._last_only)
            return output.logits[0, -1].float()


class Draw:
    """Draws a token from logits, by transformers' own processors where it has them."""

    def __init__(self, settings: Settings, prompt_tokens: int, device: Any, vocabulary: Any = None) -> None:
        """`vocabulary` is needed for a grammar."""
        import torch
        from transformers.generation import logits_process as processors

        self.settings, self.prompt_tokens = settings, prompt_tokens
        self.random = torch.Generator(device).manual_seed(
            random.getrandbits(63) if settings.seed is None else settings.seed % (1 << 63)
        )
        self.penalties: list[Any] = []
        if settings.repetition_penalty != 1:
            self.penalties.append(processors.RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        if settings.presence_penalty or settings.frequency_penalty:
            self.penalties.append(self._count_penalty)
        self.cuts: list[Any] = []
        if settings.temperature:
            self.cuts.append(processors.TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_p < 1:
                self.cuts.append(processors.TopPLogitsWarper(float(settings.top_p)))
            if settings.min_p:
                self.cuts.append(processors.MinPLogitsWarper(float(settings.min_p)))
        self.bias = None
        if settings.logit_bias:
            places, values = zip(*settings.logit_bias, strict=True)
            self.bias = torch.tensor(places, device=device), torch.tensor(values, device=device)
        self.matcher = Matcher(vocabulary, settings.grammar) if settings.grammar else None

    def __call__(self, ids: list[int], logits: Any, reply: Reply) -> int:
        """The token after `ids`; `logits` is (vocabulary,). Its log-probability is noted in `reply`, if wanted."""
        import torch

        with torch.inference_mode():
            token = self._choose(ids, logits[None])
            if self.settings.logprobs is not None:
                known = logits.log_softmax(-1)
                values, tokens = known.topk(self.settings.logprobs)
                top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
                reply.logprobs.append(TokenLogprob(token, float(known[token]), top))
        if self.matcher:
            self.matcher.take(token)
        return token

    def _choose(self, ids: list[int], scores: Any) -> int:
        import torch

        if self.penalties:
            sequence = torch.tensor([ids], device=scores.device)
            for process in self.penalties:
                scores = process(sequence, scores)
        if self.bias:
            scores = scores.clone()
            scores[0, self.bias[0]] += self.bias[1]
        if self.matcher:
            allowed = torch.from_numpy(self.matcher.allowed(scores.shape[-1]))
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if not self.settings.temperature:
            return int(scores.argmax())
        tokens = None
        if 0 < self.settings.top_k < scores.shape[-1]:  # first: the rest then has tens of tokens to look at
            scores, tokens = scores.topk(self.settings.top_k)
        for process in self.cuts:
            scores = process(None, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.random)
        return int(drawn if tokens is None else tokens[0, drawn[0]])

    def _count_penalty(self, sequence: Any, scores: Any) -> Any:
        """OpenAI's presence and frequency penalties, over the reply so far."""
        tokens, counts = sequence[0, self.prompt_tokens :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self.settings.presence_penalty + self.settings.frequency_penalty * counts
        return scores


class Adapters:
    """Switches the adapter of a model on and off, as two engines on the same weights need it."""

    def __init__(self, peft: Any = None) -> None:
        self.peft, self.on, self.lock = peft, True, threading.Lock()

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
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


def load(source: Source, with_base: bool) -> Engine:
    """The model on the card, where there is one, else on the CPU."""
    import torch

    config, gpu = source.config, torch.cuda.is_available()
    plain = not gpu and "quantization_config" not in read_json(Path(source.model) / "config.json")
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
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # the adapter was trained with new tokens
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if source.adapter is None:
            return TransformersEngine(source, model, tokenizer)
        quantized = "quantization_config" in options or hasattr(model, "hf_quantizer")
        if not with_base and not quantized and _merge(model, source.adapter):
            return TransformersEngine(source, model, tokenizer)
        from peft import PeftModel

        peft = PeftModel.from_pretrained(model, source.adapter).eval()
    if not with_base:
        # input and output share one weight, and the adapter changes one of them: peft would merge it into both
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        shared = model.config.tie_word_embeddings and any(hasattr(layer, "base_layer") for layer in ends)
        return TransformersEngine(source, model if quantized or shared else peft.merge_and_unload(), tokenizer)
    adapters = Adapters(peft)
    engine = TransformersEngine(source, model, tokenizer, adapters)
    engine.base = TransformersEngine(source, model, tokenizer, adapters, trained=False)
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


def _merge(model: Any, folder: Path) -> bool:
    """Adds a plain LoRA adapter to the weights; False, and nothing is changed, where only peft can do it.

    To import peft and to wrap every layer first takes longer than to load a small model.
    """
    import torch
    from safetensors.torch import load_file

    from runs.adapter import Adapter

    try:
        adapter = Adapter(folder)
        linear = {module: model.get_submodule(module) for module in adapter.parts}
    except (UserError, AttributeError):
        return False
    tied = model.get_input_embeddings().weight
    plain = all(type(layer) is torch.nn.Linear and layer.weight is not tied for layer in linear.values())
    if adapter.whole or not plain or any(parts.keys() != {"lora_A", "lora_B"} for parts in adapter.parts.values()):
        return False
    tensors = load_file(adapter.file)
    with torch.no_grad():
        for module, parts in adapter.parts.items():
            weight, (_, scale) = linear[module].weight, adapter.scaling(module)
            a, b = (tensors[parts[kind]].to(weight.device, torch.float32) for kind in ("lora_A", "lora_B"))
            weight.copy_(weight.float().addmm_(b, a, alpha=scale))  # added in float32, rounded once
    return True
