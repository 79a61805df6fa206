"""Who may send requests to a server of the kit (the API, the board), how large they may be, and how slow.

A server on the loopback address without a key is still reachable by every web page that its user opens: by a request
across origins, or by a name that its owner points to 127.0.0.1 (DNS rebinding). So both are refused unless allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Collection, Mapping
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import Message
from inference.api.errors import ApiError
from runs.network import host_name

HEAD_SECONDS = 20  # to send the head of a request
PART_SECONDS = 60  # to send the next part of a body, or to take the next part of an answer
MAX_HEAD = 32 << 10  # bytes of the head of a request
CLOSE = {"Connection": "close"}  # after a request that was not read to its end


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError unless the request bears the key; the comparison takes the same time for every wrong one."""
    word, _, given = request.headers.get("authorization", "").partition(" ")
    found = given.strip().encode("latin-1") if word.lower() == "bearer" else b""
    if key and not hmac.compare_digest(found, key.encode()):
        reason = Message("the API key is wrong or missing; send it as Authorization: Bearer KEY")
        raise ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class ClientTooSlow(Exception):
    """The client has taken nothing of an answer for PART_SECONDS."""


class Guard:
    """ASGI middleware.

    `hosts`: the names under which the server answers; None: any. `origins`: whose pages may use it besides its own,
    each an origin or a host name; "*": everybody's. `settings`: with which a "Host" and an "Origin" are allowed.
    `largest(path)`: bytes that the body of a request may have.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str] | None,
        origins: Collection[str],
        settings: Mapping[str, str],
        largest: Callable[[str], float],
    ) -> None:
        self.app, self.hosts, self.origins, self.settings, self.largest = app, hosts, set(origins), settings, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, largest = Headers(scope=scope), self.largest(scope["path"])
        try:
            self._check(headers, largest)
        except ApiError as error:
            return await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, send)
        with contextlib.suppress(ClientTooSlow):  # an answer without its end closes the connection
            await self.app(scope, limited(receive, largest), in_time(send))

    def _check(self, headers: Headers, largest: float) -> None:
        """Raises ApiError for a head or body that is too large, a foreign `Host`, and pages of a foreign `Origin`."""
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEAD:
            reason = Message("the headers of the request are larger than {bytes} bytes", bytes=MAX_HEAD)
            raise ApiError(431, reason, code="request_too_large")
        length = headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > largest):
            raise too_large(largest)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        name = host_name(f"//{host}")
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(403, self._foreign(name or host, "Host"), code="host_not_allowed")
        known = self.origins | {f"http://{host}", f"https://{host}"}
        if origin is not None and not known & {"*", origin, host_name(origin)}:
            raise ApiError(403, self._foreign(origin, "Origin"), code="origin_not_allowed")

    def _foreign(self, given: str, header: str) -> Message:
        text = "{header}: {given} is not allowed; to allow it, start the server with {setting}"
        return Message(text, header=header, given=given[:100], setting=self.settings[header])


def too_large(largest: float) -> ApiError:
    reason = Message("the request is larger than {bytes} bytes; send less", bytes=largest)
    return ApiError(413, reason, code="request_too_large", headers=CLOSE)


def limited(receive: Receive, largest: float) -> Receive:
    """`receive`, which raises ApiError for a body of more than `largest` bytes, and for a part that does not come."""
    size, ended = 0, False

    async def receive_limited() -> AsgiMessage:
        nonlocal size, ended
        if ended:  # it waits for the client to go away
            return await receive()
        try:
            async with asyncio.timeout(PART_SECONDS):
                message = await receive()
        except TimeoutError:
            slow = Message("nothing of the request came for {seconds} seconds; send it faster", seconds=PART_SECONDS)
            raise ApiError(408, slow, code="request_timeout", headers=CLOSE) from None
        size += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if size > largest:
            raise too_large(largest)
        return message

    return receive_limited


def in_time(send: Send) -> Send:
    """`send`, which raises ClientTooSlow where the client takes nothing."""

    async def send_in_time(message: AsgiMessage) -> None:
        try:
            async with asyncio.timeout(PART_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientTooSlow from None

    return send_in_time


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
