"""What computes the tokens of replies, and the cache of prefixes: what was computed for a finished reply is kept for
the next prompt that begins in the same way."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

MIN_SHARED = 16  # tokens in common from which copying keys and values is faster than computing them


@dataclass(eq=False)
class Sequence:
    """The token ids that a backend has computed, their keys and values, and how many tokens they may come to."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None
    reserved: int = 0


def common_prefix(some: Ids[int], others: Ids[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


class Backend:
    """Computes at most `slots` sequences side by side, and keeps as many finished ones where there is memory."""

    def __init__(self, slots: int, capacity: int = sys.maxsize) -> None:
        """`capacity`: tokens of all sequences together for which there is memory."""
        self.slots, self.capacity = slots, capacity
        self.opened: list[Sequence] = []
        self.finished: list[Sequence] = []  # oldest first

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the memory with those that are open."""
        return self._reserved() + tokens <= self.capacity

    def open(self, ids: list[int], max_tokens: int) -> Sequence:
        """A sequence for a prompt; what another one has computed of it is taken over, all but the last token at most.

        `max_tokens`: tokens that it may come to.
        """
        best, shared = None, MIN_SHARED - 1
        for other in [*self.opened, *self.finished]:
            same = common_prefix(other.ids, ids[:-1])
            if same > shared and self.can_take(other, same):
                best, shared = other, same
        if best is None:
            sequence = Sequence(cache=self.new_cache())
        elif best in self.finished and 2 * shared >= len(best.ids):
            self.finished.remove(best)
            sequence = best
        else:
            sequence = Sequence(list(best.ids), self.copy_cache(best.cache))
        if shared < len(sequence.ids):
            self.crop(sequence, shared)
            del sequence.ids[shared:]
        sequence.reserved = max_tokens
        self.opened.append(sequence)
        while self.finished and self._reserved() + sum(len(kept.ids) for kept in self.finished) > self.capacity:
            self.drop(self.finished.pop(0))
        return sequence

    def close(self, sequence: Sequence) -> None:
        """The reply has ended; its sequence is kept as long as there is a place."""
        self.opened.remove(sequence)
        self.finished.append(sequence)
        if len(self.finished) > self.slots:
            self.drop(self.finished.pop(0))

    def _reserved(self) -> int:
        return sum(sequence.reserved for sequence in self.opened)

    # ---- what each backend does its own way

    def forward(self, work: list[tuple[Sequence, list[int], bool]]) -> list[Any]:
        """Computes new ids of sequences; the last part of each item says whether the logits after them are wanted.

        Returns for each the logits (vocabulary,) as a float32 tensor, None, or the exception that it failed with.
        Raises where all failed together and nothing was computed.
        """
        raise NotImplementedError

    def new_cache(self) -> Any:
        raise NotImplementedError

    def copy_cache(self, cache: Any) -> Any:
        raise NotImplementedError

    def can_take(self, other: Sequence, length: int) -> bool:
        """Whether a sequence can go on from the first `length` tokens of another."""
        raise NotImplementedError

    def crop(self, sequence: Sequence, length: int) -> None:
        """Leaves the first `length` tokens in the cache."""
        raise NotImplementedError

    def drop(self, sequence: Sequence) -> None:
        """Frees the memory of a sequence that is no longer kept."""
