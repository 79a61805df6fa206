"""From a request to its replies: its prompts are made in one thread, and its replies collected as they grow."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from common import Message, UserError
from inference.api.errors import ApiError, refuse
from inference.engine import Engine
from inference.reply import Event, Reply
from inference.request import MessageTooLong, Request
from inference.scheduler import QueueFull, Scheduler, SchedulerClosed
from preprocessing.prompts import UnsuitableMessages

WAITING = 8  # times the slots: replies that may wait for one


@dataclass
class Job:
    """A request of a client: the replies to it, and the events that come for them."""

    request: Any
    id: str
    replies: list[Reply] = field(default_factory=list)
    echoes: list[str] = field(default_factory=list)  # of each reply the prompt's text, where it stands before it
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
        return sum(reply.prompt_tokens for reply in self.replies[:: self.request.n])

    @property
    def cached_tokens(self) -> int:
        return sum(reply.cached_tokens for reply in self.replies[:: self.request.n])

    @property
    def completion_tokens(self) -> int:
        return sum(reply.completion_tokens for reply in self.replies)

    def summary(self) -> Message:
        """For the log."""
        who = self.request.user or self.request.safety_identifier
        more = [Message("user {user}", user=json.dumps(who, ensure_ascii=False))] if who else []
        more += [Message("the client went away or it failed")] if self.unfinished else []
        prompts = sum(reply.prompt_tokens for reply in self.replies)
        seconds = time.perf_counter() - self.started
        return Message(
            "{prompts} + {replies} tokens, {seconds:.2f} s {more}",
            prompts=prompts,
            replies=self.completion_tokens,
            seconds=seconds,
            more=more,
        )


class Generator:
    """Computes the replies of requests with one engine."""

    def __init__(self, engine: Engine, slots: int, log: Callable[[str], None]) -> None:
        self.engine, self.log = engine, log
        self.scheduler = Scheduler(engine.backend(slots), slots, WAITING * slots)
        self.scheduler.start()
        self.loop: asyncio.AbstractEventLoop | None = None  # that of the server
        self._reader = ThreadPoolExecutor(1, "prompts")  # tokenizers are not made for several threads
        self._reading = 0  # jobs that it has, or that wait for it

    def close(self) -> None:
        self._reader.shutdown()
        self.scheduler.close()

    async def start(self, job: Job, add_replies: Callable[[Job], None]) -> None:
        """Adds the replies of a job by `add_replies`, in the tokenizer's thread, and queues them. Raises ApiError."""
        if self._reading >= self.scheduler.free:  # before the work of reading it
            raise self._queue_full()
        self._reading += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._reader, _add_replies, add_replies, job)
        finally:
            self._reading -= 1
        places = self.scheduler.slots + self.scheduler.waiting
        if len(job.replies) > places:
            raise refuse(
                "n",
                Message(
                    "{replies} replies are asked for, and this server has places for {places}; ask for fewer",
                    replies=len(job.replies),
                    places=places,
                ),
            )
        try:
            self.scheduler.submit(job.replies)
        except QueueFull:
            raise self._queue_full() from None
        except SchedulerClosed:
            raise ApiError(503, Message("the model answers no more; start the server again")) from None

    def add(self, job: Job, request: Request, echo: str = "") -> None:
        """One more reply of a job; each of several samples has a seed of its own."""
        index, loop, events, settings = len(job.replies), self.loop, job.events, request.settings
        if settings.seed is not None:
            settings = dataclasses.replace(settings, seed=(settings.seed + index % job.request.n) % (1 << 64))
            request = dataclasses.replace(request, settings=settings)

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        job.replies.append(self.engine.reply(request, sink))
        job.echoes.append(echo)

    async def growth(self, job: Job) -> AsyncIterator[tuple[int, Event]]:
        """What the replies of a job grow by until all have ended, with the reply's number.

        Raises ApiError where one failed.
        """
        going = len(job.replies)
        while going:
            index, event = await job.events.get()
            going -= event.end
            if isinstance(event.error, UserError):
                raise ApiError(400, event.error.message, code="invalid_value")
            if event.error:
                self.log(f"{job.id}: {event.error!r}")
                raise ApiError(500, Message("the model failed at this request; the server's log says why"))
            yield index, event

    def _queue_full(self) -> ApiError:
        return ApiError(
            429,
            Message("{waiting} replies are waiting already; try again later", waiting=len(self.scheduler.queue)),
            code="rate_limit_exceeded",
            headers={"Retry-After": str(self.scheduler.retry_after_seconds)},
        )


def _add_replies(add_replies: Callable[[Job], None], job: Job) -> None:
    try:
        add_replies(job)
    except UserError as error:
        if isinstance(error, MessageTooLong):
            raise ApiError(400, error.message, param=job.request.prompt_field, code="context_length_exceeded") from None
        param = job.request.prompt_field if isinstance(error, UnsuitableMessages) else None
        raise ApiError(400, error.message, param=param, code="invalid_value") from None
