"""Charts: losses as a PNG picture by matplotlib; curves and histograms as HTML with a little SVG, on pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from runs.files import replacing
from runs.metric_names import REWARDS

Points = Sequence[tuple[float, float]]

COLORS = ("#0f766e", "#c2570c", "#4f5fc4", "#a8327c", "#7a6a00", "#52606d")  # --c0 to --c5 of report.css
MODEL_COLORS = (5, 1, 0, 2, 3, 4)  # of COLORS: grey for what stands first, a majority vote or the base model
MAX_POINTS = 400  # of a curve as HTML, evenly chosen
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC")
CHINESE_FONTS += ("WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei")


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


@contextmanager
def picture(path: Path, *, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Iterator[list[Any]]:
    """Axes side by side, of `size` inches in all; at the end they are written to `path`, which appears complete."""
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    known = {font.name for font in font_manager.fontManager.ttflist}
    pyplot.rcParams["font.family"] = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in known)]
    warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")  # a run's name in other letters
    figure, axes = pyplot.subplots(1, columns, figsize=size, dpi=120, squeeze=False)
    yield list(axes[0])
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    pyplot.close(figure)


def draw_loss(log: Sequence[dict[str, Any]], path: Path) -> None:
    """The training loss, raw and smoothed, and the evaluation loss, of the lines of a trainer_log.jsonl.

    Of a training on rewards, the rewards stand beside it; of stage grpo, whose loss says nothing, they stand alone.
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


# ---------------------------------------------------------------------------------------------------------------------
# HTML: follows the page's width and colours by itself; its style is report.css


@dataclass(frozen=True)
class Curve:
    """A curve of (x, y); `color` is the number of one of COLORS.

    `dots`: a dot at every point; `faint`: what stands behind a smoothed curve; `steps`: from each point y stays until
    the x of the next, then jumps, as a precision-recall curve does.
    """

    name: str
    points: Points
    color: int
    dots: bool = False
    faint: bool = False
    steps: bool = False


def number(value: float) -> str:
    """A number on an axis: `12,000`, `0.0002`, `1.5e-05`."""
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


@dataclass(frozen=True)
class _Frame:
    """The range that a chart shows."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, points: Points) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return cls(min(xs), max(max(xs), min(xs) + 1), min(0.0, min(ys)), max(ys) * 1.04 or 1.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Percent from the left and from the top."""
        across = 100 * (x - self.left) / (self.right - self.left)
        return round(across, 2), round(100 * (self.top - y) / (self.top - self.bottom), 2)

    def labels(self, integers: str = "") -> str:
        """The numbers on both axes; those named in `integers` ("x", "xy") have no others."""
        xs = [x for x in ticks(self.left, self.right, 6) if "x" not in integers or x == int(x)]
        ys = [y for y in ticks(self.bottom, self.top, 4) if "y" not in integers or y == int(y)]
        columns = [f'<span class="x" style="left:{self.place(x, 0)[0]}%">{number(x)}</span>' for x in xs]
        rows = [f'<span class="y" style="top:{self.place(0, y)[1]}%">{number(y)}</span>' for y in ys]
        return "".join(rows + columns)


def _plot(title: str, keys: str, y_name: str, body: str, x_name: str, height: int) -> str:
    above = f'<div class="y-name">{escape(y_name)}</div>' if y_name else ""
    return (
        f'<div class="plot"><div class="plot-head"><b>{escape(title)}</b><span class="keys">{keys}</span></div>{above}'
        f'<div class="plot-body" style="height:{height}px">{body}</div><div class="x-name">{escape(x_name)}</div></div>'
    )


def line_chart(
    title: str,
    x_name: str,
    curves: Sequence[Curve],
    empty: str = "",
    height: int = 260,
    *,
    y_name: str = "",
    unit_square: bool = False,
    diagonal: bool = False,
) -> str:
    """HTML of curves from zero up, with a legend; every point shows its values under the mouse. Height in pixels.

    `empty`: shown where there is no point. `unit_square`: both axes from 0 to 1. `diagonal`: a line from 0 to 1, where
    a guess or a perfectly calibrated model would lie.
    """
    drawn = [(curve, points) for curve in curves if (points := thinned(curve.points))]
    if not drawn:
        return _plot(title, "", "", f'<div class="plot-none">{escape(empty)}</div>', "", height)
    keys = "".join(
        f'<span class="key c{curve.color % len(COLORS)}{" dots" * curve.dots}"><i></i>{escape(curve.name)}</span>'
        for curve, _ in drawn
        if not curve.faint
    )
    frame = _Frame(0.0, 1.0, 0.0, 1.0) if unit_square else _Frame.around([p for _, some in drawn for p in some])
    heights = (frame.place(0, y)[1] for y in ticks(frame.bottom, frame.top, 4))
    lines = [f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in heights]
    lines += ['<line class="diagonal" x1="0" x2="100" y1="100" y2="0"/>'] * diagonal
    lines += [_polyline(curve, points, frame) for curve, points in drawn]
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
    dots = [dot for curve, points in drawn if not curve.faint for dot in _dots(curve, points, frame, x_name)]
    body = f"{svg}{''.join(lines)}</svg>{''.join(dots)}{frame.labels('' if unit_square else 'x')}"
    return _plot(title, keys, y_name, body, x_name, height)


def _style(curve: Curve) -> str:
    return f"c{curve.color % len(COLORS)}" + (" faint" if curve.faint else "")


def _polyline(curve: Curve, points: Points, frame: _Frame) -> str:
    placed = (frame.place(x, y) for x, y in (with_corners(points) if curve.steps else points))
    return f'<polyline class="{_style(curve)}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>'


def _dots(curve: Curve, points: Points, frame: _Frame, x_name: str) -> Iterator[str]:
    """What shows the values of each point under the mouse."""
    seen = "dot" if curve.dots or len(points) == 1 else "dot unseen"
    for x, y in points:
        where = "left:{}%;top:{}%".format(*frame.place(x, y))
        values = f"{escape(curve.name)}: {number(y)} ({escape(x_name)} {number(x)})"
        yield f'<i class="{seen} {_style(curve)}" style="{where}" title="{values}"></i>'


def histogram(title: str, x_name: str, values: Sequence[int], mark: tuple[int, str] | None = None) -> str:
    """HTML of how often whole numbers occur, in about 30 bars; each shows its range and its count under the mouse.

    `mark`, a place and its name, is drawn as a line where it falls within the bars.
    """
    steps = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10**9)
    step = next(step for step in steps if 30 * step > max(values))
    counts = [0] * (max(values) // step + 1)
    for value in values:
        counts[value // step] += 1
    frame = _Frame(0, len(counts) * step, 0, max(counts))
    bars = "".join(
        f'<i style="height:{100 * count / frame.top:.1f}%" '
        f'title="{n * step:,}–{(n + 1) * step - 1:,} {escape(x_name)}: {count:,}"></i>'
        for n, count in enumerate(counts)
    )
    line = ""
    if mark and mark[0] <= frame.right:
        line = f'<span class="mark" style="left:{frame.place(mark[0], 0)[0]}%"><b>{escape(mark[1])}</b></span>'
    body = f'<div class="bars">{bars}</div>{line}{frame.labels("xy")}'
    return _plot(title, "", "", body, x_name, 160)
