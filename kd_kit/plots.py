"""A history as pictures: the magnitude of every loss term against its healthy band, and what it adds up to.

Pure: a history goes in, a ``matplotlib`` Figure comes out, nothing is shown and no pyplot state is touched.
Labels stand at the ends of the lines, so that a value is read without a legend and without colours.
"""

from __future__ import annotations

import html
import io
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_kit.history import History, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import ndarray

MAX_POINTS = 800  # of one line; a panel is some 290 pixels wide

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/: told apart with any colour vision. Their yellow is
# left out, too pale for a line on white; terms of one family share a colour and differ by dashes.
_ORANGE, _SKY, _GREEN, _BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
_VERMILION, _PURPLE, _BLACK = "#D55E00", "#CC79A7", "#000000"
_DASHED = (0, (4, 1.6))
_DOTTED = (0, (1.2, 1.4))
_STYLES: dict[str, tuple[str, Any]] = {
    "lm": (_BLUE, "-"),
    "kd": (_VERMILION, "-"),
    "span": (_ORANGE, "-"),
    "feature": (_GREEN, "-"),
    "layerwise": (_GREEN, _DASHED),
    "attention": (_PURPLE, "-"),
    "relation": (_PURPLE, _DASHED),
    "router": (_SKY, "-"),
    "balance": (_SKY, _DASHED),
    "contrastive": (_BLACK, _DOTTED),
}
_SPARE = [(colour, dash) for dash in (_DOTTED, _DASHED) for colour in (_ORANGE, _BLUE, _VERMILION, _BLACK)]
_INK, _GREY, _FAINT = "#222222", "#6B6B6B", "#D9D9D9"
_SMALL, _NORMAL, _LARGE = 8.5, 9.5, 12.0  # points; 8.5 are 12 pixels at 100 dpi


@dataclass(frozen=True)
class Table:
    """A small table that prints as aligned text and shows as HTML in a notebook.

    ``title`` and ``note`` are lines above and below; every row has one text per column. Columns named in
    ``words`` are aligned left, the others, being numbers, right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        left = [name in self.words for name in self.columns]
        body = [
            "  ".join(t.ljust(w) if at_left else t.rjust(w) for t, w, at_left in zip(line, widths, left, strict=True))
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in [self.title, *body, self.note] if line)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(tag: str, texts: Sequence[str]) -> str:
            sides = ("left" if name in self.words else "right" for name in self.columns)
            cells = (
                f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>'
                for side, text in zip(sides, texts, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(row("td", texts) for texts in self.rows)
        return (
            f"<div>{html.escape(self.title)}<table><thead>{row('th', self.columns)}</thead>"
            f"<tbody>{body}</tbody></table>{html.escape(self.note)}</div>"
        )


def loss_table(history: History) -> Table:
    """What every term was at the last logged step, and its share of the total in per cent.

    Shares are of the sum of the magnitudes, so that they add up to 100 even beside a negative contribution.
    """
    step = history.last("train") or {"terms": {}}
    parts = {name: _finite(t.get("contribution")) for name, t in step["terms"].items()}
    whole = sum(abs(part) for part in parts.values() if part is not None)
    rows = []
    for name, meta in history.terms.items():
        now = step["terms"].get(name, {})
        value, part = now.get("value"), parts.get(name)
        share = "-" if part is None or not whole else f"{100 * part / whole:.1f}"
        rows.append(
            (
                name,
                short(value),
                meta.get("unit") or "-",
                _span(meta),
                verdict(meta, value),
                "-" if now.get("weight") is None else plain(now["weight"]),
                short(now.get("contribution")),
                share,
            )
        )
    if "step" in step:
        rows.append(("total", "", "", "", "", "", short(step.get("total")), "100.0" if whole else "-"))
    return Table(
        title=_status(history),
        columns=("term", "value", "unit", "healthy", "verdict", "weight", "contribution", "share %"),
        rows=tuple(rows),
        note=_held_out(history),
        words=("term", "unit", "verdict"),
    )


def loss_figure(history: History, *, control: History | None = None, title: str | None = None) -> Figure:
    """Four panels of a run, 1000 x 640 pixels at 100 dpi, whatever the history holds, even nothing.

    Upper left: the raw value of every term on a log axis with its healthy band, last value and verdict in
    words; a cross at the upper rim is a value that is not finite, a triangle at the lower rim one that is not
    positive. Upper right: weight x value, stacked, with the share of each term. Lower left: held-out bits per
    byte of the student, of ``control`` (the same student trained by LM loss alone), and the references. Lower
    right: the weights, and the learning rate of each group.

    Long lines are thinned to 800 points, keeping the extremes. Thin lines are single steps, thick ones their
    running mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=100, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    _header(figure, history, title)
    upper, lower, height = 0.537, 0.075, 0.338
    left, right = (0.064, 0.282), (0.622, 0.240)  # start and width; the labels need the rest

    def panel(column: tuple[float, float], bottom: float, tall: float, title: str) -> Axes:
        return _panel(figure, (column[0], bottom, column[1], tall), title)

    _draw_magnitudes(panel(left, upper, height, "Raw value of each term"), history)
    _draw_contributions(panel(right, upper, height, "Weight × value"), history)
    _draw_held_out(panel(left, lower, height, "Held-out text, lower is better"), history, control)
    weights = panel(right, lower + 0.135, height - 0.135, "Weights and learning rate")
    _draw_schedule(weights, panel(right, lower, 0.11, ""), history)
    return figure


def figure_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG, exactly figsize x dpi pixels (never cropped to its content)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # a run named in Chinese
            FigureCanvasAgg(figure).print_png(buffer)
    finally:
        figure.set_dpi(before)
    return buffer.getvalue()


def short(value: float | None) -> str:
    """A measured number, three digits in at most seven characters: "4.02", "12,400", "3e-5"; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if size >= 99_999.5 or size < 0.00099995:
        return _scientific(value)
    if size >= 999.5:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size) + 1e-9))}f}"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def plain(value: float) -> str:
    """A number that somebody chose, without trailing zeros: "0.6", "0.0672", "1,500", "3e-4"."""
    size = abs(value)
    if not math.isfinite(value) or value == 0 or 0.00995 <= size < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1000 <= size < 1e5 else _scientific(value)


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


# Panels


def _draw_magnitudes(ax: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    terms, styles = history.terms, term_styles(history.terms)
    lines = {name: history.series(name) for name in terms}
    all_steps = [s for steps, _ in lines.values() for s in steps]
    if not all_steps:
        return _say(ax, "no steps yet")
    positive = [v for _, values in lines.values() for v in values if math.isfinite(v) and v > 0]
    limits = [edge for meta in terms.values() for edge in meta.get("healthy") or () if edge > 0]
    bottom, top = _log_limits(positive + limits)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    # Right of the last step every term has a lane: its healthy range as a bar, its last value as a dot.
    lane = 6 / ax.bbox.width
    end = 1 - lane * (len(terms) + 1)
    side, pixel = ax.get_yaxis_transform(), (top / bottom) ** (1 / ax.bbox.height)
    _step_axis(ax, all_steps, end=end)
    now = (history.last("train") or {"terms": {}})["terms"]
    faint = 0.10 if len(terms) <= 3 else 0.06 if len(terms) <= 6 else 0.0  # many bands mix to mud
    labels = []
    for i, (name, (steps, values)) in enumerate(lines.items()):
        colour, dash = styles[name]
        band = terms[name].get("healthy")
        at = end + lane * (i + 1.5)
        if band and faint:
            ax.axhspan(max(band[0], bottom), band[1], 0, end, color=colour, alpha=faint, lw=0)
        if band:
            bar = [max(band[0] / pixel, bottom), band[1] * pixel]
            look = {"lw": 3.6, "alpha": 0.45, "solid_capstyle": "butt"}
            ax.plot([at, at], bar, color=colour, transform=side, label=f"healthy {name}", **look)
        if not steps:
            labels.append((bottom, colour, dash, (name, "", "absent")))
            continue
        _line(ax, steps, [v if v > 0 else math.nan for v in values], colour, dash, label=name)
        _rim_marks(ax, steps, values, colour)
        value = now.get(name, {}).get("value")
        place = min(max(values[-1], bottom), top) if math.isfinite(values[-1]) else top
        ax.plot([end, 1], [place, place], color=colour, lw=0.6, alpha=0.8, transform=side, label="pointer")
        dot = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.6, "zorder": 4, "clip_on": False}
        ax.plot([at], [place], color=colour, transform=side, label="now", **dot)
        text = f"({short(values[-1])})" if value is None else short(value)
        labels.append((place, colour, dash, (name, text, verdict(terms[name], value))))
    units = {meta.get("unit") or "nats" for meta in terms.values()}
    ax.set_ylabel(f"{units.pop()}, log axis" if len(units) == 1 else "own unit, log axis", parse_math=False)
    ax.yaxis.set_major_locator(_log_ticks(bottom, top))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    ax.yaxis.set_minor_locator(NullLocator())
    _note(ax, "bars: healthy range", reach=215)
    _label_ends(ax, labels)


def _draw_contributions(ax: Axes, history: History) -> None:
    import numpy as np

    names, styles = list(history.terms), term_styles(history.terms)
    steps, totals = history.column("total")
    if not steps:
        return _say(ax, "no steps yet")
    where = {step: i for i, step in enumerate(steps)}
    parts = np.zeros((len(names), len(steps)))
    for row, name in zip(parts, names, strict=True):
        for step, value in zip(*history.series(name, "contribution"), strict=True):
            if step in where and math.isfinite(value):
                row[where[step]] = max(value, 0.0)
    width = _mean_width(len(steps))
    parts = np.array([_running_mean(row, width) for row in parts]).reshape(len(names), len(steps))
    total = _running_mean(totals, width)
    thin = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    x, total = np.asarray(steps, dtype=float)[thin], total[thin]
    edges = np.vstack([np.zeros(len(x)), np.cumsum(parts[:, thin], axis=0)])
    if len(x) == 1:  # one record: a bar as wide as the panel
        x, total, edges = np.array([x[0] - 1, x[0] + 1]), np.repeat(total, 2), np.repeat(edges, 2, axis=1)
    for i, name in enumerate(names):
        colour, dash = styles[name]
        fill = {"facecolor": colour, "lw": 0, "alpha": 0.75 if dash == "-" else 0.45}
        ax.fill_between(x, edges[i], edges[i + 1], label=name, **fill)
    ax.plot(x, total, color=_INK, lw=1.4, label="total")
    ax.grid(False)
    _step_axis(ax, steps)
    drawn = np.concatenate([edges[-1], total[np.isfinite(total)]])
    usual, highest = float(np.quantile(drawn, 0.95)), float(drawn.max())
    cut = highest > 3 * usual > 0
    top = 1.5 * usual if cut else 1.06 * highest
    ax.set_ylim(0, top if top > 0 else 1.0)
    ax.set_ylabel("weighted nats" + (f", cut (up to {short(highest)})" if cut else ""))
    _plain_ticks(ax)
    last = history.last("train") or {"terms": {}}
    now, shares = last["terms"], {row[0]: row[-1] for row in loss_table(history).rows}
    labels = []
    for i, name in enumerate(names):
        middle = min((edges[i][-1] + edges[i + 1][-1]) / 2, ax.get_ylim()[1])
        part = now.get(name, {}).get("contribution")
        text = "absent" if part is None else _percent(shares[name]) if math.isfinite(part) else short(part)
        labels.append((middle, *styles[name], (name, text)))
    _note(ax, f"total {short(last.get('total'))}", reach=132)
    _label_ends(ax, labels)


def _draw_held_out(ax: Axes, history: History, control: History | None) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, bits = history.evaluations()
    others = control.evaluations() if control is not None else ([], [])
    levels = {name: value for name, value in history.references().items() if math.isfinite(value)}
    ax.set_ylabel("bits per byte")
    ax.set_xlabel("optimizer step")
    good = [v for v in [*bits, *others[1], *levels.values()] if math.isfinite(v)]
    if not good:
        return _say(ax, "no evaluation yet")
    room = 0.06 * (max(good) - min(good)) or 0.05 * abs(good[0]) or 1.0
    ax.set_ylim(min(good) - room, max(good) + room)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    _step_axis(ax, [*steps, *others[0]])
    labels = []
    dashes = (_DOTTED, (0, (6, 2, 1.2, 2)), (0, (3, 3)))
    for i, (name, value) in enumerate(levels.items()):
        dash = dashes[i % len(dashes)]
        ax.axhline(value, color=_GREY, ls=dash, lw=1.4, label=name)
        labels.append((value, _GREY, dash, (name, f"{value:.3f}")))
    for name, (x, y), colour, dash in (
        ("control (LM only)", others, _INK, _DASHED),
        ("student", (steps, bits), _BLUE, "-"),
    ):
        if not x:
            continue
        thin_x, thin_y = decimate(x, y)
        marker = "o" if len(x) <= 25 and name == "student" else "o" if len(x) == 1 else ""
        ax.plot(thin_x, thin_y, color=colour, ls=dash, lw=1.8, marker=marker, ms=3.5, label=name)
        _rim_marks(ax, x, y, colour, positive=False)
        end = y[-1] if math.isfinite(y[-1]) else ax.get_ylim()[1]
        labels.append((end, colour, dash, (name, f"{y[-1]:.3f}")))
    both = sorted(set(steps) & set(others[0]))
    if both:
        gain = bits[steps.index(both[-1])] - others[1][others[0].index(both[-1])]
        _note(ax, f"student - control at step {both[-1]:,}: {gain:+.3f}", reach=215)
    _label_ends(ax, labels)


def _draw_schedule(weights: Axes, rates: Axes, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = term_styles(history.terms)
    greys = ((_INK, "-"), (_GREY, "-"), (_GREY, _DASHED), (_INK, _DOTTED))
    _draw_settings(weights, {n: (*history.series(n, "weight"), *styles[n]) for n in history.terms}, "weight")
    groups = enumerate(history.groups)
    _draw_settings(rates, {n: (*history.column("lr", n), *greys[i % 4]) for i, n in groups}, "rate")
    if weights.lines and rates.lines:
        weights.tick_params(labelbottom=False)
        rates.yaxis.set_major_locator(MaxNLocator(2))
    rates.set_xlabel("optimizer step")


def _draw_settings(ax: Axes, lines: dict[str, tuple[Any, ...]], what: str) -> None:
    """What the user or a schedule sets, on a linear axis from zero."""
    lines = {name: line for name, line in lines.items() if line[0]}
    ax.set_ylabel(what)
    if not lines:
        return _say(ax, "no steps yet")
    for name, (steps, values, colour, dash) in lines.items():
        marker = "o" if len(steps) == 1 else ""
        ax.plot(*decimate(steps, values), color=colour, ls=dash, lw=1.6, marker=marker, ms=3.5, label=name)
    good = [v for _, values, *_ in lines.values() for v in values if math.isfinite(v)]
    top = max(good, default=0.0)
    ax.set_ylim(min(0.0, *good, 0.0), 1.08 * top if top > 0 else 1.0)
    _step_axis(ax, [s for steps, *_ in lines.values() for s in steps])
    _plain_ticks(ax)
    labels = [(v[-1], colour, dash, (name, plain(v[-1]))) for name, (_, v, colour, dash) in lines.items()]
    _label_ends(ax, labels)


# Words


def _status(history: History) -> str:
    """Where the run is, in one line."""
    now = history.last("train")
    if now is None:
        return "no steps yet"
    whole = history.total_steps
    parts = [f"step {now['step']:,}" + (f" of {whole:,} ({now['step'] / whole:.0%})" if whole else "")]
    for field, text in (
        ("epoch", "epoch {:.2f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("grad_norm", "gradient norm {:.3g}"),
        ("skipped_steps", "{:,} skipped"),
        ("aligned_share", "{:.0%} aligned"),
        ("tail_mass", "tail mass {:.3f}"),
    ):
        value = now.get(field)
        if value is not None:
            parts.append(text.format(value))
    return " · ".join(parts)


def _held_out(history: History) -> str:
    steps, bits = history.evaluations()
    parts = [f"student {bits[-1]:.3f} at step {steps[-1]:,}"] if steps else []
    parts += [f"{name} {value:.3f}" for name, value in history.references().items()]
    return "held-out bits per byte: " + ", ".join(parts) if parts else ""


def _header(figure: Figure, history: History, title: str | None) -> None:
    if title is None:
        title = f"Run {history.run_id}" if history.run_id else "Loss terms of the run"
    figure.text(0.012, 0.965, _clip(title, 55), size=_LARGE, weight="bold", color=_INK, parse_math=False)
    figure.text(0.012, 0.932, _clip(_status(history), 150), size=_NORMAL, color=_GREY, parse_math=False)
    events = [e for e in history.events if e["what"] != "saved"]
    if events:
        text = f"{events[-1]['what']} at step {events[-1]['step']:,}: {events[-1]['text']}"
        figure.text(0.988, 0.968, _clip(text, 80), size=_NORMAL, ha="right", color=_INK, parse_math=False)


def _percent(share: str) -> str:
    """A share of the table as a label; never "0 %" for something."""
    if share == "-":
        return share
    return "<1 %" if 0 < float(share) < 1 else f"{float(share):.0f} %"


def _span(meta: dict[str, Any]) -> str:
    band = meta.get("healthy")
    return f"{band[0]:g} - {band[1]:g}" if band else "-"


def _clip(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Drawing


def term_styles(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """{name: (colour, dash)}; a known term always looks the same, another takes a free style by its name."""
    styles = {name: _STYLES[name] for name in names if name in _STYLES}
    for name in names:
        start = zlib.crc32(name.encode())
        order = [_SPARE[(start + i) % len(_SPARE)] for i in range(len(_SPARE))]
        styles.setdefault(name, next((s for s in order if s not in styles.values()), order[0]))
    return {name: styles[name] for name in names}


def _panel(figure: Figure, box: tuple[float, float, float, float], title: str) -> Axes:
    ax = figure.add_axes(box, facecolor="white")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_GREY)
    ax.tick_params(labelsize=_SMALL, colors=_INK, color=_GREY, length=3)
    ax.grid(True, axis="y", color=_FAINT, lw=0.6)
    ax.set_axisbelow(True)
    ax.set_title(title, loc="left", size=_NORMAL, weight="bold", color=_INK, pad=5)
    ax.xaxis.label.set(size=_SMALL, color=_INK)
    ax.yaxis.label.set(size=_SMALL, color=_INK)
    ax.yaxis.set_label_coords(-(48 if box[0] < 0.5 else 44) / ax.bbox.width, 0.5)
    return ax


def _say(ax: Axes, text: str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", size=_NORMAL, color=_GREY)


def _line(ax: Axes, steps: Sequence[int], values: Sequence[float], colour: str, dash: Any, *, label: str) -> None:
    """Single steps thin and, where they are many, their running mean thick."""
    width = _mean_width(len(steps))
    if width > 1:
        ax.plot(*decimate(steps, values), color=colour, lw=0.6, alpha=0.35, label=f"{label}, each step")
    mean = _running_mean(values, width)
    marker = "o" if len(steps) == 1 else ""
    ax.plot(*decimate(steps, mean), color=colour, ls=dash, lw=1.7, marker=marker, ms=4, label=label)


def _mean_width(points: int) -> int:
    return 1 if points < 40 else max(3, points // 40)


def _running_mean(values: Sequence[float], width: int) -> ndarray:
    """Mean of the last ``width`` finite values; NaN where there are none."""
    import numpy as np

    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(1, len(y) + 1) - width, 0)
    count = counts[1:] - counts[first]
    return np.where(finite & (count > 0), (sums[1:] - sums[first]) / np.maximum(count, 1), np.nan)


def _rim_marks(ax: Axes, steps: Sequence[int], values: Sequence[float], colour: str, *, positive: bool = True) -> None:
    """What a log axis cannot place: crosses at the upper rim (not finite), triangles at the lower (<= 0)."""
    broken = [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]
    lowest = [s for s, v in zip(steps, values, strict=True) if positive and math.isfinite(v) and v <= 0]
    for found, height, marker in ((broken, 0.985, "x"), (lowest, 0.015, "v")):
        found = found[:: max(1, math.ceil(len(found) / 60))]
        if found:
            ax.plot(found, [height] * len(found), ls="", marker=marker, ms=5, color=colour,
                    transform=ax.get_xaxis_transform(), clip_on=False, label="not on the axis")  # fmt: skip


def _step_axis(ax: Axes, steps: Sequence[int], *, end: float = 1.0) -> None:
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


def _plain_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))


def _note(ax: Axes, text: str, *, reach: float) -> None:
    """A remark on the title's line, ending ``reach`` pixels right of the panel."""
    x = 1 + reach / ax.bbox.width
    ax.text(x, 1.035, text, transform=ax.transAxes, ha="right", size=_SMALL, color=_GREY, parse_math=False)


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 0.1, 10.0
    return max(min(values), max(values) * 1e-7) / 1.25, max(values) * 1.25


def _log_ticks(bottom: float, top: float) -> Any:
    from matplotlib.ticker import FixedLocator

    decades = math.log10(top / bottom)
    inner = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1, max(1, round(decades / 5)))
    return FixedLocator([m * 10.0**p for p in powers for m in inner if bottom <= m * 10.0**p <= top])


def _label_ends(ax: Axes, labels: Sequence[tuple[float, str, Any, tuple[str, ...]]]) -> None:
    """Write (y, colour, dash, (name, number, word)) beside the panel, with a leader from each line's end.

    Like a small table: names left, numbers flush right, then words; labels that would overlap move apart.
    """
    from matplotlib.lines import Line2D

    width, height, floor = ax.bbox.width, ax.bbox.height, ax.bbox.y0
    ends = [ax.transData.transform((1, y))[1] - floor if math.isfinite(y) else height for y, *_ in labels]
    ends = [min(max(end, 0.0), height) for end in ends]
    columns: tuple[list[Any], ...] = ([], [], [])
    for (_, colour, dash, texts), end, place in zip(labels, ends, _spread(ends, 14.5, height), strict=True):
        x = [1.0 + pixels / width for pixels in (0, 7, 20)]
        y = [end / height, place / height, place / height]
        shared = {"transform": ax.transAxes, "clip_on": False, "color": colour}
        ax.add_line(Line2D(x[:2], y[:2], lw=0.7, **shared))
        ax.add_line(Line2D(x[1:], y[1:], lw=2.0, ls=dash, **shared))
        sick = texts[-1] in ("low", "high", "impossible", "absent")
        look = {"size": _SMALL, "color": _INK, "va": "center_baseline", "parse_math": False}
        for i, text in enumerate(texts):
            weight = "bold" if sick and i else "normal"
            written = ax.text(1, y[1], _clip(text, 18), transform=ax.transAxes, weight=weight, **look)
            columns[i].append(written)
    reach = 24.0
    for i, column in enumerate(columns):
        widest = max((written.get_window_extent().width for written in column), default=0.0)
        for written in column:
            written.set(x=1 + (reach + (widest if i == 1 else 0)) / width, ha="right" if i == 1 else "left")
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
