"""Reward functions of `stage: grpo`: those that come along, and FILE.py:function with TRL's signature.

A function is called with `prompts` (each a list of messages), `completions` (each a list of one message, the reply),
`completion_ids`, and the columns of the rows, `answer` among them, each as a list of one value a reply; it returns a
number a reply.
"""

from __future__ import annotations

import importlib.util
import json
import math
import numbers
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Config, UserError, nearest_word

Function = Callable[..., Any]
MAX_LABELS = 20  # of one_of_labels, where the labels are told from the data
NAMES = ("exact_label", "one_of_labels", "json_valid", "length", "regex: PATTERN")


@dataclass(frozen=True)
class Reward:
    """A reward function: the name under which it is logged, and its weight in the sum."""

    name: str
    weight: float
    function: Function

    @property
    def __name__(self) -> str:  # under which TRL logs it
        return self.name

    def __call__(self, **columns: Any) -> list[float | None]:
        """The rewards of some replies, checked; None where the function says nothing of a reply."""
        try:
            found = self.function(**columns)
        except UserError:
            raise
        except Exception as error:  # whatever a user's function does
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            raise UserError("the reward function {name} fails: {problem}", name=self.name, problem=problem) from error
        return checked(self.name, found, len(columns["completions"]))


def find_rewards(config: Config) -> list[Reward]:
    """The rewards that a configuration names, whose files are run; raises UserError for what is wrong with one."""
    names, found = Counter[str](), []
    weights = config.reward_weights or (1.0,) * len(config.reward_funcs)
    for text, weight in zip(config.reward_funcs, weights, strict=True):
        name, function = find_function(text, config)
        names[name] += 1
        numbered = f"{name}_{names[name]}" if names[name] > 1 else name
        found.append(Reward(numbered, weight, function))
    return found


def find_function(text: str, config: Config) -> tuple[str, Function]:
    """Name and function of what stands in `reward_funcs`."""
    kind, colon, rest = (part.strip() for part in text.partition(":"))
    if kind == "regex":
        return kind, matches(rest)
    if not colon and kind in BUILT_IN:
        return kind, BUILT_IN[kind](config)
    file, _, function = text.rpartition(":")
    if file.endswith(".py"):
        return function.strip(), from_file(Path(file).expanduser(), function.strip())
    raise UserError(
        "reward_funcs: there is no reward {reward}{near:suggestion}; known are {known}, and FILE.py:function",
        reward=text,
        near=nearest_word(text, (*BUILT_IN, "regex")),
        known=list(NAMES),
    )


def from_file(file: Path, name: str) -> Function:
    """The function `name` of a Python file, which is run."""
    if not file.is_file():
        raise UserError("reward_funcs: there is no file {file}", file=file)
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # what stands beside it may be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does
        problem = f"{type(error).__name__}: {error}"
        raise UserError("reward_funcs: {file} cannot be run: {problem}", file=file, problem=problem) from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = nearest_word(name, known)
        raise UserError("reward_funcs: {file} has no function {name}{near:suggestion}", file=file, name=name, near=near)
    return function


def checked(name: str, found: Any, replies: int) -> list[float | None]:
    """What a reward function returned, if that is a finite number (or None) for each reply; else raises UserError."""
    values = found.tolist() if hasattr(found, "tolist") else found
    is_list = isinstance(values, list | tuple) and len(values) == replies
    wrong = [value for value in values if not _is_reward(value)] if is_list else [values]
    if wrong:
        raise UserError(
            "the reward function {name} must return a list of {replies} finite numbers (or None), one a reply; it "
            "returned {found}",
            name=name,
            replies=replies,
            found=repr(wrong[0])[:60],
        )
    return [None if value is None else float(value) for value in values]


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, numbers.Real) and math.isfinite(value))


def with_labels(config: Config, rewards: Sequence[Reward], answers: Sequence[str | None]) -> list[Reward]:
    """The rewards with the labels of one_of_labels told from the rows' answers.

    Raises UserError where rows lack the answer that exact_label compares replies with.
    """
    names = {text.strip() for text in config.reward_funcs}
    lacking = sum(answer is None for answer in answers)
    if lacking and "exact_label" in names:
        rows = len(answers)
        raise UserError("exact_label: {lacking:,} of {rows:,} rows have no answer", lacking=lacking, rows=rows)
    if "one_of_labels" not in names or config.labels:
        return list(rewards)
    labels = sorted({answer.strip() for answer in answers if answer is not None})
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UserError(
            "one_of_labels needs 2 to {most} labels, but the rows have {found:,}; name them: labels: yes,no",
            found=len(labels),
            most=MAX_LABELS,
        )
    return [replace(r, function=among(labels)) if r.function.__name__ == "one_of_labels" else r for r in rewards]


def text_of(completion: Any) -> str:
    """The text of a reply: of a list of one message, or a plain string."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def exact_label(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the reply is the row's answer, spaces around it aside, else 0."""
    return [float(text_of(reply).strip() == right.strip()) for reply, right in zip(completions, answer, strict=True)]


def among(labels: Sequence[str]) -> Function:
    """1 where the reply is one of the labels, spaces around it aside, else 0."""

    def one_of_labels(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(text_of(reply).strip() in labels) for reply in completions]

    return one_of_labels


def json_valid(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the whole reply is a JSON object or list, else 0."""

    def is_json(text: str) -> bool:
        try:
            return isinstance(json.loads(text), dict | list)
        except (ValueError, RecursionError):
            return False

    return [float(is_json(text_of(reply))) for reply in completions]


def shortness(limit: int) -> Function:
    """1 minus the reply's tokens in those of the longest that there may be: from near 1 down to 0."""

    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [1 - len(ids) / limit for ids in completion_ids]

    return length


def matches(pattern: str) -> Function:
    """1 where the pattern is found in the reply, else 0; `.` is any character, also the end of a line."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError("reward_funcs: regex: {pattern}: {problem}", pattern=pattern, problem=str(error)) from None
    if not pattern:
        raise UserError("reward_funcs: regex needs a pattern: regex: PATTERN")

    def regex(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(bool(compiled.search(text_of(reply)))) for reply in completions]

    return regex


BUILT_IN: dict[str, Callable[[Config], Function]] = {
    "exact_label": lambda _: exact_label,
    "one_of_labels": lambda config: among(config.labels),
    "json_valid": lambda _: json_valid,
    "length": lambda config: shortness(config.max_completion_length),
}
