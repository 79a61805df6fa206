"""A model that answers: a run, an adapter, a merged or plain model folder, or a GGUF; it streams, counts and stops.

    engine = load("saves/NAME")
    reply = engine.stream([{"role": "user", "content": "你好"}], Settings(temperature=0))
    for piece in reply:
        print(piece, end="", flush=True)
    reply.finish_reason, reply.completion_tokens, reply.tokens_per_second, reply.first_token_seconds

`find` answers in a moment what is wrong with a target; `load` takes the seconds that a model takes.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Config, UserError

Message = dict[str, Any]  # {"role": "system|user|assistant|tool", "content": str, ...}


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for, and the reply


class TooLong(UserError):
    """A message that does not fit into the context."""


@dataclass(frozen=True)
class Settings:
    """How a reply is drawn. Raises UserError for a value out of its range."""

    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.9
    top_k: int = 50  # 0: off
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted once from the logit of each token of the reply so far ...
    frequency_penalty: float = 0.0  # ... and for each time it occurs there
    seed: int | None = None
    stop: tuple[str, ...] = ()  # the reply ends before any of these
    max_new_tokens: int = 1024
    logprobs: int | None = None  # alternatives whose log-probabilities are kept with each token; None: none kept
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, and what is added to the logit of each
    grammar: str | None = None  # as llguidance writes it (toolcalls.py): only replies that fit it are drawn

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0, 100),
            "top_p": (0, 1),
            "top_k": (0, 1 << 31),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "seed": (0, (1 << 64) - 1),
            "max_new_tokens": (1, 1 << 31),
            "logprobs": (0, 20),
        }
        for name, (low, high) in ranges.items():
            value, whole = getattr(self, name), isinstance(getattr(Settings, name), int) or name in ("seed", "logprobs")
            if value is None and name in ("seed", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UserError(f"{name}: {value!r} is not a {'whole ' if whole else ''}number; give one")
            if not low <= value <= high:
                raise UserError(f"{name}: {value} is out of range; it must be from {low} to {high}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("stop: an empty text would end every reply; give the texts that end it")

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The chat settings of a configuration."""
        return cls(
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            max_new_tokens=config.max_new_tokens,
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the reply, its log-probability by the model itself, and the likeliest tokens there with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Reply:
    """A reply as it comes: iterate over its pieces of text, then read how it ended. `cancel` ends it from anywhere."""

    prompt_tokens: int
    dropped_messages: int  # of the conversation's oldest, which no longer fit into the context
    cached_tokens: int = 0  # of the prompt's, not computed again
    completion_tokens: int = 0  # the end of the turn included
    finish_reason: str | None = None  # "stop", "length" or "cancelled"; None: it still goes on
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cancelled: bool = False
    _pieces: Iterator[str] = field(default_factory=lambda: iter(()), repr=False)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """Ends the reply at the next token; what was computed is kept for the next turn."""
        self.cancelled = True

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 where there was no second one."""
        spent = self.seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / spent if self.completion_tokens > 1 and spent > 0 else 0.0


class _StopTexts:
    """Holds back the end of a text as long as it may become one of the stop texts, which may span many tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def feed(self, text: str) -> str:
        """What of the text so far can be shown; sets `found` at a stop text, which is never shown."""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.found, self.held = True, self.held[: min(places)]
            return self.flush()
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Matcher:
    """Holds a reply to a grammar, by llguidance. Raises UserError for a grammar that it cannot follow."""

    def __init__(self, vocabulary: Any, grammar: str) -> None:
        from llguidance import LLMatcher

        self.matcher, self.vocabulary = LLMatcher(vocabulary, grammar, log_level=0), vocabulary
        self._check()

    def allowed(self, size: int) -> Any:
        """Which of the `size` tokens may come next: an array of booleans."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self.vocabulary.vocab_size)
        fill_next_token_bitmask(self.matcher, bits, 0)
        self._check()
        known = np.unpackbits(bits.view(np.uint8), bitorder="little")[:size].astype(bool)
        return np.pad(known, (0, size - len(known)))

    def take(self, token: int) -> None:
        """Notes the token that was drawn."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            reason = self.matcher.get_error().strip().split("\n")[0]
            raise UserError(f"the reply cannot be held to this form ({reason}); simplify the schema")


class Writer:
    """Makes the text of a reply out of its tokens, cut between characters, and notes in the reply how it ended."""

    def __init__(
        self, engine: Engine, settings: Settings, reply: Reply, shown: Mapping[int, str] | None = None
    ) -> None:
        """`shown`: control tokens that are part of the text all the same."""
        self.reply, self.shown, self.stop_ids = reply, shown or {}, engine.stop_ids
        self.stops, self.text = _StopTexts(settings.stop), engine._detokenizer()
        self.limit = min(settings.max_new_tokens, engine.context - reply.prompt_tokens)
        self.started = time.perf_counter()
        self.shown_tokens = 0  # tokens of whose text something has been shown
        self._starts: collections.deque[int] = collections.deque()  # where the texts of the others begin
        self._made = self._shown = 0  # characters

    def feed(self, token: int) -> str:
        """The text that can be shown after `token`; `finish_reason` is set where it was the last one."""
        reply = self.reply
        reply.completion_tokens += 1
        reply.seconds = time.perf_counter() - self.started
        reply.first_token_seconds = reply.first_token_seconds or reply.seconds
        ended = token in self.stop_ids
        text = "" if ended else self.shown.get(token) or self.text(token)
        piece = self._note(text, self.stops.feed(text))
        if ended or self.stops.found:
            reply.finish_reason = "stop"
        elif reply.completion_tokens == self.limit:
            reply.finish_reason = "length"
        return piece

    def end(self) -> str:
        """What was held back; a reply that has not ended by itself was cancelled."""
        self.reply.finish_reason = self.reply.finish_reason or "cancelled"
        if self.stops.found:  # the tokens of the stop text are no part of the reply
            del self.reply.logprobs[self.shown_tokens :]
        else:
            self.shown_tokens = self.reply.completion_tokens
        return self.stops.flush()

    def _note(self, text: str, shown: str) -> str:
        self._starts.append(self._made)
        self._made += len(text)
        self._shown += len(shown)
        while self._starts and self._starts[0] < self._shown:
            self._starts.popleft()
            self.shown_tokens += 1
        return shown


class Engine:
    """A loaded model. One conversation at a time profits from its cache; several at once are right, but slower."""

    name: str  # for people
    context: int  # tokens of prompt and reply together
    stop_ids: frozenset[int]  # the ends of a turn
    control_tokens: Mapping[str, int]  # what a reply's text leaves out
    added_tokens: Mapping[str, int]  # these, and others that text is never cut through: <tool_call> in some tokenizers
    vocabulary_size: int  # of the logits
    base: Engine | None = None  # the same model before training, where it was asked for
    config: Config

    def prompt_ids(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids after which the model answers `messages`, by the template that it was trained with."""
        raise NotImplementedError

    def _tokens(self, ids: list[int], settings: Settings, reply: Reply) -> Iterator[int]:
        """The tokens of an endless reply; notes `cached_tokens` and `logprobs` in `reply`."""
        raise NotImplementedError

    def _detokenizer(self) -> Callable[[int], str]:
        """Gives for each token the whole characters it completes."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a text that is no conversation; control tokens in it are control tokens."""
        raise NotImplementedError

    def text_of(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        raise NotImplementedError

    def draw(self, settings: Settings, prompt_tokens: int) -> Any:
        """What draws the tokens of one reply: called with all ids, the logits and the reply, it gives the next id."""
        raise NotImplementedError

    def rows(self, slots: int) -> Any:
        """The half of `engine_batch.Batch` that computes: at most `slots` replies side by side."""
        raise NotImplementedError

    def _vocabulary_of_grammars(self) -> Any:
        """llguidance's view of the vocabulary; takes a second, so `vocabulary` keeps it."""
        raise NotImplementedError

    @functools.cached_property
    def vocabulary(self) -> Any:
        """An llguidance.LLTokenizer: what grammars are matched against, and the bytes of single tokens."""
        return self._vocabulary_of_grammars()

    def token_bytes(self, token: int) -> bytes:
        """What a token spells; one alone may be a part of a character."""
        return self.vocabulary.decode_bytes([token])

    def prepare(
        self, messages: list[Message], settings: Settings, tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest messages had to go. Raises TooLong for one that does not fit."""
        if self.config.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.default_system}, *messages]
        return self._fit(messages, tools, settings.max_new_tokens)

    def stream(
        self, messages: list[Message], settings: Settings | None = None, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """The reply to `messages`. Raises UserError for a message that does not fit into the context."""
        settings = settings or Settings.of(self.config)
        ids, dropped = self.prepare(messages, settings, tools)
        reply = Reply(prompt_tokens=len(ids), dropped_messages=dropped)
        reply._pieces = self._pieces(ids, settings, reply)
        return reply

    def _fit(self, messages: list[Message], tools: Any, wanted: int) -> tuple[list[int], int]:
        """Prompt ids that leave room for a reply (a quarter of the context, or less where less is wanted).

        Whole turns go, oldest first; a system message stays. The last turn may use that room up, all but one token.
        """
        head = 1 if messages[0]["role"] == "system" else 0
        starts = [i for i in range(head, len(messages)) if messages[i]["role"] == "user"][1:]
        room = self.context - min(wanted, self.context // 4)

        def ids(turns: int) -> list[int]:
            kept = messages if turns == 0 else messages[:head] + messages[starts[turns - 1] :]
            return self.prompt_ids(kept, tools)

        turns = bisect.bisect_left(range(len(starts)), True, key=lambda turns: len(ids(turns)) <= room)
        found = ids(turns)
        if len(found) >= self.context:
            raise TooLong(
                f"the last message has {len(found)} tokens with what belongs to it, and the model reads "
                f"{self.context}; shorten it"
            )
        return found, starts[turns - 1] - head if turns else 0

    def _pieces(self, ids: list[int], settings: Settings, reply: Reply) -> Iterator[str]:
        """The text of the reply, piece by piece; `reply` is completed as it goes."""
        writer = Writer(self, settings, reply)
        with contextlib.closing(self._tokens(ids, settings, reply)) as tokens:
            for token in tokens:
                if piece := writer.feed(token):
                    yield piece
                if reply.finish_reason or reply.cancelled:
                    break
        if rest := writer.end():
            yield rest
