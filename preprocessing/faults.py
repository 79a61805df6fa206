"""What is wrong with the data: the reason why a row or a dataset cannot be used, and the report of all faulty rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from common import Message, UserError

LISTED = 20  # kinds of faults that are listed; the others are counted
ROWS_NAMED = 5  # rows that are named of those with the same fault


class TooLong(Message):
    """Why a sample is none: it has more than cutoff_len tokens, the field `tokens`."""


class Fault(Exception):
    """The reason: a sentence and its fields, or a Message. `final`: what follows in the file cannot be read either."""

    def __init__(self, reason: str | Message, /, *, final: bool = False, **fields: Any) -> None:
        super().__init__(reason, fields)
        self.message = Message(reason, **fields) if isinstance(reason, str) else reason
        self.final = final

    def __str__(self) -> str:
        return str(self.message)


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used; rows are numbered from 1."""

    file: str
    row: int
    reason: Message
    final: bool = False


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`, whose own way is to let the last of two values win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Fault(
            "the key '{key}' stands twice in an object; keep one", key=next(n for n in names if names.count(n) > 1)
        )
    return found


def json_problem(error: JSONDecodeError) -> str | Message:
    """What the json module says is wrong, whose messages may end with "at"; of a comma too many it says less."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    if before.endswith(",") and after in ("]", "}"):
        return Message("a comma too many stands before the closing bracket")
    return error.msg.removesuffix(" at")


class FaultReport:
    """The faulty rows of one or several datasets. Rows of one file with the same kind of fault are kept together."""

    def __init__(self) -> None:
        self.count = 0
        self.final = False
        self.groups: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, fault: RowFault) -> None:
        self.final |= fault.final
        self._add_group(fault.file, [fault.row], 1, fault.reason)

    def add_json(self, groups: Iterable[dict[str, Any]]) -> None:
        """Adds what `to_json` of another report has given."""
        for group in groups:
            self._add_group(group["file"], group["rows"], group["count"], Message.from_json(group["reason"]))

    def _add_group(self, file: str, rows: list[int], count: int, reason: Message) -> None:
        self.count += count
        new = {"file": file, "rows": [], "count": 0, "reason": reason.to_json()}
        group = self.groups.setdefault((file, reason.sentence), new)
        group["count"] += count
        group["rows"] = [*group["rows"], *rows][:ROWS_NAMED]

    def to_json(self) -> list[dict[str, Any]]:
        """For a file: [{"file", "rows" (the first ROWS_NAMED), "count", "reason" (of the first row)}]."""
        return list(self.groups.values())

    def ends_run(self, on_bad_rows: str) -> bool:
        """Whether there are faulty rows, and they are not to be skipped or cannot be."""
        return bool(self.count) and (on_bad_rows != "skip" or self.final)

    def raise_if_any(self, on_bad_rows: str) -> None:
        """Raises UserError with the first faults and the count where they end the run."""
        if not self.ends_run(on_bad_rows):
            return
        count, faults = self.count, fault_messages(self.to_json())
        if self.final:
            raise UserError(
                "{count:,} faulty row{count:plural}:\n  {faults:lines}\ncorrect the file; it cannot be read to its end",
                count=count,
                faults=faults,
            )
        raise UserError(
            "{count:,} faulty row{count:plural}:\n  {faults:lines}\ncorrect them, or skip them with on_bad_rows=skip",
            count=count,
            faults=faults,
        )


def fault_messages(groups: list[dict[str, Any]]) -> list[Message]:
    """What `FaultReport.to_json` has given, as messages: at most LISTED, and how many rows have others."""
    messages = []
    for group in groups[:LISTED]:
        (first, *others), more = group["rows"], group["count"] - 1
        place = {"file": group["file"], "row": first, "reason": Message.from_json(group["reason"])}
        if more:
            place |= {"more": more, "rows": [*map(str, others), *["..."] * (more >= ROWS_NAMED)]}
            message = Message("{file}, row {row}: {reason} (also {more:,} more row{more:plural}: {rows})", **place)
        else:
            message = Message("{file}, row {row}: {reason}", **place)
        messages.append(message)
    if rest := sum(group["count"] for group in groups[LISTED:]):
        messages.append(Message("... and {count:,} row{count:plural} with other faults", count=rest))
    return messages
