"""Measures what a model learned: it predicts held-out data, before and after training, and says how well.

python evaluate.py                     the newest run, on the data it held out
python evaluate.py saves/NAME          a run, its merged folder, a FILE.gguf of it, a model's folder or hub name, or the
                                       recipe of a run
    dataset=NAME    on this data instead; rows that the run was trained on are left out
    labels=0,1      the answers to choose from (of two, the last is the positive one); unset: told from the data
    --base          only the model before training
    --no-base       not the model before training
python evaluate.py --runs              all runs with their key figures
python evaluate.py --compare A B       what differs between two runs, and which predicts the same rows better

Everything is in eval/ of the run folder. Ctrl-C ends it; the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import common
import dataset
import engine
import metrics
import report
from common import Config, UserError

Conversation = dict[str, Any]

FORMAT = 1  # of predictions.jsonl and how they are made: another number makes old ones void
MOST_LABELS, LONGEST_LABEL = 20, 32  # of a closed set: answers, and characters of one
SHORTEST_LIMIT = 64  # tokens that a reply may always have
GENERAL = "general_test"  # of data/: what was forgotten is measured on it


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__, ("model", "data", "evaluation")))
        return
    args, settings = parse(argv)
    if args.runs:
        print(list_runs())
        return
    if args.compare:
        print(compare(*map(Path, args.compare)))
        return
    job = find_job(args, settings)
    for note in job.notes:
        print(f"note: {note}")
    announce(job)
    for contender in job.contenders:
        predict(job, contender)
    for part in job.parts:
        conclude(job, part)
    if job.config.do_predict or job.config.predict_with_generate:
        write_as_llamafactory(job)
    if job.run:
        print(f"\nthe report: {report.write(job.run)}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags and the target; and the settings, `key=value`."""
    parser = argparse.ArgumentParser(prog="evaluate.py", add_help=False, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true")
    which.add_argument("--no-base", action="store_true")
    which.add_argument("--runs", action="store_true")
    which.add_argument("--compare", nargs=2, metavar=("A", "B"))
    parser.add_argument("rest", nargs="*")
    args, unknown = parser.parse_known_args(argv)
    is_setting = [("=" in word and not Path(word).exists()) for word in args.rest]
    targets = [word for word, setting in zip(args.rest, is_setting, strict=True) if not setting]
    if len(targets) > 1:
        raise UserError(f"{targets[0]} and {targets[1]} are two targets; give one, and settings as key=value")
    args.target = targets[0] if targets else None
    return args, unknown + [word for word, setting in zip(args.rest, is_setting, strict=True) if setting]


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated: models, and data that they have not seen


@dataclass(frozen=True)
class Contender:
    """A model that is evaluated: `label` names it in tables and files."""

    label: str
    source: engine.Source


@dataclass(frozen=True)
class Part:
    """The rows of one dataset.

    `task`: "classification" where the answers come from a closed set, `labels`; "text"; or "loss", which asks only how
    likely the answers are.
    """

    name: str
    rows: list[Conversation]
    folder: Path
    task: str
    labels: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()  # answers of this dataset that were trained on
    left_out: int = 0  # rows that were trained on


@dataclass(frozen=True)
class Job:
    """What one call of this script does."""

    config: Config
    run: Path | None  # the run folder that the target belongs to
    contenders: list[Contender]
    parts: list[Part]
    notes: list[str]
    given: set[str]  # settings of the command line
    encoded: dict[str, Encoded] = dataclasses.field(default_factory=dict)


def find_job(args: argparse.Namespace, settings: list[str]) -> Job:
    """Raises UserError, before anything heavy, for what is missing or not fit to be evaluated."""
    given = {setting.lstrip("-").partition("=")[0].replace("-", "_") for setting in settings}
    if wrong := sorted(given & {"val_size", "output_dir"}):
        raise UserError(f"{wrong[0]} cannot be changed after training; name the data: dataset=NAME")
    source = engine.find(args.target, settings)
    run = next((f for f in [Path(source.name), *Path(source.name).parents][:3] if common.is_run(f)), None)
    recipe = [str(run / "config.yaml")] if run else []
    config = common.load_config([*recipe, *settings]).config if run else source.config
    notes = list(source.notes)
    parts = find_parts(config, run, given, Path(source.name), notes)
    return Job(config, run, find_contenders(args, source, run), parts, notes, given)


def find_contenders(args: argparse.Namespace, source: engine.Source, run: Path | None) -> list[Contender]:
    """The base, where it is known and wanted, and the target."""
    settings = dataclasses.replace(source.config, use_unsloth=False, infer_dtype=dtype_of(source.config))
    source = dataclasses.replace(source, config=settings)
    path = Path(source.name)
    label = path.stem if source.model.endswith(".gguf") else path.name
    label = "trained" if run == path else label if run else "model"
    base = (
        source if source.adapter else engine.find(str(run)) if run and label != "trained" and has_adapter(run) else None
    )
    if args.base and base is None:
        raise UserError(f"nothing is known of what {source.name} was before its training; evaluate the run with --base")
    target = [] if args.base else [Contender(label, source)]
    if base is None or args.no_base:
        return target
    base = dataclasses.replace(base, name=base.model, adapter=None, config=settings)
    return [Contender("base", base), *target]


def has_adapter(run: Path) -> bool:
    return (run / "adapter_config.json").is_file()


def find_parts(config: Config, run: Path | None, given: set[str], target: Path, notes: list[str]) -> list[Part]:
    """The data: what was asked for, or what the run held out, or the test sets registered beside its datasets."""
    trained_config = common.run_config(run) if run else None
    trained, held_out = dataset.read_conversations(trained_config) if trained_config else ([], [])
    changed = changed_files(run) if run else []
    home = (run or common.SAVES / target.name) / "eval"
    names = config.eval_dataset if "eval_dataset" in given else config.dataset if "dataset" in given else ()
    if not names and trained_config is None:
        raise UserError(f"{target} is no run, so nothing is known of its data; name some: dataset=NAME")
    if not names and trained_config.eval_dataset:
        names = trained_config.eval_dataset
    if not names and held_out:
        if changed:
            raise UserError(
                f"{changed[0]} has changed since {run} was trained, so what was held out is no longer known; "
                "name data that it has not seen: dataset=NAME"
            )
        whose = owners(trained_config)
        grouped: dict[str, list[Conversation]] = {}
        for row in held_out:
            grouped.setdefault(whose[dataset.fingerprint(row)], []).append(row)
    else:
        if not names:
            names = registered_tests(trained_config)
            notes.append(f"{run} held nothing out; {', '.join(names)} of dataset_info.json is used instead")
        if changed:
            notes.append(f"{changed[0]} has changed since {run} was trained: rows that it saw then may be among these")
        grouped = {name: read_rows(config, name) for name in names}
    seen = {dataset.fingerprint(row) for row in trained}
    parts = [
        make_part(config, name, rows, trained_config, seen, home / Path(name).stem) for name, rows in grouped.items()
    ]
    return parts if any(part.name == GENERAL for part in parts) else [*parts, *general_part(config, seen, home)]


def general_part(config: Config, seen: set[int], home: Path) -> list[Part]:
    """The kit's small general-knowledge set: what becomes less likely there was forgotten. None if all was trained."""
    kit = dataclasses.replace(config, dataset_dir=str(common.ROOT / "data"), default_system=None, max_samples=None)
    rows = [row for row in read_rows(kit, GENERAL) if dataset.fingerprint(row) not in seen]
    return [Part(GENERAL, rows, home / GENERAL, "loss")] if rows else []


def read_rows(config: Config, name: str) -> list[Conversation]:
    """All conversations of one dataset."""
    alone = {"dataset": (name,), "eval_dataset": (), "val_size": 0.0, "interleave_probs": (), "mix_strategy": "concat"}
    return dataset.read_conversations(dataclasses.replace(config, **alone))[0]


def owners(config: Config) -> dict[int, str]:
    """The dataset that each conversation of a run, known by its fingerprint, comes from."""
    return {dataset.fingerprint(row): name for name in config.dataset for row in read_rows(config, name)}


def changed_files(run: Path) -> list[str]:
    """Files that a run was trained on and that are no longer as they were then."""
    data = (common.read_run(run) or {}).get("data", {}).get("datasets", [])
    files = [file for entry in data for file in entry["files"] if "sha256" in file]
    return [file["path"] for file in files if not same_file(Path(file["path"]), file["sha256"])]


def same_file(path: Path, sha256: str) -> bool:
    return path.is_file() and dataset.sha256(path) == sha256


def registered_tests(config: Config) -> tuple[str, ...]:
    """NAME_test of each dataset NAME, where dataset_info.json has it."""
    registry = Path(config.dataset_dir) / "dataset_info.json"
    known = json.loads(registry.read_text(encoding="utf-8-sig")) if registry.is_file() else {}
    found = tuple(f"{name}_test" for name in config.dataset if f"{name}_test" in known)
    if not found:
        raise UserError(
            "the run held nothing out; name data that it has not seen: dataset=NAME, "
            "and train with val_size: 0.1 next time"
        )
    return found


def make_part(
    config: Config, name: str, rows: list[Conversation], trained: Config | None, seen: set[int], folder: Path
) -> Part:
    """The rows that were not trained on, and the closed set of their answers, if there is one."""
    kept = [row for row in rows if dataset.fingerprint(row) not in seen]
    if not kept:
        raise UserError(f"every row of {name} was trained on, so it proves nothing; name other data: dataset=NAME")
    answers = [answer(row) for row in kept]
    own = (
        next((other for other in trained.dataset if other in (name, name.removesuffix("_test"))), None)
        if trained
        else None
    )
    learned = [row for row in read_rows(trained, own) if dataset.fingerprint(row) in seen] if own else []
    known = tuple(answer(row) for row in learned)
    labels = config.labels or closed_set(answers, known)
    if strange := next((text for text in answers if config.labels and text not in labels), None):
        raise UserError(
            f"{name} has the answer {strange!r}, which is not among labels: {', '.join(labels)}; mend labels"
        )
    task = "classification" if labels else "text"
    return Part(name, kept, folder, task, labels, known, len(rows) - len(kept))


def answer(row: Conversation) -> str:
    """The last answer of a conversation."""
    return row["messages"][-1]["content"].strip()


def closed_set(answers: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The answers, sorted, if they are few, short, and repeated: then choosing among them is what is learned."""
    counts = Counter([*answers, *known])
    short = all(0 < len(text) <= LONGEST_LABEL and "\n" not in text for text in counts)
    repeated = min(counts.values()) >= 2 and sum(counts.values()) >= 5 * len(counts)
    if not (short and repeated and 2 <= len(counts) <= MOST_LABELS):
        return ()
    return tuple(sorted(counts, key=lambda text: (float(text) if text.lstrip("-").isdigit() else 0.0, text)))


def announce(job: Job) -> None:
    """Says what will be done."""
    print(f"models     {', '.join(f'{c.label} ({c.source.name})' for c in job.contenders)}")
    for part in job.parts:
        kinds = {
            "classification": f"choose among {', '.join(part.labels)}",
            "text": "texts",
            "loss": "what was forgotten",
        }
        out = f"; {part.left_out:,} that were trained on are left out" if part.left_out else ""
        print(f"data       {part.name}: {len(part.rows):,} rows, {kinds[part.task]}{out}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows as tokens, exactly as in training


@dataclass(frozen=True)
class Encoded:
    """The rows of a part that can be put to a model, as token ids; `rows` are their numbers."""

    rows: list[int]
    prompts: list[list[int]]
    choices: list[list[list[int]]]  # a row's labels, for a closed set
    samples: list[dict[str, list[int]]]  # prompt and answer with what is learned, for texts
    limit: int = 0  # tokens of a reply; 0: none is wanted

    @property
    def fingerprint(self) -> str:
        facts = [FORMAT, self.rows, self.prompts, self.choices, self.samples, self.limit]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def encode(job: Job, part: Part) -> Encoded:
    """The rows as training would cut and render them."""
    if part.name not in job.encoded:
        tokenizer, template = tokenizer_of(job)
        if part.task == "classification":
            encoded = encode_choices(part, job.config, tokenizer, template)
        else:
            encoded = encode_texts(part, job.config, tokenizer, template)
        if part.task == "text":
            encoded = dataclasses.replace(encoded, limit=reply_limit(job, encoded))
        job.encoded[part.name] = encoded
    return job.encoded[part.name]


def reply_limit(job: Job, encoded: Encoded) -> int:
    """max_new_tokens where it was asked for; else twice the longest answer, as a model that rambles is wrong anyway."""
    if "max_new_tokens" in job.given:
        return job.config.max_new_tokens
    longest = max(len(s["input_ids"]) - len(p) for s, p in zip(encoded.samples, encoded.prompts, strict=True))
    return min(job.config.max_new_tokens, max(SHORTEST_LIMIT, 2 * longest))


def tokenizer_of(job: Job) -> tuple[Any, Any]:
    """The tokenizer and the chat template that the run was trained with, or those of the model."""
    from transformers import AutoTokenizer

    from template import load_template

    source = job.contenders[-1].source
    folder = job.run if job.run and (job.run / "tokenizer_config.json").is_file() else source.tokenizer
    if not folder:
        raise UserError(
            f"{source.name} lies in no run folder, so its tokenizer is not known; evaluate it in saves/NAME/gguf"
        )
    options = {"trust_remote_code": job.config.trust_remote_code, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer, load_template(job.config.template, tokenizer)


def as_trained(rows: list[Conversation], config: Config, tokenizer: Any, template: Any, **changes: Any) -> list[Any]:
    """Samples as training makes them, or the reason why there is none."""
    from template import encode

    names = ("cutoff_len", "overlong", "mask_history", "train_on_prompt", "enable_thinking")
    return encode(rows, template, tokenizer, **{name: getattr(config, name) for name in names} | changes)


def split_sample(sample: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sample in which only the last answer is learned."""
    labels = sample["labels"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    return sample["input_ids"][:first], [label for label in labels[first:] if label != -100]


def refuse_faulty(part: Part, samples: list[Any]) -> list[int]:
    """The numbers of the rows that are samples; raises UserError where a row cannot be one."""
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, str) and dataset.TOO_LONG not in sample:
            raise UserError(f"{part.name}, row {number}: {sample}; take it out")
    kept = [i for i, sample in enumerate(samples) if not isinstance(sample, str)]
    if not kept:
        raise UserError(f"no row of {part.name} fits into cutoff_len; raise it: cutoff_len=...")
    if len(kept) < len(samples):
        print(f"note: {len(samples) - len(kept):,} rows of {part.name} are longer than cutoff_len and were left out")
    return kept


def encode_choices(part: Part, config: Config, tokenizer: Any, template: Any) -> Encoded:
    """Each row's prompt, and every label as the tokens that would be learned.

    The end of the turn counts only where a label is the beginning of another. A prompt that has to be cut is cut as for
    the longest label, so that it does not depend on the right one.
    """
    by_label = []
    for label in part.labels:
        rows = [
            {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": label}]} for row in part.rows
        ]
        by_label.append(as_trained(rows, config, tokenizer, template, mask_history=True, train_on_prompt=False))
    kept = [i for i in refuse_faulty(part, by_label[0]) if all(not isinstance(s[i], str) for s in by_label)]
    prompts, choices = [], []
    for i in kept:
        split = [split_sample(samples[i]) for samples in by_label]
        prompts.append(max(split, key=lambda pair: len(pair[1]))[0])
        choices.append(without_end([tokens for _, tokens in split]))
    return Encoded(kept, prompts, choices, [])


def without_end(choices: list[list[int]]) -> list[list[int]]:
    """The labels' tokens without the end of the turn, unless one is then the beginning of another."""
    words = [tokens[:-1] for tokens in choices]
    begins = any(a == b[: len(a)] for i, a in enumerate(words) for j, b in enumerate(words) if i != j)
    return choices if begins else words


def encode_texts(part: Part, config: Config, tokenizer: Any, template: Any) -> Encoded:
    """Each row's prompt, and the whole row as it would be learned."""
    last = as_trained(part.rows, config, tokenizer, template, mask_history=True, train_on_prompt=False)
    kept = refuse_faulty(part, last)
    samples = as_trained([part.rows[i] for i in kept], config, tokenizer, template, train_on_prompt=False)
    plain = [{key: sample[key] for key in ("input_ids", "labels")} for sample in samples]
    return Encoded(kept, [split_sample(last[i])[0] for i in kept], [], plain)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions: they grow row by row, and are gone on with


def predict(job: Job, contender: Contender) -> None:
    """Makes the predictions of one model that are not there yet; a model with none left to make is not loaded."""
    todo = [(part, missing) for part in job.parts if (missing := missing_rows(job, contender, part))]
    if not todo:
        print(f"{contender.label}: every prediction is there already")
        return
    import scoring

    print(f"loading {contender.source.name} ...", flush=True)
    scorer = scoring.of(engine.load(contender.source))
    for part, missing in todo:
        started = time.monotonic()
        with open(predictions_file(part, contender.label), "a", encoding="utf-8") as file:
            for lines in rows_predicted(job, contender, part, missing, scorer):
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
        finish(contender, part, time.monotonic() - started)
    del scorer
    gc.collect()


def rows_predicted(
    job: Job, contender: Contender, part: Part, missing: list[int], scorer: Any
) -> Iterator[list[dict[str, Any]]]:
    """The lines of predictions.jsonl, a batch at a time; `missing` are places in the part's Encoded."""
    from tqdm import tqdm

    import scoring

    encoded = encode(job, part)
    lengths = [len(encoded.prompts[i]) + encoded.limit for i in missing]
    ask = choose if part.task == "classification" else write
    bar = tqdm(total=len(missing), desc=f"{contender.label}, {part.name}", unit=" rows", file=sys.stderr)
    with bar:
        for batch in scoring.batches(lengths, scorer.tokens):
            places = [missing[i] for i in batch]
            facts = ask(part, encoded, places, scorer)
            lines = []
            for place, fact in zip(places, facts, strict=True):
                row = part.rows[encoded.rows[place]]
                lines.append({"row": encoded.rows[place], "prompt": prompt(row), "label": answer(row), **fact})
            yield lines
            bar.update(len(batch))


def choose(part: Part, encoded: Encoded, places: list[int], scorer: Any) -> list[dict[str, Any]]:
    """Prediction and probabilities for rows of a closed set: what the model gives to each label, made to sum to 1."""
    import numpy as np

    choices = [encoded.choices[i] for i in places]
    logs = np.array(scorer.choices([encoded.prompts[i] for i in places], choices))
    shares = np.exp(logs - logs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return [
        {
            "prediction": part.labels[int(row.argmax())],
            "probabilities": dict(zip(part.labels, row.tolist(), strict=True)),
            "mass": float(np.exp(log).sum()),  # what the model gives to all labels together, of everything it could say
        }
        for row, log in zip(shares, logs, strict=True)
    ]


def write(part: Part, encoded: Encoded, places: list[int], scorer: Any) -> list[dict[str, Any]]:
    """How likely the right texts are, and the model's own, where they are wanted."""
    losses = scorer.losses([encoded.samples[i] for i in places])
    replies = scorer.replies([encoded.prompts[i] for i in places], encoded.limit) if part.task == "text" else []
    said = [{"prediction": text.strip()} for text in replies] or [{} for _ in places]
    return [fact | {"nats": nats, "tokens": tokens} for fact, (nats, tokens) in zip(said, losses, strict=True)]


def prompt(row: Conversation) -> str:
    """The message that is answered last, as people read it."""
    return next(m["content"] for m in reversed(row["messages"][:-1]) if m["role"] != "assistant")


def predictions_file(part: Part, label: str) -> Path:
    return part.folder / ("predictions.jsonl" if label in ("trained", "model") else f"predictions.{label}.jsonl")


def read_state(part: Part) -> dict[str, Any]:
    """What eval/NAME/state.json knows of the predictions there, by model."""
    try:
        return json.loads((part.folder / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_state(part: Part, label: str, facts: dict[str, Any]) -> None:
    common.write_json(part.folder / "state.json", read_state(part) | {label: facts})


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, a row once; a last line that a kill cut off is left out."""
    found: dict[int, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            found[line["row"]] = line
    return [found[row] for row in sorted(found)]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    common.write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def missing_rows(job: Job, contender: Contender, part: Part) -> list[int]:
    """The places of the rows that are still to be predicted; what is there of other rows or weights is deleted."""
    encoded, file = encode(job, part), predictions_file(part, contender.label)
    key = hashlib.sha256(f"{encoded.fingerprint} {weights_key(contender.source)}".encode()).hexdigest()[:32]
    part.folder.mkdir(parents=True, exist_ok=True)
    state = read_state(part).get(contender.label, {})
    if state.get("key") != key:
        file.unlink(missing_ok=True)
        shared = shared_file(key)
        if shared.is_file():
            shutil.copyfile(shared, file)
        facts = {"key": key, "rows": encoded.fingerprint, "model": contender.source.name, "seconds": 0.0}
        facts["dtype"] = dtype_of(contender.source.config)
        write_state(part, contender.label, facts)
    lines = read_lines(file)
    write_lines(file, lines)
    done = {line["row"] for line in lines}
    missing = [place for place, row in enumerate(encoded.rows) if row not in done]
    if done and missing:
        print(f"{contender.label}, {part.name}: going on after {len(done):,} of {len(encoded.rows):,} rows")
    return missing


def shared_file(key: str) -> Path:
    """Where the predictions of a base model are kept for every run on it."""
    return common.CACHE / "eval" / f"{key}.jsonl"


def weights_key(source: engine.Source) -> str:
    """What the answers of a model depend on beside the rows: its weights, and the type they are computed in."""
    path = Path(source.model)
    files = [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), path / "config.json"]
    facts: list[Any] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if source.adapter:
        facts += [
            dataset.sha256(source.adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
    return json.dumps([facts, dtype_of(source.config), source.config.quantization_bit])


def dtype_of(config: Config) -> str:
    """The type an evaluation computes in: float32 on a CPU, what the engine takes on a card."""
    return config.infer_dtype if config.infer_dtype != "auto" or common.find_gpu() else "float32"


def finish(contender: Contender, part: Part, seconds: float) -> None:
    """Puts the predictions into the rows' order, and those of a base where other runs find them."""
    file, state = predictions_file(part, contender.label), read_state(part)[contender.label]
    write_lines(file, read_lines(file))
    write_state(part, contender.label, state | {"seconds": round(state["seconds"] + seconds, 1)})
    if contender.label == "base":
        shared = shared_file(state["key"])
        shared.parent.mkdir(parents=True, exist_ok=True)
        common.write_text(shared, file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def conclude(job: Job, part: Part) -> None:
    """Writes metrics.json and the pictures of a part and prints its table: all models that predicted the same rows."""
    encoded, state = encode(job, part), read_state(part)
    predictions = {
        label: lines
        for label in sorted(state, key=lambda label: (label != "base", label not in ("trained", "model"), label))
        if state[label]["rows"] == encoded.fingerprint
        and len(lines := read_lines(predictions_file(part, label))) == len(encoded.rows)
    }
    measure = {"classification": measure_choices, "text": measure_texts, "loss": measure_losses}[part.task]
    measured = measure(part, predictions)
    for label in predictions:
        measured["models"][label] |= {key: state[label][key] for key in ("model", "seconds", "dtype")}
    found = {
        "dataset": part.name,
        "task": part.task,
        "rows": len(encoded.rows),
        "left_out": part.left_out,
        "labels": list(part.labels),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    common.write_json(part.folder / "metrics.json", found | measured)
    if part.task == "classification":
        metrics.draw(measured["models"], part.folder)
    print(f"\n{part.name}: {len(encoded.rows):,} rows\n{dataset.format_table(table(part.task, measured['models']))}")
    for name, pair in measured.get("paired", {}).items():
        print(f"{name}: {describe_pair(pair)}")
    if part.task == "loss" and (note := describe_forgetting(measured["models"])):
        print(note)
    print(f"all of it: {part.folder}")


def describe_forgetting(models: dict[str, Any]) -> str | None:
    """A warning where a model holds general knowledge for less likely than the base does, beyond both intervals."""
    known = models.get("base")
    for label, figures in models.items():
        if known and figures["perplexity_interval"][0] > known["perplexity_interval"][1]:
            return (
                f"note: {label} forgot general knowledge: perplexity {known['perplexity']:.1f} before, "
                f"{figures['perplexity']:.1f} now; train on some beside your own (dataset: ...,general), or train less"
            )
    return None


def describe_pair(pair: dict[str, Any]) -> str:
    """A difference of accuracies in words."""
    low, high = pair["difference_interval"]
    return f"accuracy {pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}), McNemar's p {pair['mcnemar_p']:.2g}"


def measure_choices(part: Part, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of every model, of a majority vote, and how each differs from the base."""
    import numpy as np

    truth = [line["label"] for line in next(iter(predictions.values()))]
    shares = {"majority vote": metrics.majority(part.trained, truth, part.labels)}
    for label, lines in predictions.items():
        shares[label] = np.array([[line["probabilities"][name] for name in part.labels] for line in lines])
    models = {label: metrics.classification(truth, p, part.labels) for label, p in shares.items()}
    for label, lines in predictions.items():
        models[label]["mass"] = float(np.mean([line["mass"] for line in lines]))
    said = {label: [part.labels[i] for i in p.argmax(1)] for label, p in shares.items()}
    against = [(a, b) for b in predictions for a in ("majority vote", "base") if a in said and a != b and b != "base"]
    return {"models": models, "paired": {f"{b} - {a}": metrics.paired(truth, said[a], said[b]) for a, b in against}}


def measure_texts(_: Part, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of every model's own texts and of the right ones' likelihood, and ten samples side by side."""
    models = {
        label: metrics.texts([line["prediction"] for line in lines], [line["label"] for line in lines])
        | metrics.surprise([(line["nats"], line["tokens"]) for line in lines])
        for label, lines in predictions.items()
    }
    return {"models": models, "samples": side_by_side(predictions)}


def measure_losses(_: Part, predictions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How likely the right texts are to every model."""
    pairs = {label: [(line["nats"], line["tokens"]) for line in lines] for label, lines in predictions.items()}
    return {"models": {label: {"rows": len(pairs[label])} | metrics.surprise(pairs[label]) for label in pairs}}


def side_by_side(predictions: dict[str, list[dict[str, Any]]], count: int = 10) -> list[dict[str, Any]]:
    """Rows spread evenly over the data, with what every model says."""
    first = next(iter(predictions.values()))
    places = sorted({i * len(first) // min(count, len(first)) for i in range(min(count, len(first)))})
    return [
        {key: first[i][key] for key in ("row", "prompt", "label")}
        | {"predictions": {label: lines[i]["prediction"] for label, lines in predictions.items()}}
        for i in places
    ]


def write_as_llamafactory(job: Job) -> None:
    """generated_predictions.jsonl and predict_results.json of the target, in LLaMA-Factory's form."""
    label = job.contenders[-1].label
    tokenizer, _ = tokenizer_of(job)
    lines, seconds = [], 0.0
    for part in job.parts:
        if part.task != "loss":
            made = {line["row"]: line for line in read_lines(predictions_file(part, label))}
            encoded = encode(job, part)
            for row, ids in zip(encoded.rows, encoded.prompts, strict=True):
                texts = {"predict": made[row]["prediction"], "label": made[row]["label"]}
                lines.append({"prompt": tokenizer.decode(ids, skip_special_tokens=False), **texts})
            seconds += read_state(part)[label]["seconds"]
    if not lines:
        return
    folder = job.run or job.parts[0].folder.parent
    write_lines(folder / "generated_predictions.jsonl", lines)
    predictions, truth = ([line[key] for line in lines] for key in ("predict", "label"))
    common.write_json(folder / "predict_results.json", metrics.as_llamafactory(predictions, truth, seconds))
    print(f"\nas LLaMA-Factory writes them: {folder}/predict_results.json, {folder}/generated_predictions.jsonl")


CLASSIFICATION = {
    "balanced_accuracy": "balanced",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "average_precision": "AP",
    "tpr_at_fpr_10": "TPR@10%",
    "tpr_at_fpr_1": "TPR@1%",
    "brier": "Brier",
    "ece": "ECE",
}
LOSS = {"loss": "loss", "perplexity": "perplexity"}
TEXT = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", **LOSS}


def table(task: str, models: dict[str, Any]) -> list[list[str]]:
    """The figures, a line a model."""
    titles = {"classification": CLASSIFICATION, "text": TEXT, "loss": LOSS}[task]
    share = {"classification": "accuracy", "text": "exact_match"}.get(task)
    rows = [["model", *([share.replace("_", " "), "95 %"] if share else []), *titles.values()]]
    for label, figures in models.items():
        cells = [f"{figures[share]:.3f}", "{:.3f}-{:.3f}".format(*figures[f"{share}_interval"])] if share else []
        rows.append([label, *cells, *("-" if figures[name] is None else f"{figures[name]:.3f}" for name in titles)])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def list_runs() -> str:
    """All runs, newest first: how they went and what they reached."""
    rows = [["run", "status", "steps", "of", "minutes", "loss", "eval_loss", "measured on", "figure"]]
    for folder in common.runs():
        run = common.read_run(folder) or {}
        data, figure = key_figure(folder)
        minutes = f"{run['seconds'] / 60:.1f}" if run.get("seconds") else "-"
        losses = [f"{run[key]:.4f}" if run.get(key) else "-" for key in ("last_loss", "eval_loss")]
        steps = [str(run.get(key) or "-") for key in ("steps", "total_steps")]
        rows.append([str(folder), str(run.get("status", "-")), *steps, minutes, *losses, data, figure])
    if len(rows) == 1:
        raise UserError(f"there is no run in {common.SAVES}/; train one: make train")
    return dataset.format_table(rows)


def key_figure(folder: Path) -> tuple[str, str]:
    """The newest evaluation of a run's own model: its data, and accuracy or exact match; dashes for none.

    What tells whether the run forgot comes only where there is nothing else.
    """
    files = list(folder.glob("eval/*/metrics.json"))
    files.sort(key=lambda file: (file.parent.name != GENERAL, file.stat().st_mtime), reverse=True)
    for found in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        figures = found["models"].get("trained", {})
        for key in ("accuracy", "exact_match"):
            if key in figures:
                return found["dataset"], f"{key} {figures[key]:.3f}"
    return "-", "-"


def compare(first: Path, second: Path) -> str:
    """Settings that differ, losses, figures side by side and the difference on the same rows; draws both losses."""
    for folder in (first, second):
        if not common.is_run(folder):
            raise UserError(f"{folder} is no run folder; python evaluate.py --runs lists them")
    configs, runs = [common.run_config(f) for f in (first, second)], [common.read_run(f) or {} for f in (first, second)]
    rows = [["", str(first), str(second)]]
    for key in common.OPTIONS:
        a, b = (getattr(config, key) for config in configs)
        if a != b and key != "output_dir":
            rows.append([key, *(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (a, b))])
    for key in ("steps", "best_step", "seconds", "tokens", "last_loss", "eval_loss"):
        rows.append([key, *("-" if run.get(key) is None else f"{run[key]:,.5g}" for run in runs)])
    blocks = [dataset.format_table(rows)]
    for file in sorted(first.glob("eval/*/metrics.json")):
        other = second / file.relative_to(first)
        if other.is_file():
            blocks.append(compare_part(file, other, str(first), str(second)))
    picture = second / f"loss_beside_{first.resolve().name}.png"
    metrics.draw_losses({str(folder): folder / "trainer_log.jsonl" for folder in (first, second)}, picture)
    return "\n\n".join([*blocks, f"both losses: {picture}"])


def compare_part(first: Path, second: Path, *names: str) -> str:
    """The figures of both runs on one dataset, and their difference on the rows that both predicted."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (first, second)]
    title = found[0]["dataset"]
    if found[0]["task"] != found[1]["task"] or any("trained" not in part["models"] for part in found):
        return f"{title}: not evaluated in the same way; evaluate both again"
    models = {name: part["models"]["trained"] for name, part in zip(names, found, strict=True)}
    text = f"{title}\n{dataset.format_table(table(found[0]['task'], models))}"
    lines = [
        {(x["prompt"], x["label"]): x for x in read_lines(file.parent / "predictions.jsonl")}
        for file in (first, second)
    ]
    both = [key for key in lines[0] if key in lines[1] and "prediction" in lines[0][key]]
    if not both:
        return text
    said = [[part[key]["prediction"] for key in both] for part in lines]
    pair = metrics.paired([label for _, label in both], *said)
    return f"{text}\n{names[1]} - {names[0]} on {len(both):,} rows of both: {describe_pair(pair)}"


if __name__ == "__main__":
    common.run_script(main)
