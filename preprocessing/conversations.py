"""The conversations of a dataset and what is wrong with its rows, without tokenizing.

Small files are read once: what was read is kept for those who ask again in this process.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from common import Config, UserError
from preprocessing.faults import Fault, RowFault
from preprocessing.preferences import to_document, to_judged, to_pair
from preprocessing.registry import Entry
from preprocessing.rewarded import to_prompt
from preprocessing.rows import (
    Conversation,
    Layout,
    check_columns,
    find_layout,
    fingerprint,
    preference_shape,
    prompt_shape,
    shape_of,
    to_conversation,
)
from preprocessing.sources import Row, Source, chosen_rows, parse_line

READERS = {"sft": to_conversation, "pt": to_document, "dpo": to_pair, "kto": to_judged, "grpo": to_prompt}  # by stage
SMALL = 16 << 20  # bytes of data that are checked before anything heavy is imported, and kept


@dataclass
class Batch:
    """Rows as conversations, the faults of those that are none, and what was noticed on the way (`layout`)."""

    layout: Layout
    rows: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)  # the conversations' fingerprints
    places: list[tuple[str, int]] = field(default_factory=list)  # the file and row of each
    faults: list[RowFault] = field(default_factory=list)

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` conversations; the first has all else."""
        for start in range(0, max(1, len(self.conversations)), size):
            part = slice(start, start + size)
            content = (self.conversations[part], self.contents[part], self.places[part])
            yield (
                Batch(self.layout.blank(), 0, *content)
                if start
                else Batch(self.layout, self.rows, *content, self.faults)
            )


def layout_of(source: Source) -> Layout:
    """The layout of a source, decided by the first of its rows that has a known shape, else by the first at all."""
    first: Row | None = None
    for _, number, row in itertools.islice(source.read(), 100):
        try:
            row = parse_line(row, number) if isinstance(row, bytes) else row
        except Fault:
            continue
        if isinstance(row, dict):
            first = first or row
            others = {"dpo": preference_shape, "grpo": prompt_shape}.get(source.entry.stage)
            if shape_of(row) or (others and others(row)):
                return find_layout(source.entry, row)
    if first is None:
        return find_layout(dataclasses.replace(source.entry, registered=True), {})  # its faults will be reported
    return find_layout(source.entry, first)


def convert_rows(rows: Iterable[tuple[str, int, Any]], layout: Layout, config: Config) -> Batch:
    """The conversations of rows as `Source.read` gives them."""
    batch = Batch(layout)
    for file, number, row in rows:
        batch.rows += 1
        try:
            if isinstance(row, Fault):
                raise row
            row = parse_line(row, number) if isinstance(row, bytes) else row
            conversation = READERS[layout.stage](row, layout, config)
            content = fingerprint(conversation)
        except Fault as fault:
            batch.faults.append(RowFault(file, number, fault.message, fault.final))
            continue
        batch.conversations.append(conversation)
        batch.contents.append(content)
        batch.places.append((file, number))
    return batch


def read_batch(source: Source, config: Config) -> Batch:
    """All conversations of a source; raises UserError where it has no rows, or a column that no row has."""
    layout = layout_of(source)
    batch = convert_rows(chosen_rows(source, config, layout.notes), layout, config)
    if not batch.rows:
        raise UserError(
            "dataset '{name}' holds no rows; give it some, or take it out of the recipe", name=source.entry.name
        )
    check_columns(layout, source.entry.name, batch.rows)
    return batch


def is_kept(entry: Entry) -> bool:
    """Whether the rows of an entry are kept in memory: those of small files."""
    return bool(entry.files) and entry.size <= SMALL


_kept: OrderedDict[str, tuple[int, Batch]] = OrderedDict()  # what was read → its size and rows, the oldest first


def kept_batch(source: Source, config: Config) -> Batch:
    """`read_batch`, remembered for small files as long as they do not change. Nothing of it may be changed."""
    entry = source.entry
    if not is_kept(entry):
        return read_batch(source, config)
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in entry.files]
    settings = (config.default_system, config.name, config.author, config.max_samples, config.train_on_prompt)
    key = repr((entry, stamps, settings, config.seed if entry.num_samples else None))
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key][1]
    batch = read_batch(source, config)
    _kept[key] = (entry.size, batch)
    while sum(size for size, _ in _kept.values()) > SMALL:
        _kept.popitem(last=False)
    return batch
