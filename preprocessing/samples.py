"""Conversations → samples: tokenized by several threads, written as they come, and counted."""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Message
from preprocessing.encode_stages import COLUMNS, Sample, encode_batch
from preprocessing.faults import FaultReport, RowFault, TooLong
from preprocessing.layout import Layout
from preprocessing.rows import ReadRow
from preprocessing.sources import BATCH
from runs.files import write_json

if TYPE_CHECKING:
    import numpy as np

    from preprocessing.template import ChatTemplate

# What is known of each sample, beside its columns; lengths are tokens.
FACTS = [
    ("length", "i4"),  # of a pair that of both sequences
    ("whole_length", "i4"),  # before it was cut, or dropped
    ("learned", "i4"),
    ("truncated", "?"),
    ("content", "i8"),  # the fingerprint of its conversation
    ("first", "?"),  # whether it is the first of its conversation: a document may give several
]
EMPTY = {"label": False, "row": ""}  # what stands for no value where that is no list
PARALLEL = 1 << 20  # bytes of data above which several threads tokenize
MANY_CUT = 0.05  # the share of cut samples from which on a warning names a longer cutoff_len


@dataclass
class Chunk:
    """Tokenized rows: one entry a sample, of length 0 where its conversation was dropped."""

    columns: dict[str, list[Any]]  # of COLUMNS[stage], a value each
    facts: np.ndarray  # of FACTS
    left_out: Counter[str]  # what the template leaves out of answers → answers
    faults: list[RowFault]
    rows: int


def keep_good(rows: Iterable[ReadRow | RowFault], faults: FaultReport) -> list[ReadRow]:
    """The rows that can be used; adds the others to `faults`."""
    good = []
    for row in rows:
        if isinstance(row, RowFault):
            faults.add(row)
        else:
            good.append(row)
    return good


def write_samples(
    folder: Path,
    files: list[dict[str, Any]],
    layout: Layout,
    found: Iterable[ReadRow | RowFault],
    config: Config,
    tokenizer: Any,
    template: ChatTemplate,
    faults: FaultReport,
) -> None:
    """Tokenizes the rows of a dataset into `folder` (samples.arrow, facts.npy, report.json).

    Adds to `faults`; where these end the run there is no report.
    """
    import numpy as np

    rows, own_faults = iter(found), FaultReport()
    facts, left_out, count = [np.empty(0, FACTS)], Counter(), 0

    def batches() -> Iterator[list[ReadRow]]:
        nonlocal count
        while some := list(itertools.islice(rows, BATCH)):
            count += len(some)
            good = keep_good(some, own_faults)
            if good and (config.on_bad_rows == "skip" or not (faults.count or own_faults.count)):
                yield good

    with _arrow_writer(folder / "samples.arrow", layout) as write:
        threads = _threads(config, sum(file["bytes"] for file in files))
        for chunk in _encode_chunks(batches(), config, template, tokenizer, threads):
            write(chunk)
            facts.append(chunk.facts)
            left_out += chunk.left_out
            for fault in chunk.faults:
                own_faults.add(fault)
    all_facts = np.concatenate(facts)
    report = {"name": layout.name, "files": files, "format": layout.formatting, "rows": count}
    notes = [*layout.all_notes(config), *_notes_on(all_facts, left_out, config, template.name)]
    report |= {**_count_facts(all_facts), "notes": [note.to_json() for note in notes]}
    report |= {"skipped": own_faults.count, "faults": own_faults.to_json()}
    faults.add_json(report["faults"])
    faults.final |= own_faults.final
    if not faults.ends_run(config.on_bad_rows):
        np.save(folder / "facts.npy", all_facts)
        write_json(folder / "report.json", report)


def _threads(config: Config, size: int) -> int:
    """Threads that tokenize `size` bytes of data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, config.preprocessing_num_workers or cores) if size > PARALLEL else 1


def _encode_chunk(rows: list[ReadRow], config: Config, template: ChatTemplate, tokenizer: Any) -> Chunk:
    """Rows as samples."""
    import numpy as np

    stage = config.stage
    found = encode_batch(stage, [row.conversation for row in rows], config, template, tokenizer)
    kept: list[Sample] = []
    facts: list[tuple[Any, ...]] = []
    left_out: Counter[str] = Counter()
    faults: list[RowFault] = []
    for row, samples in zip(rows, found, strict=True):
        if isinstance(samples, Message):
            dropped = config.overlong == "drop" and isinstance(samples, TooLong)
            faults += [] if dropped else [RowFault(row.file, row.row, samples)]
            empty = {name: EMPTY.get(name, []) for name in COLUMNS[stage]}
            samples = [empty | {"truncated": False, "whole_length": samples.fields["tokens"] if dropped else 0}]
        for number, sample in enumerate(samples):
            kept.append(sample)
            facts.append((*_count(stage, sample), sample["truncated"], row.content, number == 0))
            left_out.update(sample.get("left_out"))
    columns = {name: [sample[name] for sample in kept] for name in COLUMNS[stage]}
    return Chunk(columns, np.array(facts, FACTS), left_out, faults, len(rows))


def _count(stage: str, sample: Sample) -> tuple[int, int, int]:
    """The lengths in FACTS."""
    lengths = {name: len(sample[name]) for name in COLUMNS[stage] if name not in ("label", "row")}
    if stage in ("sft", "pt"):
        tokens, learned = lengths["input_ids"], lengths["labels"] - sample["labels"].count(-100)
    else:
        prompt = lengths["prompt_ids"]
        learned = sum(lengths.values()) - prompt
        tokens = prompt + learned + (prompt if stage == "dpo" and learned else 0)
    return tokens, sample["whole_length"], learned


def _encode_chunks(
    batches: Iterable[list[ReadRow]], config: Config, template: ChatTemplate, tokenizer: Any, threads: int
) -> Iterator[Chunk]:
    """Batches of rows as samples, in order, made by several threads, a copy of the tokenizer each.

    Threads, because two thirds of the work are the tokenizer's, which runs without Python's lock; a process more would
    cost 600 MB and 6 CPU-seconds for its imports.
    """
    if threads == 1:
        yield from (_encode_chunk(batch, config, template, tokenizer) for batch in batches)
        return
    idle = [tokenizer, *(copy.deepcopy(tokenizer) for _ in range(threads - 1))]

    def work(batch: list[ReadRow]) -> Chunk:
        mine = idle.pop()  # there are as many tokenizers as threads
        try:
            return _encode_chunk(batch, config, template, mine)
        finally:
            idle.append(mine)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a batch spread over all cores in each thread: half as fast
    waiting: deque[Future[Chunk]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > 2 * threads:  # no more rows in memory than that
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # Ctrl-C and errors do not wait for batches that have not begun
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _arrow_writer(path: Path, layout: Layout) -> Iterator[Callable[[Chunk], None]]:
    """A function that appends chunks to an Arrow file of the columns of a stage, beside a progress bar."""
    import pyarrow as pa
    from tqdm import tqdm

    types = {"label": pa.bool_(), "row": pa.large_string()}
    schema = pa.schema({column: types.get(column, pa.list_(pa.int32())) for column in COLUMNS[layout.stage]})
    bar = tqdm(desc=f"tokenizing {layout.name}", unit=" rows", delay=2, leave=False, disable=None)
    with bar, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write(chunk: Chunk) -> None:
            writer.write_batch(pa.RecordBatch.from_pydict(chunk.columns, schema=schema))
            bar.update(chunk.rows)

        yield write


# ---------------------------------------------------------------------------------------------------------------------
# What is said of samples


def token_counts(lengths: np.ndarray) -> dict[str, int]:
    """Samples, tokens, and the median and longest length of those that are not empty."""
    import numpy as np

    kept = lengths[lengths > 0]
    return {
        "samples": len(kept),
        "tokens": int(kept.sum()),
        "median": int(np.median(kept)) if len(kept) else 0,
        "longest": int(kept.max(initial=0)),
    }


def _count_facts(facts: np.ndarray) -> dict[str, Any]:
    """What run.json records of the samples of a dataset."""
    import numpy as np

    return {
        "conversations": len(facts),
        **token_counts(facts["length"]),
        "learned": int(facts["learned"].sum()),
        "truncated": int(facts["truncated"].sum()),
        "dropped": int(_dropped(facts).sum()),
        "duplicates": int(facts["first"].sum()) - len(np.unique(facts["content"])),
    }


def _dropped(facts: np.ndarray) -> np.ndarray:
    return (facts["length"] == 0) & (facts["whole_length"] > 0)


def _notes_on(facts: np.ndarray, left_out: Counter[str], config: Config, template: str) -> Iterator[Message]:
    """What the template leaves out; where many samples are cut, the cutoff_len that would keep 95 % whole."""
    import numpy as np

    if count := left_out["thoughts"]:
        yield Message(
            "template {name} leaves out the thoughts of {count:,} answer{count:plural}", name=template, count=count
        )
    if count := left_out["words_beside_call"]:
        yield Message(
            "template {name} leaves out the text next to {count:,} tool call{count:plural}", name=template, count=count
        )
    known = facts["whole_length"][facts["whole_length"] > 0]
    cut, dropped = int((known > config.cutoff_len).sum()), int(_dropped(facts).sum())
    if cut > MANY_CUT * len(known):
        enough = int(np.quantile(known, 1 - MANY_CUT, method="higher"))
        yield Message(
            "{count:,} of {total:,} samples are longer than cutoff_len and are {done}; cutoff_len={enough} would keep "
            "95 % whole",
            count=dropped or cut,
            total=len(known),
            done=Message("left out") if dropped else Message("cut"),
            enough=enough,
        )
