"""/v1/responses, without what OpenAI stores: text, function calls, structured output, streamed or whole.

A conversation comes as a list of items (messages, calls, results of calls); a response is a list of items too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Literal

import pydantic

from common import Message, nearest_word
from inference.api.chat import ChatPrompts, sse
from inference.api.errors import ApiError, refuse, unknown_field, wrong_type
from inference.api.generation import Job
from inference.api.messages import (
    IGNORED,
    Tools,
    check_function,
    check_has_tools,
    choose_tools,
    read_arguments,
    read_string,
    read_text,
    template_call,
    tool_result,
)
from inference.api.replies import token_logprobs
from inference.api.schema import Request, read_named_schema
from inference.reply import Event
from inference.request import TokenLogprob
from inference.tools import Call

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that asks for them
_STORED = Message("nothing is stored here; send the whole conversation in input")


class ResponsesRequest(Request):
    """POST /v1/responses."""

    prompt_field = "input"
    limit_fields = ("max_output_tokens",)
    refused: ClassVar[dict[str, Message]] = {
        "conversation": _STORED,
        "previous_response_id": _STORED,
        "prompt": _STORED,
        "moderation": Message("there is no moderation here; leave it out"),
        "image": Message("only text is read and written here"),
        "context_management": Message("a context cannot be compacted here; send a shorter conversation"),
    }

    input: Any
    instructions: str | None = None
    background: Literal[False] = False
    include: list[str] | None = None
    max_output_tokens: int | None = pydantic.Field(None, ge=1)
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    text: dict[str, Any] | None = None
    tool_choice: Any = None
    tools: list[Any] | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    # ignored: they are about OpenAI's own tools and waiting lines
    access_programs: Any = None
    background_options: Any = None
    max_tool_calls: int | None = None

    def check(self) -> None:
        super().check()
        if self.n != 1:
            raise unknown_field("n")
        effort = (self.reasoning or {}).get("effort")
        if effort not in (None, "none"):
            raise refuse(
                "reasoning.effort", Message("this model's effort cannot be set; leave it out"), "unsupported_parameter"
            )

    @property
    def kept_logprobs(self) -> int | None:
        wanted = self.top_logprobs is not None or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_input(request: ResponsesRequest, has_tools: bool) -> list[dict[str, Any]]:
    """The conversation as chat templates take it. Raises ApiError that names the item and its field."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    if not isinstance(items, list) or not items:
        raise refuse("input", Message("give a text, or a list of items"), "invalid_value")
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise refuse(
                where,
                Message(
                    "an item is a message, a function_call or a function_call_output; stored items cannot be referenced"
                ),
                "invalid_value",
            )
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_read_message(item, where))
        elif kind == "function_call":
            check_has_tools(where, has_tools)
            _append_call(messages, item, where)
        elif kind == "function_call_output":
            check_has_tools(where, has_tools)
            messages.append(_read_result(item, where, messages))
        else:
            raise refuse(
                f"{where}.type",
                Message(
                    "an item is a message, a function_call or a function_call_output; stored items cannot be referenced"
                ),
                "invalid_value",
            )
    return messages


def _read_message(item: dict[str, Any], where: str) -> dict[str, Any]:
    roles = {"user": ("input_text",), "system": ("input_text",), "developer": ("input_text",)}
    roles["assistant"] = ("output_text", "input_text")
    role = item.get("role")
    if role not in roles:
        raise refuse(f"{where}.role", Message("must be one of {roles}", roles=tuple(roles)), "invalid_value")
    _check_fields(item, where, {"type", "role", "content", "phase"})
    if item.get("content") is None:
        raise refuse(
            f"{where}.content", Message("is missing; only an assistant's content may be null"), "invalid_value"
        )
    content = read_text(item["content"], f"{where}.content", roles[role])
    return {"role": "system" if role == "developer" else role, "content": content}


def _append_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """A call belongs to the assistant's message before it."""
    _check_fields(item, where, {"type", "call_id", "name", "arguments", "namespace", "caller", "async"})
    call = template_call(
        read_string(item.get("call_id"), f"{where}.call_id"),
        read_string(item.get("name"), f"{where}.name"),
        read_arguments(item.get("arguments"), f"{where}.arguments"),
    )
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _read_result(item: dict[str, Any], where: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    _check_fields(item, where, {"type", "call_id", "output", "name", "namespace", "caller"})
    call = read_string(item.get("call_id"), f"{where}.call_id")
    if item.get("output") is None:
        raise refuse(f"{where}.output", Message("is missing; only an assistant's content may be null"), "invalid_value")
    text = read_text(item["output"], f"{where}.output", ("input_text",))
    return {"role": "tool", "content": text, **tool_result(call, item.get("name"), f"{where}.name", before)}


def _check_fields(item: dict[str, Any], where: str, known: set[str]) -> None:
    for name, value in item.items():
        if name not in known | IGNORED and value not in (None, [], ""):
            raise unknown_field(f"{where}.{name}", nearest_word(name, known))


def read_tools(request: ResponsesRequest, has_tools: bool) -> Tools:
    """The tools of a request; a function's fields stand beside its type."""
    tools = []
    for i, tool in enumerate(request.tools or []):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise refuse(where, Message("only functions are called here: type: function, name, parameters"))
        beside = {"type", "allowed_callers", "defer_loading", "output_schema"}  # how OpenAI runs it: nothing here
        function = {name: value for name, value in tool.items() if name not in beside}
        check_function(function, where)
        tools.append({"type": "function", "function": function})
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") != "function":
        raise refuse("tool_choice", Message("must be none, auto, required, or the function of one of the tools"))
    if choice not in (None, "none", "auto") and not tools:
        raise refuse(
            "tool_choice", Message("there are no tools in this request; give tools, or leave it out"), "invalid_value"
        )
    return choose_tools(tools, choice, request.parallel_tool_calls, has_tools)


def read_text_format(request: ResponsesRequest) -> Any:
    """The JSON schema that the reply is held to; None: any text."""
    text = request.text or {}
    if text.get("verbosity") is not None:
        raise refuse(
            "text.verbosity",
            Message("this model's verbosity cannot be set; say it in the system message"),
            "unsupported_parameter",
        )
    if unknown := set(text) - {"format", "verbosity"}:
        raise unknown_field(f"text.{min(unknown)}")
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise wrong_type("text.format", Message("an object"))
    kind = form.get("type")
    if kind == "json_schema":
        return read_named_schema({name: value for name, value in form.items() if name != "type"}, "text.format")
    if kind not in ("text", "json_object"):
        raise refuse("text.format", Message("its type must be text, json_object or json_schema"))
    return {"type": "object"} if kind == "json_object" else None


# ---------------------------------------------------------------------------------------------------------------------
# Answering


class ResponsesEndpoint(ChatPrompts):
    """POST /v1/responses."""

    form, id_prefix = ResponsesRequest, "resp_"

    def add_replies(self, job: Job) -> None:
        request, has_tools = job.request, self.style is not None
        messages = read_input(request, has_tools)
        tools, schema = read_tools(request, has_tools), read_text_format(request)
        self.add_chat_replies(job, messages, tools, schema, "text.format")
        if request.truncation == "disabled" and job.dropped_messages:
            reason = Message(
                "has more tokens than the model reads ({context}), and truncation is disabled; shorten it",
                context=self.engine.context,
            )
            raise refuse("input", reason, "context_length_exceeded")

    def body(self, job: Job) -> dict[str, Any]:
        reply = job.replies[0]
        item = self._message_item(job, reply.text, reply.logprobs, cut=reply.finish_reason == "length")
        output = [item] if reply.text.strip() or not reply.calls else []
        output += [_call_item(job, call) for call in reply.calls]
        return self._response(job, output, reply.finish_reason)

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        stream = _EventStream(self, job)
        for event in stream.start():
            yield event
        async for _, grown in self.generator.growth(job):
            for event in stream.grow(grown):
                yield event
        for event in stream.end():
            yield event

    def error_event(self, error: ApiError) -> bytes:
        body = error.body["error"]
        event = {"type": "error", "code": body["code"] or body["type"], "message": body["message"]}
        return sse({**event, "param": body["param"], "sequence_number": 0}, "error")

    def _response(self, job: Job, output: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
        """The response object; `reason`: how the reply ended, None: it goes on."""
        request = job.request
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        settings = job.replies[0].request.settings
        return {
            "id": job.id,
            "object": "response",
            "created_at": job.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.model_name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": settings.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": settings.top_p,
            "truncation": request.truncation or "auto",
            "usage": None if reason is None else _usage(job),
            "user": request.user,
        }

    def _message_item(
        self, job: Job, text: str | None, logprobs: Sequence[TokenLogprob] = (), index: int = 0, cut: bool = False
    ) -> dict[str, Any]:
        """The item of a message, at `index` of the output; text None: it has only begun, `cut`: it is not whole."""
        known = [] if job.request.kept_logprobs is None else token_logprobs(logprobs, self.engine)
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": known}]
        status = "in_progress" if text is None else "incomplete" if cut else "completed"
        return {
            "id": _message_id(job, index),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else content,
        }


def _message_id(job: Job, index: int) -> str:
    return f"{job.id.replace('resp_', 'msg_')}_{index}"


def _call_item(job: Job, call: Call, arguments: str | None = None) -> dict[str, Any]:
    """The item of a call; with `arguments` "" it has only begun."""
    return {
        "id": f"{job.id.replace('resp_', 'fc_')}_{call.index}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments if arguments is None else arguments,
        "status": "completed" if arguments is None else "in_progress",
    }


def _usage(job: Job) -> dict[str, Any]:
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": job.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": job.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + job.completion_tokens,
    }


class _EventStream:
    """The events of one streamed response, numbered; items begin, grow and end one after the other."""

    def __init__(self, endpoint: ResponsesEndpoint, job: Job) -> None:
        self.endpoint, self.job = endpoint, job
        self.output: list[dict[str, Any]] = []  # finished items
        self.text: str | None = None  # of the message that is open
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None  # how the reply ended, once it has
        self.number = 0

    def start(self) -> list[bytes]:
        response = self.endpoint._response(self.job, [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def grow(self, grown: Event) -> list[bytes]:
        events: list[bytes] = []
        self.logprobs += grown.logprobs
        self.reason = self.job.replies[0].finish_reason if grown.end else None
        has_tools, logprobs = self.job.replies[0].request.tools is not None, grown.logprobs
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
        response = self.endpoint._response(self.job, self.output, self.reason)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _open_message(self) -> list[bytes]:
        if self.text is not None:
            return []
        self.text = ""
        item = self.endpoint._message_item(self.job, None, index=len(self.output))
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
        item = self.endpoint._message_item(self.job, text, self.logprobs, len(self.output), cut)
        part = item["content"][0]
        events = [
            self._text_event("response.output_text.done", text=text, logprobs=part["logprobs"]),
            self._text_event("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=len(self.output), item=item),
        ]
        self.output.append(item)
        return events

    def _call(self, call: Call) -> list[bytes]:
        item, index = _call_item(self.job, call), len(self.output)
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        arguments = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=_call_item(self.job, call, "")),
            self._event(f"{arguments}.delta", delta=call.arguments, **place),
            self._event(f"{arguments}.done", arguments=call.arguments, name=call.name, **place),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        item_id = _message_id(self.job, len(self.output))
        return self._event(kind, item_id=item_id, output_index=len(self.output), content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = sse({"type": kind, "sequence_number": self.number, **fields}, kind)
        self.number += 1
        return event
