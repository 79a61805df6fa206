"""Conversations longer than cutoff_len.

Whole turns go first, the oldest before the others; a system message stays. Where the last turn alone is too long, its
prompt and its answers are cut in the proportion of their lengths; the shorter of the two stays whole if it fits into
half of the space, as in LLaMA-Factory's `infer_seqlen`. Messages are cut at their ends, and the conversation is
rendered anew each time, so that every control token and header of the template stays. A question is never cut to
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from preprocessing.faults import Fault

Messages = list[dict[str, Any]]
Written = TypeVar("Written", bound=Sized)  # what is written of messages; its length is their tokens


def shorten(
    messages: Messages, write: Callable[[Messages], Written], token_starts: Callable[[str], list[int]], cutoff_len: int
) -> tuple[Messages, Messages, Written]:
    """The messages that are kept, the same cut so that they fit, and what is written of the latter.

    `token_starts` gives the places at which a text may be cut. Raises Fault where the template, the tools and the
    beginning of the question alone are longer than `cutoff_len`.
    """
    kept = _newest_turns(messages, write, cutoff_len)
    written = write(kept)
    if len(written) <= cutoff_len:
        return kept, kept, written
    cutter = _Cutter(kept, [token_starts(message["content"]) for message in kept], write, cutoff_len)
    answers = [i for i, message in enumerate(kept) if message["role"] == "assistant"]
    prompt = [i for i in range(len(kept)) if i not in answers]
    prompt_tokens, answer_tokens = cutter.tokens_of(prompt), cutter.tokens_of(answers)
    space = prompt_tokens + answer_tokens - (len(written) - cutoff_len)
    prompt_share, answer_share = shares(prompt_tokens, answer_tokens, max(0, space))
    if answer_share == 0 < answer_tokens:  # without an answer nothing would be learned
        prompt_share, answer_share = prompt_share - 1, 1
    cut, written = cutter.cut(kept, prompt, prompt_share, repeat=answer_share == answer_tokens)
    if len(written) > cutoff_len:
        overflow = len(written) - cutoff_len
        cut, written = cutter.cut(cut, answers, answer_tokens - overflow, repeat=True)
    if len(written) > cutoff_len:
        raise no_space(cutoff_len, len(written))
    return kept, cut, written


def no_space(cutoff_len: int, tokens: int) -> Fault:
    """The fault of a conversation of which no answer is left."""
    return Fault(
        "cutoff_len={cutoff_len} leaves no space for its answer: the template, the tools and the beginning of the "
        "question alone take {tokens} tokens; raise cutoff_len",
        cutoff_len=cutoff_len,
        tokens=tokens,
    )


def shares(prompt: int, answer: int, space: int) -> tuple[int, int]:
    """How many tokens of a prompt and an answer are kept in `space` tokens: LLaMA-Factory's `infer_seqlen`."""
    if answer * 2 < space:
        most = space
    elif prompt * 2 < space:
        most = space - prompt
    else:
        most = space * answer // max(1, prompt + answer)
    answer = min(answer, most)
    return min(prompt, space - answer), answer


def _newest_turns(messages: Messages, write: Callable[[Messages], Sized], cutoff_len: int) -> Messages:
    """The system message and as many of the newest turns as fit; at least the last turn, even where it does not fit."""
    head = int(messages[0]["role"] == "system")
    turns = [head, *(i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user")]
    low, high = min(1, len(turns) - 1), len(turns) - 1  # how many to leave out: the fewest that make it fit
    while low < high:
        middle = (low + high) // 2
        if len(write(messages[:head] + messages[turns[middle] :])) <= cutoff_len:
            high = middle
        else:
            low = middle + 1
    return messages[:head] + messages[turns[low] :]


@dataclass(frozen=True)
class _Cutter:
    """Cuts messages of one conversation to fewer tokens; `starts` are the places where each may be cut."""

    messages: Messages
    starts: list[list[int]]
    write: Callable[[Messages], Any]
    cutoff_len: int

    def tokens_of(self, group: list[int]) -> int:
        return sum(len(self.starts[i]) for i in group)

    def cut(self, messages: Messages, group: list[int], space: int, *, repeat: bool) -> tuple[Messages, Any]:
        """`messages` with those of `group` cut to `space` tokens together; `repeat`: to fewer, until all fits."""
        while True:
            longest = _longest([len(self.starts[i]) for i in group], max(0, space))
            cut = list(messages)
            for i in group:
                if len(self.starts[i]) > (most := max(longest, self._least(i))):
                    cut[i] = {**self.messages[i], "content": self.messages[i]["content"][: self.starts[i][most]]}
            written = self.write(cut)
            overflow = len(written) - self.cutoff_len
            if not repeat or overflow <= 0 or space <= 0:
                return cut, written
            space -= overflow

    def _least(self, index: int) -> int:
        """Tokens of a message that always stay: of a question those up to its first word."""
        if self.messages[index]["role"] != "user":
            return 0
        content, starts = self.messages[index]["content"], self.starts[index]
        return next((n for n, start in enumerate(starts) if content[:start].strip()), len(starts))


def _longest(lengths: list[int], space: int) -> int:
    """The largest length that keeps the sum of all lengths, each cut to it, within `space`."""
    for i, length in enumerate(sorted(lengths)):
        share = space // (len(lengths) - i)
        if length > share:
            return share
        space -= length
    return max(lengths, default=0)
