"""Text → token ids, where only the chat template's own control tokens become control tokens.

Control tokens are those that the tokenizer calls special, and added tokens that the template writes around plain text.
The same characters inside a message are a look-alike and stay text. A conversation that holds look-alikes is rendered
with their first characters escaped: a stand-in of the same length takes their place, the control tokens that are left
are the template's own, and a copy of the tokenizer that knows control tokens under other names only encodes the result.
The stand-ins are Unicode noncharacters (U+FDD0..U+FDEF), which no text may contain.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common import UserError
from preprocessing.faults import Fault
from preprocessing.rendering import LEARNED, Conversation, render

NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_CONTROL = 0xFDD1  # + i: the first character of a control token of the template
_TEXT = 0xFDDF  # + i: the first character of a look-alike
_KINDS = 14  # different first characters that fit into each of these two ranges

# Two turns whose texts are known.
TURNS = [{"role": role, "content": f"{role} text {i}"} for i in (1, 2) for role in ("user", "assistant")]


def _noncharacters() -> Fault:
    return Fault("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them")


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer; raises UserError where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "this model's tokenizer has no fast version (tokenizer.json).\n"
            "Convert it with transformers, or use a model that has one."
        )
    return backend


class TextEncoder:
    """Encodes rendered conversations with one tokenizer.

    `template_tokens` are control tokens of the template that the tokenizer does not call special.
    """

    def __init__(self, tokenizer: Any, template_tokens: frozenset[str] = frozenset()) -> None:
        self.backend = backend = backend_of(tokenizer)
        self.names: dict[str, str] = tokenizer.special_tokens_map  # bos_token, eos_token, ...: what templates may use
        added = backend.get_added_tokens_decoder()
        self.special = {
            token.content: i
            for i, token in added.items()
            if token.content and (token.special or token.content in template_tokens)
        }
        self.unknown = self.special.get(str(tokenizer.unk_token)) if tokenizer.unk_token else None
        self.firsts = sorted({token[0] for token in self.special})
        self.prefixes = tuple({token[:2] for token in self.special})
        self.endings = tuple(self.special)
        self.control = any_of(self.special)
        self.marker = Marker([token.content for token in added.values()])

    def last_control(self, text: str) -> int | None:
        """Where the last control token of `text` starts."""
        return max((match.start() for match in self.control.finditer(text)), default=None)

    def has_lookalikes(self, conversation: Conversation) -> bool:
        """Whether a text of the conversation holds a look-alike; raises Fault where one holds U+FDD0."""
        found = False
        for text in _texts(conversation):
            if LEARNED in text:
                raise _noncharacters()
            if not found:
                found = any(prefix in text for prefix in self.prefixes) and self.control.search(text) is not None
        return found

    def escape(self, conversation: Conversation) -> Conversation:
        """The conversation with a stand-in for the first character of every look-alike."""
        if len(self.firsts) > _KINDS:
            raise Fault("it contains a control token of a tokenizer that has too many kinds of them; change that text")
        if any(NONCHARACTERS.search(text) for text in _texts(conversation)):
            raise _noncharacters()
        replace = functools.partial(self.control.sub, lambda m: chr(_TEXT + self.firsts.index(m[0][0])) + m[0][1:])
        return {
            **conversation,
            "messages": [map_texts({**m, "role": ""}, replace) | {"role": m["role"]} for m in conversation["messages"]],
            "tools": map_texts(conversation.get("tools"), replace),
        }

    def unescape(self, rendered: str) -> str:
        """The template's control tokens under their other names, the stand-ins back as text; the length is kept."""
        named = self.control.sub(lambda m: self._other_name(m[0]), rendered)
        return named.translate({_TEXT + i: first for i, first in enumerate(self.firsts)})

    def _other_name(self, token: str) -> str:
        return chr(_CONTROL + self.firsts.index(token[0])) + token[1:]

    @functools.cached_property
    def _escaped_backend(self) -> tuple[Any, dict[int, int]]:
        """A backend of the same model that knows control tokens only by their other names; its ids → the real ids."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer(self.backend.model)
        if self.backend.normalizer is not None:
            copy.normalizer = self.backend.normalizer
        if self.backend.pre_tokenizer is not None:
            copy.pre_tokenizer = self.backend.pre_tokenizer
        real = {}
        for i, token in self.backend.get_added_tokens_decoder().items():
            name = self._other_name(token.content) if token.content in self.special else token.content
            how = {key: getattr(token, key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            copy.add_tokens([AddedToken(name, **how)])
            real[copy.token_to_id(name)] = i
        return copy, {new: old for new, old in real.items() if new != old}

    def encode(self, texts: list[str], escaped: bool = False) -> list[Any]:
        """`tokenizers.Encoding`s with plain offsets; nothing is added, cut or padded."""
        if escaped:
            return self._escaped_backend[0].encode_batch(texts, add_special_tokens=False)
        with _plain_encoding(self.backend) as backend:
            return backend.encode_batch(texts, add_special_tokens=False)

    def token_starts(self, content: str) -> list[int]:
        """Where each token of a message's content starts: the places at which it may be cut."""
        escaped = self.has_lookalikes({"messages": [{"content": content}]})
        return [start for start, _ in self.encode([content], escaped)[0].offsets]

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text, in which nothing is a control token; raises Fault where there is none."""
        if not text.strip():
            raise Fault("it has no text")
        escaped = self.has_lookalikes({"messages": [{"content": text}]})
        if escaped and NONCHARACTERS.search(text):
            raise _noncharacters()
        return self.ids(self.encode([text], escaped)[0], text, escaped)

    def ids(self, encoding: Any, text: str, escaped: bool) -> list[int]:
        """The real token ids of `text`; raises Fault if a look-alike became a control token all the same."""
        if not escaped:
            return encoding.ids
        real = self._escaped_backend[1]
        ids = [real.get(i, i) for i in encoding.ids]
        intended = sum(text.count(chr(_CONTROL + i)) for i in range(len(self.firsts)))
        special = set(self.special.values()) - {self.unknown}
        if sum(i in special for i in ids) > intended:
            raise Fault("this tokenizer turns text that looks like a control token into one; change that text")
        return ids


_encoders: weakref.WeakKeyDictionary[Any, dict[str, TextEncoder]] = weakref.WeakKeyDictionary()  # tokenizer, template


def encoder_of(tokenizer: Any, text: str) -> TextEncoder:
    """The encoder of a tokenizer under the template `text`."""
    encoders = _encoders.setdefault(tokenizer, {})
    if text not in encoders:
        encoder = TextEncoder(tokenizer)
        tokens = _template_tokens(text, encoder)
        encoders[text] = TextEncoder(tokenizer, tokens) if tokens else encoder
    encoder = encoders[text]
    encoder.names = tokenizer.special_tokens_map  # each time: scripts set eos_token and pad_token
    return encoder


def _template_tokens(text: str, encoder: TextEncoder) -> frozenset[str]:
    """The added tokens that the template `text` writes around plain text although they are not special.

    Not <think> and </think>, which belong to the answers; nor plain words and spaces that a tokenizer has added.
    """
    with contextlib.suppress(Fault):
        rendered = render(text, {"messages": TURNS}, encoder.names)
        added = encoder.backend.get_added_tokens_decoder().values()
        return frozenset(
            token.content
            for token in added
            if not token.special
            and token.content in rendered
            and re.fullmatch(r"[^\w\s].*[^\w\s]", token.content, re.DOTALL)
            and "think" not in token.content.lower()
        )
    return frozenset()


class Marker:
    """Marks the text of messages, so that it is found again in what a template renders."""

    def __init__(self, added_tokens: Iterable[str]) -> None:
        """`added_tokens`: of the tokenizer; they are never marked, as a template may look for </think>."""
        tokens = [token for token in added_tokens if token.strip()]
        keep = r'[\s"\\\x00-\x1f]'  # what JSON may escape keeps its length only if it stays
        self.skipped = re.compile(f"(?:{any_of(tokens).pattern}|{keep})*")
        self.skipped_backwards = re.compile(f"(?:{any_of(token[::-1] for token in tokens).pattern}|{keep})*")
        self.units = re.compile(rf"{any_of(tokens).pattern}|</?\w+>|\w+|\s|.", re.DOTALL)

    def mark(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the first and last letter of their text, and the names of their calls, replaced.

        In message i they are the private character U+F0000 + i; every length stays.
        """
        return [self._mark(message, chr(0xF0000 + i)) for i, message in enumerate(messages)]

    def _mark(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        content = message["content"]
        if self.has_text({"content": content}):
            first = self.skipped.match(content).end()
            last = len(content) - self.skipped_backwards.match(content[::-1]).end() - 1
            content = content[:first] + mark + content[first + 1 :]
            content = content[:last] + mark + content[last + 1 :]
        marked = {**message, "content": content}
        if message.get("tool_calls"):
            marked["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark * len(call["function"]["name"])}}
                for call in message["tool_calls"]
            ]
        return marked

    def has_text(self, message: dict[str, Any]) -> bool:
        """Whether there is more in a message than spaces, quotes and added tokens like </think>."""
        content = message["content"]
        return bool(message.get("tool_calls")) or self.skipped.match(content).end() < len(content)

    def after_last_mark(self, content: str) -> str:
        """What stands in a message's content after the letter that was marked last."""
        return content[len(content) - self.skipped_backwards.match(content[::-1]).end() :]

    @staticmethod
    def marks(rendered: str) -> Iterator[tuple[int, str, int]]:
        """Each mark of a rendering: the number of its message, its character, its place."""
        for match in re.finditer("[\U000f0000-\U000ffffd]", rendered):
            yield ord(match[0]) - 0xF0000, match[0], match.start()


@contextlib.contextmanager
def _plain_encoding(backend: Any) -> Iterator[Any]:
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


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; for none, one that never matches."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


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


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` (as in JSON) with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return value
