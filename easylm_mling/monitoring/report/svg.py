"""Charts as SVG text, without a library: lines over tokens, with axes, marks and a legend in HTML beside them."""

import math
from dataclasses import dataclass
from html import escape

from easylm_mling.formatting import tokens_text
from easylm_mling.monitoring.report.curve import Point

# Inside the chart, in its own units; the page scales it to its column.
WIDTH, HEIGHT = 480, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 18, 40
COLOURS = 8


@dataclass
class Line:
    """A curve by name. `style`: plain, faint (behind others) or marked (a dot at each point)."""

    name: str
    points: list[Point]
    colour: int = 0
    style: str = "plain"


def chart(
    title: str, lines: list[Line], log: bool = False, marks: list[tuple[float, str]] | None = None, unit: str = ""
) -> str:
    """An HTML figure: the lines over tokens, and an upright line with a label at each of `marks`. Nothing for no points."""
    shown = [Line(n.name, [p for p in n.points if not log or p[1] > 0], n.colour, n.style) for n in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys))
    low, high = min(min(ys), ticks[0]), max(max(ys), ticks[-1])
    x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    height = math.log10 if log else (lambda y: y)
    span = (height(high) - height(low)) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        return right, _TOP + (height(high) - height(y)) / span * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(at, nice_ticks(x0, x1), [t for t in ticks if low <= t <= high], (x0, x1))]
    for x, label in marks or ():
        if x0 <= x <= x1:
            right = at(x, high)[0]
            parts.append(f'<path class="mark" d="M{right:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
            parts.append(
                f'<text class="small" x="{right:.1f}" y="{_TOP - 5}" text-anchor="middle">{escape(label)}</text>'
            )
    for line in sorted(shown, key=lambda n: n.style != "faint"):
        parts.append(_line(line, at))
    legend = "".join(_entry(line) for line in shown) if len(shown) > 1 or shown[0].name else ""
    head = escape(title) + (f" <small>{escape(unit)}</small>" if unit else "")
    return (
        f'<figure><figcaption>{head}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def sparkline(points: list[Point]) -> str:
    """A small curve without axes, for a table's cell."""
    if len(points) < 2:
        return ""
    (x0, x1), ys = (points[0][0], points[-1][0]), [y for _, y in points]
    low, span = min(ys), (max(ys) - min(ys)) or 1.0
    text = " ".join(
        f"{2 + 96 * (x - x0) / ((x1 - x0) or 1):.1f},{2 + 20 * (1 - (y - low) / span):.1f}" for x, y in points
    )
    return (
        f'<svg class="spark" viewBox="0 0 100 24" aria-hidden="true"><polyline class="line c0" points="{text}"/></svg>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around `low` and `high`; with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    tens = range(first, max(last, first + 1) + 1, max(1, (last - first) // 6))
    if len(tens) > 3:
        return [10.0**i for i in tens]
    every = [m * 10.0**i for i in tens for m in (1, 2, 5)]
    below, above = [t for t in every if t <= low], [t for t in every if t >= high]
    return [t for t in every if (below[-1] if below else every[0]) <= t <= (above[0] if above else every[-1])]


def number_text(y: float) -> str:
    if abs(y) >= 10_000:
        return tokens_text(y)
    return f"{y:.4g}" if abs(y) >= 1e-3 or y == 0 else f"{y:.0e}".replace("e-0", "e-")


def _axes(at, x_ticks: list[float], y_ticks: list[float], x_range: tuple[float, float]) -> str:
    parts = []
    for y in y_ticks:
        down = at(x_range[0], y)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{number_text(y)}</text>')
    for x in x_ticks:
        if x_range[0] <= x <= x_range[1]:
            right = at(x, y_ticks[0])[0]
            label = tokens_text(x) if x else "0"
            parts.append(f'<text x="{right:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="small" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">tokens</text>')
    return "".join(parts)


def _line(line: Line, at) -> str:
    places = [(x, y, *at(x, y)) for x, y in line.points]
    points = " ".join(f"{right:.1f},{down:.1f}" for _, _, right, down in places)
    look = _look(line)
    text = f'<polyline class="line {look}" points="{points}"/>'
    if line.style == "marked" or len(places) == 1:
        text += "".join(
            f'<circle class="dot {look}" cx="{right:.1f}" cy="{down:.1f}" r="3"><title>'
            f"{escape(line.name)} {number_text(y)} at {tokens_text(x)} tokens</title></circle>"
            for x, y, right, down in places
        )
    return text


def _entry(line: Line) -> str:
    return f'<li><i class="key {_look(line)}"></i>{escape(line.name)} <b>{number_text(line.points[-1][1])}</b></li>'


def _look(line: Line) -> str:
    dashed = " dashed" if line.colour >= COLOURS else ""
    return f"c{line.colour % COLOURS}{dashed}" + (" faint" if line.style == "faint" else "")
