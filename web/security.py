"""Who may use the board: the password, the names under which it answers, and no other site's scripts.

Everything here is ASGI middleware or a route; `protect` puts it around the application.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import math
import secrets
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send

from common import LANGUAGES
from runs.network import LOOPBACK, host_name
from runs.texts import Translator
from web.theme import static

SESSION = "onecard-session"  # the cookie of a visitor who has sent the password
WAIT_SECONDS = 1.0  # after a wrong password, for each address
MAX_LOGIN_BYTES = 4096
MAX_BODY = 16 << 20  # bytes of a request, uploads aside: the values of a page with a long conversation
PART_SECONDS = 60  # to send the next part of a request
MAX_ADDRESSES = 1000  # whose turns are remembered


def language_of(request: Request) -> str:
    """The language chosen before, else the first of the browser's that there is."""
    chosen = request.cookies.get("language")
    wanted = [part.split(";")[0].strip()[:2].lower() for part in request.headers.get("accept-language", "").split(",")]
    return next((name for name in [chosen, *wanted] if name in LANGUAGES), "en")


def protect(app: Any, password: str | None, host: str, names: Collection[str] = ()) -> None:
    """Puts a FastAPI application behind the checks; `names` are those under which it may be reached besides `host`."""
    if password:
        login = Login(password)
        app.add_route("/login", login.answer, methods=["GET", "POST"])
        app.add_middleware(SessionCheck, token=login.token)
    # With a password a foreign name that leads here has no session; without one it must not be answered.
    hosts = None if password else {*LOOPBACK, host, *names}
    app.add_middleware(BodyCheck)
    app.add_middleware(OriginCheck, hosts=hosts, names=set(names))


class BodyCheck:
    """Limits the size of what is sent, of uploads as Gradio is told, and the time that each part may take."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = math.inf if scope["path"].endswith("/gradio_api/upload") else MAX_BODY
        size, ended = 0, False

        async def receive_checked() -> Message:
            nonlocal size, ended
            if ended:  # it waits for the visitor to go away
                return await receive()
            try:
                async with asyncio.timeout(PART_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > limit:
                raise HTTPException(413, headers={"Connection": "close"})
            return message

        await self.app(scope, receive_checked, send)


class OriginCheck:
    """Refuses foreign host names (DNS rebinding) and requests that another site's page sends.

    Gradio allows every origin where it does not listen on loopback, and every local port where it does.
    """

    def __init__(self, app: Any, hosts: set[str] | None, names: set[str]) -> None:
        self.app, self.hosts, self.names = app, hosts, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self.is_known(headers.get("host", "")):
            return await PlainTextResponse("this page is not served under that name\n", 400)(scope, receive, send)
        if not self.is_own(headers.get("origin"), headers.get("host", "")):
            return await PlainTextResponse("another site may not use this page\n", 403)(scope, receive, send)

        async def send_framed(message: Any) -> None:
            if message["type"] == "http.response.start":  # no other site shows the page within its own
                message = {**message, "headers": [*message["headers"], (b"x-frame-options", b"DENY")]}
            await send(message)

        await self.app(scope, receive, send_framed)

    def is_known(self, host: str) -> bool:
        return self.hosts is None or host_name(f"//{host}") in self.hosts

    def is_own(self, origin: str | None, host: str) -> bool:
        """Whether a request comes from this page itself: browsers send an origin wherever a script could do harm."""
        if origin is None:
            return True
        return urlsplit(origin).netloc.lower() == host.lower() or host_name(origin) in self.names


class SessionCheck:
    """Lets in only who has sent the password; the browser then keeps a cookie that is good until this process ends."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/login":
            return await self.app(scope, receive, send)
        visitor = HTTPConnection(scope)
        if hmac.compare_digest(visitor.cookies.get(SESSION, "").encode(), self.token.encode()):
            return await self.app(scope, receive, send)
        if "text/html" in visitor.headers.get("accept", ""):
            return await RedirectResponse("/login", status_code=303)(scope, receive, send)
        text = "the password is needed: open the page in a browser\n"
        return await PlainTextResponse(text, 401)(scope, receive, send)


class Login:
    """The page that asks for the password, and what it answers."""

    def __init__(self, password: str) -> None:
        self.password, self.token = password, secrets.token_urlsafe(32)
        self.turns: dict[str, asyncio.Lock] = {}  # by the visitor's address

    async def answer(self, request: Request) -> Response:
        language = language_of(request)
        if request.method != "POST":
            return HTMLResponse(login_page(language))
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_LOGIN_BYTES:
            return PlainTextResponse("too long\n", 413)
        given = str((await request.form()).get("password", ""))
        async with self.turn(request.client.host if request.client else ""):
            if not hmac.compare_digest(given.encode(), self.password.encode()):
                await asyncio.sleep(WAIT_SECONDS)  # also of requests sent at once, one a second is answered
                return HTMLResponse(login_page(language, wrong=True), status_code=403)
        response = RedirectResponse("./", status_code=303)
        response.set_cookie(SESSION, self.token, httponly=True, samesite="strict")
        return response

    def turn(self, address: str) -> asyncio.Lock:
        """Held while a password from an address is checked; guessing from one does not keep others out."""
        if len(self.turns) > MAX_ADDRESSES:
            self.turns = {other: lock for other, lock in self.turns.items() if lock.locked()}
        return self.turns.setdefault(address, asyncio.Lock())


def login_page(language: str, wrong: bool = False) -> str:
    t = Translator(language)
    fault = f'<p role="alert">{html.escape(t("The password is wrong."))}</p>' if wrong else ""
    return static("login.html").format(language=language, label=t("Password"), button=t("Enter"), fault=fault)
