"""A request: the prompt's tokens, and how the reply is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from common import Config, Message, UserError
from inference.tools import ToolUse


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
    grammar: str | None = None  # an llguidance grammar (grammar.py): only replies that match it are sampled

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and getattr(Settings, name) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
                wanted = Message("whole number") if kind is int else Message("number")
                raise UserError("{name} must be a {kind}, not {value}", name=name, value=repr(value), kind=wanted)
            if not low <= value <= high:
                limits = {"low": low, "high": high}
                raise UserError("{name} must be from {low} to {high}, not {value}", name=name, value=value, **limits)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("{name}: an empty text would end every reply; leave it out", name="stop")

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The chat settings of a configuration."""
        temperature = cls.temperature if config.temperature is None else config.temperature
        return cls(
            temperature=temperature if config.do_sample else 0.0,
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


@dataclass(frozen=True)
class Request:
    """What is asked of a model: the prompt's token ids, and how the reply is sampled and read."""

    ids: list[int]
    settings: Settings
    dropped_messages: int = 0  # how many of the oldest messages were left out, because they do not fit the context
    thoughts: bool = False  # whether they are kept apart from the reply's text
    opened: bool = False  # whether the prompt ends within a thought, which the reply goes on with
    tools: ToolUse | None = None  # whose calls are read out of the reply's text
