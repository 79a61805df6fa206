"""Who may ask the server, and for how long: the key, `Host` and `Origin` of a request, its size, and time limits.

A server on the loopback address without a key is still reachable by every web page that its user opens: by a request
across origins, or by a name that its owner points to 127.0.0.1 (DNS rebinding). So both are refused unless opened.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import Message
from inference.api.errors import ApiError
from inference.api.options import ServerOptions
from runs.network import LOOPBACK, host_name

HEAD_SECONDS = 20  # to send the head of a request
BODY_SECONDS = 60  # to send the body of a request
SEND_SECONDS = 60  # to take the next part of an answer
MAX_HEAD = 32 << 10  # bytes of the head of a request


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError unless the request bears the key; the comparison takes the same time for every wrong one."""
    word, _, given = request.headers.get("authorization", "").partition(" ")
    found = given.strip().encode("latin-1") if word.lower() == "bearer" else b""
    if key and not hmac.compare_digest(found, key.encode()):
        raise ApiError(
            401,
            Message("the API key is wrong or missing; send it as Authorization: Bearer KEY"),
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, largest: int) -> bytes:
    """The body of a request. Raises ApiError for more than `largest` bytes, and for a client that is too slow."""
    length = request.headers.get("content-length", "0")
    close = {"Connection": "close"}
    too_large = ApiError(
        413,
        Message(
            "the request is larger than {bytes} bytes, which is more than any prompt that fits the model's context",
            bytes=largest,
        ),
        code="request_too_large",
        headers=close,
    )
    if len(length) > 18 or (length.isdigit() and int(length) > largest):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > largest:
                    raise too_large
    except ClientDisconnect:
        raise ApiError(400, Message("the client closed the connection")) from None
    except TimeoutError:
        slow = Message("the request was not complete after {seconds} seconds; send it faster", seconds=BODY_SECONDS)
        raise ApiError(408, slow, code="request_timeout", headers=close) from None
    return bytes(body)


class ClientTooSlow(Exception):
    """The client has taken nothing of an answer for SEND_SECONDS."""


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, and cuts off clients that read nothing."""

    def __init__(self, app: Any, options: ServerOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
                raise ApiError(
                    431,
                    Message("the headers of the request are larger than {bytes} bytes", bytes=MAX_HEAD),
                    code="request_too_large",
                )
            check_host(headers.get("host", ""), self.options)
            check_origin(headers.get("origin"), self.options)
        except ApiError as error:
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return

        async def send_in_time(message: Any) -> None:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                raise ClientTooSlow from None

        try:
            await self.app(scope, receive, send_in_time)
        except ClientTooSlow:
            return  # without an end of the answer, which closes the connection


def check_host(header: str, options: ServerOptions) -> None:
    """Raises ApiError for a `Host` that does not name this server, where no key keeps others out."""
    if options.key or "*" in options.allowed_hosts:
        return
    name = host_name(f"//{header}")
    if name not in (*LOOPBACK, options.host, *options.allowed_hosts):
        raise ApiError(
            403,
            Message(
                "the Host header names {host}, which is not this server (protection against DNS rebinding); to allow "
                "it, start the server with API_ALLOWED_HOSTS={host}",
                host=(name or header)[:100],
            ),
            code="host_not_allowed",
        )


def check_origin(origin: str | None, options: ServerOptions) -> None:
    """Raises ApiError for a web page that API_CORS_ORIGINS does not name."""
    if origin is not None and not {"*", origin} & set(options.cors_origins):
        raise ApiError(
            403,
            Message(
                "web pages of {origin} may not use this server; to allow it, start the server with "
                "API_CORS_ORIGINS={origin}",
                origin=origin[:100],
            ),
            code="origin_not_allowed",
        )


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with at most HEAD_SECONDS for the head of a request (slowloris)."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.head_timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self._cut_off)

    def _stop_timer(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def _cut_off(self) -> None:
        self.head_timer = None
        if not self.transport.is_closing():
            self.transport.abort()
