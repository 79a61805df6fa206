"""The data of a run: checked, tokenized or found in the cache, split and mixed, with one report of all that is wrong.

A row's way: registry.py (names) → sources.py (rows) → layout.py, rows.py (conversations) → template.py (text) →
encode_stages.py (token ids and labels, cut by truncation.py) → samples.py, cache.py (written). Only this file knows it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Message, UserError
from preprocessing.cache import cache_folder, is_whole, written
from preprocessing.faults import Fault, FaultReport, RowFault
from preprocessing.layout import Layout, find_layout
from preprocessing.registry import Entry, find_entries
from preprocessing.rows import Conversation, ReadRow
from preprocessing.rows import read_conversations as read_each
from preprocessing.samples import FACTS, arrow_writer, count_facts, encode_chunks, notes_on, token_counts
from preprocessing.sources import BATCH, Source, chosen_rows, open_source, parse_row
from runs.files import read_json, write_json

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from preprocessing.template import ChatTemplate

SPLIT_FROM, SPLIT_AT_MOST = 200, 200  # conversations from which on a tenth is held out by default, and its limit
SMALL = 16 << 20  # bytes of data that are checked before anything heavy is imported, and kept
PARALLEL = 1 << 20  # bytes of data above which several threads tokenize


def check(config: Config) -> None:
    """Raises UserError with all that is wrong with registry, files and rows, without importing anything heavy.

    Only rows of small local datasets are looked at; `prepare` looks at the others as it tokenizes them.
    """
    faults = FaultReport()
    for entry in _entries(config):
        if _is_small(entry):
            _keep_good(_rows_of(open_source(entry), config)[1], faults)
    faults.raise_if_any(config.on_bad_rows)


def read_conversations(config: Config) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations that are trained on and those held out, as `prepare` splits them, without tokenizing.

    They may be kept for the next caller: do not change them. Raises UserError as `prepare` does.
    """
    faults = FaultReport()
    parts: tuple[list[ReadRow], list[ReadRow]] = ([], [])
    for number, entry in enumerate(_entries(config)):
        part = parts[number >= len(config.dataset)]
        part += _keep_good(_rows_of(open_source(entry), config)[1], faults)
    faults.raise_if_any(config.on_bad_rows)
    train, held_out = parts
    if val_size := held_out_size(config, len(train)):
        import numpy as np

        mask = held_out_mask(np.array([row.content for row in train], dtype=np.int64), val_size, config.seed)
        held_out = [row for row, out in zip(train, mask, strict=True) if out]
        train = [row for row, out in zip(train, mask, strict=True) if not out]
    return [row.conversation for row in train], [row.conversation for row in held_out]


@dataclass(frozen=True)
class TrainingData:
    """The data of a run: the columns of its stage (encode_stages.py), mapped from the cache; lengths in rows' order."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_lengths: np.ndarray
    eval_lengths: np.ndarray | None
    contents: np.ndarray  # int64, the fingerprints of the conversations that are trained on, each once
    report: dict[str, Any]


def prepare(config: Config, tokenizer: Any, template: ChatTemplate) -> TrainingData:
    """Reads, checks, tokenizes (or finds in the cache), splits and mixes the data of a run.

    What is held out is in an order drawn with the seed: an evaluation during training may take only the first of it,
    which must not be those of one label or one dataset. Raises UserError with all faulty rows, or where no sample is
    left.
    """
    import numpy as np

    faults = FaultReport()
    made = [_samples_of(open_source(entry), config, tokenizer, template, faults) for entry in _entries(config)]
    faults.raise_if_any(config.on_bad_rows)
    reports = [read_json(folder / "report.json") for folder in made]
    for report in reports:
        if not report["samples"]:
            raise UserError(
                "no sample is left of dataset '{name}'; see cutoff_len, overlong and on_bad_rows", name=report["name"]
            )
    folders, eval_folders = made[: len(config.dataset)], made[len(config.dataset) :]
    reports, eval_reports = reports[: len(folders)], reports[len(folders) :]
    facts = _facts(folders)
    lengths, contents = facts["length"], facts["content"]
    train, held_out = np.arange(len(facts)), None
    if val_size := held_out_size(config, int(facts["first"].sum())):
        conversations = contents[facts["first"]]
        out = conversations[held_out_mask(conversations, val_size, config.seed)]
        mask = np.isin(contents, out)  # a document's samples stay together
        train, held_out = train[~mask], train[mask]
    train = _mixed(train[lengths[train] > 0], [report["conversations"] for report in reports], config)
    table = eval_table = _table(folders)
    eval_lengths, shuffled = lengths, np.random.default_rng(config.seed).permutation
    if held_out is not None:
        held_out = shuffled(held_out[lengths[held_out] > 0])
    elif eval_folders:
        eval_facts, eval_table = _facts(eval_folders), _table(eval_folders)
        eval_lengths = eval_facts["length"]
        held_out = shuffled(np.flatnonzero(eval_lengths))
        if shared := int(np.isin(eval_facts["content"][held_out], contents[train]).sum()):
            eval_reports[0]["notes"].append(
                Message("{count:,} sample{count:plural} of eval_dataset are trained on too", count=shared).to_json()
            )
    report = {"datasets": reports, "eval_datasets": eval_reports, "train": token_counts(lengths[train])}
    if held_out is not None:
        report["eval"] = token_counts(eval_lengths[held_out])
    return TrainingData(
        table.select(train),
        None if held_out is None else eval_table.select(held_out),
        lengths[train],
        None if held_out is None else eval_lengths[held_out],
        np.unique(contents[train]),
        report,
    )


def _entries(config: Config) -> list[Entry]:
    """What the registry says of dataset, then of eval_dataset."""
    return find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir, config.stage)


def _keep_good(rows: Iterable[ReadRow | RowFault], faults: FaultReport) -> list[ReadRow]:
    """The rows that can be used; adds the others to `faults`."""
    good = []
    for row in rows:
        if isinstance(row, RowFault):
            faults.add(row)
        else:
            good.append(row)
    return good


def _facts(folders: list[Path]) -> np.ndarray:
    """What is known of the samples of all cache folders (samples.FACTS)."""
    import numpy as np

    return np.concatenate([np.load(folder / "facts.npy") for folder in folders])


def _table(folders: list[Path]) -> datasets.Dataset:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f / "samples.arrow")) for f in folders])


# ---------------------------------------------------------------------------------------------------------------------
# One dataset


def _is_small(entry: Entry) -> bool:
    return bool(entry.files) and entry.size <= SMALL


_kept: OrderedDict[str, tuple[int, Layout, list[ReadRow | RowFault]]] = OrderedDict()  # by what was read; with its size


def _rows_of(source: Source, config: Config) -> tuple[Layout, Iterable[ReadRow | RowFault]]:
    """The rows of a dataset as conversations; of small files they are kept as long as these do not change."""
    entry = source.entry
    if not _is_small(entry):
        return _read(source, config)
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in entry.files]
    settings = (config.default_system, config.name, config.author, config.max_samples, config.train_on_prompt)
    key = repr((entry, stamps, settings, config.seed if entry.num_samples else None))
    if key not in _kept:
        layout, rows = _read(source, config)
        _kept[key] = entry.size, layout, list(rows)
    _kept.move_to_end(key)
    while sum(size for size, *_ in _kept.values()) > SMALL:
        _kept.popitem(last=False)
    return _kept[key][1:]


def _read(source: Source, config: Config) -> tuple[Layout, Iterator[ReadRow | RowFault]]:
    """The layout of a dataset, and its rows."""
    layout = find_layout(source.entry, _first_rows(source))
    return layout, _all_rows(source, layout, config)


def _all_rows(source: Source, layout: Layout, config: Config) -> Iterator[ReadRow | RowFault]:
    """The rows of a dataset; raises UserError at their end where there are none, or none has a column."""
    count = 0
    for row in read_each(chosen_rows(source, config, layout.notes), layout, config):
        count += 1
        yield row
    if not count:
        raise UserError("dataset '{name}' holds no rows; give it some, or leave it out", name=source.entry.name)
    layout.check_columns(source.entry.name)


def _first_rows(source: Source) -> Iterator[Any]:
    for _, number, row in itertools.islice(source.read(), 100):
        with contextlib.suppress(Fault):
            yield parse_row(row, number)


def _samples_of(source: Source, config: Config, tokenizer: Any, template: ChatTemplate, faults: FaultReport) -> Path:
    """The cache folder of a dataset's samples (samples.arrow, facts.npy, report.json), made if needed.

    Where there are faults that end the run nothing is made: there may be no such folder.
    """
    folder = cache_folder(source, config, template, tokenizer)
    if is_whole(folder) and not config.overwrite_cache:
        faults.add_json(read_json(folder / "report.json")["faults"])
    else:
        with written(folder) as beside:
            _write_samples(beside, source, config, tokenizer, template, faults)
    return folder


def _write_samples(
    folder: Path, source: Source, config: Config, tokenizer: Any, template: ChatTemplate, faults: FaultReport
) -> None:
    """Tokenizes a dataset into `folder`; without a report where faults end the run."""
    import numpy as np

    layout, found = _rows_of(source, config)
    rows = iter(found)
    files, name, own_faults = source.content, source.entry.name, FaultReport()
    facts, left_out, count = [np.empty(0, FACTS)], Counter(), 0

    def batches() -> Iterator[list[ReadRow]]:
        nonlocal count
        while some := list(itertools.islice(rows, BATCH)):
            count += len(some)
            good = _keep_good(some, own_faults)
            if good and (config.on_bad_rows == "skip" or not (faults.count or own_faults.count)):
                yield good

    with arrow_writer(folder / "samples.arrow", name, config.stage) as write:
        threads = _threads(config, sum(file["bytes"] for file in files))
        for chunk in encode_chunks(batches(), config, template, tokenizer, threads):
            write(chunk)
            facts.append(chunk.facts)
            left_out += chunk.left_out
            for fault in chunk.faults:
                own_faults.add(fault)
    faults.add_json(own_faults.to_json())
    faults.final |= own_faults.final
    if faults.ends_run(config.on_bad_rows):
        return
    all_facts = np.concatenate(facts)
    np.save(folder / "facts.npy", all_facts)
    notes = [*layout.all_notes(config), *notes_on(all_facts, left_out, config, template.name)]
    report = {"rows": count, **count_facts(all_facts), "skipped": own_faults.count, "faults": own_faults.to_json()}
    report |= {"name": name, "files": files, "format": layout.formatting, "notes": [note.to_json() for note in notes]}
    write_json(folder / "report.json", report)


def _threads(config: Config, size: int) -> int:
    """Threads that tokenize `size` bytes of data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, config.preprocessing_num_workers or cores) if size > PARALLEL else 1


# ---------------------------------------------------------------------------------------------------------------------
# What is held out, and the order of the others


def held_out_size(config: Config, conversations: int) -> float:
    """val_size; where it is unset, a tenth of the conversations if there are enough of them, and at most 200."""
    if config.val_size is not None:
        return config.val_size
    if config.eval_dataset or config.eval_strategy == "no" or conversations < SPLIT_FROM:
        return 0
    return min(conversations // 10, SPLIT_AT_MOST)


def held_out_mask(contents: np.ndarray, val_size: float, seed: int) -> np.ndarray:
    """Which conversations are held out: a share (below 1) or a count, drawn by content: equal ones stay together.

    The order of the rows does not matter. Raises UserError when nothing would be left to train on.
    """
    import numpy as np

    unique, inverse, repeats = np.unique(contents, return_inverse=True, return_counts=True)
    drawn = unique.view(np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64: every bit of the seed reaches every bit
        drawn = (drawn ^ (drawn >> np.uint64(30))) * np.uint64(factor)
    order = np.argsort(drawn ^ (drawn >> np.uint64(31)), kind="stable")
    target = round(val_size * len(contents)) if val_size < 1 else int(val_size)
    count = int(np.searchsorted(np.cumsum(repeats[order]), max(target, 1))) + 1
    if count >= len(unique):
        raise UserError(
            "val_size {val_size:g} leaves nothing to train on: there are {conversations} different conversations; "
            "lower it",
            val_size=val_size,
            conversations=len(unique),
        )
    return np.isin(inverse, order[:count])


def _mixed(rows: np.ndarray, sizes: list[int], config: Config) -> np.ndarray:
    """The order in which `rows` of the stacked datasets are trained, after mix_strategy."""
    import numpy as np

    if config.mix_strategy == "concat" or len(sizes) == 1:
        return rows
    import datasets

    parts = np.split(rows, np.searchsorted(rows, np.cumsum(sizes)[:-1]))
    stop = "first_exhausted" if config.mix_strategy == "interleave_under" else "all_exhausted"
    mixed = datasets.interleave_datasets(
        [datasets.Dataset.from_dict({"row": part}) for part in parts],
        probabilities=list(config.interleave_probs) or None,
        seed=config.seed,
        stopping_strategy=stop,
    )
    return np.array(mixed.with_format("numpy")["row"])
