"""The data of a run: checked, tokenized or found in the cache, split and mixed, with one report of all that is wrong.

A row's way: registry.py (names) → sources.py (rows) → layout.py, rows.py (conversations) → template.py (text) →
encode_stages.py (token ids and labels, cut by truncation.py) → samples.py, cache.py (written). Only this file knows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Message, UserError
from preprocessing.cache import cache_folder, is_whole, written
from preprocessing.faults import FaultReport
from preprocessing.registry import entries_of
from preprocessing.rows import Conversation, ReadRow, is_small, read_dataset
from preprocessing.samples import keep_good, token_counts, write_samples
from preprocessing.sources import open_source
from runs.files import read_json

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from preprocessing.template import ChatTemplate

SPLIT_FROM, SPLIT_AT_MOST = 200, 200  # conversations from which on a tenth is held out by default, and its limit


def check(config: Config) -> None:
    """Raises UserError with all that is wrong with registry, files and rows, without importing anything heavy.

    Only rows of small local datasets are looked at; `prepare` looks at the others as it tokenizes them.
    """
    faults = FaultReport()
    for entry in entries_of(config):
        if is_small(entry):
            keep_good(read_dataset(open_source(entry), config)[1], faults)
    faults.raise_if_any(config.on_bad_rows)


def read_conversations(config: Config) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations that are trained on and those held out, as `prepare` splits them, without tokenizing.

    They may be kept for the next caller: do not change them. Raises UserError as `prepare` does.
    """
    faults = FaultReport()
    parts: tuple[list[ReadRow], list[ReadRow]] = ([], [])
    for number, entry in enumerate(entries_of(config)):
        part = parts[number >= len(config.dataset)]
        part += keep_good(read_dataset(open_source(entry), config)[1], faults)
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


def tokenized(config: Config, tokenizer: Any, template: ChatTemplate) -> tuple[list[Path], list[dict[str, Any]]]:
    """The cache folder and the report of each dataset, those of eval_dataset last; what is not cached is tokenized."""
    faults = FaultReport()
    made: list[Path] = []
    for entry in entries_of(config):
        source = open_source(entry)
        content = source.content
        folder = cache_folder(entry, content, config, template, tokenizer)
        if is_whole(folder) and not config.overwrite_cache:
            faults.add_json(read_json(folder / "report.json")["faults"])
        else:
            layout, rows = read_dataset(source, config)
            with written(folder) as beside:
                write_samples(beside, content, layout, rows, config, tokenizer, template, faults)
        made.append(folder)
    faults.raise_if_any(config.on_bad_rows)
    reports = [read_json(folder / "report.json") for folder in made]
    for report in reports:
        if not report["samples"]:
            raise UserError(
                "no sample is left of dataset '{name}'; see cutoff_len, overlong and on_bad_rows", name=report["name"]
            )
    return made, reports


def prepare(config: Config, tokenizer: Any, template: ChatTemplate) -> TrainingData:
    """Reads, checks, tokenizes (or finds in the cache), splits and mixes the data of a run.

    What is held out is in an order drawn with the seed: an evaluation during training may take only the first of it,
    which must not be those of one label or one dataset. Raises UserError with all faulty rows, or where no sample is
    left.
    """
    import numpy as np

    made, reports = tokenized(config, tokenizer, template)
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


def _facts(folders: list[Path]) -> np.ndarray:
    """What is known of the samples of all cache folders (samples.FACTS)."""
    import numpy as np

    return np.concatenate([np.load(folder / "facts.npy") for folder in folders])


def _table(folders: list[Path]) -> datasets.Dataset:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f / "samples.arrow")) for f in folders])


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
