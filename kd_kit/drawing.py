"""The hand that draws: colours, axes, line ends with labels. Nothing here knows what a loss is."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kd_kit.table import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from numpy import ndarray

MAX_POINTS = 800  # of one line; a panel is some 290 pixels wide

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/: told apart with any colour vision. Their yellow is
# left out, too pale for a line on white; terms of one family share a colour and differ by dashes.
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILION, PURPLE, BLACK = "#D55E00", "#CC79A7", "#000000"
DASHED = (0, (4, 1.6))
DOTTED = (0, (1.2, 1.4))
_STYLES: dict[str, tuple[str, Any]] = {
    "lm": (BLUE, "-"),
    "kd": (VERMILION, "-"),
    "span": (ORANGE, "-"),
    "feature": (GREEN, "-"),
    "layerwise": (GREEN, DASHED),
    "attention": (PURPLE, "-"),
    "relation": (PURPLE, DASHED),
    "router": (SKY, "-"),
    "balance": (SKY, DASHED),
    "contrastive": (BLACK, DOTTED),
}
_SPARE = [(colour, dash) for dash in (DOTTED, DASHED) for colour in (ORANGE, BLUE, VERMILION, BLACK)]
INK, GREY, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
SICK = frozenset({"low", "high", "impossible", "absent", "fights lm", "too weak", "too strong", "no gradient"})
"""Words beside a line that are written in bold."""
SMALL, NORMAL, LARGE = 8.5, 9.5, 12.0  # points; 8.5 are 12 pixels at 100 dpi


def clip(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def fit(written: Text, room: float) -> Text:
    """The same text, cut so that it is at most ``room`` pixels wide."""
    while (width := written.get_window_extent().width) > room:
        text = written.get_text()
        written.set_text(clip(text, min(len(text) - 1, int(len(text) * room / width))))
    return written


def decimate(steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS) -> tuple[ndarray, ndarray]:
    """At most ``limit`` points of a line: first, last, and the lowest and highest of each stretch between.

    Every spike stays visible; a stretch without any finite value leaves one gap.

    Shapes:
        steps, values: [N]
        returns: two arrays [M], M <= limit
    """
    import numpy as np

    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) <= limit:
        return x, y
    width = math.ceil(len(x) / ((limit - 2) // 2))
    padded = np.full(math.ceil(len(x) / width) * width, np.nan)
    padded[: len(x)] = np.where(np.isfinite(y), y, np.nan)
    stretches = padded.reshape(-1, width)
    starts = np.arange(len(stretches)) * width
    lowest = np.where(np.isnan(stretches), np.inf, stretches).argmin(axis=1)  # index 0 where nothing is finite
    highest = np.where(np.isnan(stretches), -np.inf, stretches).argmax(axis=1)
    chosen = np.unique(np.concatenate([[0], starts + lowest, starts + highest, [len(x) - 1]]))
    return x[chosen], y[chosen]


def term_styles(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """{name: (colour, dash)}; a known term always looks the same, another takes a free style by its name."""
    styles = {name: _STYLES[name] for name in names if name in _STYLES}
    for name in names:
        start = zlib.crc32(name.encode())
        order = [_SPARE[(start + i) % len(_SPARE)] for i in range(len(_SPARE))]
        styles.setdefault(name, next((s for s in order if s not in styles.values()), order[0]))
    return {name: styles[name] for name in names}


def new_figure(width: float, height: float) -> Figure:
    """A white figure of so many inches at 100 dots each, with no part in pyplot; a notebook shows it as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _shown_figure()(figsize=(width, height), dpi=100, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    return figure


@functools.cache
def _shown_figure() -> type:
    """A Figure that a notebook shows without pyplot; made when first wanted, since matplotlib is slow to import."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            return figure_png(self)

    return ShownFigure


def figure_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG in 256 colours, exactly figsize x dpi pixels (never cropped to its content).

    The eye sees no difference; the file is a third of one in all colours, and every notebook holds it.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    try:
        with quiet_glyphs():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(buffer, "PNG")
    finally:
        figure.set_dpi(before)
    return buffer.getvalue()


@contextlib.contextmanager
def quiet_glyphs() -> Iterator[None]:
    """A run named in a script that the font lacks is drawn with boxes, and not warned of at every redraw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def new_panel(figure: Figure, box: tuple[float, float, float, float], title: str) -> Axes:
    ax = figure.add_axes(box, facecolor="white")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=SMALL, colors=INK, color=GREY, length=3)
    ax.grid(True, axis="y", color=FAINT, lw=0.6)
    ax.set_axisbelow(True)
    ax.set_title(title, loc="left", size=NORMAL, weight="bold", color=INK, pad=5)
    ax.xaxis.label.set(size=SMALL, color=INK)
    ax.yaxis.label.set(size=SMALL, color=INK)
    ax.yaxis.set_label_coords(-(48 if box[0] < 0.5 else 44) / ax.bbox.width, 0.5)
    return ax


def say(ax: Axes, text: str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", size=NORMAL, color=GREY)


def draw_line(ax: Axes, steps: Sequence[int], values: Sequence[float], colour: str, dash: Any, *, label: str) -> None:
    """Single steps thin and, where they are many, their running mean thick."""
    width = mean_width(len(steps))
    if width > 1:
        ax.plot(*decimate(steps, values), color=colour, lw=0.6, alpha=0.35, label=f"{label}, each step")
    mean = running_mean(values, width)
    marker = "o" if len(steps) == 1 else ""
    ax.plot(*decimate(steps, mean), color=colour, ls=dash, lw=1.7, marker=marker, ms=4, label=label)


def mean_width(points: int) -> int:
    return 1 if points < 40 else max(3, points // 40)


def running_mean(values: Sequence[float], width: int) -> ndarray:
    """Mean of the last ``width`` finite values; NaN where there are none."""
    import numpy as np

    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(1, len(y) + 1) - width, 0)
    count = counts[1:] - counts[first]
    return np.where(finite & (count > 0), (sums[1:] - sums[first]) / np.maximum(count, 1), np.nan)


def rim_marks(ax: Axes, steps: Sequence[int], values: Sequence[float], colour: str, *, positive: bool = True) -> None:
    """What a log axis cannot place: crosses at the upper rim (not finite), triangles at the lower (<= 0)."""
    broken = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
    lowest = [s for s, v in zip(steps, values, strict=True) if positive and math.isfinite(v) and v <= 0]
    for found, height, marker in ((broken, 0.985, "x"), (lowest, 0.015, "v")):
        found = found[:: max(1, math.ceil(len(found) / 60))]
        if found:
            ax.plot(found, [height] * len(found), ls="", marker=marker, ms=5, color=colour,
                    transform=ax.get_xaxis_transform(), clip_on=False, label="not on the axis")  # fmt: skip


def step_axis(ax: Axes, steps: Sequence[int], *, end: float = 1.0) -> None:
    """Steps from the left edge to ``end``, a fraction of the width; what lies beyond has no scale."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    first, last = (min(steps), max(steps)) if steps else (0, 1)
    first = 0 if 0 < first <= 0.05 * last else first
    if first == last:
        first, last = first - 1, last + 1
    ax.set_xlim(first, first + (last - first) / end)
    ticks = MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(first, last)
    ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if first <= t <= last]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.spines["bottom"].set_bounds(first, last)


def plain_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))


def note(ax: Axes, text: str, *, reach: float) -> None:
    """A remark on the title's line, ending ``reach`` pixels right of the panel."""
    x, y = 1 + reach / ax.bbox.width, 1 + 8 / ax.bbox.height
    ax.text(x, y, text, transform=ax.transAxes, ha="right", size=SMALL, color=GREY, parse_math=False)


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.1, 10.0
    return max(min(values), max(values) * 1e-7) / 1.25, max(values) * 1.25


def log_ticks(bottom: float, top: float) -> Any:
    from matplotlib.ticker import FixedLocator

    decades = math.log10(top / bottom)
    inner = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1, max(1, round(decades / 5)))
    return FixedLocator([m * 10.0**p for p in powers for m in inner if bottom <= m * 10.0**p <= top])


def stack(
    ax: Axes, x: Sequence[float], parts: ndarray, styles: dict[str, tuple[str, Any]], *, faint: bool = False
) -> ndarray:
    """Areas on top of each other, one per style in its order, with white seams; paler where ``faint``.

    A single point is drawn as a bar around it.

    Shapes:
        x: [N]. parts: [terms, N], not negative, NaN for a gap
        returns: the seams, [terms + 1, N], of which row 0 is zero
    """
    import numpy as np

    x, edges = np.asarray(x, dtype=float), np.vstack([np.zeros(len(x)), np.cumsum(parts, axis=0)])
    wide = edges
    if len(x) == 1:
        x, wide = np.array([x[0] - 1, x[0] + 1]), np.repeat(edges, 2, axis=1)
    for i, (name, (colour, dash)) in enumerate(styles.items()):
        strength = (0.75 if dash == "-" else 0.45) * (0.45 if faint else 1.0)
        label = f"{name}, planned" if faint else name
        ax.fill_between(x, wide[i], wide[i + 1], facecolor=colour, lw=0, alpha=strength, label=label)
        ax.plot(x, wide[i + 1], color="white", lw=0.4, label=f"seam of {label}")
    ax.grid(False)
    return edges


def now_line(ax: Axes, step: float) -> None:
    """Where the run is, on an axis that shows all of it."""
    ax.axvline(step, color=INK, lw=1.3, label="now")


def label_ends(
    ax: Axes, labels: Sequence[tuple[float, str, Any, tuple[str, ...]]], *, numbers: int = 1, length: int = 18
) -> None:
    """Write (y, colour, dash, (name, number, word)) beside the panel, with a leader from each line's end.

    Like a small table: names left, ``numbers`` columns flush right, then words; labels that would overlap move
    apart. A word out of :data:`SICK` makes all but the name bold; names longer than ``length`` are cut.
    """
    from matplotlib.lines import Line2D

    width, height, floor = ax.bbox.width, ax.bbox.height, ax.bbox.y0
    ends = [ax.transData.transform((1, y))[1] - floor if math.isfinite(y) else height for y, *_ in labels]
    ends = [min(max(end, 0.0), height) for end in ends]
    columns: list[list[Any]] = [[] for _ in range(max((len(texts) for *_, texts in labels), default=0))]
    for (_, colour, dash, texts), end, place in zip(labels, ends, _spread(ends, 14.5, height - 5), strict=True):
        x = [1.0 + pixels / width for pixels in (0, 7, 20)]
        y = [end / height, place / height, place / height]
        shared = {"transform": ax.transAxes, "clip_on": False, "color": colour}
        ax.add_line(Line2D(x[:2], y[:2], lw=0.7, **shared))
        ax.add_line(Line2D(x[1:], y[1:], lw=2.0, ls=dash, **shared))
        sick = texts[-1] in SICK
        look = {"size": SMALL, "color": INK, "va": "center_baseline", "parse_math": False}
        for i, text in enumerate(texts):
            weight = "bold" if sick and i else "normal"
            written = ax.text(1, y[1], clip(text, 18 if i else length), transform=ax.transAxes, weight=weight, **look)
            columns[i].append(written)
    reach = 24.0
    for i, column in enumerate(columns):
        right = 1 <= i <= numbers
        widest = max(written.get_window_extent().width for written in column)
        for written in column:
            written.set(x=1 + (reach + (widest if right else 0)) / width, ha="right" if right else "left")
        reach += widest + 8


def _spread(ends: Sequence[float], gap: float, height: float) -> list[float]:
    """Places near ``ends``, ``gap`` apart and in the same order; closer only if there is no room."""
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    gap = min(gap, (height + gap) / max(1, len(ends)))
    groups: list[list[float]] = []  # [sum of wanted bottoms, how many]: neighbours that touch move as one
    for rank, i in enumerate(order):
        groups.append([ends[i] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    bottoms = [total / count for total, count in groups for _ in range(int(count))]
    highest = height + gap / 2 - gap * (len(ends) - 1) - gap / 2
    places = [0.0] * len(ends)
    for rank, i in enumerate(order):
        places[i] = min(max(bottoms[rank], 0.0), max(highest, 0.0)) + rank * gap
    return places
