"""The conversation and the tools of a request, and how chat templates take them.

Fields that do not change the reply (`name`, `cache_control`, `id`) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic

from common import Message
from inference.api.errors import refuse
from inference.api.schema import Form, Name, Refused

# What clients send with every message or part and what no template shows: caching, and their own bookkeeping.
IGNORED = frozenset({"id", "cache_control", "annotations", "provider_specific_fields", "status"})
WRONG_CHOICE = Message("must be none, auto, required, or the function of one of the tools")
NO_TOOLS = Message(
    "this model's chat template has no tools in a form that is read here; start one that has (template=qwen)"
)


def text_of_parts(*kinds: str) -> Callable[[Any], Any]:
    """A validator that joins the text of parts of these types; what is no list is left to the next one."""

    def joined(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
                reason = Message("only parts of these types are read, with their text: {kinds}", kinds=kinds)
                raise Refused(f"[{i}]", reason, "unsupported_value")
            for name, value in part.items():
                if name not in {"type", "text", "logprobs"} | IGNORED and value is not None:
                    reason = Message("a text part has type and text; leave it out")
                    raise Refused(f"[{i}].{name}", reason, "unsupported_parameter")
        return "".join(part["text"] for part in content)

    return joined


def read_arguments(text: Any) -> Any:
    """The arguments of a call; an empty text, which many servers write for none, is {}."""
    try:
        arguments = json.loads(text or "{}") if isinstance(text, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused("", Message("must be a JSON object, as text"))
    return arguments


Arguments = Annotated[dict[str, Any], pydantic.BeforeValidator(read_arguments)]


class Called(pydantic.BaseModel):
    """The function of a call."""

    name: Name
    arguments: Arguments


class ToolCall(pydantic.BaseModel):
    """A call in a message of the assistant."""

    id: Name
    type: Literal["function"]
    function: Called


class ChatMessage(Form):
    """A message of a chat."""

    ignored = IGNORED

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, pydantic.BeforeValidator(text_of_parts("text"))] = None
    name: Name | None = None
    tool_calls: list[ToolCall] = pydantic.Field([])
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, as vLLM and OpenRouter name it

    @pydantic.model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise Refused("content", Message("is missing; only an assistant's content may be null"))
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise Refused("tool_call_id", Message("goes together with the role tool"))
        if self.tool_calls and self.role != "assistant":
            raise Refused("tool_calls", Message("only an assistant calls tools"))
        return self


@dataclass
class Conversation:
    """Messages as chat templates take them, in the order in which they are added.

    `where`, the place of a message in the request, is named by the ApiError of one that cannot be added.
    """

    has_tools: bool  # whether the model's chat template has them
    messages: list[dict[str, Any]] = field(default_factory=list)
    thought: str | None = None  # that belongs to the assistant's next message
    functions: dict[str, str] = field(default_factory=dict)  # the name of the function of each call, by its id

    def add(self, role: str, content: str | None, thought: str | None = None) -> None:
        thought, self.thought = thought or self.thought, None
        message = {"role": "system" if role == "developer" else role, "content": content or ""}
        self.messages.append(message | ({"reasoning_content": thought} if thought and role == "assistant" else {}))

    def add_call(self, where: str, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """A call belongs to the assistant's message before it."""
        self._check_tools(where)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add("assistant", "")
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(call)
        self.functions[call_id] = name

    def add_result(self, where: str, call_id: str, name: str | None, content: str | None) -> None:
        """The result of a call, with the name of its function, which the client need not give."""
        self._check_tools(where)
        called = self.functions.get(call_id)
        if name and called and name != called:
            facts = {"name": name, "call": call_id, "called": called}
            reason = Message("'{name}' is not the function of call {call}, '{called}'", **facts)
            raise refuse(f"{where}.name", reason, "invalid_value")
        self.add("tool", content)
        self.messages[-1] |= {"tool_call_id": call_id} | ({"name": called or name} if called or name else {})

    def _check_tools(self, where: str) -> None:
        if not self.has_tools:
            raise refuse(where, NO_TOOLS)


def read_messages(messages: Sequence[ChatMessage], has_tools: bool) -> list[dict[str, Any]]:
    """The messages of a chat, as its template takes them. Raises ApiError."""
    chat = Conversation(has_tools)
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.role == "tool":
            chat.add_result(where, message.tool_call_id, message.name, message.content)
            continue
        chat.add(message.role, message.content, message.reasoning_content or message.reasoning)
        for call in message.tool_calls:
            chat.add_call(where, call.id, call.function.name, call.function.arguments)
    return chat.messages


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class Function(Form):
    """A function that a model may call."""

    ignored = IGNORED

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Form):
    """A tool of a chat."""

    ignored = IGNORED

    type: Literal["function"]
    function: Function


def check_tool(tool: Any) -> Any:
    """Refuses tools that are no functions, whatever fields these have."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise Refused("", Message("only tools of type function are known here"), "unsupported_value")
    return tool


def check_choice(choice: Any) -> Any:
    """none, auto, required, or {"type": "function", "name": ...}, which chats nest."""
    match choice:
        case "none" | "auto" | "required":
            return choice
        case {"type": "function", "function": {"name": str(name), **inner}, **rest} if not inner and not rest:
            return {"type": "function", "name": name}
        case {"type": "function", "name": str(), **rest} if not rest:
            return choice
    raise Refused("", WRONG_CHOICE)


IsTool = pydantic.BeforeValidator(check_tool)
ToolChoice = Annotated[str | dict[str, Any], pydantic.BeforeValidator(check_choice)]


@dataclass
class Tools:
    """What a reply may call; `required`: it must, and `single`: once at most."""

    functions: list[Function]
    required: bool = False
    single: bool = False

    @property
    def strict(self) -> bool:
        return any(function.strict for function in self.functions)

    @property
    def texts(self) -> frozenset[tuple[str, str]]:
        """The arguments that are texts, each with its function."""
        properties = [(f.name, (f.parameters or {}).get("properties")) for f in self.functions]
        return frozenset(
            (function, name)
            for function, found in properties
            for name, schema in (found if isinstance(found, dict) else {}).items()
            if isinstance(schema, dict) and schema.get("type") == "string"
        )

    def in_grammar(self) -> list[dict[str, Any]]:
        """The functions in OpenAI's form."""
        return [{"type": "function", "function": function.model_dump()} for function in self.functions]

    def in_template(self) -> list[dict[str, Any]]:
        """The functions as templates show them: without what is for the server."""
        empty = {"type": "object", "properties": {}}
        shown = [(f.description or "", f.name, empty if f.parameters is None else f.parameters) for f in self.functions]
        keys = ("description", "name", "parameters")
        return [{"type": "function", "function": dict(zip(keys, facts, strict=True))} for facts in shown]


def choose_tools(
    functions: list[Function], choice: str | dict[str, Any] | None, parallel: bool | None, has_tools: bool
) -> Tools:
    """What of the tools of a request a reply may call. Raises ApiError."""
    named = isinstance(choice, dict)
    if functions and not has_tools:
        raise refuse("tools", NO_TOOLS)
    functions = [function for function in functions if not named or function.name == choice["name"]]
    if not functions and choice not in (None, "none", "auto"):
        raise refuse("tool_choice", WRONG_CHOICE)
    required, single = named or choice == "required", named or parallel is False
    return Tools([] if choice == "none" else functions, required, single)
