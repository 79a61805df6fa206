"""Charts: losses and classifiers as PNG pictures by matplotlib; curves and histograms as HTML with a little SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from runs.files import replacing
from runs.metric_names import REWARDS

Points = Sequence[tuple[float, float]]
Text = str | tuple[str, str]  # one text for both languages, or one in English and one in Chinese

COLORS = ("#0f766e", "#c2570c", "#4f5fc4", "#a8327c", "#7a6a00", "#52606d")  # --c0 to --c5 of charts.css
MODEL_COLORS = (5, 1, 0, 2, 3, 4)  # of COLORS: grey for what stands first, a majority vote or the base model
MAX_POINTS = 400  # of a curve as HTML, evenly chosen


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its start; the window is about a tenth of the values."""
    weight, average, smoothed = 1 - 1 / max(2.0, len(values) / 10), 0.0, []
    for i, value in enumerate(values):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight ** (i + 1)))
    return smoothed


def points_of(log: Sequence[dict[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of a trainer_log.jsonl that have a value for a key."""
    return [(line["step"], line[key]) for line in log for key in keys if line.get(key) is not None]


def smoothed_points(points: Points) -> list[tuple[float, float]]:
    """The same steps with the values smoothed."""
    return list(zip([step for step, _ in points], smooth([value for _, value in points]), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def use_chinese_font() -> None:
    """Lets matplotlib draw Chinese by a font of this machine; where it has none there are boxes, without warnings."""
    import warnings

    from matplotlib import font_manager, rcParams

    warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
    if len(rcParams["font.family"]) > 1:
        return
    files = font_manager.findSystemFonts()
    for file in sorted(files, key=lambda file: ("CJK" not in file, "Sans" not in file, "Regular" not in file, file)):
        with suppress(RuntimeError, OSError):  # a bitmap font, or a broken one
            if font_manager.get_font(file).get_char_index(ord("的")):
                font_manager.fontManager.addfont(file)
                rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=file).get_name()]
                return


@contextmanager
def picture(path: Path, *, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Iterator[list[Any]]:
    """Axes side by side, of `size` inches in all; at the end they are written to `path`, which appears complete."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    use_chinese_font()  # labels and the name of a run may be Chinese
    figure, axes = pyplot.subplots(1, columns, figsize=size, dpi=120, squeeze=False)
    yield list(axes[0])
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    pyplot.close(figure)


def draw_loss(log: Sequence[dict[str, Any]], path: Path) -> None:
    """The training loss, raw and smoothed, and the evaluation loss, of the lines of a trainer_log.jsonl.

    Where rewards were learned these beside it; of stage grpo, whose loss says nothing, alone.
    """
    draw_losses({path.resolve().parent.name: log}, path)


def draw_losses(logs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """As `draw_loss`, of several runs by name."""
    drawn = ["loss", *(key for key in REWARDS if any(points_of(log, key) for log in logs.values()))]
    drawn = drawn[1:] if "reward" in drawn else drawn
    with picture(path, columns=len(drawn), size=(8 + 5 * (len(drawn) - 1), 4.5)) as panels:
        for key, axes in zip(drawn, panels, strict=True):
            _draw_curves(logs, key, axes)


def _draw_curves(logs: dict[str, Sequence[dict[str, Any]]], key: str, axes: Any) -> None:
    """A value of the training, raw and smoothed, and the same of the evaluations."""
    for i, (name, log) in enumerate(logs.items()):
        color, prefix = COLORS[i % len(COLORS)], f"{name}: " if len(logs) > 1 else ""
        if training := points_of(log, key):
            axes.plot(*zip(*training, strict=True), color=color, linewidth=1, alpha=0.35)
            smoothed = smoothed_points(training)
            axes.plot(*zip(*smoothed, strict=True), color=color, linewidth=2, label=f"{prefix}{key}, smoothed")
        if evaluation := points_of(log, f"eval_{key}"):
            look = {"color": COLORS[1] if len(logs) == 1 else color, "linestyle": "--" if prefix else "-"}
            look |= {"marker": "o", "markersize": 4, "linewidth": 2, "label": f"{prefix}eval_{key}"}
            axes.plot(*zip(*evaluation, strict=True), **look)
    axes.set(xlabel="step", ylabel=key, title="" if len(logs) > 1 else next(iter(logs)))
    if key == "loss":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9)


def draw_classification(models: dict[str, Any], folder: Path) -> None:
    """roc.png, precision_recall.png, calibration.png and confusion.png of the figures in a metrics.json, by model."""
    colors = {label: COLORS[i] for label, i in zip(models, itertools.cycle(MODEL_COLORS), strict=False)}
    curved = {label: figures["curves"] for label, figures in models.items() if figures["curves"]}
    if curved:
        with _unit_square(folder / "roc.png", "false-positive rate", "true-positive rate") as axes:
            axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
            for label, curves in curved.items():
                name = f"{label}: {'micro ' * curves['micro']}AUC {curves['auc']:.3f}"
                axes.plot(curves["fpr"], curves["tpr"], color=colors[label], label=name)
        with _unit_square(folder / "precision_recall.png", "recall", "precision") as axes:
            for label, curves in curved.items():
                name = f"{label}: {'micro ' * curves['micro']}AP {curves['ap']:.3f}"
                # no classifier lies on a straight line between two points: precision is that of the higher recall
                look = {"color": colors[label], "drawstyle": "steps-post", "label": name}
                axes.plot(curves["recall"], curves["precision"], **look)
    with _unit_square(folder / "calibration.png", "predicted probability", "share that was right") as axes:
        axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
        for label, figures in models.items():
            x, y = ([point[key] for point in figures["calibration"]] for key in ("confidence", "accuracy"))
            axes.plot(x, y, marker="o", color=colors[label], label=f"{label}: ECE {figures['ece']:.3f}")
    _draw_confusions(models, folder / "confusion.png")


@contextmanager
def _unit_square(path: Path, x: str, y: str) -> Iterator[Any]:
    """Axes from 0 to 1 with a legend."""
    with picture(path, size=(5, 5)) as (axes,):
        yield axes
        axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=9)


def _draw_confusions(models: dict[str, Any], path: Path) -> None:
    with picture(path, columns=len(models), size=(3.4 * len(models), 3.6)) as panels:
        for axes, (label, figures) in zip(panels, models.items(), strict=True):
            names, matrix = figures["labels"], figures["confusion"]
            most = max(map(max, matrix))
            axes.imshow(matrix, cmap="Blues", vmin=0, vmax=most)
            for i, row in enumerate(matrix):
                for j, count in enumerate(row):
                    axes.text(j, i, count, ha="center", va="center", color="white" if count > most / 2 else "black")
            axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
            axes.set(xlabel="predicted", ylabel="actual", title=label)


# ---------------------------------------------------------------------------------------------------------------------
# HTML: follows the page's width, language and colours by itself; its style is charts.css


@dataclass(frozen=True)
class Curve:
    """A curve of (x, y); `color` is the number of one of COLORS.

    `dots`: a dot at every point; `faint`: what stands behind a smoothed curve; `steps`: from each point y stays until
    the x of the next, then jumps, as a precision-recall curve does.
    """

    name: Text
    points: Points
    color: int
    dots: bool = False
    faint: bool = False
    steps: bool = False


def css() -> str:
    """The style of the charts below."""
    return Path(__file__).with_name("charts.css").read_text(encoding="utf-8")


def number(value: float) -> str:
    """A number as people read it: `12,000`, `0.0002`, `1.5e-05`."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers between `low` and `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of the finite points, the last one among them."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    every = math.ceil(len(finite) / MAX_POINTS) or 1
    return finite[::-1][::every][::-1]


def with_corners(points: Points) -> list[tuple[float, float]]:
    """The points of a step curve: between two points y stays, then it jumps."""
    corners = [[(after[0], before[1]), after] for before, after in itertools.pairwise(points)]
    return [*points[:1], *itertools.chain.from_iterable(corners)]


def html(text: Text) -> str:
    """A text escaped for HTML; of two languages the page shows one, by the classes en and zh."""
    if isinstance(text, str):
        return escape(text)
    return f'<span class="en">{escape(text[0])}</span><span class="zh">{escape(text[1])}</span>'


def _plain(text: Text) -> str:
    """A text for an attribute, where only one language has a place."""
    return escape(text if isinstance(text, str) else text[0])


@dataclass(frozen=True)
class _Frame:
    """The range that a line chart shows."""

    left: float
    right: float
    bottom: float
    top: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Percent from the left and from the top."""
        across = 100 * (x - self.left) / (self.right - self.left)
        return round(across, 2), round(100 * (self.top - y) / (self.top - self.bottom), 2)


def line_chart(
    title: Text,
    x_name: Text,
    curves: Sequence[Curve],
    empty: Text = "",
    height: int = 260,
    *,
    y_name: Text = "",
    unit_square: bool = False,
    diagonal: bool = False,
) -> str:
    """HTML of curves from zero up, with a legend; every point shows its values under the mouse. Height in pixels.

    `empty`: shown where there is no point. `unit_square`: both axes from 0 to 1. `diagonal`: a line from 0 to 1, where
    a guess or a perfectly calibrated model would lie.
    """
    drawn = [(curve, points) for curve in curves if (points := thinned(curve.points))]
    key = "".join(
        f'<span class="key c{curve.color % len(COLORS)}{" dots" * curve.dots}"><i></i>{html(curve.name)}</span>'
        for curve, _ in drawn
        if not curve.faint
    )
    head = f'<div class="plot-head"><b>{html(title)}</b><span class="keys">{key}</span></div>'
    if not drawn:
        return f'<div class="plot">{head}<div class="plot-none" style="height:{height}px">{html(empty)}</div></div>'
    frame = _Frame(0.0, 1.0, 0.0, 1.0) if unit_square else _frame_around([point for _, some in drawn for point in some])
    rows = [(frame.place(frame.left, y)[1], number(y)) for y in ticks(frame.bottom, frame.top, 4)]
    marks = ticks(frame.left, frame.right, 6)
    columns = [(frame.place(x, frame.bottom)[0], number(x)) for x in marks if unit_square or x == int(x)]
    grid = [f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y, _ in rows]
    guess = '<line class="diagonal" x1="0" x2="100" y1="100" y2="0"/>' if diagonal else ""
    return (
        f'<div class="plot">{head}{f"""<div class="y-name">{html(y_name)}</div>""" if y_name else ""}'
        f'<div class="plot-body" style="height:{height}px">'
        + "".join(f'<span class="y" style="top:{y}%">{text}</span>' for y, text in rows)
        + f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{_plain(title)}">'
        + "".join([*grid, guess, *(_polyline(curve, points, frame) for curve, points in drawn)])
        + "</svg>"
        + "".join(dot for curve, points in drawn if not curve.faint for dot in _dots(curve, points, frame, x_name))
        + "".join(f'<span class="x" style="left:{x}%">{text}</span>' for x, text in columns)
        + f'</div><div class="x-name">{html(x_name)}</div></div>'
    )


def _frame_around(points: Points) -> _Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return _Frame(min(xs), max(max(xs), min(xs) + 1), min(0.0, min(ys)), max(ys) * 1.04 or 1.0)


def _style(curve: Curve) -> str:
    return f"c{curve.color % len(COLORS)}" + (" faint" if curve.faint else "")


def _polyline(curve: Curve, points: Points, frame: _Frame) -> str:
    placed = (frame.place(x, y) for x, y in (with_corners(points) if curve.steps else points))
    return f'<polyline class="{_style(curve)}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>'


def _dots(curve: Curve, points: Points, frame: _Frame, x_name: Text) -> Iterator[str]:
    """What shows the values of each point under the mouse."""
    seen = "dot" if curve.dots or len(points) == 1 else "dot unseen"
    for x, y in points:
        where = "left:{}%;top:{}%".format(*frame.place(x, y))
        values = f"{_plain(curve.name)}: {number(y)} ({_plain(x_name)} {number(x)})"
        yield f'<i class="{seen} {_style(curve)}" style="{where}" title="{values}"></i>'


def histogram(title: str, x_name: str, values: Sequence[int], label: str, mark: tuple[int, str] | None = None) -> str:
    """HTML of how often whole numbers occur, in about 30 bars. `label`: a bar's text with {count}, {low} and {high}.

    `mark`, a place and its name, is drawn as a line where it falls within the bars.
    """
    step = max(1, math.ceil((max(values) + 1) / 30))
    step = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10**4, 10**9) if s >= step)
    counts = [0] * (max(values) // step + 1)
    for value in values:
        counts[value // step] += 1
    top = max(counts)
    bars = "".join(
        f'<i style="height:{100 * count / top:.1f}%" '
        f'title="{escape(label.format(count=f"{count:,}", low=n * step, high=(n + 1) * step - 1))}"></i>'
        for n, count in enumerate(counts)
    )
    end = len(counts) * step
    columns = [(100 * x / end, number(x)) for x in ticks(0, end, 6) if x == int(x)]
    line = ""
    if mark and mark[0] <= end:
        line = f'<span class="mark" style="left:{100 * mark[0] / end:.1f}%"><b>{escape(mark[1])}</b></span>'
    rows = [(100 - 100 * y / top, number(y)) for y in ticks(0, top, 3) if y == int(y)]
    return (
        f'<div class="plot"><div class="plot-head"><b>{escape(title)}</b></div>'
        '<div class="plot-body" style="height:160px">'
        + "".join(f'<span class="y" style="top:{y:.1f}%">{text}</span>' for y, text in rows)
        + f'<div class="bars">{bars}</div>{line}'
        + "".join(f'<span class="x" style="left:{x:.1f}%">{text}</span>' for x, text in columns)
        + f'</div><div class="x-name">{escape(x_name)}</div></div>'
    )
