"""Reward functions of one's own, for configs/fraud-grpo-cpu.yaml."""

from collections import Counter

WORDS = {"1": "Yes", "0": "No"}  # what the rows call fraud and not → what the model is to reply


def right_word(completions: list, answer: list, **_: object) -> list[float]:
    """1 where the reply is the word for the row's answer, else 0."""
    return [float(reply == WORDS[row]) for reply, row in zip(texts(completions), answer, strict=True)]


def both_words(completions: list, **_: object) -> list[float]:
    """One half minus how often the batch gives this word: less than 0 for the more frequent one of the two.

    Without it the model soon replies always the same, and no group has a better reply to learn from.
    """
    replies = texts(completions)
    counts = Counter(reply for reply in replies if reply in WORDS.values())
    return [0.5 - counts[reply] / counts.total() if reply in counts else 0.0 for reply in replies]


def texts(completions: list) -> list[str]:
    return [completion[0]["content"].strip() for completion in completions]
