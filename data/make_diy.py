"""The fraud task as a dataset: drawn from a seed, or made of your own table of transactions.

  python data/make_diy.py
      writes diy, diy_small, diy_words and diy_amounts, each .json and _test.json, beside this file, always the same
      bytes; with --overwrite where they are there already
  python data/make_diy.py --table tx.csv --labels labels.csv --split-time 2024-06-01 --out mydata
      writes mydata.json and mydata_test.json; tx has the columns from, to, amount, time, labels has account, label

A sample is a window of one account's newest transactions, in the tutorial's prompt or in words, and the answer 1
(fraud) or 0.
An account is either in training, with what it did before the split time, or held out, with what it did from then on:
no account and no moment is in both parts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import re
import statistics
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import Message, UserError, nearest_word, run_script  # noqa: E402
from preprocessing.sources import not_utf8  # noqa: E402
from runs.files import write_text  # noqa: E402

IN_WORDS = "--accounts 4400 --window 10 --min-transactions 10 --balance 1 --split-time 2024-06-01"
# The datasets of this folder, as the arguments that make them.
SHIPPED = {
    "diy": "--accounts 700 --window 64 --min-transactions 20 --test-share 0.4 --balance 1 --split-time 2024-06-01",
    "diy_small": "--accounts 1500 --window 10 --min-transactions 10 --digits 3 --balance 1 --split-time 2024-06-01",
    "diy_words": f"{IN_WORDS} --form words",
    "diy_amounts": f"{IN_WORDS} --form amounts",
}
HEAD = "以下是你需要分析的账户节点的交易数据:"
QUESTION = "\n\n这是当前节点和其他节点的交易数据，请对这个节点作出判断，诈骗节点输出1，正常节点输出0."
WORDS_QUESTION = "\nFraud?"
SIZES = {"tiny": 0.1, "small": 1.0, "medium": 10.0, "large": 100.0, "huge": math.inf}  # each word's amounts end there
TEMPLATE_TOKENS = 32  # kept free below --max-tokens for what the chat template puts around prompt and answer
DAY = 24 * 60 * 60
SLASHED = re.compile(r"^(\d{4})/(\d{1,2})/(\d{1,2})(?: +(\d{1,2})(?=:))?")


class Transaction(NamedTuple):
    """What an account did: seconds since 1970 (UTC), the other account's name, the amount in the table's unit."""

    time: float
    counterparty: str
    amount: float


class Window(NamedTuple):
    """One sample before it is written out; `transactions` oldest first."""

    account: str
    label: int
    transactions: list[Transaction]


Accounts = dict[str, list[Transaction]]
Rows = Iterator[tuple[Message, dict[str, Any]]]  # where a row stands, and its values by their keys


# ---------------------------------------------------------------------------------------------------------------------
# From transactions to samples


def prompt(transactions: list[Transaction], digits: int) -> str:
    """The tutorial's prompt. Counterparties are numbered as the window meets them, so no name reaches the model."""
    numbers: dict[str, int] = {}
    lines = []
    for moment, counterparty, amount in transactions:
        number = numbers.setdefault(counterparty, len(numbers) + 1)
        when = datetime.fromtimestamp(moment, UTC)
        lines.append(f"[{when:%m-%d %H:%M}] 节点 {number} 交易 {amount_text(amount, digits)}")
    return HEAD + " ".join(lines) + QUESTION


def words(transactions: list[Transaction], digits: int) -> str:
    """The same in words of about one token each, for a model that needs 38 tokens for a line of the tutorial's prompt.

    Per transaction, oldest first: night (before 6 o'clock, UTC) or day; minutes, hours or days since the one before;
    whether the counterparty is new in the window or known; whether the amount is round (`digits` apart from the first
    are zero), and its size.
    """
    seen: set[str] = set()
    lines = []
    for place, (moment, counterparty, amount) in enumerate(transactions):
        line = ["night" if datetime.fromtimestamp(moment, UTC).hour < 6 else "day"]
        if place:
            pause = moment - transactions[place - 1].time
            line.append("minutes" if pause < 3600 else "hours" if pause < DAY else "days")
        line.append("known" if counterparty in seen else "new")
        if amount and float(f"{amount:.1g}") == float(f"{amount:.{digits}g}"):
            line.append("round")
        line.append(size(amount))
        seen.add(counterparty)
        lines.append(" ".join(line))
    return "\n".join(lines) + WORDS_QUESTION


def amounts(transactions: list[Transaction]) -> str:
    """Of the words only the sizes of the amounts, for a training that must be short."""
    return " ".join(size(amount) for _, _, amount in transactions) + WORDS_QUESTION


def size(amount: float) -> str:
    return "zero" if amount == 0 else next(word for word, end in SIZES.items() if amount < end)


FORMS = {"tutorial": prompt, "words": words, "amounts": lambda transactions, _: amounts(transactions)}


def amount_text(amount: float, digits: int) -> str:
    """`amount` to so many significant digits, without an exponent, always with a point, as the tutorial has it."""
    if amount == 0:
        return "0.0"
    places = digits - 1 - math.floor(math.log10(amount))
    text = f"{round(amount, places):.{max(places, 1)}f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def build(accounts: Accounts, labels: dict[str, int], args: argparse.Namespace) -> tuple[list[Window], list[Window]]:
    """The training and the held-out windows, each in a drawn order. Raises UserError when a part lacks a class."""
    draw = random.Random(args.seed)
    held_out = set()
    for label in (0, 1):
        names = sorted(name for name in accounts if labels[name] == label)
        held_out.update(draw.sample(names, round(args.test_share * len(names))))
    parts: tuple[list[Window], list[Window]] = ([], [])
    for name in sorted(accounts):
        test = name in held_out
        mine = [t for t in sorted(accounts[name], key=lambda t: t.time) if (t.time >= args.split_time) == test]
        for end in range(len(mine), 0, -args.window)[: args.windows]:
            chosen = mine[max(0, end - args.window) : end]
            if len(chosen) >= args.min_transactions:
                parts[test].append(Window(name, labels[name], fit(chosen, args)))
    for part in parts:
        draw.shuffle(part)
    train, test = balanced(parts[0], args.balance), parts[1]
    for title, part in ((Message("training"), train), (Message("held-out"), test)):
        if {w.label for w in part} != {0, 1}:
            raise UserError(
                "the {part} part has {samples} sample{samples:plural} and not both classes; change --split-time "
                "({split_time}), --test-share or --min-transactions, or label more accounts",
                part=title,
                samples=len(part),
                split_time=show_time(args.split_time),
            )
    return train, test


def fit(transactions: list[Transaction], args: argparse.Namespace) -> list[Transaction]:
    """As many of the newest transactions as --max-tokens allows."""
    if args.max_tokens is None:
        return transactions

    def is_too_long(kept: int) -> bool:
        newest = transactions[len(transactions) - kept :]
        return args.count(FORMS[args.form](newest, args.digits) + "1") > args.max_tokens - TEMPLATE_TOKENS

    kept = bisect_left(range(1, len(transactions) + 1), True, key=is_too_long)
    if kept == 0:
        raise UserError(
            "--max-tokens {max_tokens} is too small for one transaction; it must be at least 256",
            max_tokens=args.max_tokens,
        )
    return transactions[-kept:]


def balanced(windows: list[Window], balance: float | None) -> list[Window]:
    """At most `balance` normal windows for each fraudulent one; the order stays."""
    if balance is None:
        return windows
    kept = round(balance * sum(w.label for w in windows))
    surplus = set([i for i, w in enumerate(windows) if w.label == 0][kept:])
    return [w for i, w in enumerate(windows) if i not in surplus]


def estimate_tokens(text: str) -> int:
    """About what SmolLM2 needs, which is more than most: a token an ASCII character, 1.6 a Chinese one (measured)."""
    ascii_count = sum(c < "\x80" for c in text)
    return math.ceil(ascii_count + 1.6 * (len(text) - ascii_count))


def token_counter(folder: str | None) -> Callable[[str], int]:
    """Counts by the tokenizer of a model's folder, or by `estimate_tokens`."""
    if folder is None:
        return estimate_tokens
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise UserError("there is no {file}; give the folder of a model, or leave --tokenizer out", file=file)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


# ---------------------------------------------------------------------------------------------------------------------
# A user's own table


def rows_of(path: Path, wanted: dict[str, str]) -> Rows:
    """(place, {"from": ..., ...}) of each row of a CSV or parquet file; `wanted` maps a key to its column."""
    reader = {".csv": csv_rows, ".parquet": parquet_rows}.get(path.suffix.lower())
    if reader is None:
        raise UserError("{file} is neither .csv nor .parquet; save it as one of them", file=path)
    if not path.is_file():
        near = nearest_word(path.name, (p.name for p in path.parent.glob("*")))
        raise UserError(
            "there is no file {file}{near:suggestion}; give the path of a .csv or .parquet file", file=path, near=near
        )
    return reader(path, wanted)


def csv_rows(path: Path, wanted: dict[str, str]) -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            columns = check_columns(path, wanted, header)
            for cells in reader:
                place = Message("{file}, line {line}", file=path, line=reader.line_num)
                if len(cells) != len(header) and cells:
                    raise UserError(
                        "{place} has {values} values where the header has {columns}; correct the line, or quote "
                        "the values that hold a comma",
                        place=place,
                        values=len(cells),
                        columns=len(header),
                    )
                if cells:
                    yield place, {key: cells[i].strip() for key, i in columns.items()}
        except csv.Error as error:
            place = Message("{file}, line {line}", file=path, line=reader.line_num)
            raise UserError(
                "{place} is broken CSV ({problem}); correct its quotes", place=place, problem=str(error)
            ) from None
        except UnicodeDecodeError:
            raise UserError(
                "{file}: {problem}; save the file as CSV in UTF-8", file=path, problem=not_utf8(path).message
            ) from None


def parquet_rows(path: Path, wanted: dict[str, str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            "{file} is not a parquet file ({problem}); write it again", file=path, problem=str(error).splitlines()[0]
        ) from None
    check_columns(path, wanted, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(columns=list(wanted.values())):
        for row in batch.to_pylist():
            number += 1
            yield (
                Message("{file}, row {row}", file=path, row=number),
                {key: row[column] for key, column in wanted.items()},
            )


def check_columns(path: Path, wanted: dict[str, str], header: list[str]) -> dict[str, int]:
    """Where each wanted column stands; raises UserError with the nearest name for the first that is missing."""
    header = [name.strip() for name in header]
    for key, column in wanted.items():
        if column not in header:
            near = nearest_word(column, header)
            raise UserError(
                "{file} has no column '{column}'{near:suggestion}; its columns: {columns}. Name yours by --columns "
                "{key}=NAME",
                file=path,
                column=column,
                near=near,
                columns=header,
                key=key,
            )
    return {key: header.index(column) for key, column in wanted.items()}


def read_labels(path: Path, columns: dict[str, str]) -> dict[str, int]:
    """Account → 1 (fraud) or 0. Raises UserError with file and line at the first fault."""
    labels: dict[str, int] = {}
    for place, row in rows_of(path, {key: columns[key] for key in ("account", "label")}):
        name, value = account_name(place, "account", row["account"]), str(row["label"]).lower()
        label = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(value)
        if label is None:
            raise UserError(
                "{place}: the label '{label}' is neither 0 nor 1; write 1 for fraud, 0 for normal",
                place=place,
                label=row["label"],
            )
        if labels.setdefault(name, label) != label:
            raise UserError(
                "{place}: account {account} is 0 in one line and 1 in another; keep the right one",
                place=place,
                account=name,
            )
    return labels


def read_table(path: Path, columns: dict[str, str], labels: dict[str, int]) -> Accounts:
    """The transactions of the labelled accounts, both as sender and as receiver, in the table's order."""
    accounts: Accounts = defaultdict(list)
    for place, row in rows_of(path, {key: columns[key] for key in ("from", "to", "amount", "time")}):
        sender, receiver = (account_name(place, key, row[key]) for key in ("from", "to"))
        amount, moment = read_amount(place, row["amount"]), read_time(place, row["time"])
        if sender in labels:
            accounts[sender].append(Transaction(moment, receiver, amount))
        if receiver in labels and receiver != sender:
            accounts[receiver].append(Transaction(moment, sender, amount))
    if not accounts:
        raise UserError(
            "no account of the labels is in {file}; write the accounts in both files the same way", file=path
        )
    return dict(accounts)


def account_name(place: Message, key: str, value: Any) -> str:
    if value is None or str(value).strip() == "":
        raise UserError("{place}: the {key} account is empty; fill it in or delete the row", place=place, key=key)
    return str(value).strip()


def read_amount(place: Message, value: Any) -> float:
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise UserError(
            "{place}: the amount '{amount}' is not a number of at least 0; correct it or delete the row",
            place=place,
            amount=value,
        )
    return amount


def read_time(place: Message | str, value: Any) -> float:
    """Seconds since 1970 of an ISO 8601 time (UTC where it names no zone), a timestamp, or a number of seconds.

    Also of a date with slashes, as Excel writes it in Chinese: 2024/5/20 9:01.
    """
    advice = Message("write it like 2024-05-17 09:01, or as seconds since 1970")
    try:
        if not isinstance(value, datetime):
            value = str(value).strip().replace("Z", "+00:00")
            if value.replace(".", "", 1).isdigit():
                if float(value) > 1e11:  # the year 5138
                    advice = Message("it looks like milliseconds since 1970: divide it by 1000")
                value = from_seconds(float(value))
            else:
                value = datetime.fromisoformat(SLASHED.sub(dashed, value))
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError("{place}: '{value}' is not a time; {advice}", place=place, value=value, advice=advice) from None


def dashed(date: re.Match[str]) -> str:
    """2024/5/20 9 → 2024-05-20 09."""
    year, month, day, hour = date.groups()
    return f"{year}-{month:0>2}-{day:0>2}" + (f" {hour:0>2}" if hour else "")


def from_seconds(seconds: float) -> datetime:
    if seconds < 1e8:  # before 1973: rather a year or a date without dashes, like 20240517
        raise ValueError(seconds)
    return datetime.fromtimestamp(seconds, UTC)


def show_time(seconds: float) -> str:
    return f"{from_seconds(seconds):%Y-%m-%d %H:%M}"


# ---------------------------------------------------------------------------------------------------------------------
# Accounts drawn from a seed


@dataclass(frozen=True)
class Kind:
    """A kind of account: for each habit the range from which an account draws its own value, once.

    Shares of its transactions: at night (0 to 6 o'clock), minutes after the one before (bursts), with a counterparty
    known already, of a round amount, of amount 0, and far above the usual. `level` and `spread` are the mean and the
    deviation of the amount's natural logarithm.
    """

    night: tuple[float, float]
    burst: tuple[float, float]
    known: tuple[float, float]
    round: tuple[float, float]
    zero: tuple[float, float]
    large: tuple[float, float]
    level: tuple[float, float]
    spread: tuple[float, float]


# Every range of one class overlaps those of the other: no habit alone reveals fraud, and some accounts stay unclear.
NORMAL = (
    Kind((0.0, 0.3), (0.0, 0.3), (0.35, 0.9), (0.2, 0.6), (0.0, 0.2), (0.0, 0.05), (-2.0, 1.3), (0.5, 1.5)),  # person
    Kind((0.1, 0.55), (0.1, 0.6), (0.2, 0.7), (0.0, 0.3), (0.05, 0.4), (0.0, 0.08), (-0.8, 1.8), (0.7, 1.9)),  # trader
    Kind((0.0, 0.3), (0.0, 0.4), (0.1, 0.6), (0.3, 0.8), (0.0, 0.1), (0.0, 0.05), (-1.5, 1.3), (0.3, 1.2)),  # shop
)
FRAUD = (
    Kind(
        (0.15, 0.7), (0.25, 0.8), (0.0, 0.4), (0.1, 0.5), (0.0, 0.2), (0.03, 0.15), (-1.0, 2.0), (0.7, 1.9)
    ),  # phisher
    Kind((0.15, 0.7), (0.15, 0.65), (0.1, 0.6), (0.3, 0.8), (0.0, 0.1), (0.03, 0.15), (0.3, 2.8), (0.4, 1.4)),  # mule
    Kind((0.05, 0.5), (0.05, 0.5), (0.1, 0.7), (0.2, 0.7), (0.0, 0.2), (0.02, 0.12), (-1.0, 2.0), (0.5, 1.6)),  # hidden
)
START, END = 1709251200, 1725148800  # 2024-03-01 and 2024-09-01, UTC


def draw_accounts(count: int, seed: int) -> tuple[Accounts, dict[str, int]]:
    """`count` accounts, every other one fraudulent, each with four to twelve weeks of transactions."""
    draw = random.Random(f"accounts {seed}")
    names = [f"account {number}" for number in range(count)]
    labels = {name: number % 2 for number, name in enumerate(names)}
    return {name: draw_history(draw, draw.choice(FRAUD if labels[name] else NORMAL)) for name in names}, labels


def draw_history(draw: random.Random, kind: Kind) -> list[Transaction]:
    habit = {name: draw.uniform(*bounds) for name, bounds in vars(kind).items()}
    weeks, count = draw.uniform(4, 12), draw.randint(40, 110)
    pause = weeks * 7 * DAY / count / (1 - habit["burst"])  # mean seconds between transactions outside bursts
    moment = START + draw.random() * (END - START - weeks * 7 * DAY)
    history: list[Transaction] = []
    met: set[str] = set()
    for _ in range(count):
        moment = next_moment(draw, habit, moment, pause)
        back = history and draw.random() < habit["known"]
        counterparty = draw.choice(history).counterparty if back else f"stranger {len(met)}"
        met.add(counterparty)
        history.append(Transaction(moment, counterparty, draw_amount(draw, habit)))
    return history


def next_moment(draw: random.Random, habit: dict[str, float], moment: float, pause: float) -> float:
    if draw.random() < habit["burst"]:
        return moment + draw.uniform(1, 25) * 60
    later = moment + draw.expovariate(1 / pause)
    hour = draw.uniform(0, 6) if draw.random() < habit["night"] else draw.uniform(7, 24)
    later = later // DAY * DAY + hour * 3600
    return later if later > moment else later + DAY


def draw_amount(draw: random.Random, habit: dict[str, float]) -> float:
    if draw.random() < habit["zero"]:
        return 0.0
    amount = math.exp(draw.gauss(habit["level"], habit["spread"]))
    if draw.random() < habit["large"]:
        amount *= draw.uniform(10, 40)
    return float(f"{amount:.1g}") if draw.random() < habit["round"] else amount


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", type=Path, help="your transactions, CSV or parquet; unset: accounts are drawn from the seed")
    add("--labels", type=Path, help="the labels of your accounts: 1 fraud, 0 normal")
    add("--columns", nargs="+", default=[], metavar="KEY=NAME", help="your columns' names, like from=sender time=date")
    add("--out", type=Path, help="where to: OUT.json and OUT_test.json")
    add("--accounts", type=int, default=700, help="how many accounts are drawn without a table")
    add("--window", type=int, default=64, help="most transactions in a sample, the newest ones")
    add("--windows", type=int, default=1, help="most windows of one account, the newest ones")
    add("--min-transactions", type=int, default=5, help="a window with fewer is left out")
    add("--max-tokens", type=int, help="longest sample; the oldest transactions go")
    add("--tokenizer", help="a model's folder, to count tokens exactly; unset: a cautious estimate")
    add("--split-time", help="training ends and the held-out part begins; unset: after 70%% of the transactions")
    add("--test-share", type=float, default=0.3, help="share of the accounts that is held out")
    add("--balance", type=float, help="most normal samples for each fraudulent one in training; unset: all")
    add(
        "--form",
        choices=FORMS,
        default="tutorial",
        help="the tutorial's prompt, words for a small model, or of these the amounts",
    )
    add("--digits", type=int, default=4, help="significant digits of an amount")
    add("--seed", type=int, default=42, help="seed of the split, the order and the drawn accounts")
    add("--overwrite", action="store_true", help="replace files that are there already")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Turns the arguments into what the functions above take; raises UserError at the first that makes no sense."""
    for name in ("accounts", "window", "windows", "min_transactions", "digits"):
        if getattr(args, name) < 1:
            raise UserError(
                "{flag} {value} must be at least 1", flag=f"--{name.replace('_', '-')}", value=getattr(args, name)
            )
    if args.min_transactions > args.window:
        raise UserError(
            "--min-transactions {least} is above --window {window}; lower it",
            least=args.min_transactions,
            window=args.window,
        )
    if not 0 < args.test_share < 1:
        raise UserError("--test-share {value} must be between 0 and 1, like 0.3", value=args.test_share)
    if args.balance is not None and not 0 < args.balance < math.inf:
        raise UserError("--balance {value} must be above 0, like 1", value=args.balance)
    if (args.table is None) != (args.labels is None):
        raise UserError("--table and --labels belong together; give both, or neither to draw accounts")
    if args.table and not args.out:
        raise UserError("--out is missing; give the dataset a name, like --out mydata")
    known = {key: key for key in ("from", "to", "amount", "time", "account", "label")}
    for pair in args.columns:
        key, equals, name = pair.partition("=")
        if key not in known or not equals:
            raise UserError(
                "--columns {pair}{near:suggestion}: write KEY=NAME, KEY one of {keys}",
                pair=pair,
                near=nearest_word(key, known),
                keys=list(known),
            )
        known[key] = name
    args.columns = known
    args.split_time = None if args.split_time is None else read_time("--split-time", args.split_time)
    args.count = token_counter(args.tokenizer)


def make(args: argparse.Namespace) -> None:
    """Writes OUT.json and OUT_test.json and says what is in them."""
    files = [args.out.with_name(args.out.name + end) for end in (".json", "_test.json")]
    for file in files:
        if file.exists() and not args.overwrite:
            raise UserError("{file} is there already; choose another --out, or add --overwrite", file=file)
    if args.table:
        labels = read_labels(args.labels, args.columns)
        accounts = read_table(args.table, args.columns, labels)
    else:
        accounts, labels = draw_accounts(args.accounts, args.seed)
    if args.split_time is None:
        moments = sorted(t.time for history in accounts.values() for t in history)
        args.split_time = moments[int(0.7 * len(moments))]
    parts = build(accounts, labels, args)
    print(f"{len(labels)} labelled accounts, split at {show_time(args.split_time)}")
    if absent := [name for name in labels if name not in accounts]:
        print(
            Message(
                "labelled accounts that the table lacks: {count} (first: {first}); write them the same way in both "
                "files",
                count=len(absent),
                first=absent[0],
            )
        )
    left_out = len(labels) - len(absent) - len({window.account for part in parts for window in part})
    if left_out:
        print(f"left out: {left_out} accounts, with too few transactions in their part or above --balance")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for title, file, part in zip(("training", "held out"), files, parts, strict=True):
        write_text(file, dataset_text(part, args))
        print(f"{title}: {file}, {describe(part, args)}")


def dataset_text(windows: list[Window], args: argparse.Namespace) -> str:
    """A JSON list in the alpaca form, one row a line, so that changes can be read."""
    rows = [
        {"instruction": FORMS[args.form](w.transactions, args.digits), "input": "", "output": str(w.label)}
        for w in windows
    ]
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def describe(windows: list[Window], args: argparse.Namespace) -> str:
    tokens = [args.count(FORMS[args.form](w.transactions, args.digits)) for w in windows]
    fraud = sum(w.label for w in windows)
    lengths = [len(w.transactions) for w in windows]
    about = "" if args.tokenizer else "about "
    return (
        f"{len(windows)} samples ({fraud} fraud, {len(windows) - fraud} normal), {statistics.median(lengths):g} "
        f"transactions and {about}{statistics.median(tokens):g} tokens each (longest {max(tokens)})"
    )


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.out:
        make(args)
        print(f"next: python train.py RECIPE.yaml dataset={args.out}.json eval_dataset={args.out}_test.json")
        return
    for name, arguments in SHIPPED.items():
        make(parse([*arguments.split(), "--out", str(HERE / name), *argv]))


if __name__ == "__main__":
    run_script(main)
