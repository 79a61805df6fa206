"""Figures and pictures of an evaluation: predictions → numbers with intervals, by scikit-learn, scipy and sacrebleu."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.charts import use_chinese_font

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
    kinds = {"f1": _f1, "roc_auc": _roc_auc, "average_precision": _average_precision}
    kinds["balanced_accuracy"] = _balanced_accuracy
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
        "confusion": sk.confusion_matrix(y, predicted, labels=range(len(labels))).tolist(),  # [truth][predicted]
        "curves": curves(y, p) if len(set(y.tolist())) > 1 else None,
    }
    return figures


def wilson(right: int, rows: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(right, rows).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _f1(y: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    average = {"average": "binary"} if p.shape[1] == 2 else {"average": "macro", "labels": range(p.shape[1])}
    return float(f1_score(y, p.argmax(1), zero_division=0, **average))


def _balanced_accuracy(y: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import recall_score

    present = sorted(set(y.tolist()))  # as balanced_accuracy_score, which warns of labels that do not occur
    return float(recall_score(y, p.argmax(1), labels=present, average="macro", zero_division=0))


def _roc_auc(y: np.ndarray, p: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    if len(set(y.tolist())) < p.shape[1]:
        return None
    if p.shape[1] == 2:
        return float(roc_auc_score(y, p[:, 1]))
    return float(roc_auc_score(y, p / p.sum(1, keepdims=True), multi_class="ovr"))


def _average_precision(y: np.ndarray, p: np.ndarray) -> float | None:
    import numpy as np
    from sklearn.metrics import average_precision_score

    if len(set(y.tolist())) < p.shape[1]:
        return None
    if p.shape[1] == 2:
        return float(average_precision_score(y, p[:, 1]))
    return float(average_precision_score(np.eye(p.shape[1])[y], p, average="macro"))


def bootstrap(figure: Callable[[np.ndarray, np.ndarray], float | None], y: np.ndarray, p: np.ndarray) -> list[float]:
    """The 95 % interval of a figure over rows drawn again and again (always the same draws)."""
    import numpy as np

    random = np.random.default_rng(0)
    drawn = (random.integers(0, len(y), len(y)) for _ in range(RESAMPLES))
    values = [value for rows in drawn if (value := figure(y[rows], p[rows])) is not None]
    return [float(value) for value in np.percentile(values, [2.5, 97.5])] if values else None


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
    said, came = (p[:, 1], y == 1) if binary else (p.max(1), p.argmax(1) == y)
    bins = np.minimum((said * BINS).astype(int), BINS - 1)
    curve = [(float(said[bins == b].mean()), float(came[bins == b].mean()), int((bins == b).sum())) for b in set(bins)]
    curve.sort()
    error = sum(count * abs(mean - share) for mean, share, count in curve) / len(y)
    return {"ece": float(error), "calibration": [{"said": s, "came": c, "rows": n} for s, c, n in curve]}


def curves(y: np.ndarray, p: np.ndarray) -> dict[str, Any]:
    """The points of the ROC and the precision-recall curve, and the areas under them.

    With more than two labels of every label against the rest, all taken together (micro average).
    """
    import numpy as np
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

    binary = p.shape[1] == 2
    came, said = (y == 1, p[:, 1]) if binary else (np.eye(p.shape[1])[y].ravel(), p.ravel())
    fpr, tpr, _ = roc_curve(came, said)
    precision, recall, _ = precision_recall_curve(came, said, drop_intermediate=True)
    points = {"fpr": fpr, "tpr": tpr, "precision": precision, "recall": recall}
    found: dict[str, Any] = {name: [round(float(value), 6) for value in values] for name, values in points.items()}
    return found | {"auc": float(auc(fpr, tpr)), "ap": float(average_precision_score(came, said)), "micro": not binary}


def majority(trained: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Probabilities (rows × labels) of one who only knows how often each label occurs in the training data.

    Where nothing of that is known, in the evaluated rows themselves.
    """
    import numpy as np
    from sklearn.dummy import DummyClassifier

    seen = [labels.index(label) for label in trained if label in labels] or [labels.index(label) for label in truth]
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((len(seen), 1)), seen)
    shares = np.zeros((len(truth), len(labels)))
    shares[:, dummy.classes_] = dummy.predict_proba(np.zeros((len(truth), 1)))
    return shares


def paired(truth: Sequence[str], first: Sequence[str], second: Sequence[str]) -> dict[str, Any]:
    """How the accuracy of `second` differs from that of `first` on the same rows.

    The difference with its bootstrap interval, and McNemar's exact test on the rows that only one of them got right.
    """
    import numpy as np
    from scipy.stats import binomtest

    a = np.array([p == t for p, t in zip(first, truth, strict=True)], dtype=float)
    b = np.array([p == t for p, t in zip(second, truth, strict=True)], dtype=float)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    random = np.random.default_rng(0)
    rows = random.integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.percentile((b - a)[rows].mean(1), [2.5, 97.5])
    return {
        "rows": len(a),
        "difference": float((b - a).mean()),
        "difference_interval": [float(low), float(high)],
        "only_first_right": only_a,
        "only_second_right": only_b,
        "mcnemar_p": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
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


class Words:
    """What rouge-score calls to cut a text: lower-case words and numbers, Chinese ones by jieba."""

    def __init__(self) -> None:
        import logging

        import jieba

        jieba.setLogLevel(logging.WARNING)
        self.cut = jieba.cut

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, without spaces and punctuation."""
        words = self.cut(text.lower()) if is_chinese(text) else re.findall(r"\w+", text.lower())
        return [word for word in words if any(character.isalnum() for character in word)]


def rouge(predictions: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2 and rougeL: the mean F-measure, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Words())
    scores = [scorer.score(t, p) for p, t in zip(predictions, truth, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def surprise(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Loss (nats a token) and perplexity of rows of (nats, tokens), every token counting the same."""
    import numpy as np

    nats, tokens = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    drawn = np.random.default_rng(0).integers(0, len(nats), (RESAMPLES, len(nats)))
    means = nats[drawn].sum(1) / tokens[drawn].sum(1)
    loss = float(nats.sum() / tokens.sum())
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "perplexity_interval": [float(value) for value in np.exp(np.percentile(means, [2.5, 97.5]))],
        "tokens": int(tokens.sum()),
    }


def as_llamafactory(predictions: Sequence[str], truth: Sequence[str], seconds: float, batches: int) -> dict[str, float]:
    """The figures of LLaMA-Factory's predict_results.json: means over rows, from 0 to 100; BLEU-4 over characters.

    Its steps are batches.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    bleu = [
        sentence_bleu([list(t)], list(p), smoothing_function=smoothing) if p else 0.0
        for p, t in zip(predictions, truth, strict=True)
    ]
    scores = rouge(predictions, truth)
    return {
        "predict_bleu-4": round(100 * sum(bleu) / len(bleu), 4),
        "predict_rouge-1": round(100 * scores["rouge1"], 4),
        "predict_rouge-2": round(100 * scores["rouge2"], 4),
        "predict_rouge-l": round(100 * scores["rougeL"], 4),
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(len(truth) / seconds, 3) if seconds else 0.0,
        "predict_steps_per_second": round(batches / seconds, 3) if seconds else 0.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

COLORS = ("#8a8f98", "#e07b39", "#2468b4", "#2f8f5b", "#8b4fb0", "#b4443c")


def draw(models: dict[str, Any], folder: Path) -> None:
    """roc.png, precision_recall.png, calibration.png and confusion.png of classifiers, as `classification` has them."""
    import matplotlib

    matplotlib.use("Agg")
    use_chinese_font()
    curved = {label: figures for label, figures in models.items() if figures["curves"]}
    color = dict(zip(models, itertools.cycle(COLORS), strict=False))
    if curved:
        with _picture(folder / "roc.png", "false-positive rate", "true-positive rate") as axes:
            axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
            for label, figures in curved.items():
                points = figures["curves"]
                name = f"{label}: {'micro ' * points['micro']}AUC {points['auc']:.3f}"
                axes.plot(points["fpr"], points["tpr"], color=color[label], label=name)
        with _picture(folder / "precision_recall.png", "recall", "precision") as axes:
            for label, figures in curved.items():
                points = figures["curves"]
                name = f"{label}: {'micro ' * points['micro']}AP {points['ap']:.3f}"
                # between two points lies no classifier on a straight line: precision is that of the higher recall
                look = {"color": color[label], "drawstyle": "steps-post", "label": name}
                axes.plot(points["recall"], points["precision"], **look)
    with _picture(folder / "calibration.png", "probability said", "share that came true") as axes:
        axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
        for label, figures in models.items():
            said, came = ([point[key] for point in figures["calibration"]] for key in ("said", "came"))
            axes.plot(said, came, marker="o", color=color[label], label=f"{label}: ECE {figures['ece']:.3f}")
    _draw_confusions(models, folder / "confusion.png")


def draw_losses(logs: dict[str, Path], path: Path) -> None:
    """The losses of several runs, by name, on one picture: training thin, evaluation with dots."""
    import matplotlib

    matplotlib.use("Agg")
    use_chinese_font()
    from matplotlib import pyplot

    from runs import report

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for (name, file), color in zip(logs.items(), COLORS[1:], strict=False):
        for key, look in (("loss", {"linewidth": 1, "alpha": 0.6}), ("eval_loss", {"marker": "o", "markersize": 4})):
            points = [(line["step"], line[key]) for line in report.read_lines(file) if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=f"{name}: {key}", **look)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9)
    _save(figure, path)


@contextlib.contextmanager
def _picture(path: Path, x: str, y: str) -> Iterator[Any]:
    """Square axes from 0 to 1, written to `path` at the end."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5), dpi=120)
    yield axes
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)
    _save(figure, path)


def _draw_confusions(models: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(models), figsize=(3.4 * len(models), 3.6), dpi=120, squeeze=False)
    for axes, (label, figures) in zip(panels[0], models.items(), strict=True):
        names, matrix = figures["labels"], figures["confusion"]
        most = max(map(max, matrix))
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=most)
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                axes.text(j, i, count, ha="center", va="center", color="white" if count > most / 2 else "black")
        axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
        axes.set(xlabel="predicted", ylabel="truth", title=label)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Writes a picture whole."""
    from matplotlib import pyplot

    figure.tight_layout()
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(beside)
    pyplot.close(figure)
    os.replace(beside, path)
