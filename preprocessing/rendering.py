"""Chat templates in Jinja's immutable sandbox, with what transformers gives them.

transformers' own `render_jinja_template` keeps the spans of generation tags in an environment that threads would share;
here a generation tag is a filter that puts LEARNED around what it holds.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preprocessing.faults import Fault

Conversation = dict[str, Any]  # {"messages": [{"role", "content", "tool_calls"?, "learned"?}], "tools"?: [...]}

Span = tuple[int, int]  # characters [start, stop) of a rendered conversation
LEARNED = "\ufdd0"  # stands before and after what is learned; a noncharacter, which no text may contain
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

# What the expressions of a template may run into. (Too deep a recursion is a RuntimeError.)
_PYTHON_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError)
_PYTHON_ERRORS += (SyntaxError, TypeError, ValueError)


def has_generation_tags(text: str) -> bool:
    """Whether a template itself marks what is learned, by `{% generation %} ... {% endgeneration %}`."""
    return _GENERATION.search(text) is not None


def without_generation_tags(text: str) -> str:
    """A template that renders the same without generation tags, which plain Jinja does not know."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", text)


def _tags_as_filter(text: str) -> str:
    """Generation tags as a filter block, which keeps the whitespace control of the tags."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endfilter' if tag[2] else 'filter learned'} {tag[3]}%}}", text)


@functools.lru_cache(maxsize=32)
def compile_template(text: str) -> jinja2.Template:
    """The template, in which generation tags put LEARNED around what they hold; raises Fault where it is no Jinja."""
    with _as_faults():
        return _environment().from_string(_tags_as_filter(text))


def template_variables(text: str) -> set[str]:
    """The names that a template reads, as `messages` and `tools`; raises Fault where it is no Jinja."""
    with _as_faults():
        return find_undeclared_variables(_environment().parse(_tags_as_filter(text)))


def render(
    text: str, conversation: Conversation, names: dict[str, str], *, thinking: bool = True, prompt: bool = False
) -> str:
    """A conversation by the template `text`, with LEARNED around what it marks; `prompt`: with an answer's header.

    `names` are the special tokens of the tokenizer. Raises Fault where the template is no Jinja, or raises itself (the
    messages may not suit it).
    """
    template = compile_template(text)
    with _as_faults():
        return template.render(
            messages=conversation["messages"],
            tools=conversation.get("tools"),
            documents=None,
            add_generation_prompt=prompt,
            enable_thinking=thinking,
            **names,
        )


def render_marked(
    text: str, conversation: Conversation, names: dict[str, str], thinking: bool, endings: tuple[str, ...]
) -> tuple[str, list[Span] | None]:
    """A conversation, and the spans that the template marks, without spaces after the end of a turn (`endings`).

    None for the spans of a template without generation tags.
    """
    marked = render(text, conversation, names, thinking=thinking)
    if not has_generation_tags(text):
        return marked, None
    pieces = marked.split(LEARNED)
    spans, position = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            trimmed = piece.rstrip()
            spans.append((position, position + len(trimmed if trimmed.endswith(endings) else piece)))
        position += len(piece)
    return "".join(pieces), spans


@contextmanager
def _as_faults() -> Iterator[None]:
    """Turns whatever a template may raise into a Fault."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise Fault("it is no valid Jinja: {reason}", reason=str(error)) from None
    except jinja2.TemplateError as error:
        raise Fault("the chat template refuses it: {reason}", reason=str(error)) from None
    except _PYTHON_ERRORS as error:
        raise Fault("the chat template cannot render it: {reason}", reason=f"{type(error).__name__}: {error}") from None


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters |= {"tojson": _to_json, "learned": lambda text: f"{LEARNED}{text}{LEARNED}"}
    return environment


def _raise(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
