"""/v1/chat/completions and /v1/completions: how a request is read, and its replies become JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from common import UserError
from inference import grammar
from inference.api.errors import ApiError, refuse
from inference.api.generation import Generator, Job
from inference.api.messages import Tools, read_messages, read_tools
from inference.api.replies import TextPosition, chat_deltas, chat_message, completion_logprobs, token_logprobs
from inference.api.schema import (
    ChatRequest,
    CompletionRequest,
    read_prompts,
    read_schema,
    sampling_settings,
)
from inference.api.schema import (
    Request as ClientRequest,
)
from inference.request import Request, TokenLogprob
from inference.tools import Style, ToolUse


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

    form: type[ClientRequest]
    id_prefix: str

    def __init__(self, generator: Generator, model_name: str) -> None:
        self.generator, self.engine, self.model_name = generator, generator.engine, model_name

    def add_replies(self, job: Job) -> None:
        """Reads the request and adds its replies. Raises ApiError, UserError."""
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

    style: Style | None  # how the model's template writes calls; None: it has no tools

    def __init__(self, generator: Generator, model_name: str) -> None:
        super().__init__(generator, model_name)
        self.style = grammar.style_of(self.engine)

    def add_chat_replies(self, job: Job, messages: list[dict[str, Any]], tools: Tools, schema: Any, field: str) -> None:
        """`n` replies to one prompt; `schema` holds the reply to JSON, and came in `field` of the request."""
        settings = sampling_settings(job.request, self.engine)
        settings = dataclasses.replace(settings, grammar=self._grammar(tools, schema, field))
        use = ToolUse(self.style, tuple(tools.names), tools.single) if tools.functions else None
        request = self.engine.request(messages, settings, tools.for_template() or None, use)
        for _ in range(job.request.n):
            self.generator.add(job, request)

    def _grammar(self, tools: Tools, schema: Any, field: str) -> str | None:
        """What the reply is held to; None: nothing."""
        try:
            if tools.functions and (tools.required or tools.strict or schema is not None):
                found = grammar.call_grammar(
                    self.style,
                    tools.functions,
                    self.engine,
                    required=tools.required,
                    single=tools.single,
                    otherwise=schema,
                )
            elif schema is not None:
                found = grammar.json_grammar(schema)
            else:
                return None
            grammar.check_grammar(self.engine, found)
        except UserError as error:
            raise refuse("tools" if tools.functions else field, error.message, "invalid_schema") from None
        return found


class ChatEndpoint(ChatPrompts):
    """POST /v1/chat/completions."""

    form, id_prefix = ChatRequest, "chatcmpl-"

    def add_replies(self, job: Job) -> None:
        has_tools = self.style is not None
        messages = read_messages(job.request.messages, has_tools)
        tools = read_tools(job.request, has_tools)
        self.add_chat_replies(job, messages, tools, read_schema(job.request.response_format), "response_format")

    def body(self, job: Job) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": chat_message(reply),
                "finish_reason": reply.finish_reason,
                "logprobs": self._logprobs(job, reply.logprobs),
            }
            for index, reply in enumerate(job.replies)
        ]
        return {**self._head(job, "chat.completion"), "choices": choices, "usage": usage(job)}

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        head = self._head(job, "chat.completion.chunk")
        empty = {"usage": None} if job.request.counts_usage else {}

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            return sse({**head, "choices": [choice], **empty})

        for index in range(len(job.replies)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, event in self.generator.growth(job):
            logprobs = self._logprobs(job, event.logprobs) if event.logprobs else None
            for delta in chat_deltas(event.parts) or [{}] * bool(logprobs):
                yield chunk(index, delta, logprobs=logprobs)
                logprobs = None
            if event.end:
                yield chunk(index, {}, job.replies[index].finish_reason)
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

    def add_replies(self, job: Job) -> None:
        asked = job.request
        settings = sampling_settings(asked, self.engine)
        for number, ids in enumerate(read_prompts(asked.prompt, self.engine)):
            echo = self._text(asked.prompt, number, ids) if asked.echo else ""
            for _ in range(asked.n):
                self.generator.add(job, Request(ids, settings), echo)

    def _text(self, prompt: Any, number: int, ids: list[int]) -> str:
        """The text of a prompt, which may have come as ids."""
        one = prompt if isinstance(prompt, str) else prompt[number]
        return one if isinstance(one, str) else self.engine.text_of(ids)

    def body(self, job: Job) -> dict[str, Any]:
        choices = [
            self._choice(job, index, echo + reply.text, reply.finish_reason, reply.logprobs, TextPosition(len(echo)))
            for index, (reply, echo) in enumerate(zip(job.replies, job.echoes, strict=True))
        ]
        return {**self._head(job), "choices": choices, "usage": usage(job)}

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        head = self._head(job)
        empty = {"usage": None} if job.request.counts_usage else {}
        positions = [TextPosition(len(echo)) for echo in job.echoes]

        def chunk(index: int, text: str, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
            one = self._choice(job, index, text, reason, logprobs, positions[index])
            return sse({**head, "choices": [one if logprobs else {**one, "logprobs": None}], **empty})

        for index, echo in enumerate(job.echoes):
            if echo:
                yield chunk(index, echo)
        async for index, event in self.generator.growth(job):
            if event.text or event.logprobs:
                yield chunk(index, event.text, None, event.logprobs)
            if event.end:
                yield chunk(index, "", job.replies[index].finish_reason)
        for event in last_chunks(job, head):
            yield event

    def _head(self, job: Job) -> dict[str, Any]:
        return {"id": job.id, "object": "text_completion", "created": job.created, "model": self.model_name}

    def _choice(
        self,
        job: Job,
        index: int,
        text: str,
        reason: str | None,
        logprobs: Sequence[TokenLogprob],
        position: TextPosition,
    ) -> dict[str, Any]:
        known = None
        if job.request.kept_logprobs is not None:
            known = completion_logprobs(logprobs, self.engine, position)
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": known}
