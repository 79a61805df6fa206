"""Messages: code works with codes and fields; a sentence is made where it is shown."""

from __future__ import annotations

import difflib
import functools
import os
import string
from collections.abc import Iterable
from typing import Any

import yaml

from settings.kit import ROOT

LANGUAGES = ("en", "zh")


class Message:
    """An error, note, warning or reason: a stable code and its fields. Its sentence stands in messages/*.yaml.

    A field may be a message itself, or a list of values or messages. `str(message)` is the sentence in the user's
    language, `text("zh")` that in Chinese.
    """

    def __init__(self, code: str, /, **fields: Any) -> None:
        self.code, self.fields = code, fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and (self.code, self.fields) == (other.code, other.fields)

    def __hash__(self) -> int:
        return hash((self.code, repr(self.fields)))

    def __repr__(self) -> str:
        return f"Message({', '.join([repr(self.code), *(f'{name}={value!r}' for name, value in self.fields.items())])})"

    def __str__(self) -> str:
        return self.text(user_language())

    def text(self, language: str) -> str:
        """The sentence in `language`, one of LANGUAGES."""
        sentence = sentences().get(self.code, {}).get(language, self.code)
        return _Sentence(language).vformat(sentence, (), self.fields) if self.fields else sentence

    def to_json(self) -> dict[str, Any]:
        """For a file: {"code": ..., "fields": {...}}; what JSON does not know becomes text."""
        return {"code": self.code, "fields": {name: _to_json(value) for name, value in self.fields.items()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Message:
        """The message of `to_json`."""
        return cls(content["code"], **{name: _from_json(value) for name, value in content["fields"].items()})


class UserError(Exception):
    """An error that the user can fix: its message says what is wrong and what to do. Ends a command with status 2."""

    def __init__(self, code: str, /, **fields: Any) -> None:
        super().__init__(code, fields)
        self.message = Message(code, **fields)

    @classmethod
    def from_message(cls, message: Message) -> UserError:
        return cls(message.code, **message.fields)

    @property
    def code(self) -> str:
        return self.message.code

    @property
    def fields(self) -> dict[str, Any]:
        return self.message.fields

    def __str__(self) -> str:
        return str(self.message)


def user_language() -> str:
    """One of LANGUAGES: ONECARD_LANG where it is set, else Chinese in a Chinese locale, else English."""
    asked = os.environ.get("ONECARD_LANG")
    locale = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return asked if asked in LANGUAGES else "zh" if locale.startswith("zh") else "en"


def load_yaml(text: str) -> Any:
    """The content of YAML text, by libyaml where it is there."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@functools.cache
def sentences() -> dict[str, dict[str, str]]:
    """All sentences of messages/*.yaml: code → language → sentence with {fields}."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "messages").glob("*.yaml")):
        found.update(load_yaml(file.read_text(encoding="utf-8")) or {})
    return found


class _Sentence(string.Formatter):
    """Fills in a sentence. Besides Python's own, `{name:suggestion}` is " (did you mean 'x'?)" or nothing,
    `{count:plural}` an "s" unless the count is 1, and `{names:lines}` one item a line; a list is joined with commas."""

    def __init__(self, language: str) -> None:
        self.language = language

    def format_field(self, value: Any, format_spec: str) -> str:
        chinese = self.language == "zh"
        if format_spec == "suggestion":
            return "" if value is None else f"（是不是 '{value}'？）" if chinese else f" (did you mean '{value}'?)"
        if format_spec == "plural":
            return "" if value == 1 else "s"
        if isinstance(value, list | tuple | set | frozenset):
            joint = "\n  " if format_spec == "lines" else "、" if chinese else ", "
            return joint.join(self.format_field(item, "") for item in value)
        if isinstance(value, UserError | Message):
            return (value.message if isinstance(value, UserError) else value).text(self.language)
        return super().format_field(value if isinstance(value, int | float | str) else str(value), format_spec)


def _to_json(value: Any) -> Any:
    if isinstance(value, UserError):
        value = value.message
    if isinstance(value, Message):
        return value.to_json()
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Message.from_json(value)
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def nearest_word(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, for `{near:suggestion}` in a sentence; else None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string. Goes once all messages are codes."""
    near = nearest_word(word, known)
    return f" (did you mean '{near}'?)" if near else ""
