"""Why a row of the data, or a whole dataset, cannot be used."""

from __future__ import annotations

from typing import Any

from common import Message


class Fault(Exception):
    """The reason, as a Message. `final`: what follows in the file cannot be read either."""

    def __init__(self, code: str, /, *, final: bool = False, **fields: Any) -> None:
        super().__init__(code, fields)
        self.message = Message(code, **fields)
        self.final = final

    def __str__(self) -> str:
        return str(self.message)
