"""report.html of a run: model, data, losses, evaluations and the commands to repeat it; one file, no network."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import Message
from runs import charts
from runs.charts import Curve
from runs.files import read_json, write_text
from runs.folder import read_run, run_config
from runs.log import read_log
from runs.metric_names import METRICS, REWARDS, MetricName

MODELS = {"base": "训练前", "trained": "训练后", "majority vote": "多数类", "model": "模型"}
TEMPLATE = Path(__file__).with_name("report.jinja")


def write(folder: Path) -> Path:
    """Writes report.html from whatever the run folder holds, an evaluation or none, and returns its path."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.filters["duration"] = duration
    environment.filters["swapped"] = lambda found: shlex.quote(f"labels={','.join(reversed(found['labels']))}")
    environment.filters["model"] = lambda label: MODELS.get(label, label)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**facts(folder))
    path = folder / "report.html"
    write_text(path, page)
    return path


def facts(folder: Path) -> dict[str, Any]:
    """All that the page shows of a run."""
    run, log = read_run(folder) or {}, read_log(folder)
    settings = run_config(folder) if (folder / "config.yaml").is_file() else common.Config()
    evaluations = [read_json(path) for path in sorted(folder.glob("eval/*/metrics.json"))]
    general = next((e for e in evaluations if e["dataset"] == "general_test" and e["task"] == "loss"), None)
    return {
        "name": folder.resolve().name,
        "run": run,
        "stopped_early": stop_reason(run),
        "settings": {key: value for key in common.OPTIONS if (value := shown(settings, key)) is not None},
        "datasets": [*run.get("data", {}).get("datasets", []), *run.get("data", {}).get("eval_datasets", [])],
        "log": log,
        "loss": loss_chart(log),
        "rate": rate_chart(log),
        "rewards": [reward_chart(log, key) for key in REWARDS if charts.points_of(log, key, f"eval_{key}")],
        "speed": log[-1].get("tokens_per_second") if log else None,
        "evaluations": [
            e | {"charts": classification_charts(e["models"]) if e["task"] == "classification" else []}
            for e in evaluations
            if e is not general
        ],
        "general": general,
        "figures": METRICS | rewards_of(evaluations),
        "colors": charts.MODEL_COLORS,
        "chart_style": charts.css(),
        "commands": commands(folder, run, evaluations),
    }


def rewards_of(evaluations: Sequence[dict[str, Any]]) -> dict[str, MetricName]:
    """The names of what was measured by reward function, as metrics.json has them."""
    models = [figures for found in evaluations for figures in found["models"].values()]
    names = {name: name.removeprefix("reward_") for figures in models for name in figures if name.startswith("reward_")}
    return {
        name: MetricName(short, f"reward: {short}", f"奖励：{short}")
        for name, short in names.items()
        if not name.endswith("_interval")
    }


def shown(settings: common.Config, key: str) -> Any:
    """A setting that is not the default, as it stands in a recipe; else None."""
    value = getattr(settings, key)
    if value == common.OPTIONS[key].default or key == "output_dir":
        return None
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


def commands(folder: Path, run: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What to type to repeat it: command, and what it does in English and Chinese. None of them deletes anything."""
    place = shlex.quote(str(folder))
    elsewhere = f"output_dir={folder.with_name(f'{folder.resolve().name}-again')}"
    typed = [word for word in run.get("command", ()) if not re.match(r"-*(overwrite_)?output_dir=", word)]
    same = [(shlex.join([*typed, elsewhere]), "train it again with the same command", "用同样的命令再训练一次")]
    evaluated = dict.fromkeys(shlex.join(e["command"]) for e in evaluations) or [f"python evaluate.py {place}"]
    again = ["python", "train.py", f"{folder}/config.yaml", elsewhere, "overwrite_output_dir=false"]
    return [
        *(same if typed else []),
        (shlex.join(again), "train it again from the configuration in the run folder", "用训练目录中的配置再训练一次"),
        *((command, "evaluate it", "评测") for command in evaluated),
        (f"python chat.py {place}", "chat with it", "对话"),
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


def stop_reason(run: dict[str, Any]) -> tuple[str, str] | None:
    """Why a training stopped early, in English and Chinese; None where it did not."""
    reason = run.get("stopped_early")
    if isinstance(reason, dict):
        message = Message.from_json(reason)
        return message.text("en"), message.text("zh")
    return (reason, reason) if reason else None  # a sentence in runs of earlier versions


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def loss_chart(log: list[dict[str, Any]]) -> str:
    """The training loss, raw and smoothed, and the evaluation loss."""
    training, evaluation = charts.points_of(log, "loss"), charts.points_of(log, "eval_loss")
    curves = [
        Curve(("training", "训练"), training, 0, faint=True),
        Curve(("training, smoothed", "训练（平滑）"), charts.smoothed_points(training), 0),
        Curve(("held out", "留出集"), evaluation, 1, dots=True),
    ]
    return charts.line_chart(("loss", "损失"), ("step", "步数"), curves)


def reward_chart(log: list[dict[str, Any]], key: str) -> str:
    """What of the rewards is logged under `key`, while training and on the held-out part."""
    name = (REWARDS[key].en, REWARDS[key].zh)
    curves = [
        Curve(("training, smoothed", "训练（平滑）"), charts.smoothed_points(charts.points_of(log, key)), 0),
        Curve(("held out", "留出集"), charts.points_of(log, f"eval_{key}"), 1, dots=True),
    ]
    return charts.line_chart(name, ("step", "步数"), curves)


def rate_chart(log: list[dict[str, Any]]) -> str:
    curve = Curve(("learning rate", "学习率"), charts.points_of(log, "learning_rate"), 2)
    return charts.line_chart(("learning rate", "学习率"), ("step", "步数"), [curve])


def classification_charts(models: dict[str, Any]) -> list[str]:
    """ROC, precision-recall and calibration of the models of a metrics.json."""
    colors = dict(zip(models, itertools.cycle(charts.MODEL_COLORS), strict=False))
    names = {label: (label, MODELS.get(label, label)) for label in models}
    curved = {label: figures["curves"] for label, figures in models.items() if figures["curves"]}
    roc = [Curve(names[m], list(zip(c["fpr"], c["tpr"], strict=True)), colors[m]) for m, c in curved.items()]
    precision_recall = [
        Curve(names[m], list(zip(c["recall"], c["precision"], strict=True)), colors[m], steps=True)
        for m, c in curved.items()
    ]
    calibration = [
        Curve(names[m], [(p["confidence"], p["accuracy"]) for p in f["calibration"]], colors[m], dots=True)
        for m, f in models.items()
        if "confidence" in f["calibration"][0]  # earlier versions had other keys
    ]
    en, zh = (" (micro average)", "（微平均）") if any(c["micro"] for c in curved.values()) else ("", "")
    false_positives, true_positives = ("false-positive rate", "误报率"), ("true-positive rate", "检出率")
    recall, precision = ("recall", "召回率"), ("precision", "精确率")
    predicted, right = ("predicted probability", "预测概率"), ("share that was right", "实际比例")
    drawn = [
        ((f"ROC{en}", f"ROC 曲线{zh}"), false_positives, true_positives, roc),
        ((f"precision and recall{en}", f"精确率与召回率{zh}"), recall, precision, precision_recall),
        (("calibration", "校准"), predicted, right, calibration),
    ]
    return [
        charts.line_chart(title, x, curves, y_name=y, unit_square=True, diagonal=curves is not precision_recall)
        for title, x, y, curves in drawn
        if curves
    ]
