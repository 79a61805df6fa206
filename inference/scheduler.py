"""The decoding loop: each step computes a token of every reply, and pieces of the prompts of those that are new.

    scheduler = Scheduler(engine.backend(8), slots=8, waiting=64)
    reply = engine.reply(request, sink)     # sink(Event) is called by the thread that decodes
    scheduler.submit([reply])               # raises QueueFull, SchedulerClosed
    scheduler.step()                        # as often as it takes; or once scheduler.start(): a thread does it

A new reply joins between two steps (continuous batching). Its prompt is computed in pieces beside the tokens of the
others, so that these go on. How the tokens are computed is the backend's part (backend.py).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence
from typing import Any

from inference.backend import Backend
from inference.reply import Reply

PREFILL_SECONDS = 0.25  # that the pieces of prompts may add to a step, while the other replies wait
TRIM_EVERY = 8  # finished replies after which freed memory is given back to the system


class QueueFull(Exception):
    """There is no place for these replies, not even to wait."""


class SchedulerClosed(Exception):
    """The scheduler's thread has ended: nothing is answered any more."""


class Scheduler:
    """Decodes at most `slots` replies at once; `waiting` more may wait."""

    def __init__(self, backend: Backend, slots: int, waiting: int = 64) -> None:
        self.backend, self.slots, self.waiting = backend, slots, waiting
        self.active: list[Reply] = []
        self.queue: collections.deque[Reply] = collections.deque()
        self._prefill = 256  # tokens of prompts a step; adapted to the measured speed
        self._released = 0
        self._reply_seconds = 2.0  # running average of what a reply takes
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def submit(self, replies: Sequence[Reply]) -> None:
        """Queues replies, all or none. Raises QueueFull, SchedulerClosed."""
        with self._changed:
            if self._closed:
                raise SchedulerClosed
            if len(replies) > self.free:
                raise QueueFull
            self.queue.extend(replies)
            self._changed.notify()

    @property
    def free(self) -> int:
        """How many replies have a place, if only to wait."""
        return max(0, self.slots - len(self.active)) + self.waiting - len(self.queue)

    @property
    def alive(self) -> bool:
        return not self._closed

    @property
    def retry_after_seconds(self) -> int:
        """After how long a refused client should ask again: what the waiting replies may take."""
        return max(1, min(60, round(self._reply_seconds * (1 + len(self.queue) / self.slots) / 2)))

    def start(self) -> None:
        """Steps in a thread of its own from now on."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; replies that still go on are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def step(self) -> None:
        """One forward pass: the last token of every reply, and pieces of the prompts that are not computed yet."""
        self._remove_cancelled()
        self._admit()
        work, budget = [], self._prefill
        for reply in self.active:
            todo = reply.ids[len(reply.sequence.ids) :]
            if len(todo) > 1:
                todo = todo[:budget]
                budget -= len(todo)
            if todo:
                work.append((reply, todo))
        if not work:
            return
        started = time.perf_counter()
        results = self._forward(work)
        if budget <= 0:
            self._adapt(time.perf_counter() - started)
        for (reply, _), result in zip(work, results, strict=True):
            error = result if isinstance(result, Exception) else None
            if error is None and len(reply.sequence.ids) == len(reply.ids):
                try:
                    reply.extend(result)
                except Exception as failure:  # noqa: BLE001 - one request failed; the others go on
                    error = failure
            if error is not None:
                reply.finish("error", error=error)
            if reply.finish_reason:
                self._release(reply)

    def _run(self) -> None:
        failure = None
        try:
            while self._wait():
                self.step()
        except Exception as error:
            failure = error
            raise
        finally:  # whatever has happened, nobody waits for a thread that has ended
            with self._changed:
                self._closed = True
            for reply in [*self.active, *self.queue]:
                reply.finish("error" if failure else "cancelled", error=failure)

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        with self._changed:
            while not (self.active or self.queue or self._closed):
                self._changed.wait()
            return not self._closed

    def _remove_cancelled(self) -> None:
        """Ends cancelled replies, also those that wait."""
        with self._changed:
            cancelled = [reply for reply in [*self.active, *self.queue] if reply.cancelled]
            self.queue = collections.deque(reply for reply in self.queue if not reply.cancelled)
        for reply in cancelled:
            if reply.sequence is not None:
                self._release(reply)
            reply.finish("cancelled")

    def _release(self, reply: Reply) -> None:
        self._reply_seconds += 0.1 * (reply.seconds - self._reply_seconds)
        self._released += 1
        if self._released % TRIM_EVERY == 0:
            _trim()
        with self._changed:
            self.active.remove(reply)
        self.backend.close(reply.sequence)

    def _admit(self) -> None:
        """Waiting replies take the free slots, in their order, as far as there is memory for them."""
        while self.queue and len(self.active) < self.slots:
            reply = self.queue[0]
            if self.active and not self.backend.fits(reply.max_tokens):
                return
            try:
                reply.sequence = self.backend.open(reply.ids, reply.max_tokens)
            except Exception as error:  # noqa: BLE001 - one request failed; the others go on
                with self._changed:
                    self.queue.popleft()
                reply.finish("error", error=error)
                continue
            reply.cached_tokens = len(reply.sequence.ids)
            with self._changed:
                self.active.append(self.queue.popleft())

    def _forward(self, work: list[tuple[Reply, list[int]]]) -> list[Any]:
        """Logits for each reply, or its exception: where all together fail, each is tried alone."""
        asked = [(reply.sequence, todo, len(reply.sequence.ids) + len(todo) == len(reply.ids)) for reply, todo in work]
        try:
            return self.backend.forward(asked)
        except Exception as error:  # noqa: BLE001 - one request failed; the others go on
            return [error] if len(work) == 1 else [self._forward([one])[0] for one in work]

    def _adapt(self, seconds: float) -> None:
        if seconds > 2 * PREFILL_SECONDS:
            self._prefill = max(16, self._prefill // 2)
        elif seconds < PREFILL_SECONDS:
            self._prefill = min(2048, self._prefill * 2)


def _trim() -> None:
    """Gives freed memory back to the system: replies come and go in all sizes, and glibc keeps the holes between."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
