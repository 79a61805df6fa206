"""Conversations -> token ids and labels, by the Jinja files of templates/ or the tokenizer's own chat template.

A template marks what is learned by `{% generation %} ... {% endgeneration %}`; the words and the end of each of the
assistant's turns stand inside. Everything about a template is in its file: the comment at its head names the control
tokens it needs, and one more template is one more file.

Only the template's own control tokens become control tokens; the same characters inside a message stay text. Control
tokens are those that the tokenizer calls special, and added tokens that the template writes around plain words. A row
that holds such characters takes a detour: their first character is replaced, while rendering, by a stand-in of the same
length, the control tokens left over are the template's own, and these are encoded by a copy of the tokenizer that knows
control tokens only under other names. The stand-ins are Unicode noncharacters (U+FDD0..U+FDEF), which no text may
contain.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common import ROOT, Message, UserError, nearest
from preprocessing.faults import Fault
from preprocessing.truncation import shorten

TEMPLATES = ROOT / "templates"
OWN = "the tokenizer's own"  # the name of a template that is no file of templates/

Conversation = dict[str, Any]  # {"messages": [{"role", "content", "tool_calls"?, "learned"?}], "tools"?: [...]}
# {"input_ids": list[int], "labels": list[int], "truncated": bool, "whole_length": int, "left_out": Counter}
Sample = dict[str, Any]
Span = tuple[int, int]  # characters [start, stop) of a rendered conversation

_LEARNED = "\ufdd0"  # stands before and after what is learned
_CONTROL = 0xFDD1  # + i: the first character of a control token of the template
_TEXT = 0xFDDF  # + i: the first character of text that looks like a control token
_KINDS = 14  # different first characters that fit into each of these two ranges
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_HEADER = re.compile(r"\{#.*?\btokens:(.*?)-?#\}", re.DOTALL)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that fits a tokenizer; `text` is Jinja with generation tags where it has any."""

    name: str  # of the file, or OWN
    text: str
    stop: tuple[str, ...]  # the control tokens that end an answer
    has_tools: bool

    @property
    def saved(self) -> str:
        """The same without generation tags, rendering the same: what is written as chat_template.jinja."""
        return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", self.text)

    @property
    def tagged(self) -> bool:
        """Whether the template itself says what is learned."""
        return _GENERATION.search(self.text) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Finding a template


def template_names() -> list[str]:
    """The names of templates/*.jinja."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def load_template(name: str | None, tokenizer: Any) -> ChatTemplate:
    """The template `name` of templates/, or the tokenizer's own for None.

    Raises UserError for an unknown name, for control tokens that the tokenizer lacks, for a tokenizer without a
    template, and for an own template whose answers cannot be found in what it renders.
    """
    if name is None:
        text = _own_text(tokenizer)
        return _probe(OWN, text, tokenizer)
    check_name(name)
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    lacking = _lacking(text, tokenizer)
    if lacking:
        raise UserError(
            f"template {name} needs control tokens that this model's tokenizer lacks: {', '.join(lacking)}.\n"
            + _advice(tokenizer, named=True)
        )
    return _probe(name, text, tokenizer)


def check_name(name: str) -> None:
    """Raises UserError where no file of templates/ has that name."""
    if name not in template_names():
        raise UserError(
            f"there is no template {name!r}{nearest(name, template_names())}.\n"
            f"Use one of {', '.join(template_names())}, or leave template out for the tokenizer's own."
        )


def _own_text(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"this model's tokenizer has no chat template of its own.\n{_advice(tokenizer)}")
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several, none of them called default
        raise UserError(
            f"this model's tokenizer has several chat templates and no default.\n{_advice(tokenizer)}"
        ) from None


def _advice(tokenizer: Any, named: bool = False) -> str:
    """What to do about a template that does not fit, a `named` one or the tokenizer's own."""
    fitting = [n for n in template_names() if not _lacking((TEMPLATES / f"{n}.jinja").read_text("utf-8"), tokenizer)]
    own = ", or leave template out for the tokenizer's own" if named and tokenizer.chat_template else ""
    return f"Templates that fit it: {', '.join(fitting) or 'none'}{own}."


def _lacking(text: str, tokenizer: Any) -> list[str]:
    """The control tokens of a template's header that the tokenizer does not read as one token each."""
    header = _HEADER.search(text)
    special = tokenizer.special_tokens_map
    missing = []
    for token in header[1].split() if header else []:
        spelled = special.get(token) if token.endswith("_token") else token
        if not spelled or len(_backend(tokenizer).encode(spelled, add_special_tokens=False).ids) != 1:
            missing.append(token)
    return missing


_TURNS = [{"role": role, "content": f"{role} words {i}"} for i in (1, 2) for role in ("user", "assistant")]


def _probe(name: str, text: str, tokenizer: Any) -> ChatTemplate:
    """The ChatTemplate of `text`, tried on two turns: their answers must be found, with a control token at the end."""
    import jinja2
    from jinja2 import meta

    fault = f"the chat template ({name})"
    try:
        environment = _environment()
        variables = meta.find_undeclared_variables(environment.parse(_filtered(text)))
        template = ChatTemplate(name, text, (), "tools" in variables)
        coder = _coder(tokenizer, text)
        rendered = _render(template, {"messages": _TURNS}, coder)
    except (jinja2.TemplateError, TypeError, _RowFault) as error:
        raise UserError(f"{fault} cannot be used: {error}.\n{_advice(tokenizer, name != OWN)}") from None
    ends = []
    for number, (start, stop) in enumerate(rendered.spans, 1):
        answer = rendered.text[start:stop]
        end = coder.last_control(answer)
        if end is not None and f"assistant words {number}" in answer and "user words" not in answer:
            ends.append(answer[end:].strip())
    if len(ends) != 2 or ends[0] != ends[1] or ends[0] not in coder.special:
        raise UserError(f"{fault} does not end every answer with a control token.\n{_advice(tokenizer, name != OWN)}")
    return ChatTemplate(name, text, (ends[0],), template.has_tools)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


class _RowFault(Exception):
    """A conversation that cannot become a sample; the text is the reason."""


@dataclass
class _Rendered:
    """A conversation as text, the spans to learn (one an answer), and the guard of look-alikes, where it has any."""

    text: str
    spans: list[Span]
    guarded: bool


def _filtered(text: str) -> str:
    """Generation tags as a filter block, which keeps the whitespace control of the tags."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endfilter' if tag[2] else 'filter learned'} {tag[3]}%}}", text)


@functools.cache
def _environment() -> Any:
    """transformers' Jinja environment (its filters, sandbox and whitespace rules) with the filter `learned`."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("{# one environment for this kit #}").environment
    environment.filters["learned"] = lambda text: f"{_LEARNED}{text}{_LEARNED}"
    return environment


@functools.lru_cache(maxsize=16)
def _compile(text: str) -> Any:
    return _environment().from_string(_filtered(text))


def _render(template: ChatTemplate, conversation: Conversation, coder: _Coder, thinking: bool = True) -> _Rendered:
    """Raises _RowFault where the template refuses the conversation or would leave a part of it out."""
    conversation = _plain(conversation)
    messages, tools = conversation["messages"], conversation.get("tools")
    if not template.has_tools and (tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)):
        raise _RowFault(f"it has tools, and the chat template ({template.name}) has none")
    guarded = coder.looks_like_control(conversation)
    if guarded:
        conversation = coder.guard(conversation)
    text = _jinja(template.text, conversation, coder, thinking)
    if template.tagged:
        text, spans = _split(text, coder)
    else:
        spans = _find_answers(template.text, conversation, text, coder, thinking)
    return _Rendered(coder.unguard(text) if guarded else text, spans, guarded)


def _plain(conversation: Conversation) -> Conversation:
    """The conversation with contents that are strings and arguments of calls that are not: copied only if needed."""
    messages = conversation["messages"]
    if all(type(message.get("content")) is str and not message.get("tool_calls") for message in messages):
        return conversation
    messages = [{**message, "content": message.get("content") or ""} for message in messages]
    for message in messages:
        if not isinstance(message["content"], str):
            raise _RowFault(f"the content of a message is {type(message['content']).__name__}, not text")
        if message.get("tool_calls"):
            message["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return {**conversation, "messages": messages}


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's form with its arguments as an object, which templates write as JSON themselves."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except json.JSONDecodeError as error:
            raise _RowFault(f"the arguments of a tool call are no JSON ({error})") from None
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": function}


def _jinja(text: str, conversation: Conversation, coder: _Coder, thinking: bool, *, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return _compile(text).render(
            messages=conversation["messages"],
            tools=conversation.get("tools"),
            documents=None,
            add_generation_prompt=prompt,
            enable_thinking=thinking,
            **coder.names,
        )
    except TemplateError as error:
        raise _RowFault(f"the chat template refuses it: {error}") from None
    except TypeError as error:  # an own template that adds up None and text
        raise _RowFault(f"the chat template cannot render it: {error}") from None


def _split(marked: str, coder: _Coder) -> tuple[str, list[Span]]:
    """The text without marks, and the spans between them, without spaces after the end of a turn."""
    pieces = marked.split(_LEARNED)
    spans, position = [], 0
    for i, piece in enumerate(pieces):
        if i % 2:
            words = piece.rstrip()
            spans.append((position, position + len(words if words.endswith(coder.endings) else piece)))
        position += len(piece)
    return "".join(pieces), spans


# ---------------------------------------------------------------------------------------------------------------------
# The answers in a template without generation tags


@dataclass(frozen=True)
class _Shape:
    """What a template writes around answers: `closing` after each, `openings[role]` between a message and an answer."""

    closing: str
    openings: dict[str, str]


def _find_answers(text: str, conversation: Conversation, rendered: str, coder: _Coder, thinking: bool) -> list[Span]:
    """Where the assistant's turns stand in `rendered`, by rendering once more with marked messages.

    In the second rendering the first and the last letter of each message (and the names of the tools it calls) are
    private characters, one for each message; where both renderings differ, that message stands. A turn starts where
    the prompt for it would end and reaches through the template's closing. Raises _RowFault wherever that is not
    certain: no answer is better than a wrong mask.
    """
    messages = conversation["messages"]
    marked = {**conversation, "messages": [_mark(m, chr(0xF0000 + i), coder) for i, m in enumerate(messages)]}
    places = _differences(rendered, _jinja(text, marked, coder, thinking))
    shape = _shape(text, coder, thinking)
    order = sorted(places, key=lambda i: places[i][0])
    spans, previous, before = [], -1, 0  # the message before, and where it ends
    for number, i in enumerate(order):
        first, last = places[i][0], places[i][-1] + 1
        if first < before:
            raise _RowFault(_UNCERTAIN)
        if messages[i]["role"] == "assistant":
            opening = shape.openings.get(messages[i - 1]["role"]) if i > 0 else None
            written = previous == i - 1 or not _has_words(messages[i - 1], coder)
            if opening is None or not written:
                raise _RowFault(_UNCERTAIN)
            start = _answer_start(rendered, before, first, opening, previous == i - 1, coder)
            following = places[order[number + 1]][0] if number + 1 < len(order) else len(rendered)
            end = rendered.find(shape.closing, last, following)
            if end < 0:
                raise _RowFault(_UNCERTAIN)
            last = end + len(shape.closing)
            spans.append((start, last))
        else:
            last += _unmarked_end(messages[i]["content"], rendered[last:], coder)
        previous, before = i, last
    if any(m["role"] == "assistant" and i not in places and _has_words(m, coder) for i, m in enumerate(messages)):
        raise _RowFault("the tokenizer's own chat template leaves a message out; set template to one that fits")
    return spans


def _answer_start(rendered: str, before: int, words: int, opening: str, adjoining: bool, coder: _Coder) -> int:
    """Where the answer starts whose first letter is at `words`: behind what a prompt for it would end with.

    `before` is the end of the message that it answers if that is `adjoining`; an empty message leaves no trace. An
    answer may leave out the end of the opening if no control token is in that (thoughts that are not kept).
    """
    if not adjoining:
        at = rendered.rfind(opening, before, words)
        if at < 0 or not opening.strip():
            raise _RowFault(_UNCERTAIN)
        return at + len(opening)
    common = _common(opening, rendered[before:words], coder)
    if coder.control.search(opening, len(common)) or (opening.strip() and not common.strip()):
        raise _RowFault(_UNCERTAIN)
    return before + len(common)


_UNCERTAIN = (
    "its answers cannot be told for certain in the tokenizer's own chat template; set template to one that fits"
)


def _differences(rendered: str, shadow: str) -> dict[int, list[int]]:
    """For each message with marks in `shadow` their places; raises _RowFault if anything else differs."""
    places: dict[int, list[int]] = {}
    last, same = 0, len(shadow) == len(rendered)
    for match in re.finditer("[\U000f0000-\U000ffffd]", shadow):
        at = match.start()
        if rendered[at : at + 1] != match[0]:
            same = same and shadow[last:at] == rendered[last:at]
            places.setdefault(ord(match[0]) - 0xF0000, []).append(at)
            last = at + 1
    if not same or shadow[last:] != rendered[last:]:
        raise _RowFault(_UNCERTAIN)
    return places


def _mark(message: dict[str, Any], mark: str, coder: _Coder) -> dict[str, Any]:
    """The message with the first and the last letter of its words, and the names of its calls, replaced by `mark`."""
    content = message["content"]
    if _has_words({"content": content}, coder):
        first = coder.skipped.match(content).end()
        last = len(content) - coder.skipped_backwards.match(content[::-1]).end() - 1
        content = content[:first] + mark + content[first + 1 :]
        content = content[:last] + mark + content[last + 1 :]
    marked = {**message, "content": content}
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": mark * len(call["function"]["name"])}}
            for call in message["tool_calls"]
        ]
    return marked


def _has_words(message: dict[str, Any], coder: _Coder) -> bool:
    """Whether there is more in it than spaces, quotes and added tokens like </think>."""
    return bool(message.get("tool_calls")) or coder.skipped.match(message["content"]).end() < len(message["content"])


def _unmarked_end(content: str, following: str, coder: _Coder) -> int:
    """How many characters of `content` stand after its last mark in `following`, the rest of the rendering.

    They stand there as they are, as JSON has them (Llama 3.1's tool results), or without spaces at the end.
    """
    rest = content[len(content) - coder.skipped_backwards.match(content[::-1]).end() :]
    ends = (rest, json.dumps(rest, ensure_ascii=False)[1:-1], rest.rstrip(), "")
    return next(len(end) for end in ends if following.startswith(end))


@functools.lru_cache(maxsize=64)
def _shape(text: str, coder: _Coder, thinking: bool) -> _Shape:
    """The shape of a template, from conversations with known words; raises _RowFault where it has no closing."""

    def turn(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": f"the words of {role}", **more}

    turns = [turn("user"), turn("assistant"), turn("user"), turn("assistant")]
    pieces = _jinja(text, {"messages": turns}, coder, thinking).split(turns[1]["content"])
    closing = _common(pieces[1], pieces[-1], coder).rstrip() if len(pieces) == 3 else ""
    eos = coder.names.get("eos_token")
    if eos and eos in closing:  # Command R goes on with the start of the next turn
        closing = closing[: closing.index(eos) + len(eos)]
    if not coder.control.search(closing):
        raise _RowFault("it does not end every answer with a control token")
    call = {"type": "function", "id": "call00001", "function": {"name": "call", "arguments": {}}}
    starts = {"user": [turn("user")], "system": [turn("system")]}
    starts["tool"] = [
        turn("user"),
        turn("assistant", content="", tool_calls=[call]),
        turn("tool", name="call", tool_call_id=call["id"]),
    ]
    openings = {}
    for role, messages in starts.items():
        with contextlib.suppress(_RowFault):
            prompt = _jinja(text, {"messages": messages}, coder, thinking, prompt=True)
            _, words, opening = prompt.rpartition(messages[-1]["content"])
            if words:
                openings[role] = opening
    return _Shape(closing, openings)


def _common(one: str, other: str, coder: _Coder) -> str:
    """The longest common start that ends inside no word, tag or added token."""
    for unit in coder.units.finditer(one):
        if not other.startswith(unit[0], unit.start()):
            return one[: unit.start()]
    return one


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def _backend(tokenizer: Any) -> Any:
    """The fast tokenizer of the tokenizers library; raises UserError where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "this model's tokenizer has no fast version (tokenizer.json).\n"
            "Convert it with transformers, or use a model that has one."
        )
    return backend


class _Coder:
    """What is known of one tokenizer: its control tokens, and how text is encoded in which only some are meant.

    `marks` are control tokens that the tokenizer does not call special.
    """

    def __init__(self, tokenizer: Any, marks: frozenset[str] = frozenset()) -> None:
        self.backend = backend = _backend(tokenizer)
        self.names: dict[str, str] = tokenizer.special_tokens_map  # bos_token, eos_token, ...: what templates may use
        added = backend.get_added_tokens_decoder()
        self.special = {
            token.content: i
            for i, token in added.items()
            if token.content and (token.special or token.content in marks)
        }
        self.unknown = self.special.get(str(tokenizer.unk_token)) if tokenizer.unk_token else None
        self.firsts = sorted({token[0] for token in self.special})
        self.prefixes = tuple({token[:2] for token in self.special})
        self.endings = tuple(self.special)
        self.control = _any_of(self.special)
        words = [token.content for token in added.values() if token.content.strip()]
        keep = r'[\s"\\\x00-\x1f]'  # what JSON may escape keeps its length only if it stays
        self.skipped = re.compile(f"(?:{_any_of(words).pattern}|{keep})*")
        self.units = re.compile(rf"{_any_of(words).pattern}|</?\w+>|\w+|\s|.", re.DOTALL)
        self.skipped_backwards = re.compile(f"(?:{_any_of(w[::-1] for w in words).pattern}|{keep})*")

    def last_control(self, text: str) -> int | None:
        """Where the last control token of `text` starts."""
        return max((match.start() for match in self.control.finditer(text)), default=None)

    def looks_like_control(self, conversation: Conversation) -> bool:
        """Whether any text of the conversation holds a control token; raises _RowFault for noncharacters."""
        suspicious = False
        for text in _texts(conversation):
            if _LEARNED in text:
                raise _RowFault("it contains the noncharacter U+FDD0, which no text may; remove it")
            if not suspicious:
                suspicious = any(prefix in text for prefix in self.prefixes) and self.control.search(text) is not None
        return suspicious

    def guard(self, conversation: Conversation) -> Conversation:
        """The conversation with a stand-in for the first character of everything that looks like a control token."""
        if len(self.firsts) > _KINDS:
            raise _RowFault(
                "it contains a control token of a tokenizer that has too many kinds of them; change that text"
            )
        if any(_RESERVED.search(text) for text in _texts(conversation)):
            raise _RowFault("it contains noncharacters (U+FDD0 to U+FDEF), which no text may; remove them")
        replace = functools.partial(self.control.sub, lambda m: chr(_TEXT + self.firsts.index(m[0][0])) + m[0][1:])
        return {
            **conversation,
            "messages": [
                _map_texts({**m, "role": ""}, replace) | {"role": m["role"]} for m in conversation["messages"]
            ],
            "tools": _map_texts(conversation.get("tools"), replace),
        }

    def unguard(self, rendered: str) -> str:
        """The template's control tokens under their other names, the stand-ins back as text; the length is kept."""
        named = self.control.sub(lambda m: self.rename(m[0]), rendered)
        return named.translate({_TEXT + i: first for i, first in enumerate(self.firsts)})

    def rename(self, token: str) -> str:
        return chr(_CONTROL + self.firsts.index(token[0])) + token[1:]

    @functools.cached_property
    def guarded(self) -> tuple[Any, dict[int, int]]:
        """A backend of the same model that knows control tokens only by their other names; its ids -> the real ids."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer(self.backend.model)
        if self.backend.normalizer is not None:
            copy.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            copy.pre_tokenizer = self.backend.pre_tokenizer
        real = {}
        for i, token in self.backend.get_added_tokens_decoder().items():
            name = self.rename(token.content) if token.content in self.special else token.content
            how = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            copy.add_tokens([AddedToken(name, **how)])
            real[copy.token_to_id(name)] = i
        return copy, {new: old for new, old in real.items() if new != old}

    def encode(self, texts: list[str], guarded: bool = False) -> list[Any]:
        """Encodings with plain offsets; nothing is added, cut or padded."""
        if guarded:
            return self.guarded[0].encode_batch(texts, add_special_tokens=False)
        with _bare(self.backend) as backend:
            return backend.encode_batch(texts, add_special_tokens=False)

    def words(self, content: str) -> list[int]:
        """Where each token of a message's content starts: the places at which it may be cut."""
        guarded = self.looks_like_control({"messages": [{"content": content}]})
        return [start for start, _ in self.encode([content], guarded)[0].offsets]

    def ids(self, encoding: Any, rendered: _Rendered) -> list[int]:
        """The real token ids; raises _RowFault if a guarded text became a control token all the same."""
        if not rendered.guarded:
            return encoding.ids
        real = self.guarded[1]
        ids = [real.get(i, i) for i in encoding.ids]
        meant = sum(rendered.text.count(chr(_CONTROL + i)) for i in range(len(self.firsts)))
        special = set(self.special.values()) - {self.unknown}
        if sum(i in special for i in ids) > meant:
            raise _RowFault("this tokenizer turns text that looks like a control token into one; change that text")
        return ids


_coders: weakref.WeakKeyDictionary[Any, dict[str, _Coder]] = weakref.WeakKeyDictionary()  # tokenizer, template's text


def _coder(tokenizer: Any, text: str) -> _Coder:
    """The coder of a tokenizer under the template `text`."""
    coders = _coders.setdefault(tokenizer, {})
    if text not in coders:
        coder = _Coder(tokenizer)
        marks = _marks(text, coder)
        coders[text] = _Coder(tokenizer, marks) if marks else coder
    coder = coders[text]
    coder.names = tokenizer.special_tokens_map  # each time: scripts set eos_token and pad_token
    return coder


def _marks(text: str, coder: _Coder) -> frozenset[str]:
    """The added tokens that the template `text` writes around plain words although they are not special.

    Not <think> and </think>, which are the answers' own; nor plain words and spaces that a tokenizer has added.
    """
    with contextlib.suppress(_RowFault):
        rendered = _jinja(text, {"messages": _TURNS}, coder, thinking=True)
        added = coder.backend.get_added_tokens_decoder().values()
        return frozenset(
            token.content
            for token in added
            if not token.special
            and token.content in rendered
            and re.fullmatch(r"[^\w\s].*[^\w\s]", token.content, re.DOTALL)
            and "think" not in token.content.lower()
        )
    return frozenset()


@contextlib.contextmanager
def _bare(backend: Any) -> Iterator[Any]:
    """The backend without what would change ids or offsets: truncation, padding, trimmed offsets."""
    processor, truncation, padding = backend.post_processor, backend.truncation, backend.padding
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.post_processor = processor
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the words, the longest first; for no words, one that never matches."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _texts(conversation: Conversation) -> Iterator[str]:
    """All text of a conversation that is the data's: contents, and every string of tool calls and tools."""
    for message in conversation["messages"]:
        yield message["content"]
        if len(message) > 2:
            yield from _strings([value for key, value in message.items() if key not in ("role", "content")])
    if conversation.get("tools"):
        yield from _strings(conversation["tools"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_texts(value: Any, change: Any) -> Any:
    """`value` (as in JSON) with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class _Rules:
    """What `encode` was asked for."""

    cutoff_len: int
    overlong: str
    mask_history: bool
    train_on_prompt: bool
    enable_thinking: bool


def encode(
    conversations: list[Conversation],
    template: ChatTemplate,
    tokenizer: Any,
    *,
    cutoff_len: int,
    overlong: str = "truncate",
    mask_history: bool = False,
    train_on_prompt: bool = False,
    enable_thinking: bool = True,
) -> list[Sample | Message]:
    """A sample for each conversation, or the reason why there is none.

    Learned (label = id, elsewhere -100) are the assistant's words and the token that ends its turn: of every turn, of
    the last one (`mask_history`), or everything (`train_on_prompt`); never an answer with "learned": False.
    A conversation longer than `cutoff_len` tokens is cut (`overlong="truncate"`, see truncation.py) or becomes a reason
    ("drop" and "error" are the caller's difference). `left_out` of a sample counts its answers of which the template
    renders a part only, by what it leaves out.
    """
    coder = _coder(tokenizer, template.text)
    rules = _Rules(cutoff_len, overlong, mask_history, train_on_prompt, enable_thinking)
    results: list[Any] = []
    for conversation in conversations:
        try:
            results.append(_render(template, conversation, coder, enable_thinking))
        except _RowFault as fault:
            results.append(Message(str(fault)))
    for guarded in (False, True):
        chosen = [i for i, r in enumerate(results) if isinstance(r, _Rendered) and r.guarded is guarded]
        if chosen:
            encodings = coder.encode([results[i].text for i in chosen], guarded)
            for i, encoding in zip(chosen, encodings, strict=True):
                try:
                    left_out = _left_out(conversations[i]["messages"], results[i])
                    results[i] = _sample(conversations[i], template, coder, rules, results[i], encoding)
                    results[i]["left_out"] = left_out
                except _RowFault as fault:
                    results[i] = Message(str(fault))
                except Fault as fault:
                    results[i] = fault.message
    return results


def _left_out(messages: list[dict[str, Any]], rendered: _Rendered) -> Counter[str]:
    """How many answers lack thoughts, or the sentence beside a tool call, in what is learned of them."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(len(answer) > 2 or "</think>" in (answer.get("content") or "") for answer in answers):
        return Counter()
    learned = [rendered.text[start:stop] for start, stop in rendered.spans]
    if len(learned) != len(answers):  # an own template that leaves empty answers out, or tags several parts of each
        learned = ["".join(learned)] * len(answers)
    left_out: Counter[str] = Counter()
    for answer, text in zip(answers, learned, strict=True):
        before, _, sentence = (answer.get("content") or "").rpartition("</think>")
        thoughts = answer.get("reasoning_content") or before.rpartition("<think>")[2]
        left_out["thoughts"] += thoughts.strip() not in text
        left_out["words beside a tool call"] += bool(answer.get("tool_calls")) and sentence.strip() not in text
    return +left_out


def _sample(
    conversation: Conversation,
    template: ChatTemplate,
    coder: _Coder,
    rules: _Rules,
    rendered: _Rendered,
    encoding: Any,
) -> Sample:
    """The sample of one rendered and encoded conversation, cut if it is too long."""
    truncated, cut, whole_length, messages = False, frozenset(), len(encoding), conversation["messages"]
    if whole_length > rules.cutoff_len:
        if rules.overlong != "truncate":
            raise Fault("longer_than_cutoff_len", tokens=len(encoding), cutoff_len=rules.cutoff_len)
        truncated = True
        messages, rendered, encoding, cut = _shortened(_plain(conversation), template, coder, rules)
    ids = coder.ids(encoding, rendered)
    labels = list(ids) if rules.train_on_prompt else [-100] * len(ids)
    masked = _masked_spans(messages, rendered)
    for start, stop in rendered.spans[-1:] if rules.mask_history else rendered.spans:
        first, end = _tokens(encoding, start, stop, len(rendered.text))
        labels[first:end] = [-100] * (end - first) if (start, stop) in masked else ids[first:end]
    if rules.train_on_prompt:
        for start, stop in masked:
            first, end = _tokens(encoding, start, stop, len(rendered.text))
            labels[first:end] = [-100] * (end - first)
    for number in cut:  # a cut answer must not teach to stop there
        start, stop = rendered.spans[number]
        first, end = _tokens(encoding, _end_of_turn(rendered, start, stop, coder), stop, len(rendered.text))
        labels[first:end] = [-100] * (end - first)
    if max(labels, default=-100) == -100:
        if truncated:
            raise Fault("no_space_for_answer", cutoff_len=rules.cutoff_len, tokens=len(ids))
        raise _RowFault("nothing of it would be learned: it has no answer")
    return {"input_ids": ids, "labels": labels, "truncated": truncated, "whole_length": whole_length}


def _masked_spans(messages: list[dict[str, Any]], rendered: _Rendered) -> list[Span]:
    """The spans of the answers that the data marks with "learned": False (a weight of 0)."""
    learned = [message.get("learned", True) for message in messages if message["role"] == "assistant"]
    if all(learned):
        return []
    if len(learned) != len(rendered.spans):
        raise Fault("answers_not_told_apart")
    return [span for span, is_learned in zip(rendered.spans, learned, strict=True) if not is_learned]


def _tokens(encoding: Any, start: int, stop: int, length: int) -> Span:
    """The tokens [first, end) that hold characters [start, stop); one that straddles `start` is inside.

    Nothing straddles `stop`: a control token ends there.
    """
    first = _token_from(encoding, start, stop)
    return first, max(first, _token_from(encoding, stop, length))


def _token_from(encoding: Any, position: int, stop: int) -> int:
    """The first token that holds a character of [position, stop); where there is none, the one after it."""
    for at in range(position, stop):  # a character without a token is rare: some normalizers drop some
        token = encoding.char_to_token(at)
        if token is not None:
            return token
    return len(encoding)


def _end_of_turn(rendered: _Rendered, start: int, stop: int, coder: _Coder) -> int:
    """Where the control token that ends the answer [start, stop) starts."""
    answer = rendered.text[start:stop]
    if rendered.guarded:
        names = [m.start() for m in _RESERVED.finditer(answer)]
        return start + names[-1] if names else stop
    end = coder.last_control(answer)
    return stop if end is None else start + end


def _shortened(
    conversation: Conversation, template: ChatTemplate, coder: _Coder, rules: _Rules
) -> tuple[list[dict[str, Any]], _Rendered, Any, frozenset[int]]:
    """The messages that are kept, rendered and encoded in `cutoff_len` tokens, and the numbers of the cut answers."""

    def measure(messages: list[dict[str, Any]]) -> tuple[_Rendered, Any]:
        rendered = _render(template, {**conversation, "messages": messages}, coder, rules.enable_thinking)
        return rendered, coder.encode([rendered.text], rendered.guarded)[0]

    whole, kept, rendered, encoding = shorten(conversation["messages"], measure, coder.words, rules.cutoff_len)
    answers = [i for i, message in enumerate(whole) if message["role"] == "assistant"]
    cut = frozenset(number for number, i in enumerate(answers) if kept[i] is not whole[i])
    open_ended = any("</think>" in whole[i]["content"] and "</think>" not in kept[i]["content"] for i in answers)
    if open_ended and not template.tagged:
        raise _RowFault("its thoughts alone are too long, and the tokenizer's own chat template cannot show a part")
    if cut and len(rendered.spans) != len(answers):
        raise Fault("answers_not_told_apart")
    return whole, rendered, encoding, cut


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompt_ids(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    template_text: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool = True,
) -> list[int]:
    """The token ids after which a model answers `messages`, by the tokenizer's chat template or `template_text`.

    The same rule as in training: only the template's own control tokens are control tokens. Raises UserError where the
    template refuses the messages.
    """
    text = template_text or _own_text(tokenizer)
    coder = _coder(tokenizer, text)
    try:
        conversation = _plain({"messages": messages, "tools": tools})
        guarded = coder.looks_like_control(conversation)
        if guarded:
            conversation = coder.guard(conversation)
        prompt = _jinja(text, conversation, coder, enable_thinking, prompt=True)
        prompt = prompt.replace(_LEARNED, "")
        if not guarded:
            return tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rendered = _Rendered(coder.unguard(prompt), [], True)
        return coder.ids(coder.encode([rendered.text], True)[0], rendered)
    except _RowFault as fault:
        raise UserError(f"these messages cannot be put to the model: {fault}.\nChange them.") from None
