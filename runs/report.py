"""report.html of a run: what was trained on what, what came of it, and how to repeat it; one file, no network."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from runs.files import write_text
from runs.folder import read_run, run_config

COLORS = ("#8a8f98", "#e07b39", "#3b7dd8", "#2f9e6a", "#9a5fc0", "#c2504a")
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 260, 52, 36  # of a chart, in its own units

# What stands in the tables of an evaluation: the figure, its name in English and Chinese.
FIGURES = {
    "accuracy": ("accuracy", "准确率"),
    "balanced_accuracy": ("balanced accuracy", "平衡准确率"),
    "precision": ("precision", "精确率"),
    "recall": ("recall", "召回率"),
    "f1": ("F1", "F1"),
    "roc_auc": ("ROC AUC", "ROC AUC"),
    "average_precision": ("average precision", "平均精度"),
    "tpr_at_fpr_10": ("found at 10 % false alarms", "误报 10% 时的检出率"),
    "tpr_at_fpr_1": ("found at 1 % false alarms", "误报 1% 时的检出率"),
    "brier": ("Brier score", "Brier 分数"),
    "ece": ("calibration error", "校准误差"),
    "exact_match": ("exact match", "完全一致"),
    "bleu": ("BLEU", "BLEU"),
    "chrf": ("chrF", "chrF"),
    "rouge1": ("ROUGE-1", "ROUGE-1"),
    "rouge2": ("ROUGE-2", "ROUGE-2"),
    "rougeL": ("ROUGE-L", "ROUGE-L"),
    "loss": ("loss", "损失"),
    "perplexity": ("perplexity", "困惑度"),
}
# What stopping.py says of the end of a training, in Chinese.
REASONS = {
    r"eval_loss has not improved by more than (\S+) since step (\S+)": r"自第 \2 步起，留出集损失的下降未超过 \1",
    r"eval_loss has not improved since step (\S+)": r"自第 \1 步起，留出集损失不再下降",
    r"the training loss is flat and near zero: the data is known by heart": "训练损失已平稳且接近零：数据已被背下来",
}
MODELS = {"base": "训练前", "trained": "训练后", "majority vote": "多数类", "model": "模型"}
TEMPLATE = Path(__file__).with_name("report.jinja")


def write(folder: Path) -> Path:
    """Writes report.html from whatever the run folder holds, an evaluation or none, and returns its path."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.filters["duration"] = duration
    environment.filters["reason"] = reason
    environment.filters["turned"] = lambda found: shlex.quote(f"labels={','.join(reversed(found['labels']))}")
    environment.filters["model"] = lambda label: MODELS.get(label, label)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**facts(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def facts(folder: Path) -> dict[str, Any]:
    """All that the page shows of a run."""
    run, log = read_run(folder) or {}, read_lines(folder / "trainer_log.jsonl")
    settings = run_config(folder) if (folder / "config.yaml").is_file() else common.Config()
    evaluations = read_evaluations(folder)
    return {
        "name": folder.resolve().name,
        "run": run,
        "settings": {key: value for key in common.OPTIONS if (value := shown(settings, key)) is not None},
        "datasets": [*run.get("data", {}).get("datasets", []), *run.get("data", {}).get("eval_datasets", [])],
        "log": log,
        "evaluated": any(line.get("eval_loss") is not None for line in log),
        "loss": loss_chart(log),
        "rate": rate_chart(log),
        "speed": log[-1].get("tokens_per_second") if log else None,
        "evaluations": [e | {"charts": charts(e)} for e in evaluations if e["task"] != "loss"],
        "forgotten": next((e for e in evaluations if e["dataset"] == "general_test"), None),
        "figures": FIGURES,
        "colors": COLORS,
        "commands": commands(folder, run, evaluations),
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # a kill cut the last one off
            break
    return lines


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """metrics.json of every evaluated dataset."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("eval/*/metrics.json"))]


def shown(settings: common.Config, key: str) -> Any:
    """A setting that is not the default, as it stands in a recipe; else None."""
    value = getattr(settings, key)
    if value == common.OPTIONS[key].default or key == "output_dir":
        return None
    return (
        ", ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if value in (True, False)
        else value
    )


def commands(folder: Path, run: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What to type to repeat it: command, and what it does in English and Chinese. Nothing that is there is deleted."""
    place = shlex.quote(str(folder))
    elsewhere = f"output_dir={folder.with_name(f'{folder.resolve().name}-again')}"
    typed = [word for word in run.get("command", ()) if not re.match(r"-*(overwrite_)?output_dir=", word)]
    evaluated = dict.fromkeys(shlex.join(e["command"]) for e in evaluations) or [f"python evaluate.py {place}"]
    again = ["python", "train.py", f"{folder}/config.yaml", elsewhere, "overwrite_output_dir=false"]
    return [
        *([(shlex.join([*typed, elsewhere]), "train it again, as it was done", "按原样再训练一次")] if typed else []),
        (shlex.join(again), "train it again from what the run folder holds", "用运行目录中的配置再训练一次"),
        *((command, "evaluate it", "评测") for command in evaluated),
        (f"python chat.py {place}", "talk to it", "对话"),
        (f"python merge.py {place}", "merge it into a 16-bit model", "合并为 16 位模型"),
    ]


def number(value: Any, digits: int = 3) -> str:
    """A figure as people read it; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def duration(seconds: float | None, units: tuple[str, str, str] = ("h", "min", "s")) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    counts = (hours, minutes) if hours else (minutes, rest) if minutes else (rest,)
    return " ".join(f"{n} {unit}" for n, unit in zip(counts, units if hours else units[-len(counts) :], strict=False))


def reason(said: str) -> str:
    """Why a training stopped, in Chinese; as it was said where that is not known."""
    known = ((re.fullmatch(pattern, said), chinese) for pattern, chinese in REASONS.items())
    return next((match.expand(chinese) for match, chinese in known if match), said)


# ---------------------------------------------------------------------------------------------------------------------
# Charts: small SVGs whose colours follow the page


Line = tuple[str, str, Sequence[tuple[float, float]]]  # name, colour, points


def chart(
    lines: Sequence[Line],
    x: tuple[str, str],
    y: tuple[str, str],
    *,
    unit: bool = False,
    dots: bool = False,
    diagonal: bool = False,
) -> Any:
    """An SVG of lines over two axes; `x` and `y` are their names in English and Chinese; `unit`: from 0 to 1.

    `diagonal`: where guessing, or what is perfectly calibrated, would lie.
    """
    from markupsafe import Markup, escape

    points = [point for _, _, some in lines for point in some]
    if not points:
        return None
    low, high = (0.0, 1.0) if unit else (min(p[0] for p in points), max(p[0] for p in points))
    top = 1.0 if unit else max(p[1] for p in points) * 1.05 or 1.0
    high = high if high > low else low + 1
    right, above = WIDTH - 18, 26

    def place(point: tuple[float, float]) -> str:
        across = LEFT + (point[0] - low) / (high - low) * (right - LEFT)
        return f"{across:.1f},{HEIGHT - BOTTOM - point[1] / top * (HEIGHT - BOTTOM - above):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y[0])}">']
    for step in range(5):
        level, at = top * step / 4, low + (high - low) * step / 4
        height = float(place((low, level)).split(",")[1])
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height}" y2="{height}"/>')
        shown_level = f"{level:,.0f}" if top >= 100 else f"{level:.3g}"
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4}" text-anchor="end">{shown_level}</text>')
        across = place((at, 0)).split(",")[0]
        label = f"{at:.2g}" if unit else f"{at:,.0f}"
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    for language, across, up in zip(("en", "zh"), x, y, strict=True):
        parts.append(f'<text class="{language}" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(across)}</text>')
        parts.append(f'<text class="{language}" x="4" y="13">{escape(up)}</text>')
    if diagonal:
        parts.append(f'<polyline class="diagonal" points="{place((0, 0))} {place((1, 1))}"/>')
    for name, color, some in lines:
        path = " ".join(map(place, some))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"><title>{escape(name)}')
        parts.append("</title></polyline>")
        for point in some if dots or len(some) == 1 else ():
            across, height = place(point).split(",")
            parts.append(f'<circle cx="{across}" cy="{height}" r="3" fill="{color}"/>')
    return Markup("".join([*parts, "</svg>"]))


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average without the start's bias; its window is about a tenth of the values."""
    weight, average, found = 1 - 1 / max(2.0, len(values) / 10), 0.0, []
    for i, value in enumerate(values):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight ** (i + 1)))
    return found


def loss_chart(log: list[dict[str, Any]]) -> Any:
    """The training loss, raw and smoothed, and the evaluation loss."""
    train = [(line["step"], line["loss"]) for line in log if line.get("loss") is not None]
    held = [(line["step"], line["eval_loss"]) for line in log if line.get("eval_loss") is not None]
    soft = list(zip([step for step, _ in train], smooth([loss for _, loss in train]), strict=True))
    lines: list[Line] = [("loss", "#3b7dd855", train), ("loss, smoothed", "#3b7dd8", soft)]
    lines += [("eval_loss", "#e07b39", held)] if held else []
    return chart(lines, ("step", "步数"), ("loss", "损失"))


def rate_chart(log: list[dict[str, Any]]) -> Any:
    """The learning rate, in millionths."""
    points = [(line["step"], 1e6 * line["learning_rate"]) for line in log if line.get("learning_rate") is not None]
    return chart([("learning rate", "#9a5fc0", points)], ("step", "步数"), ("learning rate", "学习率"))


def steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A precision-recall curve with its corners: on the way to a lower recall precision stays, then it jumps."""
    corners = [[(after[0], before[1]), after] for before, after in itertools.pairwise(points)]
    return [*points[:1], *itertools.chain.from_iterable(corners)]


def charts(found: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """ROC, precision-recall and calibration of a classification: title in English and Chinese, and the SVG."""
    if found["task"] != "classification":
        return []
    named = list(zip(found["models"].items(), COLORS * len(found["models"]), strict=False))
    curved = [(label, color, f["curves"]) for (label, f), color in named if f["curves"]]
    roc = [(label, color, list(zip(c["fpr"], c["tpr"], strict=True))) for label, color, c in curved]
    pr = [(label, color, steps(list(zip(c["recall"], c["precision"], strict=True)))) for label, color, c in curved]
    known = [(label, color, [(p["said"], p["came"]) for p in f["calibration"]]) for (label, f), color in named]
    micro = any(c.get("micro") for _, _, c in curved)
    more = (" (micro average)", "（微平均）") if micro else ("", "")
    axes = {
        "roc": (
            f"ROC{more[0]}",
            f"ROC 曲线{more[1]}",
            roc,
            ("false-positive rate", "误报率"),
            ("true-positive rate", "检出率"),
        ),
        "pr": (
            f"precision and recall{more[0]}",
            f"精确率与召回率{more[1]}",
            pr,
            ("recall", "召回率"),
            ("precision", "精确率"),
        ),
        "said": ("calibration", "校准", known, ("probability said", "预测概率"), ("share that came true", "实际比例")),
    }
    return [
        (en, zh, chart(lines, x, y, unit=True, dots=key == "said", diagonal=key != "pr"))
        for key, (en, zh, lines, x, y) in axes.items()
    ]
