"""/v1/responses, without what OpenAI stores: text, function calls, structured output, streamed or whole.

A conversation comes as a list of items (messages, calls, results of calls); a response is a list of items too.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from common import Message
from inference.api.chat import Endpoint, sse, token_logprobs, too_long
from inference.api.errors import ApiError
from inference.api.generation import Exchange
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
from inference.api.schema import NO_MODERATION, NO_VERBOSITY, TEXT_ONLY, Body, Effort, Form, Format, Name, Refused
from inference.reply import Event
from inference.request import Request, TokenLogprob
from inference.tools import Call, Thought

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


class ReasoningItem(pydantic.BaseModel):
    """Thoughts that the answer after it came from."""

    type: Literal["reasoning"]
    content: Annotated[str | None, pydantic.BeforeValidator(text_of_parts("reasoning_text"))] = None

    def add_to(self, conversation: Conversation, _: str) -> None:
        conversation.thought = self.content


ITEMS = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": ReasoningItem,
}
Item = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


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
    """A tool; the fields of its function stand next to its type."""

    ignored = IGNORED | {"allowed_callers", "defer_loading", "output_schema"}  # how OpenAI runs it: nothing here

    type: Literal["function"]


class TextSettings(Form):
    refused: ClassVar[dict[str, Message]] = {"verbosity": NO_VERBOSITY}

    format: Format | None = None


class Reasoning(pydantic.BaseModel):
    effort: Effort = None


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
    # also what concerns OpenAI's own tools and queues
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
    def effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning else None

    @property
    def kept_logprobs(self) -> int | None:
        wanted = self.top_logprobs is not None or LOGPROBS in self.include
        return (self.top_logprobs or 0) if wanted else None


class ResponsesEndpoint(Endpoint):
    """POST /v1/responses."""

    form, id_prefix = ResponsesBody, "resp_"

    def requests(self, body: ResponsesBody) -> list[Request]:
        conversation = Conversation(has_tools=self.style is not None)
        if body.instructions:
            conversation.add("system", body.instructions)
        for i, item in enumerate(body.input):
            item.add_to(conversation, f"input[{i}]")
        tools = choose_tools(body.tools, body.tool_choice, body.parallel_tool_calls, conversation.has_tools)
        schema = body.text.format.held_to if body.text.format else None
        request = self.chat_request(body, conversation.messages, tools, schema, "text.format")
        if body.truncation == "disabled" and request.dropped_messages:
            raise too_long("input", self.engine)
        return [request]

    def answer(self, exchange: Exchange) -> dict[str, Any]:
        reply = exchange.replies[0]
        output = [reasoning_item(exchange, 0, reply.thought)] if reply.thought else []
        if reply.text.strip() or not reply.calls:
            facts = (reply.text, reply.logprobs, reply.finish_reason)
            output.append(self.message_item(exchange, len(output), *facts))
        output += [call_item(exchange, call) for call in reply.calls]
        return self.response(exchange, output, reply.finish_reason)

    async def events(self, exchange: Exchange) -> AsyncIterator[bytes]:
        stream = ResponseStream(self, exchange)
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

    def response(self, exchange: Exchange, output: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
        """The response object; `reason`: how the reply ended, None: it goes on."""
        body, settings = exchange.body, exchange.replies[0].request.settings
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        text = body.text.model_dump(exclude_unset=True, by_alias=True)
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
            "text": text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools],
            "top_p": settings.top_p,
            "truncation": body.truncation,
            "usage": None if reason is None else usage(exchange),
            "user": body.user,
        }

    def message_item(
        self,
        exchange: Exchange,
        index: int,
        text: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        """The item of a message, at `index` of the output; text None: it has only begun. `reason`: as in `response`."""
        known = [] if exchange.body.kept_logprobs is None else token_logprobs(logprobs, self.engine)
        return {
            "id": f"{exchange.id.replace('resp_', 'msg_')}_{index}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress" if text is None else "incomplete" if reason == "length" else "completed",
            "content": [] if text is None else [text_part(text, known)],
        }


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def reasoning_item(exchange: Exchange, index: int, thought: str | None = None) -> dict[str, Any]:
    """The item of a thought; None: it has only begun."""
    content = [] if thought is None else [{"type": "reasoning_text", "text": thought}]
    return {
        "id": f"{exchange.id.replace('resp_', 'rs_')}_{index}",
        "type": "reasoning",
        "summary": [],
        "content": content,
    }


def call_item(exchange: Exchange, call: Call, *, begun: bool = False) -> dict[str, Any]:
    """The item of a call; `begun`: it has no arguments yet."""
    return {
        "id": f"{exchange.id.replace('resp_', 'fc_')}_{call.index}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": "" if begun else call.arguments,
        "status": "in_progress" if begun else "completed",
    }


def usage(exchange: Exchange) -> dict[str, Any]:
    """Token counts as responses give them."""
    return {
        "input_tokens": exchange.prompt_tokens,
        "input_tokens_details": {"cached_tokens": exchange.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": exchange.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": exchange.prompt_tokens + exchange.completion_tokens,
    }


class ResponseStream:
    """The events of one streamed response, numbered; items begin, grow and end one after the other."""

    def __init__(self, endpoint: ResponsesEndpoint, exchange: Exchange) -> None:
        self.endpoint, self.exchange, self.reply = endpoint, exchange, exchange.replies[0]
        self.output: list[dict[str, Any]] = []  # finished items
        self.message: dict[str, Any] | None = None  # the item that is open
        self.text = ""  # of that item
        self.thought: str | None = None  # of the item of a thought that is open
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None  # how the reply ended, once it has
        self.numbers = itertools.count()

    def start(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self.endpoint.response(self.exchange, []))

    def grow(self, grown: Event) -> Iterator[bytes]:
        self.logprobs += grown.logprobs
        self.reason = self.reply.finish_reason if grown.end else None
        logprobs = token_logprobs(grown.logprobs, self.endpoint.engine)
        for part in grown.parts:
            if isinstance(part, Thought):
                yield from self._close_message()
                yield from self._think(part.text)
            elif isinstance(part, Call):
                yield from self._close_thought()
                yield from self._close_message()
                yield from self._call(part)
            elif part and (self.message or part.strip() or not self.reply.request.tools):  # none of blanks before calls
                yield from self._open_message()
                self.text += part
                yield self._text_event("output_text.delta", delta=part, logprobs=logprobs)
                logprobs = []

    def end(self) -> Iterator[bytes]:
        yield from self._close_thought()
        if not any(item["type"] != "reasoning" for item in self.output):
            yield from self._open_message()
        yield from self._close_message()
        response = self.endpoint.response(self.exchange, self.output, self.reason)
        yield self._event(response["status"], response=response)

    def _think(self, text: str) -> Iterator[bytes]:
        if self.thought is None:
            self.thought = ""
            yield self._item_event("added", reasoning_item(self.exchange, len(self.output)))
        self.thought += text
        yield self._thought_event("delta", delta=text)

    def _close_thought(self) -> Iterator[bytes]:
        if self.thought is not None:
            item = reasoning_item(self.exchange, len(self.output), self.thought)
            yield self._thought_event("done", text=self.thought)
            yield self._item_event("done", item)
            self.output.append(item)
            self.thought = None

    def _thought_event(self, kind: str, **fields: Any) -> bytes:
        index = len(self.output)
        place = {"item_id": reasoning_item(self.exchange, index)["id"], "output_index": index, "content_index": 0}
        return self._event(f"reasoning_text.{kind}", **place, **fields)

    def _open_message(self) -> Iterator[bytes]:
        yield from self._close_thought()
        if self.message is None:
            self.message, self.text = self.endpoint.message_item(self.exchange, len(self.output)), ""
            yield self._item_event("added", self.message)
            yield self._text_event("content_part.added", part=text_part("", []))

    def _close_message(self) -> Iterator[bytes]:
        if self.message is not None:
            facts = (self.text, self.logprobs, self.reason)
            item = self.endpoint.message_item(self.exchange, len(self.output), *facts)
            (part,) = item["content"]
            yield self._text_event("output_text.done", text=self.text, logprobs=part["logprobs"])
            yield self._text_event("content_part.done", part=part)
            yield self._item_event("done", item)
            self.output.append(item)
            self.message = None

    def _call(self, call: Call) -> Iterator[bytes]:
        item = call_item(self.exchange, call)
        place = {"item_id": item["id"], "output_index": len(self.output)}
        yield self._item_event("added", call_item(self.exchange, call, begun=True))
        yield self._event("function_call_arguments.delta", delta=call.arguments, **place)
        yield self._event("function_call_arguments.done", arguments=call.arguments, name=call.name, **place)
        yield self._item_event("done", item)
        self.output.append(item)

    def _item_event(self, kind: str, item: dict[str, Any]) -> bytes:
        return self._event(f"output_item.{kind}", output_index=len(self.output), item=item)

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self.message["id"], "output_index": len(self.output), "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return sse({"type": f"response.{kind}", "sequence_number": next(self.numbers), **fields}, f"response.{kind}")
