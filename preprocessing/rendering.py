"""Chat templates are programs that come with a model: they run in Jinja's sandbox, with limits on time and output.

What they may call is what transformers gives them. The limits are counted, not timed by a clock alone, so that the same
template ends the same way on every machine: every loop, call and piece of output is charged to the budget of the
rendering, and what would make a huge text at once (`'x' * 10**9`) is refused before it is made.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from preprocessing.faults import Fault

CPU_SECONDS = 2.0  # of one rendering, or of one compilation; an ordinary one takes a thousandth
STEPS = 5_000_000  # rounds of loops in one rendering
CALL = 5  # steps that a call costs
STEPS_PER_LOOK = 200  # after so many steps the clock is looked at: a system call, which most renderings do without
CHARACTERS = 64_000_000  # of one text, and of all that one rendering writes
ITEMS = 1_000_000  # of one list, and bits of one number
TEMPLATE_CHARACTERS = 1_000_000
LEARNED = "\ufdd0"  # stands before and after what is learned; a noncharacter, which no text may contain
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_WIDE_FORMAT = re.compile(r"\d{6}|\*")  # a width of a million characters, or one from an argument

# What a template may raise: its own errors, and those of Python that its expressions run into.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError)
_TEMPLATE_ERRORS += (NameError, RuntimeError, SyntaxError, TypeError, ValueError)


class _LimitExceeded(RuntimeError):
    """A template that takes too long or writes too much."""


def has_generation_tags(text: str) -> bool:
    """Whether a template itself marks what is learned, by `{% generation %} ... {% endgeneration %}`."""
    return _GENERATION.search(text) is not None


def without_generation_tags(text: str) -> str:
    """A template that renders the same without generation tags, which plain Jinja does not know."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", text)


@functools.lru_cache(maxsize=32)
def compile_template(text: str) -> jinja2.Template:
    """The template, in which generation tags put LEARNED around what they hold; raises Fault where it is no Jinja."""
    if len(text) > TEMPLATE_CHARACTERS:
        raise Fault("the chat template loops for too long or writes too much")
    return _guarded(lambda: _environment().from_string(_tags_as_filter(text)))


def template_variables(text: str) -> set[str]:
    """The names that a template reads, as `messages` and `tools`; raises Fault where it is no Jinja."""
    from jinja2.meta import find_undeclared_variables

    return _guarded(lambda: find_undeclared_variables(_environment().parse(_tags_as_filter(text))))


def render_template(text: str, variables: dict[str, Any]) -> str:
    """What the template writes, with LEARNED around what it marks.

    Raises Fault where it is no Jinja, where it raises (the messages may not suit it), and where it exceeds a limit.
    """
    template = compile_template(text)

    def write() -> str:
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > CHARACTERS:
                raise _LimitExceeded
            pieces.append(piece)
        return "".join(pieces)

    return _guarded(write)


def _guarded(work: Callable[[], Any]) -> Any:
    """The result of `work`, with a new budget; raises Fault for whatever a template may do wrong."""
    _budget.start()
    try:
        return work()
    except _LimitExceeded:
        raise Fault("the chat template loops for too long or writes too much") from None
    except RecursionError:
        raise Fault("the chat template loops for too long or writes too much") from None
    except jinja2.TemplateSyntaxError as error:
        raise Fault("it is no valid Jinja: {reason}", reason=str(error)) from None
    except jinja2.TemplateError as error:
        raise Fault("the chat template refuses it: {reason}", reason=str(error)) from None
    except _TEMPLATE_ERRORS as error:
        raise Fault("the chat template cannot render it: {reason}", reason=f"{type(error).__name__}: {error}") from None


def _tags_as_filter(text: str) -> str:
    """Generation tags as a filter block, which keeps the whitespace control of the tags."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endfilter' if tag[2] else 'filter learned'} {tag[3]}%}}", text)


# ---------------------------------------------------------------------------------------------------------------------
# The budget of a rendering


class _Budget(threading.local):
    """What the rendering of this thread may still spend."""

    steps, characters, end, next_look = STEPS, CHARACTERS, None, STEPS

    def start(self) -> None:
        self.steps, self.characters, self.end = STEPS, CHARACTERS, None
        self.next_look = STEPS - STEPS_PER_LOOK

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < self.next_look:
            self.next_look = self.steps - STEPS_PER_LOOK
            now = time.thread_time()
            self.end = self.end or now + CPU_SECONDS
            if self.steps < 0 or now > self.end:
                raise _LimitExceeded

    def write(self, value: Any) -> Any:
        """The value of an expression that is written out."""
        if isinstance(value, str):
            self.characters -= len(value)
            if self.characters < 0:
                raise _LimitExceeded
        return value


_budget = _Budget()


def _check_size(size: int, limit: int = CHARACTERS) -> None:
    if size > limit:
        raise _LimitExceeded


def _check_numbers(values: Iterable[Any]) -> None:
    """Raises where an argument is a number so large that a text of that width would be one too."""
    if any(isinstance(value, int) and abs(value) > ITEMS for value in values):
        raise _LimitExceeded


def _size(value: Any) -> int:
    """What a value adds to the limit of CHARACTERS: of a text its characters, of a list so many that ITEMS fill it."""
    if isinstance(value, list | tuple):
        return len(value) * (CHARACTERS // ITEMS)
    return len(value) if isinstance(value, str | bytes) else 0


def _counted(items: Any) -> Any:
    """What a loop walks over, charged to the budget."""
    try:
        _budget.step(len(items) + 1)
    except TypeError:  # a generator, whose length is not known
        return _counted_one_by_one(items)
    return items


def _counted_one_by_one(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _budget.step()
        yield item


# ---------------------------------------------------------------------------------------------------------------------
# The environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Limiter().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_size(_size(left) + _size(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _check_size(_size(some) * times)
        if operator in "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * (right if operator == "**" else 1) + right.bit_length(), ITEMS // 10)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.step(CALL)
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _check_method(text, method.__name__, args, kwargs)
        return super().call(context, obj, *args, **kwargs)


class _Limiter(NodeTransformer):
    """Puts filters into a template's tree that charge loops and joined texts to the budget."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "concatenated")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_budget.write)
    environment.globals |= {"raise_exception": _raise, "strftime_now": time.strftime}
    del environment.globals["lipsum"]
    for name in ("batch", "center", "format", "indent", "round", "slice"):
        environment.filters[name] = _with_checked_numbers(FILTERS[name])
    environment.filters |= {
        "tojson": _to_json,
        "learned": lambda text: f"{LEARNED}{text}{LEARNED}",
        "counted": jinja2.pass_context(lambda _, items: _counted(items)),  # of a context: not at compile time
        "concatenated": jinja2.pass_context(lambda _, parts: _concatenated(parts)),
        "join": _join,
        "replace": _replace,
    }
    return environment


def _raise(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_numbers([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _concatenated(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    items = list(_counted(value))
    _check_size(sum(map(_size, items)) + len(items) * _size(d))
    return FILTERS["join"](context, items, d, attribute)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _check_method(str(text), "replace", (str(old), str(new)), {})
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _with_checked_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refused where an argument is a huge number or a format asks for a huge width."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers([*args, *kwargs.values()])
        if function is FILTERS["format"]:
            _check_format(str(args[0]))
        return function(*args, **kwargs)

    return checked


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise _LimitExceeded


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a method of a text whose result would be huge."""
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(sum(map(_size, args[0])) + len(args[0]) * len(text))
    elif name in ("format", "format_map"):
        _check_numbers([*args, *kwargs.values()])
        if re.search(r"\{[^}]*\d{6}", text):
            raise _LimitExceeded
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_numbers(args)
