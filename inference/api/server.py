"""The server that speaks OpenAI's API: routes, and how a request is answered. Whatever goes wrong has OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common import Message
from inference.api.chat import ChatEndpoint, CompletionEndpoint, Endpoint
from inference.api.errors import ApiError
from inference.api.generation import Exchange, Generator
from inference.api.guard import MAX_HEAD, ClientTooSlow, Guard, TimedProtocol, check_key
from inference.api.options import ServerOptions
from inference.api.responses import ResponsesEndpoint
from inference.api.schema import read
from inference.engine import Engine
from inference.reply import Reply
from inference.scheduler import Scheduler
from runs.network import LOOPBACK

Handler = Callable[[Request], Awaitable[Response]]
MAX_CONNECTIONS = 512
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the histograms' buckets
EXPOSED_HEADERS = ("X-Request-Id", "X-Dropped-Messages", "Retry-After")  # to the scripts of other origins


def serve(engine: Engine, options: ServerOptions, listener: socket.socket) -> None:
    """Answers until Ctrl-C."""
    server = ApiServer(engine, options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{listener.getsockname()[1]}/v1"
    facts = {"model": server.model_name, "url": url, "slots": options.slots}
    log(str(Message("{model} answers at {url} (up to {slots} requests at once); Ctrl-C ends", **facts)))
    config = uvicorn.Config(
        server.application(),
        http=TimedProtocol,
        root_path=options.root_path,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=MAX_CONNECTIONS,
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ServerMetrics:
    """What /metrics shows: counters of requests, tokens and times, and what the scheduler does now."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("onecard_requests", "Answered requests", ["path", "status"], registry=registry)
        self.prompt = Counter("onecard_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("onecard_cached_tokens", "Tokens of prompts found in the cache", registry=registry)
        self.reply = Counter("onecard_reply_tokens", "Tokens of replies", registry=registry)
        self.cancelled = Counter("onecard_cancelled_replies", "Replies whose client went away", registry=registry)
        self.first = Histogram("onecard_first_token_seconds", "To the first token", registry=registry, buckets=SECONDS)
        self.seconds = Histogram("onecard_reply_seconds", "To the end of a reply", registry=registry, buckets=SECONDS)
        active = Gauge("onecard_active_replies", "Replies computed now", registry=registry)
        active.set_function(lambda: len(scheduler.active))
        waiting = Gauge("onecard_waiting_replies", "Replies that wait for a slot", registry=registry)
        waiting.set_function(lambda: len(scheduler.queue))

    def count_request(self, path: str, status: int) -> None:
        """`path` is that of a route, so that the number of series stays bounded."""
        self.requests.labels(path, status).inc()

    def count_reply(self, reply: Reply) -> None:
        self.prompt.inc(reply.prompt_tokens)
        self.cached.inc(reply.cached_tokens)
        self.reply.inc(reply.completion_tokens)
        self.cancelled.inc(reply.finish_reason == "cancelled")
        if reply.completion_tokens:
            self.first.observe(reply.first_token_seconds)
            self.seconds.observe(reply.seconds)


class ApiServer:
    """One model behind OpenAI's routes."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.options = options
        self.model_name = options.model_name or Path(engine.name).name
        self.created = int(time.time())
        self.generator = Generator(engine, options.slots, log)
        self.metrics = ServerMetrics(self.generator.scheduler)
        self.max_body = max(1 << 20, 64 * engine.context)  # bytes: more than any prompt that fits the context

    def application(self) -> Guard:
        """The routes behind the Guard."""
        endpoints = {
            "/v1/chat/completions": ChatEndpoint,
            "/v1/completions": CompletionEndpoint,
            "/v1/responses": ResponsesEndpoint,
        }
        routes = [Route("/health", self._health)]
        for path, endpoint in endpoints.items():
            answer = functools.partial(self._answer, endpoint=endpoint(self.generator, self.model_name))
            routes.append(Route(path, self._with_key(answer), methods=["POST"]))
        small = {"/v1/models": self._models, "/v1/models/{name:path}": self._model, "/metrics": self._metrics}
        small = {"/v1/models/": self._models, **small}
        routes += [Route(path, self._with_key(handler)) for path, handler in small.items()]
        handlers = {HTTPException: self._on_error, Exception: self._on_failure}
        options = self.options
        cors = CORSMiddleware(
            Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan),
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST", "OPTIONS"),
            allow_headers=("*",),
            allow_private_network=True,  # a public page may ask a private address
            expose_headers=EXPOSED_HEADERS,
        )
        any_host = options.key or "*" in options.allowed_hosts  # who has no key learns nothing, whatever the name
        return Guard(
            cors,
            hosts=None if any_host else {*LOOPBACK, options.host, *options.allowed_hosts},
            origins=options.cors_origins,
            settings={"Host": "API_ALLOWED_HOSTS", "Origin": "API_CORS_ORIGINS"},
            largest=lambda _: self.max_body,
        )

    def _with_key(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            check_key(request, self.options.key)
            return await handler(request)

        return checked

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.generator.loop = asyncio.get_running_loop()
        yield
        self.generator.close()

    def _log_request(self, path: str, status: int, text: str = "") -> None:
        """Counts a finished request and writes its line to the log; `path` is that of its route."""
        self.metrics.count_request(path, status)
        log(f"{time.strftime('%H:%M:%S')} {status} {path} {text}".rstrip()[:500].replace("\n", " "))

    async def _on_error(self, request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            self._log_request(request.scope["route"].path, error.status_code, str(error.message))
        else:  # no such route, or another method
            text = "no {method} {path} here; there are /v1/chat/completions, /v1/responses, /v1/completions, /v1/models"
            message = Message(text, method=request.method, path=request.url.path[:200])
            error = ApiError(error.status_code, message, code="unknown_url", headers=error.headers)
        return JSONResponse(error.body, error.status_code, error.headers)

    async def _on_failure(self, request: Request, error: Exception) -> Response:
        """The client learns that the server failed; what happened stands in the log only."""
        if isinstance(error, ClientTooSlow):
            raise error
        self._log_request(request.scope["route"].path, 500, repr(error))
        return JSONResponse(ApiError(500, Message("the server failed at this request; its log says why")).body, 500)

    # -- small routes

    async def _health(self, _: Request) -> Response:
        alive = self.generator.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "onecard"}

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            known = Message("there is no model '{name}' here, only '{model}'", name=name[:200], model=self.model_name)
            raise ApiError(404, known, param="model", code="model_not_found")

    # -- replies

    async def _answer(self, http: Request, endpoint: Endpoint) -> Response:
        """The response to a request: its replies as one JSON object, or streamed."""
        try:
            raw = await http.body()
        except ClientDisconnect:
            raise ApiError(400, Message("the client closed the connection")) from None
        body = read(raw, endpoint.form)
        self._check_model(body.model)
        path, exchange = http.scope["route"].path, Exchange(body, endpoint.id_prefix + uuid.uuid4().hex)
        await self.generator.start(exchange, endpoint.requests)
        headers = {"X-Request-Id": exchange.id}
        if exchange.dropped_messages:
            headers["X-Dropped-Messages"] = str(exchange.dropped_messages)
        watcher = asyncio.create_task(_cancel_when_gone(http, exchange))
        if body.stream:
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = self._stream(path, endpoint, exchange, watcher)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        try:
            async for _ in self.generator.growth(exchange):
                pass
        except ApiError as error:
            error.headers |= headers
            raise
        finally:
            self._finish(path, exchange, watcher)
        return JSONResponse(endpoint.answer(exchange), headers=headers)

    async def _stream(
        self, path: str, endpoint: Endpoint, exchange: Exchange, watcher: asyncio.Task[None]
    ) -> AsyncIterator[bytes]:
        try:
            async for event in endpoint.events(exchange):
                yield event
        except ApiError as error:
            yield endpoint.error_event(error)
        finally:
            self._finish(path, exchange, watcher)

    def _finish(self, path: str, exchange: Exchange, watcher: asyncio.Task[None]) -> None:
        """Frees the places of an exchange, and logs it."""
        watcher.cancel()
        unfinished = exchange.unfinished
        exchange.cancel()
        for reply in exchange.replies:
            self.metrics.count_reply(reply)
        self._log_request(path, 499 if unfinished else 200, str(exchange.summary()))


async def _cancel_when_gone(http: Request, exchange: Exchange) -> None:
    """Ends the replies of an exchange when its client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    exchange.cancel()
