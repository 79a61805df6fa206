"""Calls of tools in the text of a reply.

A chat template writes calls in one of four styles:

    tags      <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>          Qwen, Hermes, ChatML
    XML       <tool_call> <function=f> <parameter=x> 1 </parameter> </function> </tool_call>, a line each    Qwen3.5
    list      [TOOL_CALLS] [{"name": "f", "arguments": {...}, "id": "..."}]       Mistral
    object    {"name": "f", "parameters": {...}}                                  Llama 3; the whole reply
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
THINK = ("<think>", "</think>")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Style:
    """How calls are written: marks before and after, and the key of the arguments."""

    name: str
    opening: str
    closing: str
    arguments: str = "arguments"


TAGS = Style("tags", "<tool_call>", "</tool_call>")
LIST = Style("list", "[TOOL_CALLS]", "")
XML = Style("tags", "<tool_call>", "</tool_call>", "")
OBJECT = Style("object", "", "", "parameters")


@dataclass(frozen=True)
class ToolUse:
    """The tools that a reply may call: how calls are written, the tools' names, and whether one call is the most."""

    style: Style
    names: tuple[str, ...]
    single: bool = False
    texts: frozenset[tuple[str, str]] = frozenset()  # function and argument: these are texts, whatever they look like


def call_id() -> str:
    """Nine letters and digits, as Mistral's template wants them."""
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(9))


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON text, `index` counts the calls of a reply."""

    name: str
    arguments: str
    index: int = field(default=0, compare=False)
    id: str = field(default_factory=call_id, compare=False)


@dataclass(frozen=True)
class Thought:
    """A piece of what a model thinks before it answers: no part of the answer, and calls in it are drafts."""

    text: str


def overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` with which `mark` begins, but not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


class ThoughtReader:
    """Separates thoughts, between <think> and </think>, from the rest of a growing reply.

    `open`: the prompt has opened a thought already.
    """

    def __init__(self, open: bool) -> None:
        self.inside, self.held, self.blank = open, "", open  # blank: line ends at the start of a part are left out

    def feed(self, text: str) -> Iterator[str | Thought]:
        self.held += text
        while True:
            mark = THINK[self.inside]
            before, found, after = self.held.partition(mark)
            kept = "" if found else before[len(before) - overlap(before, mark) :]
            shown = before[: len(before) - len(kept)]
            shown = shown.rstrip("\n") if self.inside else shown
            self.held = after if found else before[len(shown) :]
            yield from self._part(shown)
            if not found:
                return
            self.inside, self.blank = not self.inside, True

    def end(self) -> Iterator[str | Thought]:
        rest, self.held = self.held, ""
        return self._part(rest.rstrip("\n") if self.inside else rest)

    def _part(self, text: str) -> Iterator[str | Thought]:
        text = text.lstrip("\n") if self.blank else text
        if text:
            self.blank = False
            yield Thought(text) if self.inside else text


class CallReader:
    """Separates text from calls in a growing reply. A call comes as a whole; what only looks like one stays text."""

    def __init__(self, style: Style, names: Sequence[str], texts: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.style, self.names, self.texts = style, frozenset(names), texts
        self.held, self.inside, self.begun, self.calls = "", False, False, 0

    def feed(self, text: str) -> list[str | Call]:
        """What is certain after `text`: pieces of text, and calls."""
        self.held += text
        reader = {"tags": self._tags, "list": self._list, "object": self._object}[self.style.name]
        return [part for part in reader() if part]

    def end(self) -> list[str | Call]:
        """The rest: an unfinished call is text."""
        if self.inside and self.style.name == "tags":
            rest = self._call(self.held) or self.style.opening + self.held
        elif self.inside and self.style is LIST:
            rest = self.held.lstrip(" \n[,]") if self.calls else self.style.opening + self.held
        else:
            rest = self.held
        self.held = ""
        return [rest] if rest else []

    def _tags(self) -> Iterator[str | Call]:
        opening, closing = self.style.opening, self.style.closing
        while True:
            mark = closing if self.inside else opening
            before, found, after = self.held.partition(mark)
            if not found:
                break
            self.held, was_inside, self.inside = after, self.inside, not self.inside
            if was_inside:
                yield self._call(before) or f"{opening}{before}{closing}"
            elif self.calls:
                yield before.strip("\n")
            else:
                yield before.rstrip("\n")
        if not self.inside:
            yield self._safe(opening)

    def _safe(self, mark: str) -> str:
        """What can be shown of the held text: no line ends and no start of a mark at its end."""
        shown = self.held[: len(self.held) - overlap(self.held, mark)].rstrip("\n")
        self.held = self.held[len(shown) :]
        return shown

    def _list(self) -> Iterator[str | Call]:
        if not self.inside:
            before, found, after = self.held.partition(self.style.opening)
            if not found:
                yield self._safe(self.style.opening)
                return
            self.held, self.inside = after, True
            yield before
        while self.held:
            rest = self.held.lstrip(" \n[,]")
            try:
                value, end = _DECODER.raw_decode(rest)
            except ValueError:
                return
            self.held = rest[end:]
            yield self._made(value) or rest[:end]

    def _object(self) -> Iterator[str | Call]:
        """The reply is a call as a whole or text as a whole; the first character tells which it may be."""
        if self.begun:
            yield self._take()
            return
        start = self.held.lstrip().removeprefix("<|python_tag|>")
        if start and not start.startswith("{"):
            if "<|python_tag|>".startswith(start):
                return
            self.begun = True
            yield self._take()
            return
        try:
            value, end = _DECODER.raw_decode(start)
        except ValueError:
            return
        call = self._made(value)
        self.begun = call is None
        self.held = start[end:].lstrip(" ;\n") if call else self.held
        yield call or self._take()

    def _take(self) -> str:
        shown, self.held = self.held, ""
        return shown

    def _call(self, text: str) -> Call | None:
        if self.style is XML:
            function = _FUNCTION.fullmatch(text)
            return function and self._made({"name": function[1], "arguments": self._arguments(*function.groups())})
        try:
            return self._made(json.loads(text))
        except ValueError:
            return None

    def _arguments(self, function: str, text: str) -> dict[str, Any]:
        """The arguments in XML: what is no text by its schema is JSON where it can be."""
        found: dict[str, Any] = {}
        for name, value in _PARAMETER.findall(text):
            try:
                found[name] = value if (function, name) in self.texts else json.loads(value)
            except ValueError:
                found[name] = value
        return found

    def _made(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(arguments, dict):
            return None
        self.calls += 1
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False), self.calls - 1)
