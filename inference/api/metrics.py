"""What /metrics shows, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from inference.reply import Reply
from inference.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the histograms' buckets


class ServerMetrics:
    """Counters of requests, tokens and times, and what the scheduler does now."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("onecard_requests", "Answered requests", ["path", "status"], registry=registry)
        self.prompt = Counter("onecard_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("onecard_cached_tokens", "Tokens of prompts found in the cache", registry=registry)
        self.reply = Counter("onecard_reply_tokens", "Tokens of replies", registry=registry)
        self.cancelled = Counter("onecard_cancelled_replies", "Replies whose client went away", registry=registry)
        self.first = Histogram("onecard_first_token_seconds", "To the first token", registry=registry, buckets=SECONDS)
        self.seconds = Histogram("onecard_reply_seconds", "To the end of a reply", registry=registry, buckets=SECONDS)
        active = Gauge("onecard_active_replies", "Replies computed now", registry=registry)
        active.set_function(lambda: len(scheduler.active))
        waiting = Gauge("onecard_waiting_replies", "Replies that wait for a slot", registry=registry)
        waiting.set_function(lambda: len(scheduler.queue))

    def count_request(self, path: str, status: int) -> None:
        """`path` is that of a route, so that the number of series stays bounded."""
        self.requests.labels(path, status).inc()

    def count_reply(self, reply: Reply) -> None:
        self.prompt.inc(reply.prompt_tokens)
        self.cached.inc(reply.cached_tokens)
        self.reply.inc(reply.completion_tokens)
        self.cancelled.inc(reply.finish_reason == "cancelled")
        if reply.completion_tokens:
            self.first.observe(reply.first_token_seconds)
            self.seconds.observe(reply.seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
