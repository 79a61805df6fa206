"""How the next token is chosen from the logits: transformers' processors in the order of its `generate`, and what it
has not: OpenAI's penalties and bias, and grammars."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from common import UserError
from inference.request import Settings, TokenLogprob

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids so far, 1 x n; logits, 1 x vocabulary) -> logits


class CountPenalty:
    """OpenAI's presence and frequency penalties, over the reply so far."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self.presence, self.frequency, self.prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        tokens, counts = ids[0, self.prompt_tokens :].unique(return_counts=True)
        return logits.index_add(1, tokens, -(self.presence + self.frequency * counts[None]).to(logits.dtype))


class LogitBias:
    """Adds a value to the logits of single tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self.tokens, self.values = zip(*bias, strict=True)

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        tokens = torch.tensor(self.tokens, device=logits.device)
        return logits.index_add(1, tokens, torch.tensor([self.values], device=logits.device, dtype=logits.dtype))


class GrammarMatcher:
    """Restricts a reply to a grammar, by llguidance. Raises UserError for a grammar that it cannot follow."""

    def __init__(self, vocabulary: Any, grammar: str) -> None:
        """`vocabulary`: an llguidance.LLTokenizer."""
        from llguidance import LLMatcher

        self.matcher, self.vocabulary = LLMatcher(vocabulary, grammar, log_level=0), vocabulary
        self._check()

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        """Rules out the tokens that may not come next."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self.vocabulary.vocab_size)
        fill_next_token_bitmask(self.matcher, bits, 0)
        self._check()
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: logits.shape[1]].astype(bool)
        allowed = np.pad(allowed, (0, logits.shape[1] - len(allowed)))
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def consume(self, token: int) -> None:
        """Advances the grammar by the token that was sampled."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = self.matcher.get_error().strip().split("\n")[0]
            raise UserError("the reply cannot be held to this format ({reason}); simplify the schema", reason=reason)


class Sampler:
    """Samples the tokens of one reply after its settings."""

    def __init__(self, settings: Settings, prompt_tokens: int, device: Any, vocabulary: Any = None) -> None:
        """`vocabulary` (an llguidance.LLTokenizer) is needed for a grammar."""
        self.settings = settings
        seed = random.getrandbits(63) if settings.seed is None else settings.seed % (1 << 63)
        self.random = torch.Generator(device).manual_seed(seed)
        self.matcher = GrammarMatcher(vocabulary, settings.grammar) if settings.grammar else None
        self.before: list[Processor] = []  # change which token is the likeliest
        if settings.repetition_penalty != 1:
            penalty = float(settings.repetition_penalty)
            self.before.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
        if settings.presence_penalty or settings.frequency_penalty:
            self.before.append(CountPenalty(settings.presence_penalty, settings.frequency_penalty, prompt_tokens))
        if settings.logit_bias:
            self.before.append(LogitBias(settings.logit_bias))
        if self.matcher:
            self.before.append(self.matcher)
        self.after: list[Processor] = []  # of those that top_k leaves
        if settings.temperature:
            self.after.append(logits_process.TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_p < 1:
            self.after.append(logits_process.TopPLogitsWarper(float(settings.top_p)))
        if settings.min_p:
            self.after.append(logits_process.MinPLogitsWarper(settings.min_p))

    def __call__(self, ids: list[int], logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The token after `ids`, and its log-probability where it is wanted; `logits` is (vocabulary,)."""
        with torch.inference_mode():
            token, wanted = self._sample(ids, logits), self.settings.logprobs
            logprob = None if wanted is None else _token_logprob(token, logits, wanted)
        if self.matcher:
            self.matcher.consume(token)
        return token, logprob

    def _sample(self, ids: list[int], logits: Tensor) -> int:
        logits = logits[None]
        seen = torch.tensor([ids], device=logits.device) if self.before else None
        for process in self.before:
            logits = process(seen, logits)
        if not self.settings.temperature:
            return int(logits.argmax())
        tokens = None
        if 0 < self.settings.top_k < logits.shape[1]:  # first: the others then sort tens of tokens
            logits, tokens = logits.topk(self.settings.top_k)
        for process in self.after:
            logits = process(seen, logits)
        place = int(torch.multinomial(logits.softmax(-1), 1, generator=self.random))
        return place if tokens is None else int(tokens[0, place])


def _token_logprob(token: int, logits: Tensor, alternatives: int) -> TokenLogprob:
    known = logits.log_softmax(-1)
    values, tokens = known.topk(alternatives)
    return TokenLogprob(token, float(known[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
