"""Charts, drawn by matplotlib: SVG text that takes the colours of the page it stands in, and PNG files.

matplotlib is imported when a chart is drawn, so no other command waits for it.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easylm_mling.formatting import tokens_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]

# A page may give each colour another shade by the CSS variables --c0, --c1, ..., --soft (text) and --rule (grid).
COLOURS = ("#2563b8", "#c2571a", "#1f8a5b", "#a13a9b", "#8a6d00", "#0f8b9e", "#c0324b", "#5c5fc7")
_VARIABLES = {"#63676f": "soft", "#e2e2dd": "rule"} | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
_SOFT, _RULE = list(_VARIABLES)[:2]

_WIDTH, _HEIGHT = 480, 280
# Left, bottom, width and height of the plot in an SVG chart: the same in all, so that charts side by side line up.
_PLOT = (58 / _WIDTH, 40 / _HEIGHT, 410 / _WIDTH, 222 / _HEIGHT)
# matplotlib's unit of length is 1/72 inch, which is one unit of an SVG.
_UNITS_PER_INCH = 72


@dataclass
class Line:
    """A curve by name. `style`: plain, faint (behind the others) or marked (a dot at each point)."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    style: str = "plain"

    @property
    def dashed(self) -> bool:
        """Whether all colours were used up by lines before this one."""
        return self.colour >= len(COLOURS)


def draw_svg(title: str, lines: list[Line], log: bool = False, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Draw `lines` over tokens, each of one point or more, as an SVG element for an HTML page.

    `marks`: the x and the label of upright lines. With `log`, every y is positive. Dots show their value when pointed at.
    """
    from matplotlib.figure import Figure

    with _style(font_size=12.5):
        figure = Figure(figsize=(_WIDTH / _UNITS_PER_INCH, _HEIGHT / _UNITS_PER_INCH))
        axis = figure.add_axes(_PLOT)
        axis.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw_lines(axis, lines, log)
        left, right = axis.get_xlim()
        for x, label in marks:
            if left <= x <= right:
                axis.axvline(x, color=_SOFT, linewidth=1, linestyle=(0, (2, 4)), clip_on=False)
                axis.text(x, 1.02, label, transform=axis.get_xaxis_transform(), ha="center", color=_SOFT)
        axis.set_xlabel("tokens", loc="right", labelpad=9)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    tooltips = [
        f"{line.name} {number_text(y)} at {tokens_text(x)} tokens" for line in _with_dots(lines) for x, y in line.points
    ]
    return _for_a_page(svg.getvalue(), title, tooltips)


@contextmanager
def draw_png(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """Give a figure of `width` by `height` inches to draw on, and write it to `path` at the end."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="png", dpi=120)


def draw_lines(axis: Any, lines: list[Line], log: bool = False):
    """Draw `lines` on a matplotlib axis, between round numbers that lie below and above all points."""
    for line in lines:
        style: dict[str, Any] = {"linewidth": 1.8, "label": line.name, "zorder": 3}
        if line.style == "faint":
            style = {"linewidth": 1, "alpha": 0.65, "zorder": 2}
        if line in _with_dots(lines):
            style |= {"marker": "o", "markersize": 6, "markeredgewidth": 0}
        style |= {"color": COLOURS[line.colour % len(COLOURS)], "linestyle": "--" if line.dashed else "-"}
        axis.plot(*zip(*line.points, strict=True), clip_on=False, **style)
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    if log:
        axis.set_yscale("log")
    ticks = _ticks(min(ys), max(ys), log)
    axis.set_yticks(ticks, [number_text(y) for y in ticks], minor=False)
    axis.set_yticks([], minor=True)
    axis.set_ylim(ticks[0], ticks[-1])
    axis.set_xlim(*((min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)))
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(lambda x, _: tokens_text(x) if x else "0")


def number_text(y: float) -> str:
    """A number as short as an axis has room for: 0.004167, 2.5, 12.3K, 1e-5."""
    if abs(y) >= 10_000:
        return tokens_text(y)
    return f"{y:.4g}" if abs(y) >= 1e-3 or y == 0 else f"{y:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from at most `low` to at least `high`. A `log` axis has powers of ten, and 2 and 5 if they are few."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    if not log:
        return [round(float(tick), 12) for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 6)
    ticks = [m * 10.0**i for i in range(first, last + step, step) for m in ((1, 2, 5) if last - first < 4 else (1,))]
    bottom, top = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
    return [t for t in ticks if bottom <= t <= top]


def _with_dots(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.style == "marked" or len(line.points) == 1]


@contextmanager
def _style(font_size: float = 10) -> Iterator[None]:
    import matplotlib
    from cycler import cycler

    settings: Any = {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": _SOFT,
        "axes.prop_cycle": cycler(color=COLOURS),
        **{f"axes.spines.{side}": False for side in ("bottom", "left", "right", "top")},
        "font.size": font_size,
        "grid.color": _RULE,
        "grid.linewidth": 1,
        "svg.fonttype": "none",  # letters, and not their outlines
        "svg.hashsalt": "easylm-mling",  # the same names for the same shapes
        "text.parse_math": False,  # a source may be called $x$
        **{"xtick.bottom": False, "xtick.labelcolor": _SOFT},
        **{"ytick.left": False, "ytick.labelcolor": _SOFT, "ytick.major.size": 0},
    }
    with matplotlib.rc_context(settings):
        yield


def _for_a_page(svg: str, title: str, tooltips: list[str]) -> str:
    """matplotlib's SVG file as an element of a page: with the page's colours and fonts, and without any address."""
    body = svg[svg.index("</defs>") + len("</defs>") :]
    for pattern, replacement in (
        (r"<defs>\s*<clipPath.*</defs>", ""),
        (r' clip-path="[^"]*"', ""),
        (r'<g id="[^"]*">', "<g>"),
        (r"font-size: [^;]*; font-family: [^;]*; ", ""),
        (r' transform="rotate\(-?0 [^"]*"', ""),
        (r'([ "]-?\d+\.\d)\d+', r"\1"),  # of coordinates; labels stand behind a >
        (r"\s*\n\s*", " "),
        (r"#[0-9a-f]{6}(?=[;\"])", lambda colour: f"var(--{_VARIABLES[colour[0]]})"),
    ):
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    dots = iter(tooltips)
    body = re.sub(r"(<use [^>]*)/>", lambda dot: f"{dot[1]}><title>{escape(next(dots))}</title></use>", body)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{body.strip()}'
