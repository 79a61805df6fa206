"""Several replies at once from one model: one thread owns it, and each of its steps computes a token of every reply.

    batch = Batch(engine, slots=8, waiting=64)
    row = Row(engine, ids, Settings(), sink)        # sink(Event) is called by the batch's thread
    batch.submit([row])                             # raises QueueFull, BatchClosed
    row.reply.cancel()

A new reply joins between two steps (continuous batching). Its prompt is computed in pieces beside the tokens of the
others, so that these go on. What the model has computed for a finished reply is kept for the next prompt that begins
in the same way. How rows are computed is the kernel's part (`Engine.batch_kernel`; batch_kernels.py).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference.engine import Engine, Reply, Settings, TextStreamer, TokenLogprob

PREFILL_SECONDS = 0.25  # that the pieces of prompts may add to a step, while the other replies wait
TRIM_EVERY = 8  # finished rows after which freed memory is given back to the system


class QueueFull(Exception):
    """There is no place for these rows, not even to wait."""


class BatchClosed(Exception):
    """The batch's thread has ended: nothing is answered any more."""


@dataclass(frozen=True)
class Event:
    """Text of a reply, and its tokens' log-probabilities; `end`: it was the last, `error`: why the reply failed."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    end: bool = False
    error: Exception | None = None


class Row:
    """A reply to generate: the prompt's ids, and after them the reply's. Raises UserError for a wrong grammar."""

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        settings: Settings,
        sink: Callable[[Event], None],
        *,
        dropped: int = 0,
        visible: Mapping[int, str] | None = None,
    ) -> None:
        self.ids, self.settings, self.sink = list(ids), settings, sink
        self.reply = Reply(prompt_tokens=len(ids), dropped_messages=dropped)
        self.sampler = engine.sampler(settings, len(ids))
        self.streamer = TextStreamer(engine, settings, self.reply, visible)
        self.cache: Any = None  # the kernel's
        self._sent_logprobs = 0

    @property
    def max_tokens(self) -> int:
        """Tokens that prompt and reply together may come to."""
        return self.reply.prompt_tokens + self.streamer.max_tokens

    def extend(self, logits: Any) -> None:
        """Samples the next token and sends what can be shown to the sink."""
        token = self.sampler(self.ids, logits, self.reply)
        self.ids.append(token)
        text = self.streamer.feed(token)
        if self.reply.finish_reason:
            self.finish(text)
        elif text:
            self.sink(Event(text, self._new_logprobs()))

    def finish(self, text: str = "", error: Exception | None = None) -> None:
        """Ends the reply, whatever state it is in."""
        if error is not None:
            self.reply.finish_reason = "error"
        text += self.streamer.end()
        self.sink(Event(text, self._new_logprobs(), True, error))

    def _new_logprobs(self) -> tuple[TokenLogprob, ...]:
        new = tuple(self.reply.logprobs[self._sent_logprobs : self.streamer.shown_tokens])
        self._sent_logprobs += len(new)
        return new


class Batch:
    """The thread that owns an engine's model. At most `slots` rows are computed at once; `waiting` more may wait."""

    def __init__(self, engine: Engine, slots: int = 8, waiting: int = 64) -> None:
        self.engine, self.slots, self.waiting = engine, slots, waiting
        self.kernel = engine.batch_kernel(slots)
        self.active: list[Row] = []
        self.queue: collections.deque[Row] = collections.deque()
        self._prefill = 64  # tokens of prompts a step; adapted to the measured speed
        self._released = 0
        self._row_seconds = 2.0  # running average of what a row takes
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queues rows, all or none. Raises QueueFull, BatchClosed."""
        with self._changed:
            if self._closed:
                raise BatchClosed
            if len(rows) > self.free:
                raise QueueFull
            self.queue.extend(rows)
            self._changed.notify()

    @property
    def free(self) -> int:
        """How many rows have a place, if only to wait."""
        return max(0, self.slots - len(self.active)) + self.waiting - len(self.queue)

    @property
    def alive(self) -> bool:
        return not self._closed

    @property
    def retry_after_seconds(self) -> int:
        """After how long a refused client should ask again: what the waiting rows may take."""
        return max(1, min(60, round(self._row_seconds * (1 + len(self.queue) / self.slots) / 2)))

    def close(self) -> None:
        """Ends the thread; replies that still go on are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        failure = None
        try:
            while self._wait():
                self._remove_cancelled()
                self._admit()
                self._step()
        except Exception as error:
            failure = error
            raise
        finally:  # whatever has happened, nobody waits for a thread that has ended
            with self._changed:
                self._closed = True
            for row in [*self.active, *self.queue]:
                row.finish(error=failure)

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        with self._changed:
            while not (self.active or self.queue or self._closed):
                self._changed.wait()
            return not self._closed

    def _remove_cancelled(self) -> None:
        """Ends cancelled rows, also those that wait."""
        with self._changed:
            cancelled = [row for row in [*self.active, *self.queue] if row.reply.cancelled]
            self.queue = collections.deque(row for row in self.queue if not row.reply.cancelled)
        for row in cancelled:
            if row.cache is not None:
                self._release(row)
            row.finish()

    def _release(self, row: Row) -> None:
        self._row_seconds += 0.1 * (row.reply.seconds - self._row_seconds)
        self._released += 1
        if self._released % TRIM_EVERY == 0:
            _trim()
        with self._changed:
            self.active.remove(row)
        self.kernel.close(row.cache)

    def _admit(self) -> None:
        """Waiting rows take the free slots, in their order, as far as there is memory for them."""
        while self.queue and len(self.active) < self.slots:
            row = self.queue[0]
            if self.active and not self.kernel.fits(row.max_tokens):
                return
            try:
                row.cache = self.kernel.open(row.ids, row.max_tokens)
            except Exception as error:  # noqa: BLE001 - one request failed; the others go on
                with self._changed:
                    self.queue.popleft()
                row.finish(error=error)
                continue
            row.reply.cached_tokens = len(row.cache.ids)
            with self._changed:
                self.active.append(self.queue.popleft())

    def _step(self) -> None:
        """One forward pass: the last token of every reply, and pieces of the prompts that are not computed yet."""
        work, budget = [], self._prefill
        for row in self.active:
            todo = row.ids[len(row.cache.ids) :]
            if len(todo) > 1:
                todo = todo[:budget]
                budget -= len(todo)
            if todo:
                work.append((row, todo))
        if not work:
            return
        started = time.perf_counter()
        results = self._forward(work)
        if budget <= 0:
            self._adapt(time.perf_counter() - started)
        for (row, _), result in zip(work, results, strict=True):
            error = result if isinstance(result, Exception) else None
            if error is None and len(row.cache.ids) == len(row.ids):
                try:
                    row.extend(result)
                except Exception as failure:  # noqa: BLE001 - one request failed; the others go on
                    error = failure
            if error is not None:
                row.finish(error=error)
            if row.reply.finish_reason:
                self._release(row)

    def _forward(self, work: list[tuple[Row, list[int]]]) -> list[Any]:
        """Logits for each row, or its exception: where all together fail, each is tried alone."""
        work_items = [(row.cache, todo, len(row.cache.ids) + len(todo) == len(row.ids)) for row, todo in work]
        try:
            return self.kernel.forward(work_items)
        except Exception as error:  # noqa: BLE001 - one request failed; the others go on
            return [error] if len(work) == 1 else [self._forward([one])[0] for one in work]

    def _adapt(self, seconds: float) -> None:
        if seconds > 2 * PREFILL_SECONDS:
            self._prefill = max(16, self._prefill // 2)
        elif seconds < PREFILL_SECONDS:
            self._prefill = min(2048, self._prefill * 2)


def _trim() -> None:
    """Gives freed memory back to the system: rows come and go in all sizes, and glibc keeps the holes between them."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
