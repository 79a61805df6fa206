"""Who may use the board: the password, and the Guard that it shares with the API; `protect` puts both around it."""

from __future__ import annotations

import asyncio
import hmac
import html
import math
import secrets
from collections.abc import Collection
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from common import LANGUAGES
from inference.api.guard import Guard
from runs.network import LOOPBACK
from runs.texts import Translator
from web.theme import static

SESSION = "onecard-session"  # the cookie of a visitor who has sent the password
WAIT_SECONDS = 1.0  # after a wrong password, for each address
MAX_LOGIN_BYTES = 4096
MAX_BODY = 16 << 20  # bytes of a request, uploads aside: the values of a page with a long conversation
NOT_FRAMED = {"X-Frame-Options": "DENY"}  # no other site shows the page within its own
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
    settings = dict.fromkeys(("Host", "Origin"), "--allow-host")
    # Gradio itself allows every origin where it does not listen on loopback, and every local port where it does.
    app.add_middleware(Guard, hosts=hosts, origins=names, settings=settings, largest=largest_body)


def largest_body(path: str) -> float:
    """The bytes of a request to `path`; uploads have a limit of Gradio's."""
    if path.endswith("/gradio_api/upload"):
        return math.inf
    return MAX_LOGIN_BYTES if path == "/login" else MAX_BODY


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
            return HTMLResponse(login_page(language), headers=NOT_FRAMED)
        given = str((await request.form()).get("password", ""))
        async with self.turn(request.client.host if request.client else ""):
            if not hmac.compare_digest(given.encode(), self.password.encode()):
                await asyncio.sleep(WAIT_SECONDS)  # also of requests sent at once, one a second is answered
                return HTMLResponse(login_page(language, wrong=True), 403, NOT_FRAMED)
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
