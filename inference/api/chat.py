"""/v1/chat/completions and /v1/completions: what may be asked there, and how replies become JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from common import Message, UserError
from inference import grammar
from inference.api.errors import ApiError, refuse
from inference.api.generation import Exchange, Generator, TextPosition
from inference.api.messages import ChatMessage, ChatTool, IsTool, ToolChoice, Tools, choose_tools, read_messages
from inference.api.schema import NO_MODERATION, NO_VERBOSITY, TEXT_ONLY, Body, Effort, Format, Refused
from inference.engine import Engine
from inference.reply import Event, Reply
from inference.request import Request, TokenLogprob
from inference.tools import Call, Thought, ToolUse

LEAST_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have


class ChatBody(Body):
    """POST /v1/chat/completions."""

    prompt_field = "messages"
    limit_fields = ("max_completion_tokens", "max_tokens")
    refused: ClassVar[dict[str, Message]] = {
        "audio": TEXT_ONLY,
        "function_call": Message("it was replaced by {field}; use that", field="tool_choice"),
        "functions": Message("it was replaced by {field}; use that", field="tools"),
        "moderation": NO_MODERATION,
        "prediction": Message("predicted output is not used here; leave it out"),
        "verbosity": NO_VERBOSITY,
        "web_search_options": Message("nothing is searched here; leave it out"),
    }

    messages: list[ChatMessage] = pydantic.Field(min_length=1)
    n: int = pydantic.Field(1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    modalities: list[Literal["text"]] | None = pydantic.Field(None, min_length=1)
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort = None
    response_format: Format | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    tool_choice: ToolChoice | None = None
    tools: list[Annotated[ChatTool, IsTool]] = pydantic.Field([])

    @pydantic.model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs", Message("needs logprobs: true"))
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            reason = Message("{field} means the same; give one of them", field="max_completion_tokens")
            raise Refused("max_tokens", reason)
        for field in ("parallel_tool_calls", "tool_choice"):
            if not self.tools and getattr(self, field) not in (None, "none"):
                raise Refused(field, Message("there are no tools in this request; give tools, or leave it out"))
        return self

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort

    @property
    def kept_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """POST /v1/completions: prompts without a conversation."""

    prompt_field = "prompt"
    refused: ClassVar[dict[str, Message]] = {
        "suffix": Message("this model cannot fill in text before a suffix; leave it out")
    }

    prompt: Any = None
    n: int = pydantic.Field(1, ge=1, le=128)
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = pydantic.Field(None, ge=0, le=5)
    max_tokens: int = 16

    @pydantic.model_validator(mode="after")
    def _check_completion(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise Refused("best_of", Message("only the value of n is possible; leave it out"))
        if self.echo and self.logprobs is not None:
            raise Refused("echo", Message("the prompt's log-probabilities are not computed; take echo or logprobs"))
        return self

    @property
    def kept_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises ApiError."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            reason = Message("give a text, a list of texts, or token ids")
            raise refuse("prompt", reason, "missing_required_parameter")
        for i, one in enumerate(prompt):
            if not isinstance(one, str) and not (isinstance(one, list) and one and all(type(id) is int for id in one)):
                raise refuse(f"prompt[{i}]", Message("must be text, or a list of token ids"), "invalid_value")
        return prompt


def sse(content: dict[str, Any], event: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def too_long(param: str, engine: Engine) -> ApiError:
    reason = Message("has more tokens than the model reads ({context}); shorten it", context=engine.context)
    return refuse(param, reason, "context_length_exceeded")


class Endpoint:
    """One of OpenAI's forms. `form`: what a request may say, `id_prefix`: how its ids begin."""

    form: type[Body]
    id_prefix: str

    def __init__(self, generator: Generator, model_name: str) -> None:
        self.generator, self.engine, self.model_name = generator, generator.engine, model_name
        self.style = grammar.style_of(self.engine)  # how the model's template writes calls; None: it has no tools

    def requests(self, body: Any) -> list[Request]:
        """What is asked of the model, a request for each prompt. Raises ApiError, UserError."""
        raise NotImplementedError

    def answer(self, exchange: Exchange) -> dict[str, Any]:
        """The answer that is not streamed, once all replies have ended."""
        raise NotImplementedError

    def events(self, exchange: Exchange) -> AsyncIterator[bytes]:
        """The answer as server-sent events, while the replies grow. Raises ApiError where one fails."""
        raise NotImplementedError

    def error_event(self, error: ApiError) -> bytes:
        return sse(error.body)

    def chat_request(
        self, body: Body, messages: list[dict[str, Any]], tools: Tools, schema: dict[str, Any] | None, field: str
    ) -> Request:
        """The request of a conversation; `schema` holds the reply to JSON, and came in `field`. Raises ApiError."""
        names = tuple(function.name for function in tools.functions)
        use = ToolUse(self.style, names, tools.single, tools.texts) if names else None
        settings, shown = body.settings(self.engine), tools.in_template() or None
        request = self.engine.request(messages, settings, shown, use, thoughts=True, thinking=body.thinking)
        if request.opened and body.thinking is False:
            raise refuse(
                "enable_thinking", Message("this model's chat template cannot switch thinking off"), "unsupported_value"
            )
        found, functions = None, tools.in_grammar()
        facts = {"required": tools.required, "single": tools.single, "otherwise": schema}
        try:
            if functions and (tools.required or tools.strict or schema is not None):
                found = grammar.call_grammar(self.style, functions, self.engine, **facts)
            elif schema is not None:
                found = grammar.json_grammar(schema)
            if found is not None:
                found = grammar.after_thought(found, self.engine) if request.opened else found
                settings = dataclasses.replace(settings, grammar=grammar.checked_grammar(self.engine, found))
        except UserError as error:
            raise refuse("tools" if functions else field, error.message, "invalid_schema") from None
        return dataclasses.replace(request, settings=settings)


class ChoiceEndpoint(Endpoint):
    """What chats and completions have in common: a list of choices, whole, or each piece as a chunk."""

    kinds: tuple[str, str]  # `object` of an answer, and of a chunk
    fields: tuple[str, str]  # where a choice has its content, and a chunk
    empty: Any  # the content of a chunk that says how a reply ended

    def openings(self, exchange: Exchange) -> list[Any]:
        """The content of each reply's first chunk; None: it has none."""
        raise NotImplementedError

    def content(self, exchange: Exchange, index: int) -> tuple[Any, Any]:
        """The content of a whole reply, and its log-probabilities."""
        raise NotImplementedError

    def growth(self, exchange: Exchange, index: int, event: Event) -> Iterator[tuple[Any, Any]]:
        """The content of the chunks that an event gives, each with its log-probabilities."""
        raise NotImplementedError

    def answer(self, exchange: Exchange) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(exchange.replies):
            content, logprobs = self.content(exchange, index)
            choices.append(self._choice(index, self.fields[0], content, reply.finish_reason, logprobs))
        return {**self._head(exchange, self.kinds[0]), "choices": choices, "usage": usage(exchange)}

    async def events(self, exchange: Exchange) -> AsyncIterator[bytes]:
        head, counts_usage = self._head(exchange, self.kinds[1]), exchange.body.counts_usage

        def chunk(index: int, content: Any, reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = self._choice(index, self.fields[1], content, reason, logprobs)
            return sse({**head, "choices": [choice], **({"usage": None} if counts_usage else {})})

        for index, content in enumerate(self.openings(exchange)):
            if content is not None:
                yield chunk(index, content)
        async for index, event in self.generator.growth(exchange):
            for content, logprobs in self.growth(exchange, index, event):
                yield chunk(index, content, None, logprobs)
            if event.end:
                yield chunk(index, self.empty, exchange.replies[index].finish_reason)
        if counts_usage:
            yield sse({**head, "choices": [], "usage": usage(exchange)})
        yield b"data: [DONE]\n\n"

    def _head(self, exchange: Exchange, kind: str) -> dict[str, Any]:
        return {"id": exchange.id, "object": kind, "created": exchange.created, "model": self.model_name}

    def _choice(self, index: int, field: str, content: Any, reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, field: content, "finish_reason": reason, "logprobs": logprobs}


def usage(exchange: Exchange) -> dict[str, Any]:
    """Token counts as chats and completions give them."""
    return {
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": exchange.completion_tokens,
        "total_tokens": exchange.prompt_tokens + exchange.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens},
    }


class ChatEndpoint(ChoiceEndpoint):
    """POST /v1/chat/completions."""

    form, id_prefix = ChatBody, "chatcmpl-"
    kinds, fields, empty = ("chat.completion", "chat.completion.chunk"), ("message", "delta"), {}

    def requests(self, body: ChatBody) -> list[Request]:
        has_tools = self.style is not None
        messages = read_messages(body.messages, has_tools)
        functions = [tool.function for tool in body.tools]
        tools = choose_tools(functions, body.tool_choice, body.parallel_tool_calls, has_tools)
        schema = body.response_format.held_to if body.response_format else None
        return [self.chat_request(body, messages, tools, schema, "response_format")]

    def openings(self, exchange: Exchange) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": "", "refusal": None}] * len(exchange.replies)

    def content(self, exchange: Exchange, index: int) -> tuple[Any, Any]:
        reply = exchange.replies[index]
        return chat_message(reply), self._logprobs(exchange, reply.logprobs)

    def growth(self, exchange: Exchange, _: int, event: Event) -> Iterator[tuple[Any, Any]]:
        logprobs = self._logprobs(exchange, event.logprobs) if event.logprobs else None
        for delta in chat_deltas(event.parts) or [{}] * bool(logprobs):
            yield delta, logprobs
            logprobs = None

    def _head(self, exchange: Exchange, kind: str) -> dict[str, Any]:
        tier = {"service_tier": "default"} if exchange.body.service_tier else {}
        return super()._head(exchange, kind) | tier

    def _logprobs(self, exchange: Exchange, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if exchange.body.kept_logprobs is None:
            return None
        return {"content": token_logprobs(tokens, self.engine), "refusal": None}


class CompletionEndpoint(ChoiceEndpoint):
    """POST /v1/completions: `n` replies to each prompt."""

    form, id_prefix = CompletionBody, "cmpl-"
    kinds, fields, empty = ("text_completion",) * 2, ("text",) * 2, ""

    def requests(self, body: CompletionBody) -> list[Request]:
        settings, engine, found = body.settings(self.engine), self.engine, []
        for i, prompt in enumerate(body.prompts()):
            ids = (engine.text_ids(prompt) or sorted(engine.stop_ids)[:1]) if isinstance(prompt, str) else prompt
            if not 0 <= min(ids) <= max(ids) < engine.vocabulary_size:
                raise refuse(f"prompt[{i}]", Message("has a token id that this model does not have"), "invalid_value")
            if len(ids) >= engine.context:
                raise too_long("prompt", engine)
            found.append(Request(ids, settings))
        return found

    def openings(self, exchange: Exchange) -> list[str | None]:
        exchange.positions = [TextPosition(len(echo)) for echo in self._echoes(exchange)]
        return [echo or None for echo in self._echoes(exchange)]

    def content(self, exchange: Exchange, index: int) -> tuple[Any, Any]:
        echo, reply = self._echoes(exchange)[index], exchange.replies[index]
        return echo + reply.text, self._logprobs(exchange, reply.logprobs, TextPosition(len(echo)))

    def growth(self, exchange: Exchange, index: int, event: Event) -> Iterator[tuple[Any, Any]]:
        if event.text or event.logprobs:
            known = self._logprobs(exchange, event.logprobs, exchange.positions[index]) if event.logprobs else None
            yield event.text, known

    def _echoes(self, exchange: Exchange) -> list[str]:
        """Of each reply the prompt's text, where it stands before it."""
        body = exchange.body
        if not body.echo:
            return [""] * len(exchange.replies)
        texts = [one if isinstance(one, str) else self.engine.text_of(one) for one in body.prompts()]
        return [text for text in texts for _ in range(body.n)]

    def _logprobs(self, exchange: Exchange, tokens: Sequence[TokenLogprob], position: TextPosition) -> Any:
        return None if exchange.body.kept_logprobs is None else completion_logprobs(tokens, self.engine, position)


# ---------------------------------------------------------------------------------------------------------------------
# A reply, or what it grows by, as JSON


def chat_message(reply: Reply) -> dict[str, Any]:
    """A complete reply of a chat."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    if reply.calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
        message |= {"content": reply.text.strip() or None, "tool_calls": calls}
    return message


def chat_deltas(parts: Sequence[str | Call | Thought]) -> list[dict[str, Any]]:
    """What parts of a reply are in a streamed chat; a call is its head and its arguments."""
    deltas: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            deltas.append({"content": part})
        elif isinstance(part, Thought):
            deltas.append({"reasoning_content": part.text})
        else:
            head = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
            deltas.append({"tool_calls": [{"index": part.index, **head}]})
            deltas.append({"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]})
    return deltas


def token_logprobs(tokens: Sequence[TokenLogprob], engine: Engine) -> list[dict[str, Any]]:
    """Log-probabilities of a reply's tokens; the end of the turn is no part of the text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = engine.token_bytes(token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}

    return [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}
        for token in tokens
        if token.id not in engine.stop_ids
    ]


def completion_logprobs(tokens: Sequence[TokenLogprob], engine: Engine, position: TextPosition) -> dict[str, Any]:
    """The older form of /v1/completions, for the next `tokens` of a reply."""
    form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if token.id in engine.stop_ids:
            continue
        spelled = engine.token_bytes(token.id)
        form["tokens"].append(_token_name(spelled))
        form["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
        top = {_token_name(engine.token_bytes(i)): max(value, LEAST_LOGPROB) for i, value in token.top}
        form["top_logprobs"].append(top)
        form["text_offset"].append(position.offset)
        position.offset += len(position.decoder.decode(spelled))
    return form


def _token_name(spelled: bytes) -> str:
    """A token as the older form names it; a part of a character by its bytes."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
