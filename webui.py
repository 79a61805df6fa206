"""The whole flow in a browser: choose data, train, watch, evaluate, export, chat.

python webui.py                   the board
python webui.py --chat X          only the chat page, for X: a run, an adapter, a merged or plain model folder,
                                  a hub name, a FILE.gguf, or the recipe of a run; settings as key=value
    --host H       where it listens; unset: 127.0.0.1, this machine only. Any other needs a password
    --port P       unset: 7860; 0: any free one
    --password     asks for the password that the page will ask for; or set WEBUI_PASSWORD

The language (English or 中文) follows the browser and is switched on the page.
"""

from __future__ import annotations

import argparse
import getpass
import hmac
import html
import ipaddress
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import common
from common import UserError
from runs import network
from runs.target import Source, find
from web import theme

SESSION = "onecard-session"  # the cookie of a visitor who has sent the password

WORDS = {
    "onecard": "onecard",
    "Password": "密码",
    "Enter": "进入",
    "That is not the password.": "密码不对。",
    "Fine-tune a language model on one card": "一张显卡微调语言模型",
    "Chat with {name}": "与 {name} 对话",
}


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__, ("model", "chat")))
        return
    args = parse(argv)
    network.check_environment()  # Gradio asks its own server through httpx
    password = read_password(args)
    source = find(args.chat or None, args.settings) if args.chat is not None else None
    listener = listen(args.host, args.port)
    for note in source.notes if source else ():
        print(f"note: {note}", file=sys.stderr)
    serve(build(source, password, args.host), listener)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, and the settings as `key=value`. Host and port may also stand where Gradio's users put them."""
    parser = argparse.ArgumentParser(prog="webui.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--chat", nargs="?", const="", metavar="X")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", default=os.environ.get("GRADIO_SERVER_PORT", "7860"))
    parser.add_argument("--password", action="store_true")
    args, args.settings = parser.parse_known_args(argv)
    if args.chat and "=" in args.chat and not Path(args.chat).exists():
        args.chat, args.settings = "", [args.chat, *args.settings]
    if not args.port.isdecimal() or int(args.port) > 65535:
        raise UserError(f"--port {args.port} is not a port; give a number from 0 to 65535")
    if args.chat is None and args.settings:
        raise UserError(f"{args.settings[0]} is not for the board, where settings stand on the page; leave it out")
    return args


def read_password(args: argparse.Namespace) -> str | None:
    """The password that visitors need, or None where only this machine can visit; raises UserError if it is missing."""
    password = os.environ.get("WEBUI_PASSWORD") or None
    if args.password:
        password = getpass.getpass("password for the page: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
        if not password:
            raise UserError("the password is empty; type one")
    if password is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} lets others reach this machine's models and files; give a password (--password, or "
            "WEBUI_PASSWORD in the environment), or leave --host out and forward the port: "
            f"ssh -L {args.port}:127.0.0.1:{args.port} THIS_MACHINE"
        )
    return password


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: str) -> socket.socket:
    """A socket on the address, taken before anything slow starts; raises UserError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of this machine; leave it out, or give 0.0.0.0") from None
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be had ({error.strerror}); choose another: --port 7861") from None
    return listener


def build(source: Source | None, password: str | None, host: str) -> Any:
    """The web application: each page once in each language, behind the password where there is one."""
    import fastapi
    import gradio as gr
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import RedirectResponse

    from web.pages import chat as chat_page

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/", lambda request: RedirectResponse(f"{language_of(request)}/"))
    css = theme.CSS + chat_page.CSS
    if source is None:
        from web import board

        css += board.CSS
        board.add_routes(app)
    for language in theme.LANGUAGES:
        gr.mount_gradio_app(
            app,
            chat_page(language, source) if source else board(language),
            f"/{language}",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            ssr_mode=False,
            theme=theme.theme(),
            css=css,
        )
    app.add_middleware(Headed)
    if password:
        guard(app, password)
    else:  # without a password nobody may reach the page by a foreign name that leads to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    return app


def language_of(request: Any) -> str:
    """The language chosen before, else the first of the browser's that there is."""
    chosen = request.cookies.get("language")
    wanted = [part.split(";")[0].strip()[:2].lower() for part in request.headers.get("accept-language", "").split(",")]
    return next((name for name in [chosen, *wanted] if name in theme.LANGUAGES), "en")


def board(language: str) -> Any:
    """Every page, each in its tab."""
    import gradio as gr

    from web import board
    from web.pages import chat as chat_page

    t = theme.translator(language, WORDS)
    with gr.Blocks(title=t("onecard"), analytics_enabled=False) as blocks:
        theme.header(language, t("onecard"), t("Fine-tune a language model on one card"))
        with gr.Tabs():
            board.pages(language)
        blocks.unload(chat_page.stop)
    return blocks


def chat_page(language: str, source: Source) -> Any:
    """Only the chat, with one target."""
    import gradio as gr

    from web.pages import chat as chat_page

    t = theme.translator(language, WORDS)
    with gr.Blocks(title=t("Chat with {name}", name=source.name), analytics_enabled=False) as blocks:
        theme.header(language, t("Chat with {name}", name=source.name))
        chat_page.page(language, source)
        blocks.unload(chat_page.stop)
    return blocks


class Headed:
    """Puts the script of theme.head into the pages; Gradio itself would run it only after its own."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        language = scope.get("path", "").strip("/")
        if scope["type"] != "http" or language not in theme.LANGUAGES:
            return await self.app(scope, receive, send)
        # the page must come as it is, and not compressed
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        opening: dict[str, Any] = {}
        body = b""

        async def add_head(message: dict[str, Any]) -> None:
            nonlocal opening, body
            if message["type"] == "http.response.start":
                opening = message
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                whole = body.replace(b"<head>", b"<head>" + theme.head(language).encode(), 1)
                kept = [pair for pair in opening["headers"] if pair[0] != b"content-length"]
                await send({**opening, "headers": [*kept, (b"content-length", str(len(whole)).encode())]})
                await send({"type": "http.response.body", "body": whole})

        await self.app(scope, receive, add_head)


class Guard:
    """Lets in only who has sent the password; the browser then keeps a cookie that is good until this process ends."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse

        if scope["type"] == "lifespan" or scope["path"] == "/login":
            return await self.app(scope, receive, send)
        visitor = HTTPConnection(scope)
        if hmac.compare_digest(visitor.cookies.get(SESSION, "").encode(), self.token.encode()):
            return await self.app(scope, receive, send)
        if "text/html" in visitor.headers.get("accept", ""):
            return await RedirectResponse("/login", status_code=303)(scope, receive, send)
        return await PlainTextResponse("the password is needed: open the page in a browser\n", 401)(
            scope, receive, send
        )


def guard(app: Any, password: str) -> None:
    """Puts `app` behind the password, which is asked for at /login."""
    import asyncio

    from starlette.responses import HTMLResponse, RedirectResponse

    token = secrets.token_urlsafe(32)

    async def login(request: Any) -> Any:
        if request.method != "POST":
            return HTMLResponse(login_page(language_of(request)))
        given = str((await request.form()).get("password", ""))
        if hmac.compare_digest(given.encode(), password.encode()):
            answer = RedirectResponse("./", status_code=303)
            answer.set_cookie(SESSION, token, httponly=True, samesite="strict")
            return answer
        await asyncio.sleep(1)  # guessing is slow
        return HTMLResponse(login_page(language_of(request), wrong=True), status_code=403)

    app.add_route("/login", login, methods=["GET", "POST"])
    app.add_middleware(Guard, token=token)


def login_page(language: str, wrong: bool = False) -> str:
    t = theme.translator(language, WORDS)
    fault = f'<p role="alert">{html.escape(t("That is not the password."))}</p>' if wrong else ""
    return f"""<!doctype html><html lang="{language}"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{t("onecard")}</title>
<style>:root {{ color-scheme: light dark; font: 16px system-ui, sans-serif }}
form {{ max-width: 320px; margin: 18vh auto 0; padding: 0 20px; display: grid; gap: 12px }}
h1 {{ font-size: 22px; margin: 0 }} input, button {{ font: inherit; padding: 10px 12px; border-radius: 8px }}
input {{ border: 1px solid #8a949e }} button {{ border: 0; background: #0f766e; color: #fff; cursor: pointer }}
p {{ color: #c0392b; margin: 0 }}</style>
<form method="post" action="login"><h1>{t("onecard")}</h1>
<label for="password">{t("Password")}</label><input id="password" name="password" type="password" autofocus required>
{fault}<button>{t("Enter")}</button></form></html>"""


def serve(app: Any, listener: socket.socket) -> None:
    """Answers until Ctrl-C."""
    import uvicorn

    host, port = listener.getsockname()[:2]
    print(f"open http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    common.run_script(main)
