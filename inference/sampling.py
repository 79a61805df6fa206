"""How the next token is chosen from the logits: small functions that compose.

Each function here takes settings and gives a filter: (ids so far, logits) -> logits, on one row of `vocabulary` float32
logits. `Sampler` applies those that the settings ask for, in the order of transformers' `generate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common import UserError
from inference.request import Settings, TokenLogprob

Filter = Callable[[list[int], Tensor], Tensor]


def repetition_penalty(penalty: float) -> Filter:
    """Makes every token of prompt and reply less likely, once (CTRL, arXiv 1909.05858)."""

    def apply(ids: list[int], logits: Tensor) -> Tensor:
        seen = torch.tensor(ids, device=logits.device).unique()
        values = logits[seen]
        return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))

    return apply


def count_penalty(presence: float, frequency: float, prompt_tokens: int) -> Filter:
    """OpenAI's presence and frequency penalties, over the reply so far."""

    def apply(ids: list[int], logits: Tensor) -> Tensor:
        tokens, counts = torch.tensor(ids[prompt_tokens:], device=logits.device).unique(return_counts=True)
        return logits.index_add(0, tokens.long(), -(presence + frequency * counts).to(logits.dtype))

    return apply


def logit_bias(bias: Sequence[tuple[int, float]]) -> Filter:
    """Adds a value to the logits of single tokens."""

    def apply(_: list[int], logits: Tensor) -> Tensor:
        tokens, values = (torch.tensor(column, device=logits.device) for column in zip(*bias, strict=True))
        return logits.index_add(0, tokens, values.to(logits.dtype))

    return apply


def temperature(value: float) -> Filter:
    return lambda _, logits: logits / value


def top_p(mass: float) -> Filter:
    """Keeps the likeliest tokens that together have the probability `mass`; always one (nucleus sampling)."""

    def apply(_: list[int], logits: Tensor) -> Tensor:
        ordered, places = logits.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - mass
        removed[-1] = False
        return logits.masked_fill(removed[places.argsort()], -torch.inf)

    return apply


def min_p(share: float) -> Filter:
    """Keeps the tokens that have at least `share` of the likeliest token's probability."""

    def apply(_: list[int], logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < share * probabilities.max(), -torch.inf)

    return apply


class GrammarMatcher:
    """Restricts a reply to a grammar, by llguidance. Raises UserError for a grammar that it cannot follow."""

    def __init__(self, vocabulary: Any, grammar: str) -> None:
        """`vocabulary`: an llguidance.LLTokenizer."""
        from llguidance import LLMatcher

        self.matcher, self.vocabulary = LLMatcher(vocabulary, grammar, log_level=0), vocabulary
        self._check()

    def __call__(self, _: list[int], logits: Tensor) -> Tensor:
        """Rules out the tokens that may not come next."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self.vocabulary.vocab_size)
        fill_next_token_bitmask(self.matcher, bits, 0)
        self._check()
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        allowed = np.pad(allowed, (0, len(logits) - len(allowed)))
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def consume(self, token: int) -> None:
        """Advances the grammar by the token that was sampled."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise UserError(
                "the reply cannot be held to this format ({reason}); simplify the schema",
                reason=self.matcher.get_error().strip().split("\n")[0],
            )


class Sampler:
    """Samples the tokens of one reply after its settings."""

    def __init__(self, settings: Settings, prompt_tokens: int, device: Any, vocabulary: Any = None) -> None:
        """`vocabulary` (an llguidance.LLTokenizer) is needed for a grammar."""
        self.settings = settings
        self.random = torch.Generator(device).manual_seed(
            random.getrandbits(63) if settings.seed is None else settings.seed % (1 << 63)
        )
        self.matcher = GrammarMatcher(vocabulary, settings.grammar) if settings.grammar else None
        self.before: list[Filter] = []  # change which token is the likeliest
        if settings.repetition_penalty != 1:
            self.before.append(repetition_penalty(settings.repetition_penalty))
        if settings.presence_penalty or settings.frequency_penalty:
            self.before.append(count_penalty(settings.presence_penalty, settings.frequency_penalty, prompt_tokens))
        if settings.logit_bias:
            self.before.append(logit_bias(settings.logit_bias))
        if self.matcher:
            self.before.append(self.matcher)
        self.after: list[Filter] = [temperature(settings.temperature)]  # of those that top_k leaves
        if settings.top_p < 1:
            self.after.append(top_p(settings.top_p))
        if settings.min_p:
            self.after.append(min_p(settings.min_p))

    def __call__(self, ids: list[int], logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The token after `ids`, and its log-probability where it is wanted; `logits` is (vocabulary,)."""
        with torch.inference_mode():
            token, wanted = self._sample(ids, logits), self.settings.logprobs
            logprob = None if wanted is None else _token_logprob(token, logits, wanted)
        if self.matcher:
            self.matcher.consume(token)
        return token, logprob

    def _sample(self, ids: list[int], logits: Tensor) -> int:
        for apply in self.before:
            logits = apply(ids, logits)
        if not self.settings.temperature:
            return int(logits.argmax())
        tokens = None
        if 0 < self.settings.top_k < len(logits):  # first: the filters after it then sort tens of tokens
            logits, tokens = logits.topk(self.settings.top_k)
        for apply in self.after:
            logits = apply(ids, logits)
        place = int(torch.multinomial(logits.softmax(-1), 1, generator=self.random))
        return place if tokens is None else int(tokens[place])


def _token_logprob(token: int, logits: Tensor, alternatives: int) -> TokenLogprob:
    known = logits.log_softmax(-1)
    values, tokens = known.topk(alternatives)
    return TokenLogprob(token, float(known[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
