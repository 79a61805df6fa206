"""Errors in OpenAI's form: a sentence made of a Message, the field at fault, and OpenAI's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from common import Message

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A request that is not answered with a reply: an HTTP status and OpenAI's error body.

    `param` is the field of the request as the client wrote it (`messages[0].content`), `code` OpenAI's code.
    """

    def __init__(
        self,
        status: int,
        message: Message,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, str(message), dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": str(self.message), "type": kind, "param": self.param, "code": self.code}}


def refuse(param: str, reason: Message, code: str = "unsupported_value") -> ApiError:
    """The answer to a request whose field `param` cannot be honoured; its sentence begins with the field."""
    return ApiError(400, Message("{param}: {reason}", param=param, reason=reason), param=param, code=code)
