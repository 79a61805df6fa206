"""/v1/chat/completions and /v1/completions: how a request becomes rows of the batch, and its replies become JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from common import UserError
from inference import tool_calls
from inference.api.errors import ApiError, refuse
from inference.api.generation import Generator, Job
from inference.api.messages import Tools, read_messages, read_tools
from inference.api.replies import Choice, chat_deltas, chat_message, completion_logprobs, token_logprobs
from inference.api.schema import (
    ChatRequest,
    CompletionRequest,
    Request,
    read_prompts,
    read_schema,
    sampling_settings,
)
from inference.engine import TokenLogprob


def sse(content: dict[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def usage(job: Job) -> dict[str, Any]:
    """Token counts as chats and completions give them."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
    }


def last_chunks(job: Job, head: dict[str, Any]) -> Iterator[bytes]:
    """How the stream of a chat or a completion ends."""
    if job.request.counts_usage:
        yield sse({**head, "choices": [], "usage": usage(job)})
    yield b"data: [DONE]\n\n"


class Endpoint:
    """One of OpenAI's forms. `form`: what a request may say, `id_prefix`: how its ids begin."""

    form: type[Request]
    id_prefix: str

    def __init__(self, generator: Generator, model_name: str) -> None:
        self.generator, self.engine, self.model_name = generator, generator.engine, model_name

    def add_rows(self, job: Job) -> None:
        """Reads the request and adds its rows and choices. Raises ApiError, UserError."""
        raise NotImplementedError

    def body(self, job: Job) -> dict[str, Any]:
        """The answer that is not streamed, once all replies have ended."""
        raise NotImplementedError

    def events(self, job: Job) -> AsyncIterator[bytes]:
        """The answer as server-sent events, while the replies grow. Raises ApiError where one fails."""
        raise NotImplementedError

    def error_event(self, error: ApiError) -> bytes:
        return sse(error.body)


class ChatPrompts(Endpoint):
    """What chats and responses have in common: one prompt, tools and formats of the reply."""

    style: tool_calls.Style | None  # how the model's template writes calls; None: it has no tools

    def __init__(self, generator: Generator, model_name: str) -> None:
        super().__init__(generator, model_name)
        self.style = tool_calls.style_of(self.engine)

    def add_chat_rows(self, job: Job, messages: list[dict[str, Any]], tools: Tools, schema: Any, field: str) -> None:
        """`n` rows of one prompt; `schema` holds the reply to JSON, and came in `field` of the request."""
        settings = sampling_settings(job.request, self.engine)
        settings = dataclasses.replace(settings, grammar=self._grammar(tools, schema, field))
        ids, dropped = self.engine.prepare(messages, settings, tools.for_template() or None)
        visible = {}
        if tools.functions:
            marks = (self.style.opening, self.style.closing)
            visible = {self.engine.control_tokens[mark]: mark for mark in marks if mark in self.engine.control_tokens}
        for index in range(job.request.n):
            reader = tool_calls.CallReader(self.style, tools.names) if tools.functions else None
            job.choices.append(Choice(index, reader, single=tools.single))
            self.generator.add_row(job, ids, settings, dropped=dropped, visible=visible)

    def _grammar(self, tools: Tools, schema: Any, field: str) -> str | None:
        """What the reply is held to; None: nothing."""
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
            tool_calls.check_grammar(self.engine, grammar)
        except UserError as error:
            raise refuse("tools" if tools.functions else field, error.message, "invalid_schema") from None
        return grammar


class ChatEndpoint(ChatPrompts):
    """POST /v1/chat/completions."""

    form, id_prefix = ChatRequest, "chatcmpl-"

    def add_rows(self, job: Job) -> None:
        has_tools = self.style is not None
        messages = read_messages(job.request.messages, has_tools)
        tools = read_tools(job.request, has_tools)
        self.add_chat_rows(job, messages, tools, read_schema(job.request.response_format), "response_format")

    def body(self, job: Job) -> dict[str, Any]:
        choices = [
            {
                "index": choice.index,
                "message": chat_message(choice),
                "finish_reason": choice.finish_reason,
                "logprobs": self._logprobs(job, choice.logprobs),
            }
            for choice in job.choices
        ]
        return {**self._head(job, "chat.completion"), "choices": choices, "usage": usage(job)}

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        head = self._head(job, "chat.completion.chunk")
        empty = {"usage": None} if job.request.counts_usage else {}

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return sse({**head, "choices": [choice], **empty})

        for choice in job.choices:
            yield chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
        async for choice, parts, tokens in self.generator.growth(job):
            logprobs = self._logprobs(job, tokens) if tokens else None
            for delta in chat_deltas(parts) or [{}] * bool(logprobs):
                yield chunk(choice.index, delta, logprobs=logprobs)
                logprobs = None
            if choice.finish_reason:
                yield chunk(choice.index, {}, choice.finish_reason)
        for event in last_chunks(job, head):
            yield event

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        head = {"id": job.id, "object": kind, "created": job.created, "model": self.model_name}
        return {**head, "service_tier": "default"} if job.request.service_tier else head

    def _logprobs(self, job: Job, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if job.request.kept_logprobs is None:
            return None
        return {"content": token_logprobs(tokens, self.engine), "refusal": None}


class CompletionEndpoint(Endpoint):
    """POST /v1/completions: `n` replies to each prompt."""

    form, id_prefix = CompletionRequest, "cmpl-"

    def add_rows(self, job: Job) -> None:
        request = job.request
        settings = sampling_settings(request, self.engine)
        for number, ids in enumerate(read_prompts(request.prompt, self.engine)):
            for _ in range(request.n):
                echoed = self._text(request.prompt, number, ids) if request.echo else ""
                job.choices.append(Choice(len(job.choices), prefix=echoed))
                self.generator.add_row(job, ids, settings)

    def _text(self, prompt: Any, number: int, ids: list[int]) -> str:
        """The text of a prompt, which may have come as ids."""
        one = prompt if isinstance(prompt, str) else prompt[number]
        return one if isinstance(one, str) else self.engine.text_of(ids)

    def body(self, job: Job) -> dict[str, Any]:
        choices = [
            self._choice(job, choice, choice.prefix + choice.text, choice.finish_reason, choice.logprobs)
            for choice in job.choices
        ]
        return {**self._head(job), "choices": choices, "usage": usage(job)}

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        head = self._head(job)
        empty = {"usage": None} if job.request.counts_usage else {}

        def chunk(choice: Choice, text: str, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
            one = self._choice(job, choice, text, reason, logprobs)
            return sse({**head, "choices": [one if logprobs else {**one, "logprobs": None}], **empty})

        for choice in job.choices:
            if choice.prefix:
                yield chunk(choice, choice.prefix)
        async for choice, parts, logprobs in self.generator.growth(job):
            text = "".join(part for part in parts if isinstance(part, str))
            if text or logprobs:
                yield chunk(choice, text, None, logprobs)
            if choice.finish_reason:
                yield chunk(choice, "", choice.finish_reason)
        for event in last_chunks(job, head):
            yield event

    def _head(self, job: Job) -> dict[str, Any]:
        return {"id": job.id, "object": "text_completion", "created": job.created, "model": self.model_name}

    def _choice(
        self, job: Job, choice: Choice, text: str, reason: str | None, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        known = None
        if job.request.kept_logprobs is not None:
            known = completion_logprobs(logprobs, self.engine, choice)
        return {"index": choice.index, "text": text, "finish_reason": reason, "logprobs": known}
