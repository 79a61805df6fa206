"""The web application: the board's pages or the chat page alone, each in every language, and how it is served.

A page of the board writes a recipe, starts a command as a process of its own and reads the run folder; nothing is
trained here, and nothing that matters is kept here.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from typing import Any

import fastapi
import uvicorn
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from common import LANGUAGES, Message
from inference.api.guard import TimedProtocol
from runs import report
from runs.target import Target
from runs.texts import Translator
from web import widgets
from web.security import NOT_FRAMED, language_of, protect
from web.theme import gradio_theme, static

LOCALES = {"en": "en", "zh": "zh-CN"}
MAX_UPLOAD = "4gb"  # of a data file; a larger one is named by its path
# Pages whose state is kept, of each language. Gradio keeps it also of pages that are closed, about 2 MB each; the one
# that was used longest ago goes first, and an open page is used every two seconds.
MAX_SESSIONS = 50


def build(source: Target | None, password: str | None, host: str, names: Collection[str] = ()) -> Any:
    """The application: every page once in each language, behind the password where there is one.

    `source`: only the chat page, for this model. `names`: see `security.protect`.
    """
    import gradio as gr

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/", lambda request: RedirectResponse(f"{language_of(request)}/"))
    if source is None:
        app.add_route("/files/{path:path}", widgets.serve_file)
    css = static("page.css") + static("chat.css")
    css += report.css() + static("board.css") if source is None else ""
    for language in LANGUAGES:
        blocks = pages(Translator(language), source)
        blocks.state_session_capacity = MAX_SESSIONS
        gr.mount_gradio_app(
            app,
            blocks,
            f"/{language}",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            max_file_size=MAX_UPLOAD,
            ssr_mode=False,
            theme=gradio_theme(),
            css=css,
        )
        app.routes[-1].app.add_exception_handler(KeyError, no_such_function)
    app.add_middleware(PageScript)
    protect(app, password, host, names)
    return app


def no_such_function(*_: Any) -> Response:
    """Gradio's own answer to the number of a function that a page does not have would be status 500."""
    return PlainTextResponse("this page has no such function\n", 404)


def pages(t: Translator, source: Target | None) -> Any:
    """The gr.Blocks of the board, or of the chat with `source` alone."""
    import gradio as gr

    from web.pages import chat

    title = t("Chat with {name}", name=source.name) if source else "onecard"
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        widgets.header(t, title, "" if source else t("Fine-tune a language model on one card"))
        if source:
            chat.ChatPage(t, source).connect(blocks)
        else:
            place_tabs(t, blocks)
            # see static/page.js
            blocks.load(js="() => document.getElementById(`tab-${location.hash.slice(1)}-button`)?.click()")
        blocks.unload(chat.stop)
    return blocks


def place_tabs(t: Translator, blocks: Any) -> None:
    """The pages of the board, each in its tab."""
    import gradio as gr

    from web.pages.chat import ChatPage
    from web.pages.data import DataPage
    from web.pages.evaluate import EvaluatePage
    from web.pages.export import ExportPage
    from web.pages.train import TrainPage

    options: dict[str, Any] = {}  # the name of a setting → the component that holds it, on whatever page it stands
    tabs = {
        "data": (t("Model and data"), lambda: DataPage(t, options)),
        "train": (t("Train"), lambda: TrainPage(t, options)),
        "evaluate": (t("Evaluate"), lambda: EvaluatePage(t)),
        "chat": (t("Chat"), lambda: ChatPage(t)),
        "export": (t("Export"), lambda: ExportPage(t)),
    }
    placed = []
    with gr.Tabs():
        for name, (title, make) in tabs.items():
            with gr.Tab(title, id=name, elem_id=f"tab-{name}", elem_classes="board" if name != "chat" else None) as tab:
                placed.append((make(), tab))
        for page, tab in placed:  # once every option has its field
            page.connect(blocks, tab)


class PageScript(BaseHTTPMiddleware):
    """Puts static/page.js at the head of the pages; Gradio itself would run it only after its own scripts."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].strip("/") not in LANGUAGES:
            return await self.app(scope, receive, send)
        # the page must come as it is, and not compressed
        headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await super().__call__({**scope, "headers": headers}, receive, send)

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        language = request.url.path.strip("/")
        script = static("page.js").replace("LOCALE", LOCALES[language]).replace("LANGUAGE", language)
        answer = await call_next(request)
        page = b"".join([part async for part in answer.body_iterator])
        del answer.headers["content-length"]
        page = page.replace(b"<head>", f"<head><script>{script}</script>".encode(), 1)
        return Response(page, answer.status_code, {**answer.headers, **NOT_FRAMED})


def serve(app: Any, listener: socket.socket) -> None:
    """Prints the address and answers until Ctrl-C."""
    host, port = listener.getsockname()[:2]
    print(Message("open {url}  (Ctrl-C ends)", url=f"http://{f'[{host}]' if ':' in host else host}:{port}"), flush=True)
    config = uvicorn.Config(app, http=TimedProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])
