"""The grammars that replies are held to: JSON of a schema, and calls of tools as the model's chat template writes them.

A chat template writes calls in one of three styles (tools.py), which `style_of` finds by rendering one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common import UserError
from inference.engine import Engine
from inference.tools import LIST, OBJECT, TAGS, THINK, XML, Style

Schema = dict[str, Any] | bool

_PROBE = "onecard_probe"


def style_of(engine: Engine) -> Style | None:
    """How the model's chat template writes calls; None where it has no tools."""
    function = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call00001", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": "call00001", "name": _PROBE},
    ]
    try:
        offered = engine.text_of(engine.prompt_ids(talk[:1], [{"type": "function", "function": function}]))
        called = engine.text_of(engine.prompt_ids(talk))
    except UserError:
        return None
    if _PROBE not in offered or _PROBE not in called:
        return None
    if TAGS.opening in called and f"<function={_PROBE}>" in called:
        return XML
    if '"name"' not in called:
        return None
    if TAGS.opening in called:
        return TAGS
    if LIST.opening in called:
        return LIST
    return OBJECT if '"parameters"' in called else None


def json_grammar(schema: Schema) -> str:
    """The grammar of replies that are JSON after `schema`, spaced as models write it."""
    return f"start: %json {_compact(schema)}"


def after_thought(grammar: str, engine: Engine) -> str:
    """The grammar of replies that go on with a thought, which the prompt has opened, before what `grammar` allows."""
    closing = THINK[1].replace("/", r"\/")
    thought = f"PONDERED: /(?s:.)+/ & ~/(?s:.)*{closing}(?s:.)*/"
    start = f"start: PONDERED? {_mark(THINK[1], engine)} /\\n{{0,2}}/ answer"
    return f"{start}\n{thought}\nanswer: {grammar.removeprefix('start: ')}"


def call_grammar(
    style: Style,
    tools: Sequence[dict[str, Any]],
    engine: Engine,
    *,
    required: bool,
    single: bool,
    otherwise: Any = None,
) -> str:
    """The grammar of replies that call `tools` (functions in OpenAI's form).

    `required`: nothing but calls; else a reply may be text (or JSON after the schema `otherwise`) instead, and text may
    stand before calls. `single`: one call at most. Arguments are held to the schemas.
    """
    if style is XML:
        raise UserError("this model calls in XML, which cannot be forced; leave out required, strict and schemas")
    call = {"anyOf": [_call_schema(tool["function"], style, f"json-schema:///tool{i}") for i, tool in enumerate(tools)]}
    one = f"%json {_compact(call)}"
    if style is TAGS:
        opening, closing = (_mark(mark, engine) for mark in (style.opening, style.closing))
        rules = [f'call: {opening} "\\n" body "\\n" {closing}', f"body: {one}"]
        calls = "call" if single else 'call ("\\n" call)*'
        before = "" if required or otherwise is not None else "PROSE? "
    elif style is LIST:
        rules = [f"body: {one}"]
        more = "" if single else '(", " body)* '
        calls = f'{_mark(style.opening, engine)} /[ ]?/ "[" body {more}"]"'
        before = ""
    else:
        rules, calls, before = [f"body: {one}"], "body", ""
    rules.insert(0, f"start: {before}calls" if required else f"start: {before}calls | text")
    rules.insert(1, f"calls: {calls}")
    if not required:
        rules.append("text: PROSE?" if otherwise is None else f"text: %json {_compact(otherwise)}")
    if before or (not required and otherwise is None):
        rules.append(_prose(style))
    return "\n".join(rules)


def _prose(style: Style) -> str:
    """Text that is no call."""
    if style is OBJECT:
        return r"PROSE: /[^{\s](?s:.)*/"
    mark = style.opening.replace("[", r"\[").replace("]", r"\]")
    return f"PROSE: /(?s:.)+/ & ~/(?s:.)*{mark}(?s:.)*/"


def _mark(mark: str, engine: Engine) -> str:
    """A mark in a grammar: the token, where it is one that text is never cut through, else its characters."""
    return f"<[{engine.added_tokens[mark]}]>" if mark in engine.added_tokens else json.dumps(mark)


def _call_schema(function: dict[str, Any], style: Style, root: str) -> dict[str, Any]:
    """`root` names the schema of the arguments, so that its "$ref": "#/$defs/X" is looked up in it."""
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    properties = {"name": {"const": function["name"]}, style.arguments: {"$id": root, **parameters}}
    if style is LIST:
        properties["id"] = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _compact(schema: Any) -> str:
    spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": spaced}
    return json.dumps(schema, ensure_ascii=False)


def checked_grammar(engine: Engine, lark: str) -> str:
    """A grammar for llguidance; raises UserError, with the cause alone, where it cannot be followed."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_lark(lark)
    if fault := LLMatcher.validate_grammar(grammar, engine.grammar_vocabulary):
        raise UserError("replies cannot be held to it: {reason}", reason=_cause(fault))
    return grammar


def _cause(fault: str) -> str:
    """The cause in an error of llguidance; that of a regular expression stands below the expression."""
    lines = [line.strip() for line in fault.strip().splitlines()]
    if "regex parse error" not in lines[0]:
        return lines[0]
    error = next((line for line in lines if line.startswith("error: ")), lines[0])
    return f"the pattern {lines[1]} cannot be used, {error.removeprefix('error: ')}"
