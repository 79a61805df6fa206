"""The conversation and the tools of a request, as chat templates take them.

What a client writes beside (`name`, `cache_control`, `id`) is ignored where the answer stays the same without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import Message, nearest_word
from inference.api.errors import refuse, unknown_field, wrong_type
from inference.api.schema import ChatRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
# What clients send with every message or part and what no template shows: caching, and their own bookkeeping.
IGNORED = {"id", "cache_control", "annotations", "provider_specific_fields", "status"}


def read_messages(messages: list[Any], has_tools: bool) -> list[dict[str, Any]]:
    """The conversation in the form of chat templates. Raises ApiError that names the message and its field."""
    read: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        read.append(_message(message, f"messages[{i}]", has_tools, read))
    return read


def _message(message: Any, where: str, has_tools: bool, before: list[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refuse(where, Message("a message is an object with role and content"), "invalid_value")
    role = message.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", Message("must be one of {roles}", roles=ROLES), "invalid_value")
    own = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(role, set())
    for name, value in message.items():
        if name not in {"role", "content", "name"} | own | IGNORED and value not in (None, [], ""):
            raise refuse(
                f"{where}.{name}", Message("chat templates have no place for it; leave it out"), "unsupported_parameter"
            )
    if message.get("name") is not None:
        read_string(message["name"], f"{where}.name")
    content = message.get("content")
    if content is None and role != "assistant":
        raise refuse(
            f"{where}.content", Message("is missing; only an assistant's content may be null"), "invalid_value"
        )
    read = {"role": "system" if role == "developer" else role, "content": read_text(content, f"{where}.content")}
    if role == "tool":
        check_has_tools(where, has_tools)
        call = read_string(message.get("tool_call_id"), f"{where}.tool_call_id")
        read |= tool_result(call, message.get("name"), f"{where}.name", before)
    elif role == "assistant" and message.get("tool_calls"):
        check_has_tools(where, has_tools)
        read["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    return read


def check_has_tools(where: str, has_tools: bool) -> None:
    if not has_tools:
        raise refuse(
            where,
            Message("this model's chat template has no tools; start the server with one that has (template=qwen)"),
        )


def tool_result(call_id: str, name: str | None, where: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    """The id and name of a tool's message; the name is that of its call. Raises ApiError for another one."""
    calls = [call for message in before for call in message.get("tool_calls", ())]
    called = next((call["function"]["name"] for call in reversed(calls) if call["id"] == call_id), None)
    if name and called and name != called:
        raise refuse(
            where,
            Message(
                "'{name}' is not the function of call {call}, which is '{called}'",
                name=name,
                call=call_id,
                called=called,
            ),
            "invalid_value",
        )
    found = {"tool_call_id": call_id}
    return found | {"name": called or name} if called or name else found


def read_text(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a message: a text, None, or a list of parts of these kinds."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong_type(where, Message("text"))
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise refuse(
                f"{where}[{i}]", Message("only parts of these types are read, with their text: {kinds}", kinds=kinds)
            )
        for name, value in part.items():
            if name not in {"type", "text", "logprobs"} | IGNORED and value is not None:
                raise refuse(
                    f"{where}[{i}].{name}",
                    Message("a text part has type and text; leave it out"),
                    "unsupported_parameter",
                )
    return "".join(part["text"] for part in content)


def read_string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise wrong_type(where, Message("text"))
    return value


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise wrong_type(where, Message("a list"))
    read = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        if not isinstance(call, dict) or call.get("type") != "function" or not isinstance(call.get("function"), dict):
            raise refuse(at, Message("a call has id, type: function, and function"), "invalid_value")
        function = call["function"]
        name = read_string(function.get("name"), f"{at}.function.name")
        arguments = read_arguments(function.get("arguments"), f"{at}.function.arguments")
        read.append(template_call(read_string(call.get("id"), f"{at}.id"), name, arguments))
    return read


def template_call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates take it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_arguments(text: Any, where: str) -> dict[str, Any]:
    """The arguments of a call; an empty text, which many servers write for none, is {}."""
    if text == "":
        return {}
    try:
        arguments = json.loads(read_string(text, where))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise refuse(where, Message("must be a JSON object, as text"), "invalid_value")
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Tools


@dataclass
class Tools:
    """What a reply may call: functions in OpenAI's form; `required`: it must, and `single`: once at most."""

    functions: list[dict[str, Any]]
    required: bool = False
    single: bool = False

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.functions]

    @property
    def strict(self) -> bool:
        return any(tool["function"].get("strict") for tool in self.functions)

    def for_template(self) -> list[dict[str, Any]]:
        """The functions as templates show them: without what is for the server."""
        return [_template_tool(tool["function"]) for tool in self.functions]


def _template_tool(function: dict[str, Any]) -> dict[str, Any]:
    shown = {name: function[name] for name in ("name", "description", "parameters") if function.get(name) is not None}
    shown.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": {"description": "", **shown}}


def read_tools(request: ChatRequest, has_tools: bool) -> Tools:
    """The tools of a chat request."""
    for i, tool in enumerate(request.tools or []):
        _check_tool(tool, f"tools[{i}]")
    choice = request.tool_choice
    if isinstance(choice, dict):  # {"type": "function", "function": {"name": ...}}
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) and set(function) == {"name"} else None
        choice = {"name": name} if choice.get("type") == "function" and set(choice) == {"type", "function"} else {}
    return choose_tools(request.tools or [], choice, request.parallel_tool_calls, has_tools)


def choose_tools(tools: list[dict[str, Any]], choice: Any, parallel: bool | None, has_tools: bool) -> Tools:
    """What of the tools `choice` leaves: None, none, auto, required, or {"name": of one of them}."""
    if not tools:
        return Tools([])
    if not has_tools:
        raise refuse(
            "tools",
            Message("this model's chat template has no tools; start the server with one that has (template=qwen)"),
        )
    if isinstance(choice, dict):
        chosen = [tool for tool in tools if tool["function"]["name"] == choice.get("name")]
        if not chosen:
            raise refuse("tool_choice", Message("must be none, auto, required, or the function of one of the tools"))
        return Tools(chosen, required=True, single=True)
    if choice not in (None, "none", "auto", "required"):
        raise refuse(
            "tool_choice", Message("must be none, auto, required, or the function of one of the tools"), "invalid_value"
        )
    if choice == "none":
        return Tools([])
    return Tools(tools, required=choice == "required", single=parallel is False)


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise refuse(where, Message("a tool has type: function, and a function"))
    if unknown := set(tool) - {"type", "function"} - IGNORED:
        raise unknown_field(f"{where}.{min(unknown)}")
    check_function(tool["function"], f"{where}.function")


def check_function(function: dict[str, Any], where: str) -> None:
    """Raises ApiError for a function that cannot be offered to a model."""
    read_string(function.get("name"), f"{where}.name")
    kinds = {"name": str, "description": str, "parameters": dict, "strict": bool}
    expected = {str: Message("text"), dict: Message("an object"), bool: Message("true or false")}
    for name, value in function.items():
        if name not in kinds and name not in IGNORED:
            raise unknown_field(f"{where}.{name}", nearest_word(name, kinds))
        if name in kinds and value is not None and not isinstance(value, kinds[name]):
            raise wrong_type(f"{where}.{name}", expected[kinds[name]])
