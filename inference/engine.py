"""The interface of a loaded model: what is asked of it (Settings), what comes back (Reply), and the engine between.

engine = load("saves/NAME")                     # inference/load.py
reply = engine.stream([{"role": "user", "content": "你好"}], Settings(temperature=0))
for piece in reply:
    print(piece, end="", flush=True)
reply.finish_reason, reply.completion_tokens, reply.tokens_per_second, reply.first_token_seconds
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import Config, Message, UserError

ChatMessage = dict[str, Any]  # {"role": "system|user|assistant|tool", "content": str, ...}
MIN_SHARED = 16  # tokens in common from which copying keys and values is faster than computing them


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for, and the reply


class MessageTooLong(UserError):
    """The last message alone has more tokens than the model reads."""


@dataclass(frozen=True)
class Settings:
    """How a reply is sampled. Raises UserError, with the field's name as `name`, for a value out of its range."""

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
    grammar: str | None = None  # an llguidance grammar (tool_calls.py): only replies that match it are sampled

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and getattr(Settings, name) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
                code = Message("whole number") if kind is int else Message("number")
                raise UserError("{name}: {value} is not a {kind}; give one", name=name, value=repr(value), kind=code)
            if not low <= value <= high:
                raise UserError(
                    "{name}: {value} is out of range; it must be from {low} to {high}",
                    name=name,
                    value=value,
                    low=low,
                    high=high,
                )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("{name}: an empty text would end every reply; give texts that are not empty", name="stop")

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The chat settings of a configuration."""
        return cls(
            temperature=(cls.temperature if config.temperature is None else config.temperature)
            if config.do_sample
            else 0.0,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            max_new_tokens=config.max_new_tokens,
        )


# Type, and least and greatest value, of the settings that are numbers.
_RANGES = {
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 1 << 31),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "seed": (int, 0, (1 << 64) - 1),
    "max_new_tokens": (int, 1, 1 << 31),
    "logprobs": (int, 0, 20),
}


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the reply, its log-probability by the model itself, and the likeliest tokens there with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Reply:
    """A reply while it is generated: iterate over its pieces of text, then read how it ended.

    `cancel` may be called from any thread.
    """

    prompt_tokens: int
    dropped_messages: int  # how many of the oldest messages were left out, because they no longer fit the context
    cached_tokens: int = 0  # tokens of the prompt that were already in the cache
    completion_tokens: int = 0  # the end of the turn included
    finish_reason: str | None = None  # "stop", "length" or "cancelled"; None: not ended yet
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

    def summary(self) -> list[Message]:
        """How the reply came: tokens, speed, and why it was cut, where it was."""
        parts = [Message("{count} token{count:plural}", count=self.completion_tokens)]
        if self.tokens_per_second:
            parts.append(Message("{speed:.1f} tokens/s", speed=self.tokens_per_second))
        if self.completion_tokens:
            parts.append(Message("first after {seconds:.2f} s", seconds=self.first_token_seconds))
        if self.finish_reason == "length":
            parts.append(Message("cut: max_new_tokens or the context is full"))
        if self.finish_reason == "cancelled":
            parts.append(Message("stopped"))
        return parts


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
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back."""
        shown, self.held = self.held, ""
        return shown


def overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` with which `mark` begins, but not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def common_prefix(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


class TextStreamer:
    """Turns the tokens of a reply into text, cut between characters, and records in the reply how it ended."""

    def __init__(
        self, engine: Engine, settings: Settings, reply: Reply, visible: Mapping[int, str] | None = None
    ) -> None:
        """`visible`: control tokens whose text is part of the reply's text all the same."""
        self.reply, self.visible, self.stop_ids = reply, visible or {}, engine.stop_ids
        self.stops, self.detokenize = _StopTexts(settings.stop), engine.detokenizer()
        self.max_tokens = min(settings.max_new_tokens, engine.context - reply.prompt_tokens)
        self.started = time.perf_counter()
        self.shown_tokens = 0  # tokens of whose text something has been shown
        self._token_starts: collections.deque[int] = collections.deque()  # where the texts of the other tokens begin
        self._characters = self._shown_characters = 0

    def feed(self, token: int) -> str:
        """The text that can be shown after `token`; `finish_reason` is set where it was the last one."""
        reply = self.reply
        reply.completion_tokens += 1
        reply.seconds = time.perf_counter() - self.started
        reply.first_token_seconds = reply.first_token_seconds or reply.seconds
        ended = token in self.stop_ids
        text = "" if ended else self.visible.get(token) or self.detokenize(token)
        piece = self._count_shown(text, self.stops.feed(text))
        if ended or self.stops.found:
            reply.finish_reason = "stop"
        elif reply.completion_tokens == self.max_tokens:
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

    def _count_shown(self, text: str, shown: str) -> str:
        self._token_starts.append(self._characters)
        self._characters += len(text)
        self._shown_characters += len(shown)
        while self._token_starts and self._token_starts[0] < self._shown_characters:
            self._token_starts.popleft()
            self.shown_tokens += 1
        return shown


class Engine:
    """A loaded model. `stream` caches one conversation; for several at once see scheduler.py."""

    name: str  # shown to the user
    context: int  # tokens of prompt and reply together
    stop_ids: frozenset[int]  # tokens that end a turn
    control_tokens: Mapping[str, int]  # left out of a reply's text
    added_tokens: Mapping[str, int]  # these, and other added tokens such as <tool_call>
    vocabulary_size: int  # of the logits
    grammar_vocabulary: Any  # an llguidance.LLTokenizer, made when it is asked for: it takes a second
    base: Engine | None = None  # the same model before training, where it was asked for
    config: Config

    def prompt_ids(self, messages: list[ChatMessage], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids after which the model answers `messages`, by the template that it was trained with."""
        raise NotImplementedError

    def generate(self, ids: list[int], settings: Settings, reply: Reply) -> Iterator[int]:
        """Samples tokens without end; records `cached_tokens` and `logprobs` in `reply`."""
        raise NotImplementedError

    def detokenizer(self) -> Callable[[int], str]:
        """A function that gives, for each token, the whole characters that it completes."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a text that is no conversation; control tokens in it are control tokens."""
        raise NotImplementedError

    def text_of(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        raise NotImplementedError

    def sampler(self, settings: Settings, prompt_tokens: int) -> Any:
        """A function of (all ids, logits, reply) that gives the next id of one reply."""
        raise NotImplementedError

    def batch_kernel(self, slots: int) -> Any:
        """What computes at most `slots` replies side by side; see scheduler.py."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """What a token spells; one alone may be a part of a character."""
        return self.grammar_vocabulary.decode_bytes([token])

    def prepare(
        self, messages: list[ChatMessage], settings: Settings, tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest messages were left out.

        Raises MessageTooLong where the last turn alone does not fit the context.
        """
        if self.config.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.default_system}, *messages]
        return self._fit_context(messages, tools, settings.max_new_tokens)

    def stream(
        self, messages: list[ChatMessage], settings: Settings | None = None, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """The reply to `messages`. Raises UserError where the last turn does not fit the context."""
        settings = settings or Settings.of(self.config)
        ids, dropped = self.prepare(messages, settings, tools)
        reply = Reply(prompt_tokens=len(ids), dropped_messages=dropped)
        reply._pieces = self.stream_text(ids, settings, reply)
        return reply

    def _fit_context(self, messages: list[ChatMessage], tools: Any, wanted: int) -> tuple[list[int], int]:
        """Prompt ids that leave space for a reply: `wanted` tokens, but at most a quarter of the context.

        Whole turns are left out, oldest first; a system message stays. The last turn may use all but one token.
        """
        first = 1 if messages[0]["role"] == "system" else 0
        turn_starts = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"][1:]
        longest = self.context - min(wanted, self.context // 4)

        def ids(dropped_turns: int) -> list[int]:
            kept = messages if dropped_turns == 0 else messages[:first] + messages[turn_starts[dropped_turns - 1] :]
            return self.prompt_ids(kept, tools)

        dropped = bisect.bisect_left(range(len(turn_starts)), True, key=lambda turns: len(ids(turns)) <= longest)
        found = ids(dropped)
        if len(found) >= self.context:
            raise MessageTooLong(
                "the last message has {tokens} tokens with what belongs to it, and the model reads {context}; "
                "shorten it",
                tokens=len(found),
                context=self.context,
            )
        return found, turn_starts[dropped - 1] - first if dropped else 0

    def stream_text(self, ids: list[int], settings: Settings, reply: Reply) -> Iterator[str]:
        """The text of the reply to a prompt's ids, piece by piece; `reply` is completed meanwhile."""
        streamer = TextStreamer(self, settings, reply)
        with contextlib.closing(self.generate(ids, settings, reply)) as tokens:
            for token in tokens:
                if piece := streamer.feed(token):
                    yield piece
                if reply.finish_reason or reply.cancelled:
                    break
        if rest := streamer.end():
            yield rest
