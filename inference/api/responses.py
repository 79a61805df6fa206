"""/v1/responses, without what OpenAI stores: text, function calls, structured output, streamed or whole.

A conversation comes as a list of items (messages, calls, results of calls); a response is a list of items too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from common import Message
from inference import grammar
from inference.api.chat import Endpoint, chat_request, sse
from inference.api.errors import ApiError, refuse
from inference.api.generation import Exchange, Generator
from inference.api.messages import (
    IGNORED,
    Arguments,
    Conversation,
    Function,
    IsTool,
    ToolChoice,
    choose_tools,
    text_of_parts,
)
from inference.api.replies import token_logprobs
from inference.api.schema import NO_EFFORT, NO_MODERATION, NO_VERBOSITY, TEXT_ONLY, Body, Form, Name, Refused
from inference.reply import Event
from inference.request import Request, TokenLogprob
from inference.tools import Call

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that asks for them
NOT_STORED = Message("nothing is stored here; send the whole conversation in input")
Text = Annotated[str, pydantic.BeforeValidator(text_of_parts("input_text", "output_text"))]


class InputMessage(Form):
    ignored = IGNORED | {"phase"}

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Text

    def add_to(self, conversation: Conversation, _: str) -> None:
        conversation.add(self.role, self.content)


class FunctionCall(Form):
    ignored = IGNORED | {"namespace", "caller", "async"}

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Arguments

    def add_to(self, conversation: Conversation, where: str) -> None:
        conversation.add_call(where, self.call_id, self.name, self.arguments)


class FunctionCallOutput(Form):
    ignored = IGNORED | {"namespace", "caller"}

    type: Literal["function_call_output"]
    call_id: Name
    name: str | None = None
    output: Text

    def add_to(self, conversation: Conversation, where: str) -> None:
        conversation.add_result(where, self.call_id, self.name, self.output)


ITEMS = {"message": InputMessage, "function_call": FunctionCall, "function_call_output": FunctionCallOutput}
Item = InputMessage | FunctionCall | FunctionCallOutput


def read_item(item: Any) -> Item:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind not in ITEMS:
        reason = Message("an item is one of {kinds}; stored items cannot be referenced", kinds=list(ITEMS))
        raise Refused("type" if kind else "", reason)
    return ITEMS[kind].model_validate(item)


def read_input(given: Any) -> Any:
    """A text is the message of a user."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(Function):
    """A function stands beside the type of its tool."""

    ignored = IGNORED | {"allowed_callers", "defer_loading", "output_schema"}  # how OpenAI runs it: nothing here

    type: Literal["function"]


class TextFormat(Form):
    """What a reply is held to, as responses say it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = pydantic.Field(None, alias="schema")
    strict: bool | None = None

    @pydantic.model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise Refused("schema", Message("goes together with type json_schema"))
        return self

    @property
    def held_to(self) -> dict[str, Any] | None:
        """The JSON schema; None: any text."""
        return {"type": "object"} if self.type == "json_object" else self.schema_


class TextSettings(Form):
    refused: ClassVar[dict[str, Message]] = {"verbosity": NO_VERBOSITY}

    format: TextFormat | None = None


class Reasoning(pydantic.BaseModel):
    effort: str | None = None

    @pydantic.field_validator("effort")
    @classmethod
    def _none(cls, effort: str | None) -> str | None:
        if effort not in (None, "none"):
            raise Refused("", NO_EFFORT, "unsupported_parameter")
        return effort


class ResponsesBody(Body):
    """POST /v1/responses."""

    prompt_field = "input"
    limit_fields = ("max_output_tokens",)
    refused: ClassVar[dict[str, Message]] = {
        "conversation": NOT_STORED,
        "previous_response_id": NOT_STORED,
        "prompt": NOT_STORED,
        "moderation": NO_MODERATION,
        "image": TEXT_ONLY,
        "context_management": Message("a context cannot be compacted here; send a shorter conversation"),
    }
    # besides, what is about OpenAI's own tools and waiting lines
    ignored = Body.ignored | {"access_programs", "background_options", "max_tool_calls"}
    n: ClassVar[int] = 1

    input: Annotated[
        list[Annotated[Any, pydantic.PlainValidator(read_item)]],
        pydantic.BeforeValidator(read_input),
        pydantic.Field(min_length=1),
    ]
    instructions: str | None = None
    background: Literal[False] = False
    include: list[str] = pydantic.Field([])
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    text: TextSettings = TextSettings()
    tool_choice: ToolChoice | None = None
    tools: list[Annotated[FunctionTool, IsTool]] = pydantic.Field([])
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] = "auto"

    @property
    def kept_logprobs(self) -> int | None:
        wanted = self.top_logprobs is not None or LOGPROBS in self.include
        return (self.top_logprobs or 0) if wanted else None


class ResponsesEndpoint(Endpoint):
    """POST /v1/responses."""

    form, id_prefix = ResponsesBody, "resp_"

    def __init__(self, generator: Generator, model_name: str) -> None:
        super().__init__(generator, model_name)
        self.style = grammar.style_of(self.engine)

    def requests(self, body: ResponsesBody) -> list[Request]:
        conversation = Conversation(has_tools=self.style is not None)
        if body.instructions:
            conversation.add("system", body.instructions)
        for i, item in enumerate(body.input):
            item.add_to(conversation, f"input[{i}]")
        tools = choose_tools(body.tools, body.tool_choice, body.parallel_tool_calls, conversation.has_tools)
        schema = body.text.format.held_to if body.text.format else None
        messages = conversation.messages
        request = chat_request(self.engine, self.style, body, messages, tools, ("text.format", schema))
        if body.truncation == "disabled" and request.dropped_messages:
            reason = Message(
                "has more tokens than the model reads ({context}); shorten it", context=self.engine.context
            )
            raise refuse("input", reason, "context_length_exceeded")
        return [request]

    def answer(self, exchange: Exchange) -> dict[str, Any]:
        reply = exchange.replies[0]
        item = self._message_item(exchange, reply.text, reply.logprobs, cut=reply.finish_reason == "length")
        output = [item] if reply.text.strip() or not reply.calls else []
        output += [_call_item(exchange, call) for call in reply.calls]
        return self._response(exchange, output, reply.finish_reason)

    async def events(self, exchange: Exchange) -> AsyncIterator[bytes]:
        stream = _EventStream(self, exchange)
        for event in stream.start():
            yield event
        async for _, grown in self.generator.growth(exchange):
            for event in stream.grow(grown):
                yield event
        for event in stream.end():
            yield event

    def error_event(self, error: ApiError) -> bytes:
        body = error.body["error"]
        event = {"type": "error", "code": body["code"] or body["type"], "message": body["message"]}
        return sse({**event, "param": body["param"], "sequence_number": 0}, "error")

    def _response(self, exchange: Exchange, output: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
        """The response object; `reason`: how the reply ended, None: it goes on."""
        body = exchange.body
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        settings = exchange.replies[0].request.settings
        return {
            "id": exchange.id,
            "object": "response",
            "created_at": exchange.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self.model_name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": settings.temperature,
            "text": body.text.model_dump(exclude_unset=True, by_alias=True) or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools],
            "top_p": settings.top_p,
            "truncation": body.truncation,
            "usage": None if reason is None else _usage(exchange),
            "user": body.user,
        }

    def _message_item(
        self,
        exchange: Exchange,
        text: str | None,
        logprobs: Sequence[TokenLogprob] = (),
        index: int = 0,
        cut: bool = False,
    ) -> dict[str, Any]:
        """The item of a message, at `index` of the output; text None: it has only begun, `cut`: it is not whole."""
        known = [] if exchange.body.kept_logprobs is None else token_logprobs(logprobs, self.engine)
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": known}]
        status = "in_progress" if text is None else "incomplete" if cut else "completed"
        return {
            "id": _message_id(exchange, index),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else content,
        }


def _message_id(exchange: Exchange, index: int) -> str:
    return f"{exchange.id.replace('resp_', 'msg_')}_{index}"


def _call_item(exchange: Exchange, call: Call, arguments: str | None = None) -> dict[str, Any]:
    """The item of a call; with `arguments` "" it has only begun."""
    return {
        "id": f"{exchange.id.replace('resp_', 'fc_')}_{call.index}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments if arguments is None else arguments,
        "status": "completed" if arguments is None else "in_progress",
    }


def _usage(exchange: Exchange) -> dict[str, Any]:
    return {
        "input_tokens": exchange.prompt_tokens,
        "input_tokens_details": {"cached_tokens": exchange.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": exchange.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": exchange.prompt_tokens + exchange.completion_tokens,
    }


class _EventStream:
    """The events of one streamed response, numbered; items begin, grow and end one after the other."""

    def __init__(self, endpoint: ResponsesEndpoint, exchange: Exchange) -> None:
        self.endpoint, self.exchange = endpoint, exchange
        self.output: list[dict[str, Any]] = []  # finished items
        self.text: str | None = None  # of the message that is open
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None  # how the reply ended, once it has
        self.number = 0

    def start(self) -> list[bytes]:
        response = self.endpoint._response(self.exchange, [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def grow(self, grown: Event) -> list[bytes]:
        events: list[bytes] = []
        self.logprobs += grown.logprobs
        self.reason = self.exchange.replies[0].finish_reason if grown.end else None
        has_tools, logprobs = self.exchange.replies[0].request.tools is not None, grown.logprobs
        for part in grown.parts:
            if isinstance(part, Call):
                events += self._close_message() + self._call(part)
            elif part and (self.text is not None or part.strip() or not has_tools):  # no blank message before calls
                events += self._open_message()
                self.text += part
                known = token_logprobs(logprobs, self.endpoint.engine)
                events.append(self._text_event("response.output_text.delta", delta=part, logprobs=known))
                logprobs = ()
        return events

    def end(self) -> list[bytes]:
        events: list[bytes] = []
        if not self.output:
            events += self._open_message()
        events += self._close_message()
        response = self.endpoint._response(self.exchange, self.output, self.reason)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _open_message(self) -> list[bytes]:
        if self.text is not None:
            return []
        self.text = ""
        item = self.endpoint._message_item(self.exchange, None, index=len(self.output))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            self._event("response.output_item.added", output_index=len(self.output), item=item),
            self._text_event("response.content_part.added", part=part),
        ]

    def _close_message(self) -> list[bytes]:
        if self.text is None:
            return []
        text, self.text = self.text, None
        cut = self.reason == "length"
        item = self.endpoint._message_item(self.exchange, text, self.logprobs, len(self.output), cut)
        part = item["content"][0]
        events = [
            self._text_event("response.output_text.done", text=text, logprobs=part["logprobs"]),
            self._text_event("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=len(self.output), item=item),
        ]
        self.output.append(item)
        return events

    def _call(self, call: Call) -> list[bytes]:
        item, index = _call_item(self.exchange, call), len(self.output)
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        arguments = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=_call_item(self.exchange, call, "")),
            self._event(f"{arguments}.delta", delta=call.arguments, **place),
            self._event(f"{arguments}.done", arguments=call.arguments, name=call.name, **place),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        item_id = _message_id(self.exchange, len(self.output))
        return self._event(kind, item_id=item_id, output_index=len(self.output), content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = sse({"type": kind, "sequence_number": self.number, **fields}, kind)
        self.number += 1
        return event
