"""report.html of a run: model, data, losses, evaluations and the commands to repeat it; one file, no network.

Every part is rendered for one language: the file holds both, a page of the board shows a part in its own.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import LANGUAGES
from runs import charts
from runs.charts import Curve
from runs.files import read_json, write_text
from runs.folder import read_log, read_run, run_config
from runs.metric_names import METRICS, REWARDS
from runs.texts import Translator


def write(folder: Path) -> Path:
    """Writes report.html from whatever the run folder holds, an evaluation or none, and returns its path."""
    translators = [Translator(language) for language in LANGUAGES]
    bodies = {t.language: _render("report_body.jinja", t, facts(folder, t)) for t in translators}
    frame = {"name": folder.resolve().name, "css": css(), "bodies": bodies}
    path = folder / "report.html"
    write_text(path, _render("report.jinja", translators[0], frame))
    return path


def evaluation_html(folder: Path, t: Translator) -> str:
    """The report's part about evaluations, as HTML for a page that has the style `css`."""
    return _render("report_evaluation.jinja", t, evaluation_facts(folder, t))


def css() -> str:
    """The style of the report's parts and of the charts."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _render(template: str, t: Translator, facts: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["duration"] = duration
    environment.filters["swapped"] = lambda found: shlex.quote(f"labels={','.join(reversed(found['labels']))}")
    environment.filters["model"] = lambda label: model_name(label, t)
    return environment.get_template(template).render(**facts, t=t)


def model_name(label: str, t: Translator) -> str:
    """What a model of a metrics.json is called on a page."""
    names = {"base": t("base model"), "trained": t("trained model"), "majority vote": t("majority vote")}
    return names.get(label, label)


def facts(folder: Path, t: Translator) -> dict[str, Any]:
    """All that the report says of a run in one language."""
    run, log, evaluation = read_run(folder) or {}, read_log(folder), evaluation_facts(folder, t)
    settings = run_config(folder) if (folder / "config.yaml").is_file() else common.Config()
    statuses = {"finished": t("finished"), "running": t("running"), "interrupted": t("paused"), "failed": t("failed")}
    return evaluation | {
        "name": folder.resolve().name,
        "run": run,
        "status": statuses.get(run.get("status")),
        "stopped_early": t.message(run.get("stopped_early") or ""),
        "settings": {key: value for key in common.OPTIONS if (value := shown(settings, key)) is not None},
        "datasets": [*run.get("data", {}).get("datasets", []), *run.get("data", {}).get("eval_datasets", [])],
        "log": log,
        "training_charts": training_charts({"": log}, t),
        "speed": log[-1].get("tokens_per_second") if log else None,
        "commands": commands(folder, run, [*evaluation["evaluations"], *evaluation["general"]], t),
    }


def evaluation_facts(folder: Path, t: Translator) -> dict[str, Any]:
    """What was measured of a run; the check for forgetting stands apart."""
    evaluations = [read_json(path) for path in sorted(folder.glob("eval/*/metrics.json"))]
    general = [e for e in evaluations if e["dataset"] == "general_test" and e["task"] == "loss"]
    for found in evaluations:
        found["charts"] = classification_charts(found["models"], t) if found["task"] == "classification" else []
        found["figures"] = figure_names(found["models"], t)
    evaluations = [found for found in evaluations if found not in general]
    return {"evaluations": evaluations, "general": general, "colors": charts.MODEL_COLORS}


def figure_names(models: dict[str, Any], t: Translator) -> dict[str, str]:
    """The figures of a metrics.json that a table shows, by key: those of METRICS, and rewards by function."""
    measured = [key for figures in models.values() for key in figures if figures[key] is not None]
    rewards = [key for key in measured if key.startswith("reward_") and not key.endswith("_interval")]
    known = {key: t.message(metric.name) for key, metric in METRICS.items() if key in measured}
    return known | {key: key.replace("_", ": ", 1) for key in rewards}


def shown(settings: common.Config, key: str) -> Any:
    """A setting that is not the default, as it stands in a recipe; else None."""
    value = getattr(settings, key)
    if value == common.OPTIONS[key].default or key == "output_dir":
        return None
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


def commands(
    folder: Path, run: dict[str, Any], evaluations: Sequence[dict[str, Any]], t: Translator
) -> list[tuple[str, str]]:
    """What to type to repeat it: command, and what it does. None of them deletes anything."""
    place = shlex.quote(str(folder))
    named = folder if folder.name not in ("", "..") else folder.resolve()  # "." has no name of its own
    elsewhere = f"output_dir={named.with_name(f'{named.resolve().name}-again')}"
    typed = [word for word in run.get("command", ()) if not re.match(r"-*(overwrite_)?output_dir=", word)]
    same = [(shlex.join([*typed, elsewhere]), t("train it again with the same command"))]
    evaluated = dict.fromkeys(shlex.join(e["command"]) for e in evaluations) or [f"python evaluate.py {place}"]
    again = shlex.join(["python", "train.py", f"{folder}/config.yaml", elsewhere, "overwrite_output_dir=false"])
    return [
        *(same if typed else []),
        (again, t("train it again from the configuration in the run folder")),
        *((command, t("evaluate it")) for command in evaluated),
        (f"python chat.py {place}", t("chat with it")),
        (f"python merge.py {place}", t("merge it into a 16-bit model")),
    ]


def number(value: Any, digits: int = 3) -> str:
    """A figure as people read it; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """`0:01:40`, `63:09:48`; a dash for none."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def training_charts(
    logs: dict[str, list[dict[str, Any]]], t: Translator, empty: str = "", small: int = 260
) -> list[str]:
    """The loss, and, `small` pixels high, learning rate, speed and what is logged of rewards; of one run or several."""
    drawn = [charts.line_chart(t("Loss"), t("step"), _curves(logs, "loss", t, raw=True), empty)]
    for key, title in (("learning_rate", t("Learning rate")), ("tokens_per_second", t("Tokens per second"))):
        points = {name: charts.points_of(log, key) for name, log in logs.items()}
        curves = [Curve(name if len(logs) > 1 else title, found, i) for i, (name, found) in enumerate(points.items())]
        drawn += [charts.line_chart(title, t("step"), curves, height=small)] * any(points.values())
    for key, name in REWARDS.items():
        curves = _curves(logs, key, t)
        if any(curve.points for curve in curves):
            drawn.append(charts.line_chart(t.message(name), t("step"), curves, height=small))
    return drawn


def _curves(logs: dict[str, list[dict[str, Any]]], key: str, t: Translator, *, raw: bool = False) -> list[Curve]:
    """What is logged under `key` while training, smoothed (and `raw`), and on the held-out part."""
    curves, several = [], len(logs) > 1
    for i, (name, log) in enumerate(logs.items()):
        training, held_out = charts.points_of(log, key), charts.points_of(log, f"eval_{key}")
        label = name if several else t("training, smoothed")
        curves += [Curve(label, training, i, faint=True)] * raw
        curves.append(Curve(label, charts.smoothed_points(training), i))
        label = f"{name}: {t('held out')}" if several else t("held out")
        curves.append(Curve(label, held_out, i if several else 1, dots=True))
    return curves


def classification_charts(models: dict[str, Any], t: Translator) -> list[str]:
    """ROC, precision-recall and calibration of the models of a metrics.json."""
    colors = dict(zip(models, itertools.cycle(charts.MODEL_COLORS), strict=False))
    names = {label: model_name(label, t) for label in models}
    curved = {label: figures["curves"] for label, figures in models.items() if figures["curves"]}
    roc = [Curve(names[m], list(zip(c["fpr"], c["tpr"], strict=True)), colors[m]) for m, c in curved.items()]
    precision_recall = [
        Curve(names[m], list(zip(c["recall"], c["precision"], strict=True)), colors[m], steps=True)
        for m, c in curved.items()
    ]
    calibration = [
        Curve(names[m], [(p["confidence"], p["accuracy"]) for p in f["calibration"]], colors[m], dots=True)
        for m, f in models.items()
    ]
    micro = f" ({t('micro average')})" if any(c["micro"] for c in curved.values()) else ""
    drawn = [
        (t("ROC curve") + micro, t("false-positive rate"), t("true-positive rate"), roc),
        (t("precision and recall") + micro, t("recall"), t("precision"), precision_recall),
        (t("calibration"), t("predicted probability"), t("share that was right"), calibration),
    ]
    return [
        charts.line_chart(title, x, curves, y_name=y, unit_square=True, diagonal=curves is not precision_recall)
        for title, x, y, curves in drawn
        if curves
    ]
