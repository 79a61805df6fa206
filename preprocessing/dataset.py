"""Conversations → token ids and labels, cached and mapped from the disk, with one report of all that is wrong.

How rows become conversations stands in formats.py.
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import common
from common import Config, Message, UserError, nearest
from preprocessing.formats import (
    BATCH,
    Conversation,
    Entry,
    Fault,
    Layout,
    Row,
    find_entries,
    find_layout,
    fingerprint,
    numbered,
    parse_line,
    read_rows,
    shape_of,
    to_conversation,
)
from runs.files import write_json

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from preprocessing.chat_template import ChatTemplate

LISTED = 20  # faulty rows that are listed; the others are counted
SMALL = 16 << 20  # bytes of data that are checked before anything heavy is imported
TOO_LONG = "longer_than_cutoff_len"  # code of the reason why an over-long conversation is no sample
PARALLEL = 1 << 20  # bytes of data above which several threads tokenize
SPLIT_FROM, SPLIT_AT_MOST = 200, 200  # conversations from which on a tenth is held out by default, and its limit


# ---------------------------------------------------------------------------------------------------------------------
# One dataset: its rows, and what is wrong with them


@dataclass
class Source:
    """The rows of one entry, readable again and again, and what their content is known by."""

    entry: Entry
    content: list[dict[str, Any]]  # a file's path, bytes and sha256; or a hub's dataset and its fingerprint
    read: Callable[[], Iterator[tuple[str, int, Any]]]  # file, row number, row


def open_source(entry: Entry, *, hashed: bool = True) -> Source:
    """Where the rows of an entry come from; raises UserError when a hub does not have them."""
    if not entry.hub:
        content = [
            {"path": str(file), "bytes": file.stat().st_size} | ({"sha256": sha256(file)} if hashed else {})
            for file in entry.files
        ]
        return Source(entry, content, lambda: ((str(f), n, row) for f in entry.files for n, row in read_rows(f)))
    table = _download(entry)
    content = [{"path": entry.repository, "bytes": table.data.nbytes, "fingerprint": table._fingerprint}]
    arrow = table.with_format("arrow")
    return Source(
        entry, content, lambda: ((entry.repository, n, row) for n, row in numbered(arrow.iter(batch_size=BATCH)))
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _download(entry: Entry) -> datasets.Dataset:
    """A dataset of the Hugging Face hub (HF_ENDPOINT is honoured) or of ModelScope."""
    import datasets

    options = {"data_dir": entry.folder, "split": entry.split}
    place = "ModelScope" if entry.hub == "ms" else os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        if entry.hub == "hf":
            return datasets.load_dataset(entry.repository, entry.subset, **options)
        from modelscope import MsDataset

        table = MsDataset.load(entry.repository, subset_name=entry.subset, **options)
        return table.to_hf_dataset() if isinstance(table, MsDataset) else table
    except ImportError:
        if entry.hub == "hf":
            raise
        raise UserError(
            f"dataset {entry.name!r} is on ModelScope, whose package is not installed: pip install modelscope"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"dataset {entry.name!r} ({entry.repository}, split {entry.split}) could not be fetched from {place}: "
            f"{reason.rstrip('.')}; check name, split and network, or set HF_ENDPOINT to a mirror"
        ) from None


def chosen_rows(source: Source, config: Config, notes: set[str]) -> Iterator[tuple[str, int, Any]]:
    """The rows that num_samples (drawn at random, again where there are too few) and max_samples leave."""
    for file in source.entry.files:
        with open(file, "rb") as opened:
            if opened.read(3) == codecs.BOM_UTF8:
                notes.add(f"{file.name} starts with a byte-order mark (BOM), which is passed over")
    rows = source.read()
    if source.entry.num_samples:
        import numpy as np

        total = sum(1 for _ in source.read())
        rng = np.random.default_rng(config.seed)
        wanted = np.bincount(rng.permutation(total)[: source.entry.num_samples], minlength=total)
        if missing := max(0, source.entry.num_samples - total):
            wanted += np.bincount(rng.integers(0, total, missing), minlength=total)
            notes.add(f"num_samples asks for {source.entry.num_samples} of {total} rows; {missing} are drawn again")
        rows = (row for index, row in enumerate(source.read()) for _ in range(wanted[index]))
    if config.max_samples:
        rows = itertools.chain(itertools.islice(rows, config.max_samples), _rest(rows, config.max_samples, notes))
    return rows


def _rest(rows: Iterator[Any], limit: int, notes: set[str]) -> Iterator[Any]:
    """No rows; a note where max_samples left some out. A generator: it must not look before the others are through."""
    if next(rows, None) is not None:
        notes.add(f"max_samples: only the first {limit} rows are used")
    yield from ()


def layout_of(source: Source) -> Layout:
    """The layout of a source, told from the first of its rows that has a known shape, else from the first at all."""
    first: Row | None = None
    for _, number, row in itertools.islice(source.read(), 100):
        try:
            row = parse_line(row, number) if isinstance(row, bytes) else row
        except Fault:
            continue
        if isinstance(row, dict):
            first = first or row
            if shape_of(row):
                return find_layout(source.entry, row)
    if first is None:
        return find_layout(dataclasses.replace(source.entry, registered=True), {})  # its faults will be told
    return find_layout(source.entry, first)


def convert(row: Any, number: int, layout: Layout, config: Config) -> tuple[Conversation, int]:
    """A row as `read_rows` yields it → the conversation and its fingerprint; raises Fault."""
    if isinstance(row, Fault):
        raise row
    row = parse_line(row, number) if isinstance(row, bytes) else row
    conversation = to_conversation(row, layout, config)
    return conversation, fingerprint(conversation)


def look_back(layout: Layout, name: str, rows: int) -> None:
    """What can be said of a dataset's columns when all its rows were read; raises UserError for a column no row has."""
    for what in sorted(layout.named):
        column = layout.columns.get(what)
        if rows and column and column not in layout.seen:
            near = nearest(column, layout.seen - layout.used)
            if near:
                raise UserError(
                    f"dataset {name!r}: its {what} is to stand in '{column}', which no row has{near}; "
                    "mend columns in dataset_info.json"
                )
            layout.notes.add(f"no row has the column '{column}' that dataset_info.json names as {what}")
    if unused := sorted(map(str, layout.seen - layout.used)):
        layout.notes.add(f"columns that are not used: {', '.join(unused)}")


@dataclass
class Faults:
    """The faulty rows of all datasets of a run."""

    shown: list[str] = field(default_factory=list)
    count: int = 0
    final: bool = False

    def add(self, reasons: Iterable[tuple[str, bool]]) -> None:
        for reason, final in reasons:
            self.count += 1
            self.final |= final
            if len(self.shown) < LISTED:
                self.shown.append(reason)

    def raise_if_any(self, on_bad_rows: str) -> None:
        """Raises UserError with the first rows and the count, unless faulty rows are to be skipped and can be."""
        if not self.count or (on_bad_rows == "skip" and not self.final):
            return
        more = [f"... and {self.count - len(self.shown):,} more"] if self.count > len(self.shown) else []
        head = "a row of the data is faulty" if self.count == 1 else f"{self.count:,} rows of the data are faulty"
        advice = "mend the file" if self.final else "mend them, or leave them out with on_bad_rows=skip"
        raise UserError("\n  ".join([f"{head}:", *self.shown, *more]) + f"\n{advice}")


def check(config: Config) -> None:
    """Raises UserError with all that is wrong with registry, files and rows, without importing anything heavy.

    Only rows of small local datasets are looked at; `prepare` looks at the others as it tokenizes them.
    """
    faults = Faults()
    for entry in find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir):
        if entry.files and entry.size <= SMALL:
            _, _, found = _read(open_source(entry, hashed=False), config)
            faults.add(found)
    faults.raise_if_any(config.on_bad_rows)


def _convert_all(
    rows: Iterable[tuple[str, int, Any]], layout: Layout, config: Config
) -> tuple[list[Conversation], list[int], list[str], list[tuple[str, bool]]]:
    """The conversations of rows, with their fingerprints and places, and the faults of the rows that are none."""
    conversations, contents, places, faults = [], [], [], []
    for file, number, row in rows:
        place = f"{file}, row {number}"
        try:
            conversation, content = convert(row, number, layout, config)
        except Fault as fault:
            faults.append((f"{place}: {fault}", fault.final))
            continue
        conversations.append(conversation)
        contents.append(content)
        places.append(place)
    return conversations, contents, places, faults


def _read(source: Source, config: Config) -> tuple[list[Conversation], list[int], list[tuple[str, bool]]]:
    """The conversations of a source, their fingerprints, and its faults."""
    layout = layout_of(source)
    conversations, contents, _, faults = _convert_all(chosen_rows(source, config, layout.notes), layout, config)
    count = len(conversations) + len(faults)
    if not count:
        raise UserError(f"dataset {source.entry.name!r} holds no rows; give it some, or take it out of the recipe")
    look_back(layout, source.entry.name, count)
    return conversations, contents, faults


def read_conversations(config: Config) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations that are trained on and those held out, as `prepare` splits them, without tokenizing.

    Raises UserError as `prepare` does.
    """
    faults = Faults()
    parts: list[tuple[list[Conversation], list[int]]] = []
    for names in (config.dataset, config.eval_dataset):
        parts.append(([], []))
        for entry in find_entries(names, config.dataset_dir):
            conversations, contents, found = _read(open_source(entry, hashed=False), config)
            parts[-1][0].extend(conversations)
            parts[-1][1].extend(contents)
            faults.add(found)
    faults.raise_if_any(config.on_bad_rows)
    (train, contents), (held_out, _) = parts
    if val_size := held_out_size(config, len(contents)):
        import numpy as np

        mask = held_out_mask(np.array(contents, dtype=np.int64), val_size, config.seed)
        held_out = [c for c, out in zip(train, mask, strict=True) if out]
        train = [c for c, out in zip(train, mask, strict=True) if not out]
    return train, held_out


# ---------------------------------------------------------------------------------------------------------------------
# Samples: conversations → token ids, written to the cache as they come and mapped from there


@dataclass(frozen=True)
class Job:
    """What tokenizing a batch needs."""

    config: Config
    tokenizer: Any
    template: ChatTemplate
    layout: Layout


@dataclass
class Chunk:
    """A tokenized batch: one entry a conversation, of length 0 where it was dropped."""

    input_ids: np.ndarray  # int32, all samples one after another
    labels: np.ndarray  # int32
    lengths: np.ndarray  # int32, a sample
    contents: np.ndarray  # int64, its conversation's fingerprint
    truncated: int
    dropped: int
    faults: list[tuple[str, bool]]
    layout: Layout


def tokenize(job: Job, rows: list[tuple[str, int, Any]], *, encoding: bool = True) -> Chunk:
    """A batch of rows as samples; with `encoding` off the rows are only checked."""
    import numpy as np

    from preprocessing import chat_template

    config = job.config
    layout = dataclasses.replace(job.layout, notes=set(), counted=Counter(), used=set(), seen=set())
    conversations, contents, places, faults = _convert_all(rows, layout, config)
    samples = chat_template.encode(
        conversations if encoding else [],
        job.template,
        job.tokenizer,
        cutoff_len=config.cutoff_len,
        overlong=config.overlong,
        mask_history=config.mask_history,
        train_on_prompt=config.train_on_prompt,
        enable_thinking=config.enable_thinking,
    )
    refused = [(place, sample) for place, sample in zip(places, samples, strict=False) if isinstance(sample, Message)]
    dropped = [reason for _, reason in refused if config.overlong == "drop" and reason.code == TOO_LONG]
    faults += [(f"{place}: {reason}", False) for place, reason in refused if reason not in dropped]
    kept = [{"input_ids": [], "labels": []} if isinstance(sample, Message) else sample for sample in samples]
    for sample in kept:
        for what, answers in sample.get("left_out", {}).items():
            layout.counted[f"answers whose {what} the chat template ({job.template.name}) leaves out"] += answers
    chain = itertools.chain.from_iterable
    return Chunk(
        np.fromiter(chain(sample["input_ids"] for sample in kept), np.int32),
        np.fromiter(chain(sample["labels"] for sample in kept), np.int32),
        np.array([len(sample["input_ids"]) for sample in kept], np.int32),
        np.array(contents if encoding else [], np.int64),
        truncated=sum(bool(sample.get("truncated")) for sample in kept),
        dropped=len(dropped),
        faults=faults,
        layout=layout,
    )


@contextmanager
def _without_own_threads() -> Iterator[None]:
    """Keeps the tokenizers library from spreading each batch over all cores: several threads would be half as fast."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _chunks(job: Job, rows: Iterator[Any], threads: int, encoding: Callable[[], bool]) -> Iterator[Chunk]:
    """Batches of rows, tokenized in order by several threads, a copy of the tokenizer each.

    Threads, because two thirds of the work are the tokenizer's, which runs without Python's lock; a process more would
    cost 600 MB and 6 CPU-seconds for its imports.
    """
    batches = iter(lambda: list(itertools.islice(rows, BATCH)), [])
    if threads == 1:
        yield from (tokenize(job, batch, encoding=encoding()) for batch in batches)
        return
    idle = [job, *(dataclasses.replace(job, tokenizer=copy.deepcopy(job.tokenizer)) for _ in range(threads - 1))]

    def work(batch: list[Any], encode: bool) -> Chunk:
        mine = idle.pop()  # there are as many jobs as threads
        try:
            return tokenize(mine, batch, encoding=encode)
        finally:
            idle.append(mine)

    waiting: deque[Future[Chunk]] = deque()
    with _without_own_threads(), ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            waiting.append(pool.submit(work, batch, encoding()))
            if len(waiting) > 2 * threads:  # no more rows in memory than that
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _cache_key(source: Source, config: Config, template: ChatTemplate, tokenizer: Any) -> str:
    """What the samples of a dataset depend on: content, registry, template, tokenizer, settings, and this code."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = "cutoff_len overlong mask_history train_on_prompt enable_thinking default_system name author max_samples"
    facts = [
        source.content,
        {name: str(value) for name, value in dataclasses.asdict(source.entry).items()},
        template.text,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
        {name: getattr(config, name) for name in settings.split()},
        config.seed if source.entry.num_samples else None,
        [tokenizers.__version__, transformers.__version__],
        [sha256(file) for file in sorted(Path(__file__).parent.glob("*.py"))],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def cached(source: Source, config: Config, tokenizer: Any, template: ChatTemplate, faults: Faults) -> Path:
    """The cache folder of a dataset's samples (samples.arrow, lengths.npy, contents.npy, report.json), made if needed.

    Where there are faults that end the run nothing is made, and the folder named does not exist.
    """
    folder = common.CACHE / "data" / _cache_key(source, config, template, tokenizer)
    if config.overwrite_cache and folder.exists():
        shutil.rmtree(folder)
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder)
    if folder.exists():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        faults.add((reason, False) for reason in report["faults"])
        faults.count += report["skipped"] - len(report["faults"])
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(".*.tmp"):  # of a process that was killed
        if not Path(f"/proc/{stale.suffixes[-2][1:]}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        if _write_samples(beside, source, config, tokenizer, template, faults):
            for file in beside.iterdir():  # else a power cut may leave the name without the content
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            os.replace(beside, folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            return folder  # another run made the same samples meanwhile
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk of {folder.parent} is full; free some space, or set ONECARD_CACHE") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the files of a cache folder can be read and belong together: a power cut or a full disk may cut them."""
    import numpy as np
    import pyarrow as pa

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with pa.memory_map(str(folder / "samples.arrow")) as file:
            rows = {pa.ipc.open_stream(file).read_all().num_rows}  # mapped, not read
        rows |= {len(np.load(folder / name)) for name in ("lengths.npy", "contents.npy")}
    except (OSError, ValueError, EOFError):  # Arrow's and JSON's are ValueErrors
        return False
    return rows == {report["conversations"]}


def _write_samples(
    folder: Path, source: Source, config: Config, tokenizer: Any, template: ChatTemplate, faults: Faults
) -> bool:
    """Tokenizes a dataset into `folder`; False where faults end the run."""
    import numpy as np
    import pyarrow as pa
    from tqdm import tqdm

    layout = layout_of(source)
    size = sum(item["bytes"] for item in source.content)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cores, config.preprocessing_num_workers or cores) if size > PARALLEL else 1
    lengths, contents, own, notes, rows = [], [], [], set(), 0
    counts = dict.fromkeys(("learned", "truncated", "dropped", "faulty"), 0)
    ints = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": ints, "labels": ints})

    def counted() -> Iterator[Any]:
        nonlocal rows
        for rows, row in enumerate(chosen_rows(source, config, notes), 1):  # noqa: B007
            yield row

    def encoding() -> bool:
        return config.on_bad_rows == "skip" or not faults.count

    job = Job(config, tokenizer, template, layout)
    bar = tqdm(desc=f"tokenizing {source.entry.name}", unit=" rows", delay=2, leave=False, disable=None)
    with bar, pa.OSFile(str(folder / "samples.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in _chunks(job, counted(), threads, encoding):
            offsets = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
            columns = [pa.ListArray.from_arrays(offsets, values) for values in (chunk.input_ids, chunk.labels)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            bar.update(len(chunk.lengths))
            lengths.append(chunk.lengths)
            contents.append(chunk.contents)
            counts["learned"] += int((chunk.labels != -100).sum())
            counts["truncated"] += chunk.truncated
            counts["dropped"] += chunk.dropped
            counts["faulty"] += len(chunk.faults)
            faults.add(chunk.faults)
            own += [reason for reason, _ in chunk.faults[: 1000 - len(own)]]
            layout.notes |= chunk.layout.notes
            layout.counted += chunk.layout.counted
            layout.used |= chunk.layout.used
            layout.seen |= chunk.layout.seen
    if not rows:
        raise UserError(f"dataset {source.entry.name!r} holds no rows; give it some, or take it out of the recipe")
    look_back(layout, source.entry.name, rows)
    if not encoding() or faults.final:
        return False
    lengths, contents = np.concatenate(lengths), np.concatenate(contents)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "contents.npy", contents)
    report = {
        "name": source.entry.name,
        "files": source.content,
        "format": layout.formatting,
        "rows": rows,
        "conversations": len(lengths),
        **_token_counts(lengths, counts["learned"]),
        "truncated": counts["truncated"],
        "dropped": counts["dropped"],
        "duplicates": len(contents) - len(np.unique(contents)),
        "skipped": counts["faulty"],
        "faults": own,
        "notes": sorted(layout.notes | notes) + [f"{what}: {n:,}" for what, n in sorted(layout.counted.items())],
    }
    write_json(folder / "report.json", report)
    return True


def _token_counts(lengths: np.ndarray, learned: int | None = None) -> dict[str, int]:
    import numpy as np

    kept = lengths[lengths > 0]
    counts = {
        "samples": len(kept),
        "tokens": int(kept.sum()),
        "median": int(np.median(kept)) if len(kept) else 0,
        "longest": int(kept.max(initial=0)),
    }
    return counts if learned is None else counts | {"learned": learned}


@dataclass(frozen=True)
class Prepared:
    """The data of a run: int32 columns input_ids and labels, mapped from the cache; lengths in the rows' order."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    train_lengths: np.ndarray
    eval_lengths: np.ndarray | None
    contents: np.ndarray  # int64, the fingerprints of the conversations that are trained on, each once
    report: dict[str, Any]


def prepare(config: Config, tokenizer: Any, template: ChatTemplate) -> Prepared:
    """Reads, checks, tokenizes (or finds in the cache), splits and mixes the data of a run.

    What is held out is in an order drawn with the seed: an evaluation during training may take only the first of it,
    which must not be those of one label or one dataset. Raises UserError with all faulty rows, or where no sample is
    left.
    """
    import numpy as np

    faults = Faults()
    folders: dict[str, list[Path]] = {"train": [], "eval": []}
    for part, names in (("train", config.dataset), ("eval", config.eval_dataset)):
        for entry in find_entries(names, config.dataset_dir):
            folders[part].append(cached(open_source(entry), config, tokenizer, template, faults))
    faults.raise_if_any(config.on_bad_rows)
    reports = {
        part: [json.loads((f / "report.json").read_text(encoding="utf-8")) for f in folders[part]] for part in folders
    }
    for report in itertools.chain(*reports.values()):
        if not report["samples"]:
            raise UserError(
                f"no sample is left of dataset {report['name']!r}; see cutoff_len, overlong and on_bad_rows"
            )
    sizes, lengths, contents = _stacked(folders["train"])
    train, held_out = np.arange(len(lengths)), None
    if val_size := held_out_size(config, len(contents)):
        mask = held_out_mask(contents, val_size, config.seed)
        train, held_out = train[~mask], train[mask]
    train = _mixed(train[lengths[train] > 0], sizes, config)
    table = _table(folders["train"])
    made = {"train": (table.select(train), lengths[train])}
    shuffled = np.random.default_rng(config.seed).permutation
    if held_out is not None:
        held_out = shuffled(held_out[lengths[held_out] > 0])
        made["eval"] = (table.select(held_out), lengths[held_out])
    elif folders["eval"]:
        _, eval_lengths, eval_contents = _stacked(folders["eval"])
        kept = shuffled(np.flatnonzero(eval_lengths))
        made["eval"] = (_table(folders["eval"]).select(kept), eval_lengths[kept])
        if shared := int(np.isin(eval_contents[kept], contents[train]).sum()):
            reports["eval"][0]["notes"].append(f"{shared} samples of eval_dataset are trained on too")
    report = {"datasets": reports["train"], "eval_datasets": reports["eval"]}
    report |= {part: _token_counts(found[1]) for part, found in made.items()}
    return Prepared(
        *(made["train"][0], made.get("eval", (None, None))[0]),
        *(made["train"][1], made.get("eval", (None, None))[1]),
        contents=np.unique(contents[train]),
        report=report,
    )


def _stacked(folders: list[Path]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The conversations of each cache folder, and lengths and contents of all."""
    import numpy as np

    lengths = [np.load(folder / "lengths.npy") for folder in folders]
    contents = [np.load(folder / "contents.npy") for folder in folders]
    return [len(part) for part in lengths], np.concatenate(lengths), np.concatenate(contents)


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
            f"val_size {val_size:g} leaves nothing to train on: there are {len(unique)} different conversations; "
            "lower it"
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


# ---------------------------------------------------------------------------------------------------------------------
# What people see


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def format_table(rows: list[list[str]]) -> str:
    """Aligned columns, the first one to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [" " * (width - _width(cell)) + cell for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_report(report: dict[str, Any]) -> str:
    """The report of `prepare` as an aligned table, with its notes and the rows that were skipped."""
    every = report["datasets"] + report["eval_datasets"]
    counts = [
        "rows",
        "samples",
        "tokens",
        "median",
        "longest",
        "learned",
        "truncated",
        "dropped",
        "duplicates",
        "skipped",
    ]
    table = [["dataset", *counts]]
    for item in every:
        cells = {name: f"{item[name]:,}" for name in counts}
        cells["learned"] = f"{item['learned'] / max(1, item['tokens']):.1%}"
        table.append([item["name"], *cells.values()])
    for part, label in (("train", "= train"), ("eval", "= held out")):
        if part in report and (len(every) > 1 or "eval" in report):
            cells = [f"{report[part][name]:,}" if name in report[part] else "" for name in counts]
            table.append([label, *cells])
    lines = [format_table(table)]
    lines += [f"note: {item['name']}: {note}" for item in every for note in item["notes"]]
    for item in every:
        lines += [f"skipped: {reason}" for reason in item["faults"][:LISTED]]
        if item["skipped"] > LISTED:
            lines.append(f"skipped: ... and {item['skipped'] - LISTED:,} more rows of {item['name']}")
    return "\n".join(lines)


def show_sample(tokenizer: Any, sample: dict[str, list[int]]) -> str:
    """A sample as text, what is learned in green (between ⟦ ⟧ where there is no colour), and its share."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    shown = []
    for learned, run in itertools.groupby(
        zip(sample["input_ids"], sample["labels"], strict=True), lambda t: t[1] != -100
    ):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        shown.append(f"{before}{text}{after}" if learned else text)
    count = sum(label != -100 for label in sample["labels"])
    total = len(sample["labels"])
    return "".join(shown).rstrip("\n") + f"\n({count} of {total} tokens are learned, {count / total:.0%})"
