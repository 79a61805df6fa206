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
import re
import shlex
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
from common import Config, Message, UserError
from evaluation import metrics
from inference.load import load
from preprocessing import dataset
from runs import charts, report
from runs.files import read_jsonl, write_json, write_text
from runs.folder import TRAINED, is_run, read_run, run_config, run_folders
from runs.process import is_alive
from runs.target import Source, find

Conversation = dict[str, Any]

FORMAT = 2  # of predictions.jsonl and how they are made: another number makes old ones void
MOST_LABELS, LONGEST_LABEL = 20, 32  # of a closed set: answers, and characters of one
POSITIVE = {"yes", "y", "true", "t", "positive", "是", "对", "真", "有", "阳性"}  # of two labels, in lower case
SHORTEST_LIMIT = 64  # tokens that a reply may always have
GENERAL = "general_test"  # of data/: what was forgotten is measured on it
DATA = {"dataset", "eval_dataset"}
# What a recipe that is the target may say otherwise than the run that it belongs to.
ASKED = DATA | {"dataset_dir", "max_samples", "cutoff_len", "labels", "do_predict", "predict_with_generate"}
ASKED |= {"max_new_tokens"}


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
    source: Source


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
    given: set[str]  # settings that were asked for
    output: Path | None  # where a recipe of LLaMA-Factory wants its predictions
    encoded: dict[str, Encoded] = dataclasses.field(default_factory=dict)


def find_job(args: argparse.Namespace, settings: list[str]) -> Job:
    """Raises UserError, before anything heavy, for what is missing or not fit to be evaluated."""
    keys = {setting: setting.lstrip("-").partition("=")[0].replace("-", "_") for setting in settings}
    if wrong := sorted({"val_size", "output_dir"} & set(keys.values())):
        raise UserError(f"{wrong[0]} cannot be changed after training; name the data: dataset=NAME")
    # a model does not depend on the data, and a run's val_size would contradict an eval_dataset
    source = find(args.target, [setting for setting in settings if keys[setting] not in DATA])
    run = run_of(Path(source.name))
    config, given, output = find_config(source, run, args.target, settings)
    notes = list(source.notes)
    parts = find_parts(config, run, given, Path(source.name), notes)
    return Job(config, run, find_contenders(args, source, run), parts, notes, given, output)


def run_of(path: Path) -> Path | None:
    """The run folder that a run, its checkpoint, its merged model or its GGUF belongs to."""
    return next((folder for folder in [path, *path.parents][:3] if is_run(folder)), None)


def find_config(
    source: Source, run: Path | None, target: str | None, settings: list[str]
) -> tuple[Config, set[str], Path | None]:
    """The settings of an evaluation; those among them that were asked for; and a recipe's own folder for predictions.

    A run's settings, before them what its recipe says of data and evaluation, and before all the command line. The
    datasets of a recipe are asked for where they are others than the run's: a training's recipe is a target, too.
    """
    typed = common.load_config(settings)
    config, given, output = run_config(run) if run else source.config, set(typed.given), None
    values = {key: getattr(typed.config, key) for key in given}
    if target and Path(target).suffix in (".yaml", ".yml", ".json"):
        recipe = common.load_config([target])
        asked = recipe.given & ASKED - (DATA if given & DATA else set())
        asked = {
            key for key in asked if not (run and key in DATA and getattr(recipe.config, key) == getattr(config, key))
        }
        values = {key: getattr(recipe.config, key) for key in asked} | values
        given |= asked
        if "output_dir" in recipe.given and not is_run(Path(recipe.config.output_dir)):
            output = Path(recipe.config.output_dir)
    return dataclasses.replace(config, **values), given, output


def find_contenders(args: argparse.Namespace, source: Source, run: Path | None) -> list[Contender]:
    """The base, where it is known and wanted, and the target."""
    settings = dataclasses.replace(source.config, infer_dtype=dtype_of(source.config))
    source = dataclasses.replace(source, config=settings)
    path = Path(source.name)
    label = path.stem if source.model.endswith(".gguf") else path.name
    label = "trained" if run == path else label if run else "model"
    base = source if source.adapter else find(str(run)) if run and label != "trained" and has_adapter(run) else None
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
    check_labels(config)
    own = run_config(run) if run else None
    names = config.eval_dataset if "eval_dataset" in given else config.dataset if "dataset" in given else ()
    if not names and own is None:
        raise UserError(f"{target} is no run, so nothing is known of its data; name some: dataset=NAME")
    names, held_out = names or own.eval_dataset, None
    if not names and (held_out := held_out_by(run, own)):
        config, names = own, own.dataset
    elif not names:
        names, held_out = registered_tests(own), None
        notes.append(f"{run} held nothing out; {', '.join(names)} of dataset_info.json is used instead")
    trainings = trainings_of(run, notes) if run else []
    home = (run or common.SAVES / target.name) / "eval"
    made = [
        make_part(config, name, folder, trainings, notes, held_out)
        for name, folder in part_folders(home, names).items()
    ]
    parts = [part for part in made if part]
    if config.labels and all(part.labels != config.labels for part in parts):
        first = parts[0]
        raise UserError(
            f"{first.name} has the answer {strange_answer(config, first.rows)!r}, which is not among labels: "
            f"{', '.join(config.labels)}; mend labels"
        )
    if any(part.name == GENERAL for part in parts):
        return parts
    return [*parts, *general_part(config, trainings, home)]


def part_folders(home: Path, names: Sequence[str]) -> dict[str, Path]:
    """The folder of each dataset: its name, or its file's; where another has that, a hash of its path beside it."""
    found: dict[str, Path] = {}
    for name in names:
        folder = home / Path(name).stem
        if name != GENERAL and folder in {home / GENERAL, *found.values()}:
            folder = folder.with_name(f"{folder.name}-{hashlib.sha256(name.encode()).hexdigest()[:6]}")
        found[name] = folder
    return found


def check_labels(config: Config) -> None:
    """Raises UserError for labels among which there is nothing to choose."""
    if twice := next((text for text, count in Counter(config.labels).items() if count > 1), None):
        raise UserError(f"labels: {twice} stands there twice; name each answer once")
    if len(config.labels) == 1:
        raise UserError(f"labels: {config.labels[0]} alone leaves nothing to choose; name every answer, with commas")


def general_part(config: Config, trainings: list[Training], home: Path) -> list[Part]:
    """The kit's small general-knowledge set: what becomes less likely there was forgotten. None if all was trained."""
    kit = dataclasses.replace(config, dataset_dir=str(common.ROOT / "data"), default_system=None, max_samples=None)
    rows = read_rows(kit, GENERAL)
    kept = [row for row, new in zip(rows, unseen(kit, GENERAL, rows, trainings), strict=True) if new]
    return [Part(GENERAL, kept, home / GENERAL, "loss")] if kept else []


def read_rows(config: Config, name: str) -> list[Conversation]:
    """All conversations of one dataset."""
    alone = {"dataset": (name,), "eval_dataset": (), "val_size": 0.0, "interleave_probs": (), "mix_strategy": "concat"}
    return dataset.read_conversations(dataclasses.replace(config, **alone))[0]


def held_out_by(run: Path, config: Config) -> set[int]:
    """The fingerprints of what a run held out; raises UserError where that is no longer known."""
    _, held_out = dataset.read_conversations(config)
    if held_out and (changed := changed_files(run)):
        raise UserError(
            f"{changed[0]} has changed since {run} was trained, so what was held out is no longer known; "
            "name data that it has not seen: dataset=NAME"
        )
    return set(map(dataset.fingerprint, held_out))


@dataclass(frozen=True)
class Training:
    """What a run was trained on: the fingerprints of its conversations, as its own settings made them of the rows."""

    config: Config
    contents: set[int]


def trainings_of(run: Path, notes: list[str]) -> list[Training]:
    """The training of a run, and before it those of the runs whose adapters it went on with."""
    found: list[Training] = []
    passed: set[Path] = set()
    while run.resolve() not in passed:
        passed.add(run.resolve())
        config = run_config(run)
        found.append(Training(config, trained_contents(run, config, notes)))
        if not config.adapter_name_or_path:
            break
        before = run_of(Path(config.adapter_name_or_path))
        if before is None or not (before / "config.yaml").is_file():
            notes.append(
                f"{run} went on with {config.adapter_name_or_path}, which is no run: what that was trained on is not "
                "known, and rows of it may be among these"
            )
            break
        run = before
    return found


def trained_contents(run: Path, config: Config, notes: list[str]) -> set[int]:
    """The fingerprints that a run wrote down; where it wrote none down, those of its data, as far as they are there."""
    if (run / TRAINED).is_file():
        import numpy as np

        return set(np.load(run / TRAINED).tolist())
    try:
        trained, _ = dataset.read_conversations(config)
    except UserError as error:
        reason = str(error).splitlines()[0]
        notes.append(f"what {run} was trained on cannot be read ({reason}): rows that it saw may be among these")
        return set()
    if changed := changed_files(run):
        notes.append(f"{changed[0]} has changed since {run} was trained: rows that it saw then may be among these")
    return set(map(dataset.fingerprint, trained))


def unseen(config: Config, name: str, rows: list[Conversation], trainings: list[Training]) -> list[bool]:
    """Which rows of a dataset no training saw, as that training's name, author and system message made them."""
    fresh = [True] * len(rows)
    for training in trainings:
        own = {key: getattr(training.config, key) for key in ("name", "author", "default_system")}
        as_it_was = dataclasses.replace(config, **own)
        rendered = rows if as_it_was == config else read_rows(as_it_was, name)
        fresh = [
            new and dataset.fingerprint(row) not in training.contents for new, row in zip(fresh, rendered, strict=True)
        ]
    return fresh


def changed_files(run: Path) -> list[str]:
    """Files that a run was trained on and that are no longer as they were then."""
    data = (read_run(run) or {}).get("data", {}).get("datasets", [])
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
    config: Config,
    name: str,
    folder: Path,
    trainings: list[Training],
    notes: list[str],
    held_out: set[int] | None = None,
) -> Part | None:
    """The rows that were not trained on, and the closed set of their answers, if there is one.

    `held_out` are fingerprints: only these rows are meant. None where a dataset has none of them.
    """
    rows = read_rows(config, name)
    wanted = [held_out is None or dataset.fingerprint(row) in held_out for row in rows]
    fresh = unseen(config, name, rows, trainings)
    kept = [row for row, *facts in zip(rows, wanted, fresh, strict=True) if all(facts)]
    if not any(wanted):
        return None
    if not kept:
        raise UserError(f"every row of {name} was trained on, so it proves nothing; name other data: dataset=NAME")
    answers, known = [answer(row) for row in kept], trained_answers(name, trainings)
    strange = strange_answer(config, kept) if config.labels else None
    if strange is not None:
        notes.append(f"labels do not fit {name}, which has the answer {strange!r}")
    labels = config.labels if config.labels and strange is None else closed_set(answers, known)
    if not labels and (odd := odd_answers([*answers, *known])):
        notes.append(
            f"{name}: the answer {odd[0]!r} keeps the others from being a few that repeat, so all are taken as texts; "
            "mend or take out its row to have the choice among the others measured"
        )
    return Part(name, kept, folder, "classification" if labels else "text", labels, known, sum(wanted) - len(kept))


def trained_answers(name: str, trainings: list[Training]) -> tuple[str, ...]:
    """The answers that the newest training saw in a dataset, or in that whose test set it is, where it can be read."""
    if not trainings:
        return ()
    newest = trainings[0]
    own = next((other for other in newest.config.dataset if other in (name, name.removesuffix("_test"))), None)
    with contextlib.suppress(UserError):  # a file that is gone
        rows = read_rows(newest.config, own) if own else []
        return tuple(answer(row) for row in rows if dataset.fingerprint(row) in newest.contents)
    return ()


def answer(row: Conversation) -> str:
    """The last answer of a conversation, in words; a call of tools has none."""
    return row["messages"][-1]["content"].strip()


def strange_answer(config: Config, rows: list[Conversation]) -> str | None:
    """The first answer that is not among the labels."""
    return next((text for text in map(answer, rows) if text not in config.labels), None)


def closed_set(answers: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The answers, in order, if they are few, short, and repeated: then choosing among them is what is learned."""
    counts = Counter([*answers, *known])
    repeated = min(counts.values()) >= 2 and sum(counts.values()) >= 5 * len(counts)
    if not (all(map(is_short, counts)) and repeated and 2 <= len(counts) <= MOST_LABELS):
        return ()
    return in_order(counts)


def is_short(text: str) -> bool:
    return 0 < len(text) <= LONGEST_LABEL and "\n" not in text


def in_order(counts: Counter[str]) -> tuple[str, ...]:
    """Labels by their number, then by their characters; of two, the positive one last.

    That is the higher number or what says yes; of other words the rarer one, as one looks for what is rare.
    """
    numbers = {text: float(text) for text in counts if re.fullmatch(r"[+-]?\d+(\.\d+)?", text)}
    labels = sorted(counts, key=lambda text: (numbers.get(text, 0.0), text))
    if len(labels) == 2 and len(numbers) < 2:
        labels.sort(key=lambda text: (text.casefold() in POSITIVE, -counts[text]))
    return tuple(labels)


def odd_answers(answers: Sequence[str]) -> list[str]:
    """The few answers, at most one in twenty, without which the others would be a closed set."""
    counts = Counter(answers)
    odd = {text for text in counts if counts[text] < 2 or not is_short(text)}
    rest = [text for text in answers if text not in odd]
    few = 0 < len(answers) - len(rest) <= max(1, len(answers) // 20)
    return [text for text in counts if text in odd] if few and rest and closed_set(rest, []) else []


def announce(job: Job) -> None:
    """Says what will be done."""
    print(f"models     {', '.join(f'{c.label} ({c.source.name})' for c in job.contenders)}")
    for part in job.parts:
        kinds = {
            "classification": f"choose among {', '.join(part.labels)}",
            "text": "texts",
            "loss": "what was forgotten",
        }
        if len(part.labels) == 2:
            kinds["classification"] += f"; positive is {part.labels[1]} ({turned_round(part.labels)} turns it round)"
        out = f"; {part.left_out:,} that were trained on are left out" if part.left_out else ""
        print(f"data       {part.name}: {len(part.rows):,} rows, {kinds[part.task]}{out}")


def turned_round(labels: Sequence[str]) -> str:
    """The setting that makes the other of two labels the positive one."""
    return shlex.quote(f"labels={','.join(reversed(labels))}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows as tokens, exactly as in training


@dataclass(frozen=True)
class Encoded:
    """The rows of a part that can be put to a model, as token ids; `rows` are their numbers."""

    rows: list[int]
    prompts: list[list[int]]
    choices: list[list[list[int]]]  # a row's labels, for a closed set
    samples: list[dict[str, list[int]]]  # prompt and answer with what is learned, for texts
    answers: list[str]  # the right ones
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
    from preprocessing.chat_template import load_template
    from preprocessing.tokenizer import load_tokenizer

    source = job.contenders[-1].source
    folder = job.run if job.run and (job.run / "tokenizer_config.json").is_file() else source.tokenizer
    if not folder:
        raise UserError(
            f"{source.name} lies in no run folder, so its tokenizer is not known; evaluate it in saves/NAME/gguf"
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=job.config.trust_remote_code)
    return tokenizer, load_template(job.config.template, tokenizer)


def as_trained(rows: list[Conversation], config: Config, tokenizer: Any, template: Any, **changes: Any) -> list[Any]:
    """Samples as training makes them, or the reason why there is none."""
    from preprocessing.chat_template import encode

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
        if isinstance(sample, Message) and sample.code != dataset.TOO_LONG:
            raise UserError(f"{part.name}, row {number}: {sample}; take it out")
    kept = [i for i, sample in enumerate(samples) if not isinstance(sample, Message)]
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
    kept = [i for i in refuse_faulty(part, by_label[0]) if all(not isinstance(s[i], Message) for s in by_label)]
    prompts, choices = [], []
    for i in kept:
        split = [split_sample(samples[i]) for samples in by_label]
        prompts.append(max(split, key=lambda pair: len(pair[1]))[0])
        choices.append(without_end([tokens for _, tokens in split]))
    return Encoded(kept, prompts, choices, [], [answer(part.rows[i]) for i in kept])


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
    split = [split_sample(last[i]) for i in kept]
    answers = [
        tokenizer.decode(learned, skip_special_tokens=True).strip()  # a call of tools, as the template writes it
        if part.rows[i]["messages"][-1].get("tool_calls")
        else answer(part.rows[i])
        for i, (_, learned) in zip(kept, split, strict=True)
    ]
    return Encoded(kept, [asked for asked, _ in split], [], plain, answers)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions: they grow row by row, and are gone on with


def predict(job: Job, contender: Contender) -> None:
    """Makes the predictions of one model that are not there yet; a model with none left to make is not loaded."""
    todo = [(part, missing) for part in job.parts if (missing := missing_rows(job, contender, part))]
    if not todo:
        print(f"{contender.label}: every prediction is there already")
        return
    from evaluation import scoring

    print(f"loading {contender.source.name} ...", flush=True)
    scorer = scoring.of(load(contender.source))
    for part, missing in todo:
        started, batches = time.monotonic(), 0
        try:
            with open(predictions_file(part, contender.label), "a", encoding="utf-8") as file:
                for lines in rows_predicted(job, contender, part, missing, scorer):
                    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                    file.flush()
                    batches += 1
        finally:  # an interrupted one has taken its time, too
            add_effort(part, contender.label, time.monotonic() - started, batches)
        finish(contender, part)
    del scorer
    gc.collect()


def rows_predicted(
    job: Job, contender: Contender, part: Part, missing: list[int], scorer: Any
) -> Iterator[list[dict[str, Any]]]:
    """The lines of predictions.jsonl, a batch at a time; `missing` are places in the part's Encoded."""
    from tqdm import tqdm

    from evaluation import scoring

    encoded = encode(job, part)
    lengths = [len(encoded.prompts[i]) + encoded.limit for i in missing]
    if encoded.samples:
        lengths = [max(n, len(encoded.samples[i]["input_ids"])) for i, n in zip(missing, lengths, strict=True)]
    ask = choose if part.task == "classification" else write
    bar = tqdm(total=len(missing), desc=f"{contender.label}, {part.name}", unit=" rows", file=sys.stderr)
    with bar:
        for batch in scoring.batches(lengths, scorer.tokens):
            places = [missing[i] for i in batch]
            facts = ask(part, encoded, places, scorer)
            lines = []
            for place, fact in zip(places, facts, strict=True):
                number, right = encoded.rows[place], encoded.answers[place]
                row = part.rows[number]
                known_by = f"{dataset.fingerprint(row) % 2**64:016x}"  # all of it, where the prompt is its last message
                lines.append({"row": number, "conversation": known_by, "prompt": prompt(row), "label": right, **fact})
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
    write_json(part.folder / "state.json", read_state(part) | {label: facts})


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, a row once; a last line that a kill cut off is left out."""
    found: dict[int, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            found[line["row"]] = line
    return [found[row] for row in sorted(found)]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
        facts = {"key": key, "rows": encoded.fingerprint, "model": contender.source.name, "seconds": 0.0, "batches": 0}
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


def weights_key(source: Source) -> str:
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


def add_effort(part: Part, label: str, seconds: float, batches: int) -> None:
    """Adds what predictions took to what those before an interruption did."""
    state = read_state(part)[label]
    spent = {"seconds": round(state["seconds"] + seconds, 1), "batches": state["batches"] + batches}
    write_state(part, label, state | spent)


def finish(contender: Contender, part: Part) -> None:
    """Puts the predictions into the rows' order, and those of a base where other runs find them."""
    file, state = predictions_file(part, contender.label), read_state(part)[contender.label]
    write_lines(file, read_lines(file))
    if contender.label == "base":
        shared = shared_file(state["key"])
        shared.parent.mkdir(parents=True, exist_ok=True)
        write_text(shared, file.read_text(encoding="utf-8"))


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
        "positive": part.labels[1] if len(part.labels) == 2 else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    write_json(part.folder / "metrics.json", found | measured)
    if part.task == "classification":
        charts.draw_classification(measured["models"], part.folder)
    print(f"\n{part.name}: {len(encoded.rows):,} rows\n{dataset.format_table(table(part.task, measured['models']))}")
    for name, pair in measured.get("paired", {}).items():
        print(f"{name}: {describe_pair(pair)}")
    if part.name == GENERAL and part.task != "classification" and (note := describe_forgetting(measured["models"])):
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
    lines, seconds, batches = [], 0.0, 0
    for part in job.parts:
        if part.task != "loss":
            made = {line["row"]: line for line in read_lines(predictions_file(part, label))}
            encoded = encode(job, part)
            for row, ids in zip(encoded.rows, encoded.prompts, strict=True):
                texts = {"predict": made[row]["prediction"], "label": made[row]["label"]}
                lines.append({"prompt": tokenizer.decode(ids, skip_special_tokens=False), **texts})
            state = read_state(part)[label]
            seconds, batches = seconds + state["seconds"], batches + state["batches"]
    if not lines:
        return
    folder = job.output or job.run or job.parts[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "generated_predictions.jsonl", lines)
    predictions, truth = ([line[key] for line in lines] for key in ("predict", "label"))
    write_json(folder / "predict_results.json", metrics.as_llamafactory(predictions, truth, seconds, batches))
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
    for folder in run_folders():
        run = read_run(folder) or {}
        data, figure = key_figure(folder)
        minutes = f"{run['seconds'] / 60:.1f}" if run.get("seconds") else "-"
        losses = ["-" if run.get(key) is None else f"{run[key]:.4f}" for key in ("last_loss", "eval_loss")]
        steps = [str(run.get(key) or "-") for key in ("steps", "total_steps")]
        status = str(run.get("status", "-"))
        if status == "running" and not is_alive(run["pid"], run.get("created")):
            status = "interrupted"  # by what left it no time to write so
        rows.append([str(folder), status, *steps, minutes, *losses, data, figure])
    if len(rows) == 1:
        raise UserError(f"there is no run in {common.SAVES}/; train one: make train")
    return dataset.format_table(rows)


def key_figure(folder: Path) -> tuple[str, str]:
    """The newest evaluation of a run's own model, or of what was made of it: its data, and accuracy or exact match.

    Dashes for none. What tells whether the run forgot comes only where there is nothing else.
    """
    files = list(folder.glob("eval/*/metrics.json"))
    files.sort(key=lambda file: (file.parent.name != GENERAL, file.stat().st_mtime), reverse=True)
    for found in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        models = {
            label: figures for label, figures in found["models"].items() if label not in ("majority vote", "base")
        }
        label = "trained" if "trained" in models else next(iter(models), None)
        whose = "" if label == "trained" else f" ({label})"
        for key in ("accuracy", "exact_match"):
            if key in models.get(label, {}):
                return found["dataset"], f"{key} {models[label][key]:.3f}{whose}"
    return "-", "-"


def compare(first: Path, second: Path) -> str:
    """Settings that differ, losses, figures side by side and the difference on the same rows; draws both losses."""
    for folder in (first, second):
        if not is_run(folder):
            raise UserError(f"{folder} is no run folder; python evaluate.py --runs lists them")
    configs, runs = [run_config(f) for f in (first, second)], [read_run(f) or {} for f in (first, second)]
    rows = [["", str(first), str(second)]]
    for key in common.OPTIONS:
        a, b = (getattr(config, key) for config in configs)
        if a != b and key != "output_dir":
            rows.append([key, *(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (a, b))])
    for key in ("steps", "best_step", "seconds", "tokens", "last_loss", "eval_loss"):
        rows.append([key, *(amount(run.get(key)) for run in runs)])
    blocks = [dataset.format_table(rows)]
    for file in sorted(first.glob("eval/*/metrics.json")):
        other = second / file.relative_to(first)
        if other.is_file():
            blocks.append(compare_part(file, other, str(first), str(second)))
    picture = second / f"loss_beside_{first.resolve().name}.png"
    charts.draw_losses({str(folder): read_jsonl(folder / "trainer_log.jsonl") for folder in (first, second)}, picture)
    return "\n\n".join([*blocks, f"both losses: {picture}"])


def amount(value: float | None) -> str:
    """A number in five digits, or all where it has more; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.5g}"


def compare_part(first: Path, second: Path, *names: str) -> str:
    """The figures of both runs on one dataset, and their difference on the rows that both predicted."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (first, second)]
    title = found[0]["dataset"]
    same = all(found[0][key] == found[1][key] for key in ("task", "labels"))
    if not same or any("trained" not in part["models"] for part in found):
        return f"{title}: not evaluated in the same way; evaluate both again"
    models = {name: part["models"]["trained"] for name, part in zip(names, found, strict=True)}
    text = f"{title}\n{dataset.format_table(table(found[0]['task'], models))}"
    lines = [
        {line["conversation"]: line for line in read_lines(file.parent / "predictions.jsonl") if "conversation" in line}
        for file in (first, second)
    ]
    both = [key for key in lines[0] if key in lines[1] and "prediction" in lines[0][key]]
    if not both:
        return text
    said = [[part[key]["prediction"] for key in both] for part in lines]
    pair = metrics.paired([lines[0][key]["label"] for key in both], *said)
    return f"{text}\n{names[1]} - {names[0]} on {len(both):,} rows of both: {describe_pair(pair)}"


if __name__ == "__main__":
    common.run_script(main)
