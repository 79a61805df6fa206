"""What the checks before a training find: messages of four kinds, collected by topic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

from common import Message, UserError

Result = TypeVar("Result")


class Finding(Message):
    """What a check has found: one of the four below; `label` is what a dry run puts before it."""

    label = "ok"

    @classmethod
    def of(cls, message: Message | UserError) -> Self:
        return cls(message.sentence, **message.fields)


class Fact(Finding):
    """What is as it should be; only a dry run tells it."""


class Note(Finding):
    """What is worth knowing, or probably not meant."""

    label = "note"


class Problem(Finding):
    """What keeps a training from starting."""

    label = "FAULT"


class Risk(Problem):
    """A problem by an estimate: a dry run says no, a start only notes it."""


class Findings:
    """Pairs of a topic and a finding, in the order of the checks; `tell` is called with each."""

    def __init__(self, tell: Callable[[str, Finding], None] = lambda *_: None) -> None:
        self.all: list[tuple[str, Finding]] = []
        self.tell = tell

    def add(self, topic: str, found: Iterable[Finding]) -> None:
        """Adds what a check yields, until it ends or raises UserError, which is a problem; nothing twice."""
        try:
            for finding in found:
                if finding not in self.of(Finding):
                    self.all.append((topic, finding))
                    self.tell(topic, finding)
        except UserError as error:
            self.add(topic, [Problem.of(error)])

    def attempt(self, topic: str, make: Callable[..., Result], *arguments: Any) -> Result | None:
        """What `make` returns; None where it raises UserError, which is a problem."""
        try:
            return make(*arguments)
        except UserError as error:
            self.add(topic, [Problem.of(error)])
            return None

    def of(self, *kinds: type[Finding], topic: str | None = None) -> list[Finding]:
        return [found for its, found in self.all if isinstance(found, kinds) and topic in (None, its)]

    def conclude(self) -> list[Finding]:
        """What a start has to say; raises UserError with all problems that keep it from going on."""
        problems = [problem for problem in self.of(Problem) if not isinstance(problem, Risk)]
        if len(problems) == 1:
            raise UserError.from_message(problems[0])
        if problems:
            raise UserError("{count} faults:\n  {faults:lines}", count=len(problems), faults=problems)
        return self.of(Note, Risk)
