"""Conversations → samples: tokenized by several threads, written to the cache as they come and mapped from there."""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Message, UserError
from preprocessing.conversations import Batch, convert_rows, is_kept, kept_batch, layout_of
from preprocessing.encode_stages import COLUMNS, count_learned, count_tokens, encode_batch, length_bias, no_sample
from preprocessing.faults import FaultReport, RowFault, TooLong
from preprocessing.rows import Layout, check_columns
from preprocessing.sources import BATCH, Source, chosen_rows
from runs.files import read_json, remove_leftovers, sha256, unfinished, write_json

if TYPE_CHECKING:
    import numpy as np

    from preprocessing.template import ChatTemplate

PARALLEL = 1 << 20  # bytes of data above which several threads tokenize
# What is known of each sample, beside its columns; lengths are tokens.
FACTS = [
    ("length", "i4"),  # of a pair that of both sequences
    ("whole_length", "i4"),  # before it was cut, or dropped
    ("learned", "i4"),
    ("chosen", "i4"),
    ("rejected", "i4"),
    ("truncated", "?"),
    ("content", "i8"),  # the fingerprint of its conversation
    ("first", "?"),  # whether it is the first of its conversation: a document may give several
]
MANY_CUT = 0.05  # the share of cut samples from which on a warning names a longer cutoff_len


@dataclass(frozen=True)
class Job:
    """What tokenizing a batch needs."""

    config: Config
    tokenizer: Any
    template: ChatTemplate
    layout: Layout


@dataclass
class Chunk:
    """A tokenized batch: one entry a sample, of length 0 where its conversation was dropped."""

    columns: dict[str, list[Any]]  # of COLUMNS[stage], a value each
    facts: np.ndarray  # of FACTS
    left_out: Counter[str]  # what the template leaves out of answers → answers
    faults: list[RowFault]
    rows: int
    layout: Layout


def tokenize(job: Job, given: Batch | list[Any], *, encoding: bool = True) -> Chunk:
    """A batch, or rows as `Source.read` gives them, as samples; with `encoding` off the faults are only collected."""
    import numpy as np

    config, stage = job.config, job.layout.stage
    batch = given if isinstance(given, Batch) else convert_rows(given, job.layout.blank(), config)
    found = encode_batch(stage, batch.conversations, config, job.template, job.tokenizer) if encoding else []
    faults = list(batch.faults)
    kept: list[dict[str, Any]] = []
    facts: list[tuple[Any, ...]] = []
    left_out: Counter[str] = Counter()
    for place, content, samples in zip(batch.places, batch.contents, found, strict=False):
        if isinstance(samples, Message):
            dropped = config.overlong == "drop" and isinstance(samples, TooLong)
            faults += [] if dropped else [RowFault(*place, samples)]
            samples = [no_sample(stage, samples.fields["tokens"] if dropped else 0)]
        for number, sample in enumerate(samples):
            kept.append(sample)
            facts.append(_facts(stage, sample, content, number == 0))
            left_out.update(sample.get("left_out"))
    columns = {name: [sample[name] for sample in kept] for name in COLUMNS[stage]}
    return Chunk(columns, np.array(facts, FACTS), left_out, faults, batch.rows, batch.layout)


def _facts(stage: str, sample: dict[str, Any], content: int, first: bool) -> tuple[Any, ...]:
    """A row of FACTS."""
    answers = [len(sample.get(name, ())) for name in ("chosen_ids", "rejected_ids")]
    tokens = (count_tokens(stage, sample), sample["whole_length"], count_learned(stage, sample))
    return *tokens, *answers, sample["truncated"], content, first


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


def _chunks(
    job: Job, batches: Iterable[Batch | list[Any]], threads: int, encoding: Callable[[], bool]
) -> Iterator[Chunk]:
    """Tokenized batches in order, made by several threads, a copy of the tokenizer each.

    Threads, because two thirds of the work are the tokenizer's, which runs without Python's lock; a process more would
    cost 600 MB and 6 CPU-seconds for its imports.
    """
    if threads == 1:
        yield from (tokenize(job, batch, encoding=encoding()) for batch in batches)
        return
    idle = [job, *(dataclasses.replace(job, tokenizer=copy.deepcopy(job.tokenizer)) for _ in range(threads - 1))]

    def work(batch: Batch | list[Any], encode: bool) -> Chunk:
        mine = idle.pop()  # there are as many jobs as threads
        try:
            return tokenize(mine, batch, encoding=encode)
        finally:
            idle.append(mine)

    waiting: deque[Future[Chunk]] = deque()
    with _without_own_threads(), ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch, encoding()))
                if len(waiting) > 2 * threads:  # no more rows in memory than that
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # Ctrl-C and errors do not wait for batches that have not begun
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def cache_key(source: Source, config: Config, template: ChatTemplate, tokenizer: Any) -> str:
    """What the samples of a dataset depend on: content, registry, template, tokenizer, settings, and this code."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = "cutoff_len overlong mask_history train_on_prompt enable_thinking default_system name author max_samples"
    settings += " max_completion_length" if source.entry.stage == "grpo" else ""
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


def cached(source: Source, config: Config, tokenizer: Any, template: ChatTemplate, faults: FaultReport) -> Path:
    """The cache folder of a dataset's samples (samples.arrow, *.npy, report.json), made if needed.

    Where there are faults that end the run nothing is made: there may be no such folder.
    """
    folder = common.CACHE / "data" / cache_key(source, config, template, tokenizer)
    if _is_whole(folder) and not config.overwrite_cache:
        faults.add_json(read_json(folder / "report.json")["faults"])
        return folder
    remove_leftovers(folder, others=True)
    try:
        with unfinished(folder) as beside:
            if write_samples(beside, source, Job(config, tokenizer, template, layout_of(source)), faults):
                _place(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            "the disk of {folder} is full; free some space, or set ONECARD_CACHE", folder=folder.parent
        ) from None
    return folder


def _place(beside: Path, folder: Path) -> None:
    """Moves finished samples to their place: the folder where there is none, else each file over the one there.

    Others may read there at the same time, or write the same samples: no file is ever missing, nor half of one there.
    """
    for file in beside.iterdir():  # else a power cut may leave the name without the content
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    try:
        os.replace(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for file in beside.iterdir():
            os.replace(file, folder / file.name)


def _is_whole(folder: Path) -> bool:
    """Whether the files of a cache folder can be read and belong together: a power cut or a full disk may cut them."""
    import numpy as np
    import pyarrow as pa

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with pa.memory_map(str(folder / "samples.arrow")) as file:
            rows = {pa.ipc.open_stream(file).read_all().num_rows}  # mapped, not read
        rows.add(len(np.load(folder / "facts.npy")))
    except (OSError, ValueError, EOFError):  # Arrow's and JSON's are ValueErrors
        return False
    return rows == {report["conversations"]}


def write_samples(folder: Path, source: Source, job: Job, faults: FaultReport) -> bool:
    """Tokenizes a dataset into `folder`; False where faults end the run. Raises UserError where it has no rows."""
    import numpy as np

    layout, config = job.layout, job.config
    rows, facts, left_out, own_faults = 0, [], Counter(), FaultReport()

    def encoding() -> bool:
        return config.on_bad_rows == "skip" or not (faults.count or own_faults.count)

    size = sum(item["bytes"] for item in source.content)
    with _arrow_writer(folder / "samples.arrow", source.entry.name, layout.stage) as write:
        for chunk in _chunks(job, _batches(source, job), _threads(config, size), encoding):
            write(chunk)
            facts.append(chunk.facts)
            rows += chunk.rows
            left_out += chunk.left_out
            own_faults.add(chunk.faults)
            layout.add(chunk.layout)
    if not rows:
        raise UserError(
            "dataset '{name}' holds no rows; give it some, or take it out of the recipe", name=source.entry.name
        )
    check_columns(layout, source.entry.name, rows)
    may_go_on = encoding()
    faults.add_json(own_faults.to_json())
    faults.final |= own_faults.final
    if not may_go_on or faults.final:
        return False
    all_facts = np.concatenate(facts)
    np.save(folder / "facts.npy", all_facts)
    report = {"rows": rows, **_counts(all_facts), "skipped": own_faults.count, "faults": own_faults.to_json()}
    notes = [
        *layout.all_notes(config),
        *_left_out_notes(left_out, job.template.name),
        *_length_notes(all_facts, config),
    ]
    report |= {"name": source.entry.name, "files": source.content, "format": layout.formatting}
    write_json(folder / "report.json", report | {"notes": [note.to_json() for note in notes]})
    return True


def _threads(config: Config, size: int) -> int:
    """Threads that tokenize `size` bytes of data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, config.preprocessing_num_workers or cores) if size > PARALLEL else 1


def _batches(source: Source, job: Job) -> Iterator[Batch | list[Any]]:
    """The rows of a dataset: as conversations where they were read already, else as the source gives them."""
    if is_kept(source.entry):
        yield from kept_batch(source, job.config).split(BATCH)
        return
    rows = chosen_rows(source, job.config, job.layout.notes)
    while some := list(itertools.islice(rows, BATCH)):
        yield some


@contextmanager
def _arrow_writer(path: Path, name: str, stage: str) -> Iterator[Callable[[Chunk], None]]:
    """A function that appends chunks to an Arrow file of the columns of a stage, beside a progress bar."""
    import pyarrow as pa
    from tqdm import tqdm

    types = {"label": pa.bool_(), "row": pa.large_string()}
    schema = pa.schema({column: types.get(column, pa.list_(pa.int32())) for column in COLUMNS[stage]})
    bar = tqdm(desc=f"tokenizing {name}", unit=" rows", delay=2, leave=False, disable=None)
    with bar, pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write(chunk: Chunk) -> None:
            writer.write_batch(pa.RecordBatch.from_pydict(chunk.columns, schema=schema))
            bar.update(chunk.rows)

        yield write


def _counts(facts: np.ndarray) -> dict[str, Any]:
    """What run.json records of the samples of a dataset."""
    import numpy as np

    pairs = facts[facts["chosen"] > 0]
    means = {name: round(float(pairs[name].mean()), 1) for name in ("chosen", "rejected")} if len(pairs) else {}
    return {
        "conversations": len(facts),
        **token_counts(facts["length"]),
        **means,
        "learned": int(facts["learned"].sum()),
        "truncated": int(facts["truncated"].sum()),
        "dropped": int(_dropped(facts).sum()),
        "duplicates": int(facts["first"].sum()) - len(np.unique(facts["content"])),
    }


def _dropped(facts: np.ndarray) -> np.ndarray:
    return (facts["length"] == 0) & (facts["whole_length"] > 0)


def _left_out_notes(left_out: Counter[str], template: str) -> Iterator[Message]:
    if count := left_out["thoughts"]:
        yield Message(
            "the chat template ({template}) leaves out the thoughts of {answers:,} answer{answers:plural}",
            template=template,
            answers=count,
        )
    if count := left_out["words_beside_call"]:
        yield Message(
            "the chat template ({template}) leaves out the text beside a tool call of {answers:,} "
            "answer{answers:plural}",
            template=template,
            answers=count,
        )


def _length_notes(facts: np.ndarray, config: Config) -> Iterator[Message]:
    """A warning where many samples are cut or dropped, with the cutoff_len that would keep 95 % whole; and one where
    the answers of pairs differ in length."""
    import numpy as np

    known = facts["whole_length"][facts["whole_length"] > 0]
    cut, dropped = int((known > config.cutoff_len).sum()), int(_dropped(facts).sum())
    if cut > MANY_CUT * len(known):
        enough = int(np.quantile(known, 1 - MANY_CUT, method="higher"))
        if dropped:
            yield Message(
                "{dropped:,} of {total:,} samples are longer than cutoff_len and are left out; cutoff_len={enough} "
                "would keep 95 %",
                dropped=dropped,
                total=len(known),
                enough=enough,
            )
        else:
            cutoff_len = config.cutoff_len
            yield Message(
                "{cut:,} of {total:,} samples are longer than cutoff_len={cutoff_len} and are cut; "
                "cutoff_len={enough} would keep 95 % whole",
                cut=cut,
                total=len(known),
                cutoff_len=cutoff_len,
                enough=enough,
            )
    pairs = facts[facts["chosen"] > 0]
    if bias := length_bias(pairs["chosen"], pairs["rejected"]):
        yield bias


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
