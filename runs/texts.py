"""The texts of pages and reports in one language: the English stands in the code, zh.yaml holds the Chinese."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import Message, UserError


@dataclass(frozen=True)
class Translator:
    """`t("{n} rows", n=3)`: the text in `language`, one of common.LANGUAGES."""

    language: str

    def __call__(self, text: str, **values: Any) -> str:
        return Message(text, **values).text(self.language)

    def message(self, said: UserError | Message | dict[str, Any] | str) -> str:
        """The sentence of an error, a message or its JSON form; a text that some program has written stays as it is."""
        if isinstance(said, dict):
            said = Message.from_json(said)
        if isinstance(said, UserError):
            said = said.message
        return said.text(self.language) if isinstance(said, Message) else said
