"""The texts of the pages in English and Chinese. The English text is the key; zh.json holds the Chinese ones.

Errors and other messages are not here: their sentences stand in messages/*.yaml.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import OPTIONS, Message, UserError

LANGUAGES = {"en": "English", "zh": "中文"}


@functools.cache
def chinese() -> dict[str, dict[str, str]]:
    """zh.json: "texts" by their English, "groups" of options by title, "options" (their help) by name."""
    return json.loads(Path(__file__).with_name("zh.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Translator:
    """`t("{n} rows", n=3)`: the text in `language`, one of LANGUAGES.

    A text that zh.json lacks is a KeyError in both languages, so that none is forgotten.
    """

    language: str

    def __call__(self, text: str, **values: Any) -> str:
        translated = chinese()["texts"][text]
        chosen = translated if self.language == "zh" else text
        return chosen.format(**values) if values else chosen

    def message(self, message: UserError | Message | str) -> str:
        """The sentence of an error or message; a text that some program has written stays as it is."""
        if isinstance(message, UserError):
            message = message.message
        return message.text(self.language) if isinstance(message, Message) else message

    def recorded(self, value: Any) -> str:
        """The sentence of what a run folder's JSON holds: a message of `Message.to_json`, or a plain text."""
        is_message = isinstance(value, dict) and "code" in value and "fields" in value
        return self.message(Message.from_json(value) if is_message else str(value))

    def group(self, title: str) -> str:
        """The title of a group of options."""
        english = title[:1].upper() + title[1:]
        return chinese()["groups"].get(title, english) if self.language == "zh" else english

    def help(self, option: str) -> str:
        """What an option means; English where it has no Chinese help yet."""
        english = OPTIONS[option].metadata["help"]
        return chinese()["options"].get(option, english) if self.language == "zh" else english


def with_other_path(error: UserError, old: str, new: str) -> UserError:
    """The same error with another path of the file, wherever that stands in its fields: that of a copy says nothing."""

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(old, new)
        if isinstance(value, list):
            return [rename(item) for item in value]
        return {key: rename(item) for key, item in value.items()} if isinstance(value, dict) else value

    return UserError.from_message(Message.from_json(rename(error.message.to_json())))
