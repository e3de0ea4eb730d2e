"""Line charts as inline SVG, drawn here so that a report needs nothing from outside.

Colours come from the page's CSS (`.s0`, `.s1`, ... and `.reference`), so a chart follows the
reader's light or dark setting. What the page's script needs to show values under the pointer is
in the figure's `data-chart` attribute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from .page import Html, el

STYLES = 5  # of lines: s0, s1, ... in the page's style
POINTS = 480  # a line is drawn through at most this many: more than its width in pixels shows


@dataclass
class Series:
    """One line. `points` are (x, y) with x rising; a y that is not finite interrupts the line."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s0"
    dots: bool = False
    faint: bool = False  # drawn as background, left out of the legend and the pointer's values
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high), drawn behind the line


@dataclass
class Chart:
    title: str
    series: list[Series]
    x_label: str
    y_label: str
    references: list[tuple[str, float]] = field(default_factory=list)
    log_y: bool = False
    from_zero: bool = False
    width: int = 480
    height: int = 290


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean over about `window` points around each, so that it does not lag where the curve is
    steep: symmetric and narrower at the start, one-sided at the end. Values that are not finite
    are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0, *accumulate(y for _, y in finite)]
    out = []
    for i, (x, _) in enumerate(finite):
        reach = min(window // 2, i)
        first, last = i - reach, min(i + reach, len(finite) - 1)
        out.append((x, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return out


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` points that look the same: lowest and highest of each stretch."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    out: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [p for p in part if math.isfinite(p[1])]
        if len(finite) < len(part):
            out.append((part[0][0], math.nan))
        if finite:
            ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
            out += sorted(ends)
    return out


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: 1, 2, 5 per decade, or decades alone where there are many."""
    decades = math.log10(high / low)
    if decades < 0.9:
        return ticks(low, high)
    factors = (1, 2, 5) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [f * 10.0**p for p in powers for f in factors]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


def label(value: float) -> str:
    """A number as short as an axis or a tooltip needs it: 0.003, 1.42, 3,200, 12k, 1.5M."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}B"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size and size < 1e-4:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def draw(chart: Chart) -> Html:
    """The chart as a <figure>; a chart without a single finite value says so."""
    title = el("figcaption", chart.title, " ", el("span", chart.y_label))
    shown = [
        replace(s, points=thin(s.points))
        for s in chart.series
        if any(math.isfinite(y) for _, y in s.points)
    ]
    if not shown:
        return el("figure", title, el("p", "nothing logged yet", class_="empty"), class_="chart")
    finite = [(x, y) for s in shown for x, y in s.points if math.isfinite(y)]
    ys = [y for _, y in finite] + [y for _, y in chart.references if math.isfinite(y)]
    ys += [y for s in shown for _, *ends in s.band for y in ends]
    log_y = chart.log_y and min(ys) > 0
    x0, x1 = min(x for x, _ in finite), max(x for x, _ in finite)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    y0, y1 = _padded(min(ys), max(ys), log_y, chart.from_zero)

    y_ticks = log_ticks(y0, y1) if log_y else ticks(y0, y1)
    left = 13 + 7 * max(5, *(len(label(y)) for y in y_ticks))  # room for the longest label
    right, top, bottom = 10, 10, 34
    inner_width, inner_height = chart.width - left - right, chart.height - top - bottom

    def at_x(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * inner_width, 1)

    def at_y(y: float) -> float:
        share = math.log(y / y0) / math.log(y1 / y0) if log_y else (y - y0) / (y1 - y0)
        return round(top + (1 - share) * inner_height, 1)

    base, end = chart.height - bottom, chart.width - right
    out = []
    for y in y_ticks:
        out.append(el("line", class_="grid", x1=left, x2=end, y1=at_y(y), y2=at_y(y)))
        out.append(el("text", label(y), class_="y", x=left - 7, y=f"{at_y(y) + 4:.1f}"))
    out.append(el("line", class_="axis", x1=left, x2=end, y1=base, y2=base))
    for x in ticks(x0, x1):
        out.append(el("text", label(x), class_="x", x=at_x(x), y=base + 15))
    middle = f"{left + inner_width / 2:.0f}"
    out.append(el("text", chart.x_label, class_="x unit", x=middle, y=chart.height - 4))
    out += _references(chart.references, at_y, left, end, top, base)
    for s in shown:
        if s.band:
            around = [(x, high) for x, _, high in s.band]
            around += [(x, low) for x, low, _ in reversed(s.band)]
            path = "M" + "L".join(f"{at_x(x)} {at_y(y)}" for x, y in around) + "Z"
            out.append(el("path", class_=f"band {s.style}", d=path))
        kind = f"line {s.style}" + " faint" * s.faint + " dashed" * s.dashed
        runs = list(_unbroken(s.points))
        path = " ".join("M" + "L".join(f"{at_x(x)} {at_y(y)}" for x, y in run) for run in runs)
        out.append(el("path", class_=kind, d=path))
        alone = [run[0] for run in runs if len(run) == 1]
        for x, y in s.points if s.dots else alone:
            if math.isfinite(y):
                out.append(el("circle", class_=f"dot {s.style}", cx=at_x(x), cy=at_y(y), r=2.6))
    summary = f"{chart.title}, {chart.y_label}, against {chart.x_label}. " + "; ".join(
        f"{s.name}: from {label(_ends(s)[0])} to {label(_ends(s)[1])}" for s in shown
    )
    out.append(el("line", class_="cursor", y1=top, y2=base, x1=0, x2=0))
    box = f"0 0 {chart.width} {chart.height}"
    svg = el("svg", out, viewBox=box, role="img", aria_label=summary)
    named = [s for s in shown if not s.faint]
    data = {
        "x": chart.x_label,
        "series": [
            {
                "name": s.name,
                "style": s.style,
                "points": [
                    [at_x(x), at_y(y), label(x) if x < 1e4 else f"{x:,.0f}", label(y)]
                    for x, y in s.points
                    if math.isfinite(y)
                ],
            }
            for s in named
        ],
    }
    keys = [el("li", el("i", class_=s.style), s.name) for s in named]
    legend = el("ul", keys, class_="legend") if len(named) > 1 else None
    packed = json.dumps(data, separators=(",", ":"))
    return el("figure", title, legend, svg, class_="chart", data_chart=packed)


def _padded(low: float, high: float, log_y: bool, from_zero: bool) -> tuple[float, float]:
    if log_y:
        spread = max(high / low, 1.05) ** 0.05
        return low / spread, high * spread
    if from_zero and low >= 0:
        return 0.0, high * 1.06 or 1.0
    spread = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - spread, high + spread


def _unbroken(points: Iterable[tuple[float, float]]) -> Iterable[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for point in points:
        if math.isfinite(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _ends(series: Series) -> tuple[float, float]:
    finite = [y for _, y in series.points if math.isfinite(y)]
    return finite[0], finite[-1]


def _references(
    references: Sequence[tuple[str, float]],
    at_y: Callable[[float], float],
    left: int,
    end: int,
    top: int,
    base: int,
) -> list[Html]:
    """Dashed lines with their names at the right end, moved apart where they would overlap."""
    placed = sorted((at_y(y), name, y) for name, y in references if math.isfinite(y))
    heights = [y - 5 for y, _, _ in placed]
    for i, (above, here) in enumerate(pairwise(heights)):
        if here - above < 14:
            heights[i + 1] = placed[i + 1][0] + 13
    for i in range(len(heights) - 1):
        if heights[i + 1] - heights[i] < 14:
            heights[i + 1] = heights[i] + 14
    out = []
    for (y, name, value), height in zip(placed, heights, strict=True):
        height = min(max(height, top + 8), base - 3)
        out.append(el("line", class_="reference", x1=left, x2=end, y1=y, y2=y))
        text = f"{name} {label(value)}"
        out.append(el("text", text, class_="reference", x=end, y=f"{height:.1f}"))
    return out
