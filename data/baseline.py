"""What simple methods reach on a fraud dataset of make_diy.py: majority vote and logistic regression.

  python data/baseline.py                                     diy, diy_small, diy_words and diy_amounts
  python data/baseline.py mydata.json mydata_test.json        your own

Prints, for the held-out part: accuracy, F1 of the class fraud and ROC AUC with their 95 % intervals (Wilson's for the
accuracy, else by resampling the rows); and the ROC AUC of each feature alone. What a trained model must beat.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = ("diy", "diy_small", "diy_words", "diy_amounts")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import UserError, run_script  # noqa: E402
from evaluation import metrics  # noqa: E402

LINE = re.compile(r"\[(\d\d)-(\d\d) (\d\d):(\d\d)\] 节点 (\d+) 交易 (\d+\.\d+)")
WORDS = ("night", "minutes", "hours", "known", "round", "zero", "tiny", "small", "large", "huge")  # of make_diy.py
SIZES = {"medium", *WORDS[5:]}
FEATURES = ("night", "burst", "repeated", "round", "zero", "log mean", "log deviation", "largest", "a day")


def features(prompt: str) -> list[float]:
    """One number for each of FEATURES, from a prompt's transactions, or for each of WORDS, where it is in words.

    Raises ValueError when it is neither.
    """
    lines = [line.split() for line in prompt.removesuffix("\nFraud?").split("\n")]
    if len(lines) == 1 and set(lines[0]) <= SIZES:
        lines = [[word] for word in lines[0]]
    if all(line and line[0] in ("night", "day", *SIZES) for line in lines):
        return [statistics.fmean(word in line for line in lines) for word in WORDS]
    found = [tuple(map(float, match)) for match in LINE.findall(prompt)]
    if not found:
        raise ValueError("no transaction")
    minutes = [((month * 31 + day) * 24 + hour) * 60 + minute for month, day, hour, minute, _, _ in found]
    gaps = [b - a for a, b in itertools.pairwise(minutes)] or [24 * 60.0]
    amounts = [row[5] for row in found if row[5]] or [1e-6]
    logs = [math.log(amount) for amount in amounts]
    return [
        statistics.fmean(row[2] < 6 for row in found),
        statistics.fmean(gap <= 30 for gap in gaps),
        1 - len({row[4] for row in found}) / len(found),
        statistics.fmean(float(f"{amount:.1g}") == amount for amount in amounts),
        statistics.fmean(row[5] == 0 for row in found),
        statistics.fmean(logs),
        statistics.pstdev(logs),
        max(logs) - statistics.median(logs),
        math.log(len(found) / (1 + (minutes[-1] - minutes[0]) / (24 * 60))),
    ]


class Data(NamedTuple):
    """`x`: samples × FEATURES; `y`: 1 fraud, 0 normal."""

    x: list[list[float]]
    y: list[int]


def read(path: Path) -> Data:
    """Raises UserError with file and row when a row is not one of make_diy.py."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "{file} cannot be read ({problem}); make it with data/make_diy.py", file=path, problem=str(error)
        ) from None
    data = Data([], [])
    for number, row in enumerate(rows, 1):
        try:
            data.x.append(features(row["instruction"]))
            data.y.append({"0": 0, "1": 1}[row["output"]])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "{file}, row {row} is not of the fraud task; make it with data/make_diy.py", file=path, row=number
            ) from None
    if set(data.y) != {0, 1}:
        raise UserError("{file} does not hold both classes; make it with data/make_diy.py", file=path)
    return data


def measure(train: Data, test: Data) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Each method's figures (metrics.classification) on the held-out part, and the ROC AUC of each feature alone.

    A feature alone may point either way; its direction is the training part's.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    methods = {
        "majority vote": DummyClassifier(strategy="prior"),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
    }
    truth = [str(y) for y in test.y]
    found = {
        name: metrics.classification(truth, method.fit(train.x, train.y).predict_proba(test.x), ("0", "1"))
        for name, method in methods.items()
    }
    alone = {}
    for i, name in enumerate(FEATURES if len(train.x[0]) == len(FEATURES) else WORDS):
        sign = -1 if roc_auc_score(train.y, [x[i] for x in train.x]) < 0.5 else 1
        alone[name] = float(roc_auc_score(test.y, [sign * x[i] for x in test.x]))
    return found, alone


def main(argv: list[str]) -> None:
    if any(argument in ("-h", "--help") for argument in argv):
        print(__doc__)
        return
    if len(argv) not in (0, 2):
        raise UserError("give two files, the training and the held-out part, or none for those of data/")
    pairs = [argv] if argv else [[HERE / f"{name}.json", HERE / f"{name}_test.json"] for name in SHIPPED]
    for train_path, test_path in pairs:
        train, test = read(Path(train_path)), read(Path(test_path))
        found, alone = measure(train, test)
        print(f"{train_path}: {len(train.y)} samples, held out {len(test.y)}, {sum(test.y)} of them fraud")
        print(f"  {'method':<22}{'accuracy':>9}{'95 % interval':>17}{'F1':>8}{'':>17}{'ROC AUC':>9}")
        for name, figures in found.items():
            cells = [(figures[key], *figures[f"{key}_interval"]) for key in ("accuracy", "f1", "roc_auc")]
            print(f"  {name:<22}" + "".join(f"{x:>9.3f}{f'{low:.3f} to {high:.3f}':>17}" for x, low, high in cells))
        print("  ROC AUC alone: " + ", ".join(f"{name} {auc:.2f}" for name, auc in alone.items()))


if __name__ == "__main__":
    run_script(main)
