"""From a request to its replies: prompts are made in one thread, queued in the batch, and collected as they grow."""

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
from inference.api.replies import Choice, ToolCall
from inference.engine import Engine, MessageTooLong, Settings, TokenLogprob
from inference.scheduler import Batch, BatchClosed, Event, QueueFull, Row
from preprocessing.prompts import UnsuitableMessages

WAITING = 8  # times the slots: replies that may wait for one


@dataclass
class Job:
    """A request: its rows and choices, one for each reply, and the events that come for them."""

    request: Any
    id: str
    rows: list[Row] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        for row in self.rows:
            row.reply.cancel()

    @property
    def unfinished(self) -> bool:
        return any(choice.finish_reason in (None, "cancelled") for choice in self.choices)

    @property
    def dropped_messages(self) -> int:
        return max(row.reply.dropped_messages for row in self.rows)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one of several replies counts once."""
        return sum(row.reply.prompt_tokens for row in self.rows[:: self.request.n])

    @property
    def cached_tokens(self) -> int:
        return sum(row.reply.cached_tokens for row in self.rows[:: self.request.n])

    @property
    def completion_tokens(self) -> int:
        return sum(row.reply.completion_tokens for row in self.rows)

    def summary(self) -> Message:
        """For the log."""
        who = self.request.user or self.request.safety_identifier
        more = [Message("user {user}", user=json.dumps(who, ensure_ascii=False))] if who else []
        more += [Message("the client went away or it failed")] if self.unfinished else []
        prompts = sum(row.reply.prompt_tokens for row in self.rows)
        seconds = time.perf_counter() - self.started
        return Message(
            "{prompts} + {replies} tokens, {seconds:.2f} s {more}",
            prompts=prompts,
            replies=self.completion_tokens,
            seconds=seconds,
            more=more,
        )


Growth = tuple[Choice, list[str | ToolCall], tuple[TokenLogprob, ...]]


class Generator:
    """Computes the replies of requests with one engine."""

    def __init__(self, engine: Engine, slots: int, log: Callable[[str], None]) -> None:
        self.engine, self.log = engine, log
        self.batch = Batch(engine, slots, WAITING * slots)
        self.loop: asyncio.AbstractEventLoop | None = None  # that of the server
        self._reader = ThreadPoolExecutor(1, "prompts")  # tokenizers are not made for several threads
        self._reading = 0  # jobs that it has, or that wait for it

    def close(self) -> None:
        self._reader.shutdown()
        self.batch.close()

    async def start(self, job: Job, add_rows: Callable[[Job], None]) -> None:
        """Makes the rows of a job by `add_rows`, in the tokenizer's thread, and queues them. Raises ApiError."""
        if self._reading >= self.batch.free:  # before the work of reading it
            raise self._queue_full()
        self._reading += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._reader, _add_rows, add_rows, job)
        finally:
            self._reading -= 1
        places = self.batch.slots + self.batch.waiting
        if len(job.rows) > places:
            raise refuse(
                "n",
                Message(
                    "{replies} replies are asked for, and this server has places for {places}; ask for fewer",
                    replies=len(job.rows),
                    places=places,
                ),
            )
        try:
            self.batch.submit(job.rows)
        except QueueFull:
            raise self._queue_full() from None
        except BatchClosed:
            raise ApiError(503, Message("the model answers no more; start the server again")) from None

    def add_row(self, job: Job, ids: list[int], settings: Settings, **row: Any) -> None:
        """One more reply of a job, with `Row`'s options; each of several samples with a seed of its own."""
        index, loop, events = len(job.rows), self.loop, job.events
        if settings.seed is not None:
            settings = dataclasses.replace(settings, seed=(settings.seed + index % job.request.n) % (1 << 64))

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        job.rows.append(Row(self.engine, ids, settings, sink, **row))

    async def growth(self, job: Job) -> AsyncIterator[Growth]:
        """What the replies of a job grow by until all have ended: text, complete tool calls, log-probabilities.

        Raises ApiError where one failed.
        """
        going = len(job.rows)
        while going:
            index, event = await job.events.get()
            going -= event.end
            row, choice = job.rows[index], job.choices[index]
            if isinstance(event.error, UserError):
                raise ApiError(400, event.error.message, code="invalid_value")
            if event.error:
                self.log(f"{job.id}: {event.error!r}")
                raise ApiError(500, Message("the model failed at this request; the server's log says why"))
            if choice.finish_reason is None:
                parts = choice.take(event, row.reply.finish_reason)
                yield choice, parts, event.logprobs
                if choice.satisfied:
                    row.reply.cancel()

    def _queue_full(self) -> ApiError:
        return ApiError(
            429,
            Message("{waiting} replies are waiting already; try again later", waiting=len(self.batch.queue)),
            code="rate_limit_exceeded",
            headers={"Retry-After": str(self.batch.retry_after_seconds)},
        )


def _add_rows(add_rows: Callable[[Job], None], job: Job) -> None:
    try:
        add_rows(job)
    except UserError as error:
        if isinstance(error, MessageTooLong):
            raise ApiError(400, error.message, param=job.request.prompt_field, code="context_length_exceeded") from None
        param = job.request.prompt_field if isinstance(error, UnsuitableMessages) else None
        raise ApiError(400, error.message, param=param, code="invalid_value") from None
