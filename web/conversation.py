"""A conversation as the chat page keeps it: what the model reads, what the page shows, what becomes training data.

A turn is {"role": "user" or "tool", "text": the message, "trained": the answer, "base": that of the model before
training}; an answer is the model's own text, thoughts and tool calls included, and is missing until it has come.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common import UserError
from runs.files import read_json, write_json, write_text

Turn = dict[str, str]
Part = tuple[str, str]  # "thought", "call" or "text", and its text without the tags around it

TAGGED = re.compile(r"<(think|tool_call)>(.*?)(?:</\1>|\Z)", re.DOTALL)
KINDS = {"think": "thought", "tool_call": "call"}


# ---------------------------------------------------------------------------------------------------------------------
# What the model reads


def messages(turns: list[Turn], voice: str, system: str = "") -> list[dict[str, Any]]:
    """The conversation for the voice "trained" or "base"; where that has no answer yet, the trained one's stands in."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        messages.append({"role": turn["role"], "content": turn["text"]})
        answer = turn.get(voice, turn.get("trained"))
        if answer is not None:
            messages.append(_answer(answer))
    return messages


def _answer(text: str) -> dict[str, Any]:
    """An assistant's message; its tool calls in OpenAI's form, so that the template writes them in its own."""
    found = calls(text)
    if not found:
        return {"role": "assistant", "content": text}
    rest = "".join(_tagged(part) for part in parts(text) if part[0] != "call")
    made = [{"type": "function", "function": call} for call in found]
    return {"role": "assistant", "content": rest.strip(), "tool_calls": made}


def read_tools(text: str | None) -> list[dict[str, Any]] | None:
    """The tools of the page's field, in OpenAI's form; None where it is empty. Raises UserError for anything else."""
    if not text or not text.strip():
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UserError("the tools are not JSON ({problem}); write a list of functions", problem=error) from None
    tools = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in _listed(given)]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
        raise UserError('a tool has no name; write [{"name": "...", "description": "...", "parameters": {...}}]')
    return [{"type": "function", "function": tool} for tool in tools] or None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows


def parts(text: str) -> list[Part]:
    """An answer cut into thoughts, tool calls and text, in order; what is unfinished reaches to the end."""
    found: list[Part] = []
    end = 0
    if "</think>" in text and "<think>" not in text:  # the template put the opening tag into the prompt
        thought, _, text = text.partition("</think>")
        found.append(("thought", thought.strip()))
    for match in TAGGED.finditer(text):
        found.append(("text", text[end : match.start()].strip()))
        found.append((KINDS[match[1]], match[2].strip()))
        end = match.end()
    rest = text[end:].strip()
    found.append(("call" if _bare_calls(rest) else "text", rest))
    return [part for part in found if part[1]]


def calls(text: str) -> list[dict[str, Any]]:
    """The tool calls of an answer, {"name", "arguments"}; one that is not complete JSON is none."""
    found = []
    for kind, content in parts(text):
        if kind == "call":
            found += _bare_calls(content)
    return found


def _bare_calls(text: str) -> list[dict[str, Any]]:
    """Tool calls written as JSON alone: an object (Llama 3, Qwen) or a list of them (Mistral)."""
    text = text.removeprefix("[TOOL_CALLS]").strip()
    if not text.startswith(("{", "[")):
        return []
    try:
        given = _listed(json.loads(text))
    except ValueError:
        return []
    made = []
    for call in given:
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            return []
        made.append({"name": call["name"], "arguments": arguments})
    return made


def _tagged(part: Part) -> str:
    kind, text = part
    if kind == "thought":
        return f"<think>\n{text}\n</think>\n\n"
    return f"<tool_call>\n{text}\n</tool_call>\n" if kind == "call" else text


def with_part(text: str, number: int, new: str) -> str:
    """The answer with its part `number` (see `parts`) replaced; an empty one is left out."""
    cut = parts(text) or [("text", "")]
    if [kind for kind, _ in cut] == ["call"] and not TAGGED.search(text):
        return new.strip()  # a call without tags stays without
    cut[number] = (cut[number][0], new.strip())
    return "".join(_tagged(part) for part in cut if part[1]).strip()


def shown(turns: list[Turn], voice: str, titles: dict[str, str], streaming: bool = False) -> list[dict[str, Any]]:
    """The messages of a gr.Chatbot; thoughts, tool calls and results are folded under `titles`."""
    made: list[dict[str, Any]] = []
    for turn in turns:
        made.append({"role": "user", "content": turn["text"]})
        if turn["role"] == "tool":
            made[-1]["metadata"] = {"title": titles["result"], "status": "done"}
        if voice not in turn:
            continue
        cut = parts(turn[voice]) or [("text", "")]
        for number, (kind, content) in enumerate(cut):
            message: dict[str, Any] = {"role": "assistant", "content": content or titles["empty"]}
            if kind != "text":
                going_on = streaming and turn is turns[-1] and number == len(cut) - 1
                message["metadata"] = {"title": titles[kind], "status": "pending" if going_on else "done"}
            if not content and streaming:
                message["content"] = "…"
            made.append(message)
    return made


def find_message(turns: list[Turn], voice: str, index: int) -> tuple[int, int | None]:
    """Which turn the message `index` of `shown` belongs to, and which part of its answer it is (None: the question)."""
    for number, turn in enumerate(turns):
        count = 1 + (len(parts(turn[voice]) or [""]) if voice in turn else 0)
        if index < count:
            return number, None if index == 0 else index - 1
        index -= count
    raise IndexError(index)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes training data

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


def row(turns: list[Turn], system: str, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The trained voice's conversation as one row in OpenAI's form; raises UserError where nothing can be learned."""
    if not any("trained" in turn for turn in turns):
        raise UserError("nothing has been said yet; send a message first")
    for number, turn in enumerate(turns, 1):
        if not turn.get("trained", "").strip():
            raise UserError(
                "turn {number} has no answer, and training needs one; edit it, or delete the turn", number=number
            )
    made: dict[str, Any] = {"messages": [_openai(message) for message in messages(turns, "trained", system)]}
    if tools:
        made["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return made


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own form has a tool call's arguments as text."""
    made = dict(message)
    if "tool_calls" in message:
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in functions]
        made["tool_calls"] = [{"type": "function", "function": call} for call in texts]
    return made


def entry(file_name: str, tools: bool = False) -> dict[str, Any]:
    """What dataset_info.json says of a file of such rows; complete, so that LLaMA-Factory reads it too."""
    columns = {"messages": "messages", "tools": "tools"} if tools else {"messages": "messages"}
    return {"file_name": file_name, "formatting": "openai", "columns": columns, "tags": TAGS}


def add_to_data(made: dict[str, Any], name: str, folder: Path) -> int:
    """Adds a row to NAME.json in the folder of dataset_info.json, and registers it there; gives the count of rows.

    Raises UserError where the name is another dataset's, or the file holds something else.
    """
    if not re.fullmatch(r"[\w-]{1,60}", name):
        raise UserError("'{name}' cannot be the name of a dataset; use at most 60 letters, digits, - and _", name=name)
    registry, file = folder / "dataset_info.json", folder / f"{name}.json"
    known = read_json(registry, {})
    if not isinstance(known, dict):
        raise UserError("{file} is not an object of datasets; correct it first", file=registry)
    registered = known.get(name)
    if registered and (registered.get("file_name"), registered.get("formatting")) != (file.name, "openai"):
        raise UserError("{file} has another dataset {name} already; give another name", file=registry, name=name)
    if file.exists() and not registered:
        raise UserError("{file} exists already and is not a dataset of conversations; give another name", file=file)
    rows = read_json(file, [])
    if not isinstance(rows, list):
        raise UserError("{file} is not a list of conversations; give another name", file=file)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, [*rows, made])
    wanted = entry(file.name, "tools" in made or "tools" in (registered or {}).get("columns", {}))
    if registered != wanted:
        _register(registry, known, name, wanted)
    return len(rows) + 1


def _register(registry: Path, known: dict[str, Any], name: str, wanted: dict[str, Any]) -> None:
    """Adds a line to dataset_info.json and leaves its other lines as they are written, where that can be done."""
    text = registry.read_text(encoding="utf-8-sig").rstrip() if registry.exists() else "{}"
    line = f"  {json.dumps(name)}: {json.dumps(wanted, ensure_ascii=False)}\n}}\n"
    new = f"{text[:-1].rstrip()}{',' if known else ''}\n{line}"
    after = {**known, name: wanted}
    if name in known or json.loads(new) != after:
        new = json.dumps(after, ensure_ascii=False, indent=2) + "\n"
    write_text(registry, new)
