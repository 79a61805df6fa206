"""Which answers of a dataset are a closed set, so that choosing among them is what is measured."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence

from common import UserError

MAX_LABELS, MAX_LABEL_LENGTH = 20, 32  # of a closed set: answers, and characters of one
POSITIVE = {"yes", "y", "true", "t", "positive", "是", "对", "真", "有", "阳性"}  # of two labels, in lower case


def check_labels(labels: Sequence[str]) -> None:
    """Raises UserError for given labels among which there is nothing to choose."""
    if repeated := next((label for label, count in Counter(labels).items() if count > 1), None):
        raise UserError("labels: {label} is given twice; give each answer once", label=repeated)
    if len(labels) == 1:
        raise UserError("labels: {label} alone leaves no choice; give every answer", label=labels[0])


def unknown_label(labels: Sequence[str], answers: Sequence[str]) -> str | None:
    """The first answer that is not among the labels."""
    return next((text for text in answers if text not in labels), None)


def closed_set(answers: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """The labels in order, if the answers (and those trained on) are few, short, and repeated; else an empty tuple."""
    counts = Counter([*answers, *trained])
    repeated = min(counts.values()) >= 2 and sum(counts.values()) >= 5 * len(counts)
    if not (all(map(_is_short, counts)) and repeated and 2 <= len(counts) <= MAX_LABELS):
        return ()
    return _in_order(counts)


def _is_short(text: str) -> bool:
    return 0 < len(text) <= MAX_LABEL_LENGTH and "\n" not in text


def _in_order(counts: Counter[str]) -> tuple[str, ...]:
    """Labels by their number, then by their characters; of two, the positive one last.

    That is the higher number, or the one that means yes; of other words the rarer one, as one looks for what is rare.
    """
    numbers = {text: float(text) for text in counts if re.fullmatch(r"[+-]?\d+(\.\d+)?", text)}
    labels = sorted(counts, key=lambda text: (numbers.get(text, 0.0), text))
    if len(labels) == 2 and len(numbers) < 2:
        labels.sort(key=lambda text: (text.casefold() in POSITIVE, -counts[text]))
    return tuple(labels)


def exceptional_answers(answers: Sequence[str]) -> list[str]:
    """The few answers, at most one in twenty, without which the others would be a closed set."""
    counts = Counter(answers)
    exceptions = {text for text in counts if counts[text] < 2 or not _is_short(text)}
    rest = [text for text in answers if text not in exceptions]
    few = 0 < len(answers) - len(rest) <= max(1, len(answers) // 20)
    return [text for text in counts if text in exceptions] if few and rest and closed_set(rest, []) else []


def swapped_labels(labels: Sequence[str]) -> str:
    """The setting, for a command line, that makes the other of two labels the positive one."""
    return shlex.quote(f"labels={','.join(reversed(labels))}")
