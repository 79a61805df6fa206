"""Messages, tool calls and tools of every known format → the kit's form: OpenAI's, with arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common import Config, Message, nearest_word
from preprocessing.faults import Fault
from preprocessing.layout import Fields, Layout, Row

FOLLOWS = {"start": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
WEIGHTS = ("weight", "loss", "loss_weight")  # of a message: OpenAI's, ms-swift's, LLaMA-Factory v1's
KEYS = {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}
KEYS |= {"reasoning_content", *WEIGHTS}
TEMPLATE_MARKS = ("name", "author")  # {{name}} and {{author}} in the text become these settings


def text_value(value: Any, where: Message | str) -> str:
    """`value` if it is text; raises Fault that says what it is instead. `where` names it."""
    if isinstance(value, str):
        return value
    if value is None:
        raise Fault("{where} is null", where=where)
    if isinstance(value, bool | int | float):
        raise Fault('{where} is {value}, which is not text; write "{value}"', where=where, value=json.dumps(value))
    if isinstance(value, list):
        raise Fault("{where} is a list, not text", where=where)
    raise Fault("{where} is an object, not text", where=where)


def filled_text(value: Any, where: Message | str) -> str:
    """`value` if it is text with more than spaces; else raises Fault."""
    if not text_value(value, where).strip():
        raise Fault("{where} is empty", where=where)
    return value


def json_value(value: Any, where: Message | str) -> Any:
    """`value`, read as JSON where it is text; raises Fault where that is broken."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Fault(
            "{where} is broken JSON at column {column}: {problem}", where=where, column=error.colno, problem=error.msg
        ) from None
    except (RecursionError, ValueError):
        raise Fault("is nested too deeply") from None


def read_messages(given: list[Any], layout: Layout) -> list[Row]:
    """Messages of sharegpt, openai or LLaMA-Factory v1 with a role and a content; raises Fault with what is wrong."""
    return [read_message(message, layout, number) for number, message in enumerate(given, 1)]


def read_message(message: Any, layout: Layout, number: int) -> Row:
    """One message; tool calls are JSON text, `tool_calls`, or parts of the content. `number` counts from 1."""
    if not isinstance(message, dict):
        raise Fault("message {number} is not an object with a role and a content", number=number)
    role_key = layout.tags.get("role_tag") or ("role" if "role" in message else "from")
    usual = "content" if "content" in message or ("value" not in message and role_key == "role") else "value"
    content_key = layout.tags.get("content_tag") or usual
    if role_key not in message:
        raise _lacks_key(message, role_key, number)
    role = layout.roles.get(message[role_key]) if isinstance(message[role_key], str) else None
    if role is None:
        raise Fault(
            "message {number} has the unknown role '{role}'; known are {known}",
            number=number,
            role=str(message[role_key])[:60],
            known=list(layout.roles),
        )
    for key in message.keys() - KEYS - {role_key, content_key}:
        layout.notes.add(Message("messages have a '{key}', which is not used", key=str(key)))
    if role == "system" and layout.tags and not layout.tags.get("system_tag"):
        layout.notes.add(
            Message("tags name no system_tag; messages of the role 'system' are read (LLaMA-Factory drops their rows)")
        )
    content, more = _split_parts(message, content_key, number)
    calls = more.get("tool_calls") or message.get("tool_calls") or message.get("function_call")
    if content_key not in message and not calls:
        raise _lacks_key(message, content_key, number)
    made = _make_message(role, content, calls, number)
    if role == "tool":
        made |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if made["role"] == "assistant":
        thoughts = more.get("reasoning_content", message.get("reasoning_content"))
        if isinstance(thoughts, str):
            made["reasoning_content"] = thoughts
    if not _is_learned(message, number) and made["role"] == "assistant":
        made["learned"] = False
        layout.masked += 1
    return made


def _lacks_key(message: Row, key: str, number: int) -> Fault:
    near = nearest_word(key, map(str, message))
    return Fault("message {number} has no '{key}'{near:suggestion}", number=number, key=key, near=near)


def _make_message(role: str, content: Any, calls: Any, number: int) -> Row:
    """A message of plain text or tool calls."""
    where = Message("message {number}", number=number)
    if role == "assistant" and calls:
        return {"role": role, "content": text_value(content or "", where), "tool_calls": _read_calls(calls, number)}
    if role == "call":
        thought, mark, calls = text_value(content, where).rpartition("</think>")
        return {"role": "assistant", "content": thought + mark, "tool_calls": _read_calls(calls, number)}
    if role == "assistant":
        return {"role": role, "content": filled_text(content, Message("the answer (message {number})", number=number))}
    if role == "tool":
        shown = json.dumps(content, ensure_ascii=False) if isinstance(content, dict | list) else content
        result = Message("the tool's result (message {number})", number=number)
        return {"role": role, "content": text_value(shown, result)}
    return {"role": role, "content": (text_value if role == "system" else filled_text)(content, where)}


def _is_learned(message: Row, number: int) -> bool:
    """What a message says of its weight in the loss: 0 or false, else 1 or true, the default."""
    for key in WEIGHTS:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise Fault(
                "message {number} has {key}: {value}; it must be 1 (learned) or 0 (read only)",
                number=number,
                key=key,
                value=json.dumps(value)[:40],
            )
        if value is not None:
            return bool(value)
    return True


def _split_parts(message: Row, content_key: str, number: int) -> tuple[Any, Row]:
    """The content; of a list of parts (OpenAI's, LLaMA-Factory v1's) its text, and its thoughts and tool calls."""
    parts = message.get(content_key)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) and "type" in p for p in parts):
        return parts, {}
    texts, thoughts, calls = [], [], []
    where = Message("a part of message {number}", number=number)
    for part in parts:
        kind = part["type"]
        if kind == "text":
            texts.append(text_value(part.get("text", part.get("value")), where))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(text_value(part.get("value"), where))
        elif kind in ("tool_call", "tool_calls"):
            found = json_value(part.get("value"), Message("the tool call (message {number})", number=number))
            calls += found if isinstance(found, list) else [found]
        else:
            raise Fault(
                "message {number} has a part of type '{type}'; this kit trains on text",
                number=number,
                type=str(kind)[:60],
            )
    more: Row = {"tool_calls": calls} if calls else {}
    return "".join(texts), more | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})


def _read_calls(given: Any, number: int) -> list[Row]:
    """Tool calls in OpenAI's form, arguments as an object."""
    given = json_value(given, Message("the tool call (message {number})", number=number))
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault('the tool call (message {number}) is not {{"name": ..., "arguments": {{...}}}}', number=number)
        where = Message("the arguments of the tool call (message {number})", number=number)
        arguments = json_value(function.get("arguments") or {}, where)
        if not isinstance(arguments, dict):
            raise Fault("{where} is not an object", where=where)
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def read_tools(fields: Fields) -> dict[str, list[Row]]:
    """{"tools": those of a row in OpenAI's form} where it has any; LLaMA-Factory's bare functions are wrapped."""
    given = json_value(fields.get("tools"), "tools") or []
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Fault("tools is not a list of objects")
    tools = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in given
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise Fault("tools has one without a name")
    return {"tools": tools} if tools else {}


def check_order(messages: list[Row]) -> None:
    """A user's message, then an answer, and so on; tool results follow an answer; the last message is an answer."""
    before = "start"
    for index, message in enumerate(messages, 1):
        role = message["role"]
        if index == 1 and role == "system":
            continue
        if role not in FOLLOWS[before]:
            if before == "start":
                raise Fault(
                    "wrong role order: message 1 has the role {role}; a conversation starts with the user", role=role
                )
            raise Fault(
                "wrong role order: message {number} of role {role} follows one of role {before}",
                number=index,
                role=role,
                before=before,
            )
        before = role
    if before == "start":
        raise Fault("the conversation is empty")
    if before != "assistant":
        raise Fault(
            "wrong role order: the last message has the role {role}; the assistant's answer is missing", role=before
        )


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def alpaca_prompt(fields: Fields) -> list[Row]:
    """instruction and input as the question; history: pairs of earlier questions and answers."""
    messages = []
    history = json_value(fields.get("history"), "history") or []
    if not isinstance(history, list):
        raise Fault("history is not a list of [question, answer] pairs")
    for index, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Fault("item {item} of history is no pair; it must be [question, answer]", item=index)
        question = filled_text(pair[0], Message("the question in item {item} of history", item=index))
        answer = filled_text(pair[1], Message("the answer in item {item} of history", item=index))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    columns = [fields.columns["prompt"], fields.columns["query"]]
    parts = zip((fields["prompt"], fields.get("query")), columns, strict=True)
    question = "\n".join(text_value(part, column) for part, column in parts if part not in (None, ""))
    if not question.strip():
        raise Fault("the question is empty ({columns})", columns=list(filter(None, columns)))
    return [*messages, {"role": "user", "content": question}]


def listed_messages(fields: Fields, layout: Layout) -> list[Row]:
    """The messages of sharegpt, openai and LLaMA-Factory v1."""
    column = layout.columns["messages"]
    given = json_value(fields["messages"], column)
    if given is None:
        raise Fault("{where} is null", where=column)
    if not isinstance(given, list):
        raise Fault("{column} is not a list of messages", column=column)
    if not given:
        raise Fault("the conversation is empty")
    return read_messages(given, layout)


def prompt_messages(fields: Fields, layout: Layout) -> list[Row]:
    """The prompt of a row whose answer stands in a column of its own: its messages, or the columns of a question."""
    if layout.formatting != "alpaca":
        return listed_messages(fields, layout)
    if isinstance(fields.get("prompt"), list):  # TRL's conversational form
        return read_messages(fields["prompt"], layout)
    return alpaca_prompt(fields)


def complete(
    messages: list[Row], fields: Fields, layout: Layout, config: Config, answers: Sequence[Row] = ()
) -> dict[str, list[Row]]:
    """Messages with their system message, name and author filled in, and the tools; checked alone or with answers."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]  # as if there were none: an empty turn would only stand before each conversation
    if not messages:
        raise Fault("the conversation is empty")
    if messages[0]["role"] != "system":
        given = text_value(fields.get("system") or "", Message("the system message"))
        system = given if given.strip() else config.default_system
        messages = [{"role": "system", "content": system}, *messages] if system else messages
    for answer in answers or [None]:
        check_order([*messages, answer] if answer else messages)
    fill_in([*messages, *answers], layout, config)
    return {"messages": messages, **read_tools(fields)}


def fill_in(messages: list[Row], layout: Layout, config: Config) -> None:
    """Puts name and author for {{name}} and {{author}}, unless they are empty: a row may be about such marks."""
    marked = [message for message in messages if "{{" in message["content"]]
    for setting in TEMPLATE_MARKS:
        mark, word = f"{{{{{setting}}}}}", getattr(config, setting)
        found = [message for message in marked if mark in message["content"]]
        if found and word:
            layout.filled[setting] += 1
            for message in found:
                message["content"] = message["content"].replace(mark, word)
