"""Curves and histograms as HTML with a little SVG: they follow the page's width, language and colours by themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = 6  # classes c0 to c5 below
MOST = 400  # points of a curve that are drawn, evenly chosen


@dataclass(frozen=True)
class Curve:
    """A curve of (x, y): drawn as a line, or as a line with dots; `faint` for what stands behind a smoothed one."""

    name: str
    points: Points
    colour: int
    dots: bool = False
    faint: bool = False


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
    """At most about MOST of the finite points, the last one among them."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    every = math.ceil(len(finite) / MOST) or 1
    return finite[::-1][::every][::-1]


def number(value: float) -> str:
    """A number as people read it: `12,000`, `0.0002`, `1.5e-05`."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def lines(title: str, x_name: str, curves: Sequence[Curve], empty: str, height: int = 260) -> str:
    """A plot of curves from zero up, with a legend; every point tells its values under the mouse."""
    drawn = [(curve, thinned(curve.points)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    named = [curve for curve, _ in drawn if not curve.faint]
    key = "".join(
        f'<span class="key c{c.colour % COLOURS}{" dots" * c.dots}"><i></i>{escape(c.name)}</span>' for c in named
    )
    head = f'<div class="plot-head"><b>{escape(title)}</b><span class="keys">{key}</span></div>'
    if not drawn:
        return f'<div class="plot">{head}<div class="plot-none" style="height:{height}px">{escape(empty)}</div></div>'
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    bottom, top = min(0.0, min(ys)), max(ys) * 1.04 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        """Percent from the left and from the top."""
        return round(100 * (x - left) / (right - left), 2), round(100 * (top - y) / (top - bottom), 2)

    rows = [(place(left, y)[1], number(y)) for y in ticks(bottom, top, 4)]
    columns = [(place(x, bottom)[0], number(x)) for x in ticks(left, right, 6) if x == int(x)]
    parts = [f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y, _ in rows]
    dots = []
    for curve, points in drawn:
        style = f"c{curve.colour % COLOURS}" + (" faint" if curve.faint else "")
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        seen = "dot" if curve.dots or len(points) == 1 else "dot unseen"
        for x, y in () if curve.faint else points:
            said = f"{curve.name}: {number(y)} ({x_name} {number(x)})"
            where = "left:{}%;top:{}%".format(*place(x, y))
            dots.append(f'<i class="{seen} {style}" style="{where}" title="{escape(said)}"></i>')
    return (
        f'<div class="plot">{head}<div class="plot-body" style="height:{height}px">'
        + "".join(f'<span class="y" style="top:{y}%">{text}</span>' for y, text in rows)
        + f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
        + "".join(dots)
        + "".join(f'<span class="x" style="left:{x}%">{text}</span>' for x, text in columns)
        + f'</div><div class="x-name">{escape(x_name)}</div></div>'
    )


def histogram(title: str, x_name: str, values: Sequence[int], said: str, mark: tuple[int, str] | None = None) -> str:
    """How often whole numbers occur, in about 30 bars. `said` is a bar's text with {count}, {low} and {high}.

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
        f'title="{escape(said.format(count=f"{count:,}", low=n * step, high=(n + 1) * step - 1))}"></i>'
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


CSS = """
.plot { padding: 2px 0 6px; }
.plot-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; font-size: 14px;
  margin-bottom: 10px; }
.plot-head b { font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--c); margin-right: 6px;
  vertical-align: middle; }
.key.dots i { width: 9px; height: 9px; border-radius: 50%; }
.plot-body { position: relative; margin: 0 12px 22px 52px; border-bottom: 1px solid var(--body-text-color-subdued); }
.plot-body svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot-body .y, .plot-body .x { position: absolute; font-size: 12px; line-height: 1; white-space: nowrap;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.plot-body .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot-body .x { top: calc(100% + 7px); transform: translateX(-50%); }
.x-name { text-align: center; font-size: 12px; color: var(--body-text-color-subdued); line-height: 1.2; }
.plot-none { display: grid; place-items: center; color: var(--body-text-color-subdued); font-size: 14px;
  border: 1px dashed var(--block-border-color); border-radius: 8px; text-align: center; padding: 0 16px; }
.plot polyline { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.plot polyline.faint { opacity: .35; stroke-width: 1; }
.plot .grid { stroke: var(--block-border-color); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot .dot { position: absolute; width: 9px; height: 9px; margin: -4.5px 0 0 -4.5px; border-radius: 50%;
  background: var(--c); }
.plot .dot.unseen { opacity: 0; } .plot .dot.unseen:hover { opacity: 1; }
.plot .bars { position: absolute; inset: 0; display: flex; align-items: flex-end; gap: 1px; }
.plot .bars i { flex: 1; background: var(--c0); min-height: 0; border-radius: 2px 2px 0 0; opacity: .85; }
.plot .bars i:hover { opacity: 1; }
.plot .mark { position: absolute; top: 0; bottom: 0; border-left: 2px dashed var(--c1); }
.plot .mark b { position: absolute; right: 6px; top: 0; font-size: 12px; font-weight: 500; white-space: nowrap;
  color: var(--c1); }
:root { --c0: #0f766e; --c1: #c2570c; --c2: #4f5fc4; --c3: #a8327c; --c4: #7a6a00; --c5: #52606d; }
.dark { --c0: #2dd4bf; --c1: #fb923c; --c2: #99a5f5; --c3: #f07cc3; --c4: #d6c33a; --c5: #9fb0c0; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
"""
