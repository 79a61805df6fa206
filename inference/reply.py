"""A reply as it grows: tokens become text, calls of tools and log-probabilities, until one of its ends is reached."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import Message
from inference.request import Request, TokenLogprob
from inference.tools import Call, CallReader, Thought, ThoughtReader, overlap


@dataclass(frozen=True)
class Event:
    """What a reply has grown by: text and whole calls, and its tokens' log-probabilities.

    `end`: it was the last event, `error`: why the reply failed.
    """

    parts: tuple[str | Call | Thought, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    end: bool = False
    error: Exception | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


class StopTexts:
    """Holds back the end of a text as long as it may become one of the stop texts, which may span many tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def feed(self, text: str) -> str:
        """What of the text so far can be shown; sets `found` at a stop text, which is never shown."""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.found, self.held = True, self.held[: min(places)]
            return self.flush()
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back."""
        shown, self.held = self.held, ""
        return shown


class Reply:
    """The reply to a request. It is iterated over by who asked for it, or tells what it grows by to `sink`.

    `cancel` may be called from any thread, the rest only by the thread that decodes the reply, or after its end.
    """

    def __init__(
        self,
        request: Request,
        sink: Callable[[Event], None],
        *,
        sample: Callable[[list[int], Any], tuple[int, TokenLogprob | None]],
        detokenize: Callable[[int], str],
        stop_ids: frozenset[int],
        visible: Mapping[int, str],
        max_new_tokens: int,
    ) -> None:
        """`detokenize` gives the whole characters that a token completes; `visible` spells control tokens that are
        part of the text all the same."""
        self.request, self.sink, self.max_new_tokens = request, sink, max_new_tokens
        self.ids = list(request.ids)  # of the prompt and of the reply so far
        self.sequence: Any = None  # what the backend has computed of them
        self.pieces: Iterator[str] = iter(())
        self.text = self.thought = ""
        self.calls: list[Call] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None  # "stop", "length", "tool_calls", "cancelled", "error"; None: going on
        self.cancelled = False
        self.cached_tokens = 0  # of the prompt, that had been computed before
        self.completion_tokens = 0  # the end of the turn included
        self.seconds = self.first_token_seconds = 0.0
        self._started = time.perf_counter()
        self._sample, self._detokenize, self._stop_ids, self._visible = sample, detokenize, stop_ids, visible
        self._stops = StopTexts(request.settings.stop)
        self._thoughts = ThoughtReader(request.opened) if request.thoughts else None
        self._reader = (
            CallReader(request.tools.style, request.tools.names, request.tools.texts) if request.tools else None
        )
        self._told_logprobs = 0
        self._shown_tokens = 0  # tokens of whose text something has been shown
        self._token_starts: collections.deque[int] = collections.deque()  # where the texts of the other tokens begin
        self._characters = self._shown_characters = 0

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def cancel(self) -> None:
        """Ends the reply at the next token; what was computed is kept for the next prompt."""
        self.cancelled = True

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def dropped_messages(self) -> int:
        return self.request.dropped_messages

    @property
    def max_tokens(self) -> int:
        """Tokens that prompt and reply together may come to."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 where there was no second one."""
        spent = self.seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / spent if self.completion_tokens > 1 and spent > 0 else 0.0

    def summary(self) -> list[Message]:
        """How the reply came: tokens, speed, and what was cut."""
        parts = [Message("{count} token{count:plural}", count=self.completion_tokens)]
        if self.tokens_per_second:
            parts.append(Message("{speed:.1f} tokens/s", speed=self.tokens_per_second))
        if self.completion_tokens:
            parts.append(Message("first after {seconds:.2f} s", seconds=self.first_token_seconds))
        if self.finish_reason == "length":
            parts.append(Message("cut: max_new_tokens or the context is full"))
        if self.finish_reason == "cancelled":
            parts.append(Message("stopped"))
        if count := self.request.dropped_messages:
            parts.append(
                Message("the oldest {count} messages no longer fit the context and were left out", count=count)
            )
        return parts

    # ---- while it is decoded

    def extend(self, logits: Any) -> None:
        """Samples the next token from the logits (vocabulary,) after `ids`, and tells what it completes."""
        token, logprob = self._sample(self.ids, logits)
        self.ids.append(token)
        self.logprobs += [logprob] if logprob else []
        self.completion_tokens += 1
        self.seconds = time.perf_counter() - self._started
        self.first_token_seconds = self.first_token_seconds or self.seconds
        ended = token in self._stop_ids
        spelled = "" if ended else self._visible.get(token) or self._detokenize(token)
        shown = self._stops.feed(spelled)
        self._count_shown(len(spelled), len(shown))
        if ended or self._stops.found:
            self.finish("stop", shown)
        elif self.completion_tokens == self.max_new_tokens:
            self.finish("length", shown)
        else:
            self._tell(shown)

    def finish(self, reason: str, text: str = "", error: Exception | None = None) -> None:
        """Ends the reply, whatever state it is in."""
        self.finish_reason = reason
        if self._stops.found:  # the tokens of the stop text are no part of the reply
            del self.logprobs[self._shown_tokens :]
        self._tell(text + self._stops.flush(), error)

    def _tell(self, text: str, error: Exception | None = None) -> None:
        """Tells the sink what is new; a reply that may make one call only ends with it."""
        told = []
        for part in self._parts(text):
            told.append(part)
            if isinstance(part, str):
                self.text += part
                continue
            if isinstance(part, Thought):
                self.thought += part.text
                continue
            self.calls.append(part)
            if self.request.tools.single:
                self.finish_reason = "tool_calls"
                break
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        end = self.finish_reason is not None
        known = len(self.logprobs) if end else self._shown_tokens
        logprobs = tuple(self.logprobs[self._told_logprobs : known])
        self._told_logprobs += len(logprobs)
        if told or logprobs or end:
            self.sink(Event(tuple(told), logprobs, end, error))

    def _parts(self, text: str) -> Iterator[str | Call | Thought]:
        """What is certain after `text`; only what is no thought can have calls."""
        ended = self.finish_reason is not None
        found: list[str | Thought] = [text] if text else []
        if self._thoughts:
            found = [*self._thoughts.feed(text), *(self._thoughts.end() if ended else ())]
        for part in found:
            yield from self._reader.feed(part) if self._reader and isinstance(part, str) else [part]
        if self._reader and ended:
            yield from self._reader.end()

    def _count_shown(self, characters: int, shown: int) -> None:
        self._token_starts.append(self._characters)
        self._characters += characters
        self._shown_characters += shown
        while self._token_starts and self._token_starts[0] < self._shown_characters:
            self._token_starts.popleft()
            self._shown_tokens += 1
