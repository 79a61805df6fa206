"""Figures of an evaluation: predictions → numbers with intervals, by scikit-learn, scipy and sacrebleu."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 400  # of a bootstrap interval: its ends then wander by about 0.003 on 1,000 rows
BINS = 10  # of the calibration


# ---------------------------------------------------------------------------------------------------------------------
# Classification: answers from a small closed set


def classification(truth: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """All figures of one classifier; `probabilities` is rows × labels. The last of two labels is the positive one.

    Intervals are [low, high] at 95 %: Wilson's for the accuracy, the bootstrap's percentiles (over rows) elsewhere.
    With more than two labels precision, recall, F1, ROC AUC (one against the rest) and average precision are means over
    them. A figure that the rows do not define (a ROC AUC where only one label occurs) is None.
    """
    import numpy as np
    from sklearn import metrics as sk

    code = {label: i for i, label in enumerate(labels)}
    y = np.array([code[label] for label in truth])
    p = np.asarray(probabilities, dtype=np.float64)
    predicted = p.argmax(1)
    right = int((predicted == y).sum())
    average = {"average": "binary"} if len(labels) == 2 else {"average": "macro", "labels": range(len(labels))}
    kinds = {"f1": _f1, "balanced_accuracy": _balanced_accuracy}
    for name, binary in {"roc_auc": _binary_roc_auc, "average_precision": _binary_average_precision}.items():
        kinds[name] = functools.partial(_one_against_rest, binary)
    figures: dict[str, Any] = {
        "rows": len(y),
        "labels": list(labels),
        "support": {label: int((y == i).sum()) for label, i in code.items()},
        "accuracy": right / len(y),
        "accuracy_interval": wilson(right, len(y)),
        "precision": float(sk.precision_score(y, predicted, zero_division=0, **average)),
        "recall": float(sk.recall_score(y, predicted, zero_division=0, **average)),
    }
    for name, figure in kinds.items():
        figures[name] = figure(y, p)
        figures[f"{name}_interval"] = bootstrap(figure, y, p) if figures[name] is not None else None
    figures |= {
        "tpr_at_fpr_10": tpr_at(y, p, 0.10),
        "tpr_at_fpr_1": tpr_at(y, p, 0.01),
        "brier": float(sk.brier_score_loss(y, p[:, 1] if len(labels) == 2 else p, labels=range(len(labels)))),
        "log_loss": float(sk.log_loss(y, p, labels=range(len(labels)))),
        **calibration(y, p),
        "confusion": _confusion(y, p).tolist(),  # [truth][predicted]
        "curves": curves(y, p) if len(set(y.tolist())) > 1 else None,
    }
    return figures


def wilson(right: int, rows: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(right, rows).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


# The bootstrap computes these figures RESAMPLES times. scikit-learn's functions check their arguments each time, which
# takes many times as long for the same values.


def _confusion(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """How many rows of each label (rows of the matrix) are taken for which (columns)."""
    import numpy as np

    labels = p.shape[1]
    return np.bincount(y * labels + p.argmax(1), minlength=labels**2).reshape(labels, labels)


def _f1(y: np.ndarray, p: np.ndarray) -> float:
    import numpy as np

    confusion = _confusion(y, p)
    f1 = 2 * confusion.diagonal() / np.maximum(confusion.sum(0) + confusion.sum(1), 1)
    return float(f1[1] if len(f1) == 2 else f1.mean())


def _balanced_accuracy(y: np.ndarray, p: np.ndarray) -> float:
    confusion = _confusion(y, p)
    support = confusion.sum(1)
    return float((confusion.diagonal()[support > 0] / support[support > 0]).mean())


def _one_against_rest(figure: Callable[[np.ndarray, np.ndarray], float], y: np.ndarray, p: np.ndarray) -> float | None:
    """`figure(rows of a label, scores)` of the last of two labels, or the mean over more; None if one never occurs."""
    labels = p.shape[1]
    if len(set(y.tolist())) < labels:
        return None
    values = [figure(y == label, p[:, label]) for label in ((1,) if labels == 2 else range(labels))]
    return sum(values) / len(values)


def _binary_roc_auc(positive: np.ndarray, score: np.ndarray) -> float:
    """The share of pairs of a positive and another row where the positive one has the higher score; a tie is half."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    pairs_won = rankdata(score)[positive].sum() - count * (count + 1) / 2
    return float(pairs_won / (count * (len(positive) - count)))


def _binary_average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """The precision down to each distinct score, weighted by the share of the positive rows that have this score."""
    import numpy as np

    order = np.argsort(-score)
    last = np.flatnonzero(np.append(np.diff(score[order]), 1))  # of the rows of one score
    found = positive[order].cumsum()[last]
    return float((np.diff(found, prepend=0) * found / (last + 1)).sum() / found[-1])


def bootstrap(figure: Callable[[np.ndarray, np.ndarray], float | None], y: np.ndarray, p: np.ndarray) -> list[float]:
    """The 95 % interval of a figure over rows drawn again and again."""
    values = [value for rows in drawn(len(y)) if (value := figure(y[rows], p[rows])) is not None]
    return interval(values) if values else None


def drawn(rows: int) -> np.ndarray:
    """RESAMPLES draws of rows, always the same."""
    import numpy as np

    return np.random.default_rng(0).integers(0, rows, (RESAMPLES, rows))


def interval(values: Any) -> list[float]:
    """The percentiles at 2.5 and 97.5."""
    import numpy as np

    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def tpr_at(y: np.ndarray, p: np.ndarray, false_positives: float) -> float | None:
    """The highest true-positive rate with at most this share of false positives; None unless there are two labels."""
    from sklearn.metrics import roc_curve

    if p.shape[1] != 2 or len(set(y.tolist())) < 2:
        return None
    fpr, tpr, _ = roc_curve(y, p[:, 1], drop_intermediate=False)
    return float(tpr[fpr <= false_positives].max())


def calibration(y: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """How often what is predicted with some confidence is right: the curve, and the expected calibration error (ECE).

    With two labels the probability of the positive one against its share; with more, that of the likeliest label
    against how often it is right. Ten bins of equal width, empty ones left out.
    """
    import numpy as np

    binary = p.shape[1] == 2
    confidence, correct = (p[:, 1], y == 1) if binary else (p.max(1), p.argmax(1) == y)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    curve = [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(correct[bins == b].mean()),
            "rows": int((bins == b).sum()),
        }
        for b in sorted(set(bins.tolist()))
    ]
    error = sum(point["rows"] * abs(point["confidence"] - point["accuracy"]) for point in curve) / len(y)
    return {"ece": float(error), "calibration": curve}


def curves(y: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """The points of the ROC and the precision-recall curve, and the areas under them.

    With more than two labels of every label against the rest, all taken together (micro average).
    """
    import numpy as np
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    binary = p.shape[1] == 2
    correct, confidence = (y == 1, p[:, 1]) if binary else (np.eye(p.shape[1])[y].ravel(), p.ravel())
    fpr, tpr, _ = roc_curve(correct, confidence)
    precision, recall, _ = precision_recall_curve(correct, confidence, drop_intermediate=True)
    points = {"fpr": fpr, "tpr": tpr, "precision": precision, "recall": recall}
    found: dict[str, Any] = {name: [round(float(value), 6) for value in values] for name, values in points.items()}
    return found | {
        "auc": float(auc(fpr, tpr)),
        "ap": float(average_precision_score(correct, confidence)),
        "micro": not binary,
    }


def majority(trained: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Probabilities (rows × labels) of one who only knows how often each label occurs in the training data.

    Where nothing of that is known, in the evaluated rows themselves.
    """
    import numpy as np

    seen = [labels.index(label) for label in trained if label in labels] or [labels.index(label) for label in truth]
    shares = np.bincount(seen, minlength=len(labels)) / len(seen)
    return np.tile(shares, (len(truth), 1))


def paired(truth: Sequence[str], first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """How the accuracy of `second` differs from that of `first` on the same rows.

    The difference with its bootstrap interval, and McNemar's exact test on the rows that only one of them got right.
    """
    from scipy.stats import binomtest

    right = [[p == t for p, t in zip(predictions, truth, strict=True)] for predictions in (first, second)]
    only_a, only_b = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1]))
    return {
        "rows": len(truth),
        **paired_means(*right),
        "only_first_right": only_a,
        "only_second_right": only_b,
        "mcnemar_p": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }


def against_base(models: dict[str, Any], compare: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """`compare(base, model)` of every other model, by "NAME - base"; empty where the base was not measured."""
    if "base" not in models:
        return {}
    return {f"{name} - base": compare(models["base"], own) for name, own in models.items() if name != "base"}


def mean(name: str, values: Sequence[float]) -> list[tuple[str, Any]]:
    """The mean under `name`, and its 95 % interval under `name`_interval: Wilson's of a share, else the bootstrap's."""
    import numpy as np

    found = np.array(values, dtype=np.float64)
    is_share = set(found.tolist()) <= {0.0, 1.0}
    ends = wilson(int(found.sum()), len(found)) if is_share else interval(found[drawn(len(found))].mean(1))
    return [(name, float(found.mean())), (f"{name}_interval", ends)]


def paired_means(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """How the mean of the second values differs from that of the first on the same rows, with the 95 % interval."""
    import numpy as np

    difference = np.array(second, dtype=np.float64) - np.array(first, dtype=np.float64)
    return {
        "difference": float(difference.mean()),
        "difference_interval": interval(difference[drawn(len(difference))].mean(1)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def texts(predictions: Sequence[str], truth: Sequence[str]) -> dict[str, Any]:
    """How close texts are to the right ones: shares and ROUGE from 0 to 1, BLEU and chrF from 0 to 100.

    BLEU and chrF are sacrebleu's over the whole set, Chinese split into characters; ROUGE is the mean F-measure,
    Chinese cut into words by jieba.
    """
    import sacrebleu

    right = sum(p.strip() == t.strip() for p, t in zip(predictions, truth, strict=True))
    tokenize = "zh" if any(map(is_chinese, truth)) else "13a"
    return {
        "rows": len(truth),
        "exact_match": right / len(truth),
        "exact_match_interval": wilson(right, len(truth)),
        "bleu": sacrebleu.corpus_bleu(list(predictions), [list(truth)], tokenize=tokenize).score,
        "chrf": sacrebleu.corpus_chrf(list(predictions), [list(truth)]).score,
        **rouge(predictions, truth),
    }


def is_chinese(text: str) -> bool:
    """Whether Chinese characters stand in a text."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def words(text: str) -> list[str]:
    """The lower-case words and numbers of a text, Chinese ones by jieba."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    found = jieba.cut(text.lower()) if is_chinese(text) else re.findall(r"\w+", text.lower())
    return [word for word in found if any(map(str.isalnum, word))]


def rouge(predictions: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2 and rougeL: the mean F-measure, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=SimpleNamespace(tokenize=words))
    scores = [scorer.score(t, p) for p, t in zip(predictions, truth, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def perplexity(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Loss (nats a token) and perplexity of rows of (nats, tokens), every token counting the same."""
    import numpy as np

    nats, tokens = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    rows = drawn(len(nats))
    means = nats[rows].sum(1) / tokens[rows].sum(1)
    loss = float(nats.sum() / tokens.sum())
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "perplexity_interval": interval(np.exp(means)),
        "tokens": int(tokens.sum()),
    }
