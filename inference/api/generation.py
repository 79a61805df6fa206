"""An exchange with a client: its body becomes requests in one thread, and their replies are collected as they grow."""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from common import Message, UserError
from inference.api.errors import ApiError, refuse
from inference.api.schema import Body
from inference.engine import Engine
from inference.reply import Event, Reply
from inference.request import MessageTooLong, Request
from inference.scheduler import QueueFull, Scheduler, SchedulerClosed
from preprocessing.prompts import UnsuitableMessages

WAITING = 8  # times the slots: replies that may wait for one


@dataclass
class TextPosition:
    """Where in prompt and reply the next token of a reply begins."""

    offset: int  # characters
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


@dataclass
class Exchange:
    """What a client has posted, the replies to it, and the events that come for them."""

    body: Any  # of the endpoint's form
    id: str
    replies: list[Reply] = field(default_factory=list)
    positions: list[TextPosition] = field(default_factory=list)  # of each streamed reply, for its log-probabilities
    started: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        for reply in self.replies:
            reply.cancel()

    @property
    def unfinished(self) -> bool:
        return any(reply.finish_reason in (None, "cancelled", "error") for reply in self.replies)

    @property
    def dropped_messages(self) -> int:
        return max(reply.dropped_messages for reply in self.replies)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one of several replies counts once."""
        return sum(reply.prompt_tokens for reply in self.replies[:: self.body.n])

    @property
    def cached_tokens(self) -> int:
        return sum(reply.cached_tokens for reply in self.replies[:: self.body.n])

    @property
    def completion_tokens(self) -> int:
        return sum(reply.completion_tokens for reply in self.replies)

    def summary(self) -> Message:
        """For the log."""
        who = self.body.user or self.body.safety_identifier
        more = [Message("user {user}", user=json.dumps(who, ensure_ascii=False))] if who else []
        more += [Message("the client went away or it failed")] if self.unfinished else []
        return Message(
            "{prompts} + {replies} tokens, {seconds:.2f} s {more}",
            prompts=sum(reply.prompt_tokens for reply in self.replies),
            replies=self.completion_tokens,
            seconds=time.perf_counter() - self.started,
            more=more,
        )


class Generator:
    """Computes the replies of exchanges with one engine."""

    def __init__(self, engine: Engine, slots: int, log: Callable[[str], None]) -> None:
        self.engine, self.log = engine, log
        self.scheduler = Scheduler(engine.backend(slots), slots, WAITING * slots)
        self.scheduler.start()
        self.loop: asyncio.AbstractEventLoop | None = None  # that of the server
        self._reader = ThreadPoolExecutor(1, "prompts")  # tokenizers are not made for several threads
        self._reading = 0  # exchanges that it has, or that wait for it

    def close(self) -> None:
        self._reader.shutdown()
        self.scheduler.close()

    async def start(self, exchange: Exchange, requests: Callable[[Body], list[Request]]) -> None:
        """Makes the replies of an exchange from `requests(body)` and queues them. Raises ApiError."""
        if self._reading >= self.scheduler.free:  # before the work of reading it
            raise self._queue_full()
        self._reading += 1
        try:
            await self.loop.run_in_executor(self._reader, self._make_replies, exchange, requests)
        finally:
            self._reading -= 1
        places = self.scheduler.slots + self.scheduler.waiting
        if len(exchange.replies) > places:
            raise refuse("n", Message("this server has places for {places} replies; ask for fewer", places=places))
        try:
            self.scheduler.submit(exchange.replies)
        except QueueFull:
            raise self._queue_full() from None
        except SchedulerClosed:
            raise ApiError(503, Message("the model answers no more; start the server again")) from None

    def _make_replies(self, exchange: Exchange, requests: Callable[[Body], list[Request]]) -> None:
        """`n` replies to each request, each of them with a seed of its own. Raises ApiError."""
        try:
            for request in requests(exchange.body):
                for number in range(exchange.body.n):
                    settings = request.settings
                    if settings.seed is not None:
                        settings = dataclasses.replace(settings, seed=(settings.seed + number) % (1 << 64))
                    sink = self._sink(exchange.events, len(exchange.replies))
                    reply = self.engine.reply(dataclasses.replace(request, settings=settings), sink)
                    exchange.replies.append(reply)
        except UserError as error:
            too_long = isinstance(error, MessageTooLong)
            field = exchange.body.prompt_field if too_long or isinstance(error, UnsuitableMessages) else None
            code = "context_length_exceeded" if too_long else "invalid_value"
            raise ApiError(400, error.message, param=field, code=code) from None

    def _sink(self, events: asyncio.Queue[tuple[int, Event]], index: int) -> Callable[[Event], None]:
        return lambda event: self.loop.call_soon_threadsafe(events.put_nowait, (index, event))

    async def growth(self, exchange: Exchange) -> AsyncIterator[tuple[int, Event]]:
        """What the replies of an exchange grow by until all have ended, with the reply's number.

        Raises ApiError where one failed.
        """
        going = len(exchange.replies)
        while going:
            index, event = await exchange.events.get()
            going -= event.end
            if isinstance(event.error, UserError):
                raise ApiError(400, event.error.message, code="invalid_value")
            if event.error:
                self.log(f"{exchange.id}: {event.error!r}")
                raise ApiError(500, Message("the model failed at this request; the server's log says why"))
            yield index, event

    def _queue_full(self) -> ApiError:
        reason = Message("{waiting} replies are waiting already; try again later", waiting=len(self.scheduler.queue))
        headers = {"Retry-After": str(self.scheduler.retry_after_seconds)}
        return ApiError(429, reason, code="rate_limit_exceeded", headers=headers)
