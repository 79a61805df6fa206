"""Serves a trained model to programs that speak OpenAI's API.

python api.py                     the newest run, at http://127.0.0.1:8000/v1
python api.py saves/NAME          a run, an adapter, a merged or plain model folder, a hub name, a FILE.gguf,
                                  or the recipe of a run
python api.py FOLDER template=llama3

Environment: API_HOST (127.0.0.1; any other needs API_KEY), API_PORT (8000), API_KEY (clients send it as a bearer
token), API_MODEL_NAME (the name that requests use; unset: that of the folder), FASTAPI_ROOT_PATH (behind a proxy),
MAX_CONCURRENT (8: replies computed at once; 8 times as many may wait).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import UserError
from inference import engine
from inference.load import load
from runs.target import find, read_arguments

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from inference.openai_schema import ApiError, Choice
    from inference.scheduler import Event, Row

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WAITING = 8  # times MAX_CONCURRENT may wait


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__, ("model", "chat")))
        return
    target, settings = read_arguments(argv)
    options = Options.of(os.environ)
    source = find(target, settings)
    for note in source.notes:
        tell(f"note: {note}")
    with listening(options) as listener:
        tell(f"loading {source.name} ...")
        serve(Service(load(source), options), listener)


@dataclass(frozen=True)
class Options:
    """What the environment says, under LLaMA-Factory's names."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    model_name: str | None = None
    root_path: str = ""
    slots: int = 8

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Options:
        """Raises UserError for a value that cannot be, and for a host that others reach without a key."""
        options = cls(
            host=environment.get("API_HOST") or cls.host,
            port=_number(environment, "API_PORT", cls.port, 0, 65535),
            key=environment.get("API_KEY") or None,
            model_name=environment.get("API_MODEL_NAME") or None,
            root_path=environment.get("FASTAPI_ROOT_PATH") or "",
            slots=_number(environment, "MAX_CONCURRENT", cls.slots, 1, 256),
        )
        if options.host not in LOOPBACK and not options.key:
            raise UserError(
                f"API_HOST={options.host} lets others use the model, and there is no API_KEY; "
                "set one, or leave API_HOST out"
            )
        return options


def _number(environment: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UserError(f"{name}={text} must be a whole number from {low} to {high}; change it")
    return int(text)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening(options: Options) -> Any:
    """The socket of the server, before anything heavy is loaded. Raises UserError where it cannot be had."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the server cannot listen at {options.host}:{options.port} ({reason}); set API_HOST, API_PORT"
        ) from None
    with listener:
        yield listener


def serve(service: Service, listener: socket.socket) -> None:
    """Answers until Ctrl-C."""
    import uvicorn

    options, port = service.options, listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    tell(f"{service.name} answers at http://{host}:{port}/v1 (up to {options.slots} requests at once); Ctrl-C ends")
    config = uvicorn.Config(
        application(service),
        root_path=service.options.root_path,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


# ---------------------------------------------------------------------------------------------------------------------
# The application


def application(service: Service) -> Starlette:
    """The routes. Whatever goes wrong is answered in OpenAI's form."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    from inference.openai_schema import ApiError, ChatRequest, CompletionRequest

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        service.loop = asyncio.get_running_loop()
        yield
        service.close()

    def failure(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def refused(request: Request, error: ApiError) -> JSONResponse:
        service.count(request.scope["route"].path, error.status, error.message)
        return failure(error)

    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        reason = f"{request.method} {request.url.path}: {error.detail}"
        return failure(ApiError(error.status_code, reason, headers=error.headers))

    async def broken(request: Request, error: Exception) -> JSONResponse:
        service.count(request.scope["route"].path, 500, repr(error))
        return failure(ApiError(500, "the server failed at this request; its log says why"))

    async def chat(request: Request) -> Response:
        service.check_key(request)
        return await service.answer(request, ChatRequest, service.read_chat)

    async def complete(request: Request) -> Response:
        service.check_key(request)
        return await service.answer(request, CompletionRequest, service.read_completion)

    async def models(request: Request) -> Response:
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [service.card()]})

    async def model(request: Request) -> Response:
        service.check_key(request)
        service.check_model(request.path_params["name"])
        return JSONResponse(service.card())

    async def health(_: Request) -> Response:
        alive = service.batch.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        service.check_key(request)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {ApiError: refused, HTTPException: unknown, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=life)


class Metrics:
    """What /metrics shows."""

    def __init__(self, batch: Any) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("onecard_requests", "Answered requests", ["path", "status"], registry=registry)
        self.prompt = Counter("onecard_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("onecard_cached_tokens", "Tokens of prompts not computed again", registry=registry)
        self.reply = Counter("onecard_reply_tokens", "Tokens of replies", registry=registry)
        self.cancelled = Counter("onecard_cancelled_replies", "Replies whose client went away", registry=registry)
        long = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.first = Histogram("onecard_first_token_seconds", "To the first token", registry=registry, buckets=long)
        self.seconds = Histogram("onecard_reply_seconds", "To the end of a reply", registry=registry, buckets=long)
        active = Gauge("onecard_active_replies", "Replies computed now", registry=registry)
        active.set_function(lambda: len(batch.active))
        waiting = Gauge("onecard_waiting_replies", "Replies in line", registry=registry)
        waiting.set_function(lambda: len(batch.queue))

    def note(self, reply: engine.Reply) -> None:
        self.prompt.inc(reply.prompt_tokens)
        self.cached.inc(reply.cached_tokens)
        self.reply.inc(reply.completion_tokens)
        self.cancelled.inc(reply.finish_reason == "cancelled")
        if reply.completion_tokens:
            self.first.observe(reply.first_token_seconds)
            self.seconds.observe(reply.seconds)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


@dataclass
class Job:
    """A request on its way: its rows and choices, one for each reply, and the events that come for them."""

    request: Any
    id: str
    kind: str  # "chat.completion" or "text_completion"
    rows: list[Row]
    choices: list[Choice]
    prompts: int = 1
    prefixes: list[str] = field(default_factory=list)  # echoed, one a choice
    started: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        for row in self.rows:
            row.reply.cancel()


class Service:
    """A model, its batch, and how requests become rows of it."""

    def __init__(self, model: engine.Engine, options: Options) -> None:
        from inference.scheduler import Batch
        from inference.tool_calls import style_of

        self.engine, self.options = model, options
        self.name = options.model_name or Path(model.name).name
        self.created = int(time.time())
        self.style = style_of(model)
        self.batch = Batch(model, options.slots, WAITING * options.slots)
        self.metrics = Metrics(self.batch)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.largest = max(1 << 20, 64 * model.context)  # bytes of a request
        self._reader = ThreadPoolExecutor(1, "prompts")  # tokenizers are not made for several threads
        self.reading = 0  # requests that it has, or that wait for it

    def close(self) -> None:
        self._reader.shutdown()
        self.batch.close()

    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "onecard"}

    def check_key(self, request: Request) -> None:
        from inference.openai_schema import ApiError

        word, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if word.lower() == "bearer" else b""
        if self.options.key and not hmac.compare_digest(given, self.options.key.encode()):
            raise ApiError(
                401,
                "the API key is wrong or missing; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_model(self, name: str) -> None:
        from inference.openai_schema import ApiError

        if name != self.name:
            raise ApiError(
                404, f"there is no model {name!r} here; this server has {self.name!r}", "model", "model_not_found"
            )

    def count(self, path: str, status: int, text: str = "") -> None:
        """Notes a finished request, in /metrics and as a line on stderr; `path` is that of its route."""
        self.metrics.requests.labels(path, status).inc()
        tell(f"{time.strftime('%H:%M:%S')} {status} {path} {text}".rstrip()[:500].replace("\n", " "))

    # -- requests

    async def answer(self, http: Request, form: Any, read: Callable[[Any, Job], None]) -> Response:
        """The response to a request: its replies as one JSON object, or streamed."""
        from starlette.responses import JSONResponse, StreamingResponse

        from inference.openai_schema import ApiError, ChatRequest, read_request

        request = read_request(await self.body(http), form)
        self.check_model(request.model)
        path, chat = http.scope["route"].path, form is ChatRequest
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        job = Job(request, f"{prefix}-{uuid.uuid4().hex}", kind, [], [])
        if self.reading >= self.batch.free:  # before the work of reading it
            raise self.full()
        self.reading += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._reader, self._read, read, job)
        finally:
            self.reading -= 1
        self.submit(job)
        headers = {"X-Request-Id": job.id}
        if dropped := max(row.reply.dropped_messages for row in job.rows):
            headers["X-Dropped-Messages"] = str(dropped)  # of the oldest, which no longer fit into the context
        watch = asyncio.create_task(_cancel_when_gone(http, job))
        if request.stream:
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = self.stream(path, job, watch)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        try:
            async for _ in self.growth(job):
                pass
        except ApiError as error:
            error.headers = headers
            raise
        finally:
            self.finish(path, job, watch)
        return JSONResponse(self.whole(job), headers=headers)

    async def body(self, http: Request) -> bytes:
        """The body of a request. Raises ApiError for one that is larger than any prompt."""
        from starlette.requests import ClientDisconnect

        from inference.openai_schema import ApiError

        length, parts = http.headers.get("content-length", "0"), []
        size = int(length) if length.isdigit() else 0
        try:
            if size <= self.largest:
                size = 0
                async for part in http.stream():
                    size += len(part)
                    parts.append(part)
                    if size > self.largest:
                        break
        except ClientDisconnect:
            raise ApiError(400, "the client went away") from None
        if size > self.largest:
            raise ApiError(
                413,
                f"the request is larger than {self.largest} bytes, which no prompt of {self.engine.context} tokens is",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return b"".join(parts)

    def _read(self, read: Callable[[Any, Job], None], job: Job) -> None:
        """Makes the rows of a job, in the thread of the tokenizer."""
        from inference.openai_schema import ApiError

        try:
            read(job.request, job)
        except UserError as error:
            if error.code == "message_too_long":
                raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
            raise ApiError(400, str(error), code="invalid_value") from None

    def read_chat(self, request: Any, job: Job) -> None:
        """A conversation: `n` rows of one prompt."""
        from inference import openai_schema as forms
        from inference.tool_calls import CallReader

        model = self.engine
        messages = forms.read_messages(request.messages, self.style is not None)
        tools = forms.read_tools(request, self.style is not None)
        schema = forms.read_schema(request.response_format)
        grammar = self.grammar(tools, schema)
        settings = dataclasses.replace(forms.settings_of(request, model), grammar=grammar)
        offered = [forms.plain_tool(tool) for tool in tools.functions]
        ids, dropped = model.prepare(messages, settings, offered or None)
        shown = {}
        if tools.functions:
            marks = (self.style.opening, self.style.closing)
            shown = {model.control_tokens[mark]: mark for mark in marks if mark in model.control_tokens}
        for index in range(request.n):
            reader = CallReader(self.style, tools.names) if tools.functions else None
            job.choices.append(forms.Choice(index, reader, single=tools.single))
            self.add_row(job, ids, settings, dropped=dropped, visible=shown)

    def grammar(self, tools: Any, schema: Any) -> str | None:
        """What the reply is held to; None: nothing."""
        from inference import tool_calls
        from inference.openai_schema import refuse

        try:
            if tools.functions and (tools.required or tools.strict or schema is not None):
                grammar = tool_calls.call_grammar(
                    self.style,
                    tools.functions,
                    self.engine,
                    required=tools.required,
                    single=tools.single,
                    otherwise=schema,
                )
            elif schema is not None:
                grammar = tool_calls.json_grammar(schema)
            else:
                return None
            tool_calls.check(self.engine, grammar)
        except UserError as error:
            raise refuse("tools" if tools.functions else "response_format", str(error), "invalid_schema") from None
        return grammar

    def read_completion(self, request: Any, job: Job) -> None:
        """Prompts without a conversation: `n` rows of each."""
        from inference import openai_schema as forms

        if request.best_of not in (None, request.n):
            raise forms.refuse("best_of", "no replies are made to be thrown away here; leave it out, or give it n")
        if request.echo and request.logprobs is not None:
            raise forms.refuse("echo", "the prompt's log-probabilities are not computed; take echo or logprobs")
        settings = forms.settings_of(request, self.engine)
        prompts = forms.read_prompts(request.prompt, self.engine)
        job.prompts = len(prompts)
        for number, ids in enumerate(prompts):
            text = request.prompt if isinstance(request.prompt, str) else None
            if request.echo and text is None:
                one = request.prompt[number]
                text = one if isinstance(one, str) else self.engine.text_of(ids)
            for _ in range(request.n):
                job.choices.append(forms.Choice(len(job.choices)))
                job.prefixes.append(text if request.echo else "")
                self.add_row(job, ids, settings)

    def add_row(self, job: Job, ids: list[int], settings: engine.Settings, **more: Any) -> None:
        """One more reply of a job; each of several draws with a seed of its own."""
        from inference.scheduler import Row

        index, loop = len(job.rows), self.loop
        if settings.seed is not None:
            settings = dataclasses.replace(settings, seed=(settings.seed + index % job.request.n) % (1 << 64))

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(job.events.put_nowait, (index, event))

        job.rows.append(Row(self.engine, ids, settings, sink, **more))

    def submit(self, job: Job) -> None:
        """Puts the rows in line. Raises ApiError where the line is full."""
        from inference.openai_schema import ApiError, refuse
        from inference.scheduler import BatchClosed, QueueFull

        places = self.batch.slots + self.batch.waiting
        if len(job.rows) > places:
            raise refuse("n", f"{len(job.rows)} replies are asked for, and this server has places for {places}")
        try:
            self.batch.submit(job.rows)
        except QueueFull:
            raise self.full() from None
        except BatchClosed:
            raise ApiError(503, "the model answers no more; start the server again") from None

    def full(self) -> ApiError:
        from inference.openai_schema import ApiError

        return ApiError(
            429,
            f"{len(self.batch.queue)} replies are waiting already; try again",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(self.batch.retry_after_seconds)},
        )

    # -- replies

    async def growth(self, job: Job) -> AsyncIterator[tuple[int, list[dict[str, Any]], Any, str | None]]:
        """What the replies of a job grow by, until all have ended: index, deltas, log-probabilities, finish reason.

        Raises ApiError where a reply failed.
        """
        from inference.openai_schema import ApiError

        going = len(job.rows)
        while going:
            index, event = await job.events.get()
            going -= event.end
            row, choice = job.rows[index], job.choices[index]
            if isinstance(event.error, UserError):
                raise ApiError(400, str(event.error), code="invalid_value")
            if event.error:
                tell(f"{job.id}: {event.error!r}")
                raise ApiError(500, "the model failed at this request; the server's log says why")
            if choice.finish_reason is None:
                deltas = choice.take(event, row.reply.finish_reason)
                yield index, deltas, event.logprobs, choice.finish_reason
                if choice.satisfied:
                    row.reply.cancel()

    def finish(self, path: str, job: Job, watch: asyncio.Task) -> None:
        """Frees the places of a job, and notes it."""
        watch.cancel()
        unfinished = any(choice.finish_reason in (None, "cancelled") for choice in job.choices)
        job.cancel()
        for row in job.rows:
            self.metrics.note(row.reply)
        prompt, reply = (
            sum(getattr(r.reply, name) for r in job.rows) for name in ("prompt_tokens", "completion_tokens")
        )
        who = job.request.user or getattr(job.request, "safety_identifier", None)
        seconds = time.perf_counter() - job.started
        text = f"{prompt} + {reply} tokens, {seconds:.2f} s" + (f", user {json.dumps(who)}" if who else "")
        self.count(
            path, 499 if unfinished else 200, text + (", the client went away or it failed" if unfinished else "")
        )

    def head(self, job: Job, kind: str) -> dict[str, Any]:
        from inference.openai_schema import head

        named = {"service_tier": "default"} if getattr(job.request, "service_tier", None) else {}
        return {**head(job.id, kind, self.name, job.created), **named}

    def usage(self, job: Job) -> dict[str, Any]:
        from inference.openai_schema import usage

        firsts = [row.reply for row in job.rows[:: job.request.n]]
        completions = sum(row.reply.completion_tokens for row in job.rows)
        return usage([r.prompt_tokens for r in firsts], [r.cached_tokens for r in firsts], completions)

    def whole(self, job: Job) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = [self.part(job, i, self.chosen(job, i), choice.logprobs) for i, choice in enumerate(job.choices)]
        return {**self.head(job, job.kind), "choices": choices, "usage": self.usage(job)}

    def chosen(self, job: Job, index: int) -> dict[str, Any]:
        choice = job.choices[index]
        if job.kind == "chat.completion":
            return {"message": choice.message(), "finish_reason": choice.finish_reason}
        return {"text": job.prefixes[index] + choice.text, "finish_reason": choice.finish_reason}

    def part(self, job: Job, index: int, body: dict[str, Any], logprobs: Any) -> dict[str, Any]:
        """An entry of `choices`, with its log-probabilities where they were asked for."""
        from inference.openai_schema import chat_logprobs, completion_logprobs

        known = None
        if job.request.kept_logprobs is not None and job.kind == "chat.completion":
            known = chat_logprobs(logprobs, self.engine)
        elif job.request.kept_logprobs is not None:
            known = completion_logprobs(logprobs, self.engine, job.choices[index], len(job.prefixes[index]))
        return {"index": index, **body, "logprobs": known}

    async def stream(self, path: str, job: Job, watch: asyncio.Task) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        from inference.openai_schema import ApiError

        try:
            async for chunk in self.chunks(job):
                yield _sent(chunk)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _sent(error.body)
        finally:
            self.finish(path, job, watch)

    async def chunks(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        chat = job.kind == "chat.completion"
        counted = job.request.stream_options is not None and job.request.stream_options.include_usage
        empty = {"usage": None} if counted else {}
        start = self.head(job, "chat.completion.chunk" if chat else job.kind)

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = (), reason: str | None = None) -> dict[str, Any]:
            body = {"delta": delta} if chat else {"text": delta.get("content", "")}
            part = self.part(job, index, {**body, "finish_reason": reason}, logprobs)
            if not logprobs:
                part["logprobs"] = None
            return {**start, "choices": [part], **empty}

        for choice in job.choices:
            if chat:
                yield chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
            elif job.prefixes[choice.index]:
                yield chunk(choice.index, {"content": job.prefixes[choice.index]})
        async for index, deltas, logprobs, reason in self.growth(job):
            for number, delta in enumerate(deltas or [{}] * bool(logprobs)):
                yield chunk(index, delta, () if number else logprobs)
            if reason:
                yield chunk(index, {}, (), reason)
        if counted:
            yield {**start, "choices": [], "usage": self.usage(job)}


def _sent(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _cancel_when_gone(http: Request, job: Job) -> None:
    """Ends the replies of a job when its client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


if __name__ == "__main__":
    common.run_script(main)
