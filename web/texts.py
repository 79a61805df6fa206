"""The texts of the pages in English and Chinese: the English stands on the page, zh.yaml holds the Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import OPTIONS, Message, UserError

LANGUAGES = {"en": "English", "zh": "中文"}


@dataclass(frozen=True)
class Translator:
    """`t("{n} rows", n=3)`: the text in `language`, one of LANGUAGES."""

    language: str

    def __call__(self, text: str, **values: Any) -> str:
        return Message(text, **values).text(self.language)

    def message(self, message: UserError | Message | str) -> str:
        """The sentence of an error or message; a text that some program has written stays as it is."""
        if isinstance(message, UserError):
            message = message.message
        return message.text(self.language) if isinstance(message, Message) else message

    def recorded(self, value: Any) -> str:
        """The sentence of what a run folder's JSON holds: a message of `Message.to_json`, or a plain text."""
        is_message = isinstance(value, dict) and "sentence" in value and "fields" in value
        return self.message(Message.from_json(value) if is_message else str(value))

    def group(self, title: str) -> str:
        """The title of a group of options."""
        text = self(title)
        return text[:1].upper() + text[1:]

    def help(self, option: str) -> str:
        """What an option means."""
        return self(OPTIONS[option].metadata["help"])


def with_other_path(error: UserError, old: str, new: str) -> UserError:
    """The same error with another path of the file, wherever that stands in its fields: that of a copy says nothing."""

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(old, new)
        if isinstance(value, list):
            return [rename(item) for item in value]
        return {key: rename(item) for key, item in value.items()} if isinstance(value, dict) else value

    return UserError.from_message(Message.from_json(rename(error.message.to_json())))
