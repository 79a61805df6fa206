"""A loaded model, whichever program computes it.

engine = load("saves/NAME")                     # inference/load.py
reply = engine.stream([{"role": "user", "content": "你好"}], Settings(temperature=0))
for piece in reply:                             # it is decoded while it is read
    print(piece, end="", flush=True)
reply.finish_reason, reply.completion_tokens, reply.tokens_per_second, reply.first_token_seconds
"""

from __future__ import annotations

import bisect
import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import Config
from inference.backend import Backend
from inference.reply import Event, Reply
from inference.request import MessageTooLong, Request, Settings
from inference.scheduler import Scheduler
from inference.tools import THINK, ToolUse

ChatMessage = dict[str, Any]  # {"role": "system|user|assistant|tool", "content": str, ...}
PREFILL = 512  # tokens that `logits_after` computes at once


class Engine:
    """A loaded model. `stream` gives one reply after the other; for many at once see scheduler.py."""

    name: str  # shown to the user
    context: int  # tokens of prompt and reply together
    stop_ids: frozenset[int]  # tokens that end a turn
    control_tokens: Mapping[str, int]  # left out of a reply's text
    added_tokens: Mapping[str, int]  # these, and other added tokens such as <tool_call>
    vocabulary_size: int  # of the logits
    grammar_vocabulary: Any  # an llguidance.LLTokenizer, made when it is asked for: it takes a second
    device: Any = "cpu"  # of the logits
    base: Engine | None = None  # the same model before training, where it was asked for
    config: Config

    # ---- what each kind of model does its own way

    def prompt_ids(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None
    ) -> list[int]:
        """The token ids after which the model answers `messages`, by the template that it was trained with.

        `thinking`: before the configuration's enable_thinking.
        """
        raise NotImplementedError

    def backend(self, slots: int) -> Backend:
        """What computes at most `slots` replies side by side."""
        raise NotImplementedError

    def detokenizer(self) -> Callable[[int], str]:
        """A function that gives, for each token, the whole characters that it completes."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a text that is no conversation; control tokens in it are control tokens."""
        raise NotImplementedError

    def text_of(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """What a token spells; one alone may be a part of a character."""
        return self.grammar_vocabulary.decode_bytes([token])

    # ---- requests and replies

    def request(
        self,
        messages: list[ChatMessage],
        settings: Settings | None = None,
        tools: list[dict[str, Any]] | None = None,
        use: ToolUse | None = None,
        *,
        thoughts: bool = False,
        thinking: bool | None = None,
    ) -> Request:
        """The request of a conversation's next message. `tools` (in OpenAI's form) stand in the prompt; with `use`
        their calls are read out of the reply, with `thoughts` its thoughts.

        Whole turns that do not fit the context are left out, oldest first; a system message stays. Raises
        MessageTooLong where the last turn alone does not fit.
        """
        settings = settings or Settings.of(self.config)
        if self.config.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.default_system}, *messages]
        first = 1 if messages[0]["role"] == "system" else 0
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]
        starts = [first, *turns[1:]]  # where the kept messages may begin
        longest = self.context - min(settings.max_new_tokens, self.context // 4)  # the rest is for the reply

        def ids(start: int) -> list[int]:
            return self.prompt_ids(messages[:first] + messages[start:], tools, thinking)

        fits = bisect.bisect_left(starts, True, hi=len(starts) - 1, key=lambda start: len(ids(start)) <= longest)
        found = ids(starts[fits])
        if len(found) >= self.context:
            raise MessageTooLong(
                "the last message makes {tokens} tokens, and the context is {context}; shorten it",
                tokens=len(found),
                context=self.context,
            )
        opened = self.text_of(found[-8:]).rstrip().endswith(THINK[0])
        return Request(found, settings, starts[fits] - first, thoughts, opened, use)

    def reply(self, request: Request, sink: Callable[[Event], None]) -> Reply:
        """The reply to a request, for a Scheduler to decode. Raises UserError for a grammar that cannot be used."""
        from inference.sampling import Sampler  # imports torch

        settings = request.settings
        marks = THINK if request.thoughts else ()
        if request.tools:
            marks += (request.tools.style.opening, request.tools.style.closing)
        visible = {self.control_tokens[mark]: mark for mark in marks if mark in self.control_tokens}
        vocabulary = self.grammar_vocabulary if settings.grammar else None
        return Reply(
            request,
            sink,
            sample=Sampler(settings, len(request.ids), self.device, vocabulary),
            detokenize=self.detokenizer(),
            stop_ids=self.stop_ids,
            visible=visible,
            max_new_tokens=min(settings.max_new_tokens, self.context - len(request.ids)),
        )

    def stream(
        self, messages: list[ChatMessage], settings: Settings | None = None, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """The reply to `messages`, decoded while it is iterated over. Raises UserError as `request` does."""
        return self.answer(self.request(messages, settings, tools))

    def answer(self, request: Request) -> Reply:
        """The reply to a request, decoded while it is iterated over."""
        events: collections.deque[Event] = collections.deque()
        reply = self.reply(request, events.append)
        reply.pieces = self._decode(reply, events)
        return reply

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        """Decodes one reply at a time, in the thread that reads it."""
        return Scheduler(self.backend(1), slots=1)

    def _decode(self, reply: Reply, events: collections.deque[Event]) -> Iterator[str]:
        self.scheduler.submit([reply])
        try:
            while True:
                while events:
                    event = events.popleft()
                    if event.error:
                        raise event.error
                    if event.text:
                        yield event.text
                    if event.end:
                        return
                self.scheduler.step()
        finally:
            reply.cancel()  # an abandoned one leaves at the next step

    def logits_after(self, ids: list[int]) -> Any:
        """The logits (vocabulary,) of the token after `ids`; what the ids share with earlier ones is not computed
        again."""
        backend = self.scheduler.backend
        sequence = backend.open(ids, len(ids))
        try:
            while todo := ids[len(sequence.ids) :]:
                [found] = backend.forward([(sequence, todo[:PREFILL], len(todo) <= PREFILL)])
                if isinstance(found, Exception):
                    raise found
            return found
        finally:
            backend.close(sequence)
