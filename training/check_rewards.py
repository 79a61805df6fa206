"""Checks before a training on rewards (stage grpo): the reward functions, and whether the rows have what they need."""

from __future__ import annotations

from collections.abc import Iterator

from common import Message
from training.findings import Finding, Run, ok
from training.grpo import uses_vllm
from training.rewards import find_rewards, with_answers


def check_rewards(run: Run) -> Iterator[Finding]:
    """The reward functions: their names, files and patterns."""
    if run.config.stage == "grpo":
        run.rewards = find_rewards(run.config)
        way = "vllm" if uses_vllm(run.config) else "transformers"
        yield ok(Message("rewards_found", names=[reward.name for reward in run.rewards], way=way))


def check_answers(run: Run) -> Iterator[Finding]:
    """Whether the rows have the answers that reward functions compare replies with."""
    if run.config.stage == "grpo" and run.data is not None:
        run.rewards = with_answers(run.config, run.rewards, run.data)
    yield from ()
