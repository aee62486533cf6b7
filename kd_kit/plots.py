"""A history as pictures: the magnitude of every loss term against its healthy band, and what it adds up to.

Pure: a history goes in, a ``matplotlib`` Figure comes out, nothing is shown and no pyplot state is touched.
Labels stand at the ends of the lines, so that a value is read without a legend and without colours.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import TYPE_CHECKING, Any

from kd_kit.drawing import (
    BLUE,
    DASHED,
    DOTTED,
    GREY,
    INK,
    LARGE,
    MAX_POINTS,
    NORMAL,
    clip,
    decimate,
    draw_line,
    label_ends,
    log_limits,
    log_ticks,
    mean_width,
    new_panel,
    note,
    plain_ticks,
    rim_marks,
    running_mean,
    say,
    step_axis,
    term_styles,
)
from kd_kit.history import History, verdict
from kd_kit.table import Table, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        share = "-" if part is None or not whole else _share(part / whole)
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
    left, right = (0.064, 0.282), (0.622, 0.226)  # start and width; the labels need the rest

    def panel(column: tuple[float, float], bottom: float, tall: float, title: str) -> Axes:
        return new_panel(figure, (column[0], bottom, column[1], tall), title)

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


# Panels


def _draw_magnitudes(ax: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    terms, styles = history.terms, term_styles(history.terms)
    lines = {name: history.series(name) for name in terms}
    all_steps = [s for steps, _ in lines.values() for s in steps]
    if not all_steps:
        return say(ax, "no steps yet")
    positive = [v for _, values in lines.values() for v in values if math.isfinite(v) and v > 0]
    limits = [edge for meta in terms.values() for edge in meta.get("healthy") or () if edge > 0]
    bottom, top = log_limits(positive + limits)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    # Right of the last step every term has a lane: its healthy range as a bar, its last value as a dot.
    lane = 6 / ax.bbox.width
    end = 1 - lane * (len(terms) + 1)
    side, pixel = ax.get_yaxis_transform(), (top / bottom) ** (1 / ax.bbox.height)
    step_axis(ax, all_steps, end=end)
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
        draw_line(ax, steps, [v if v > 0 else math.nan for v in values], colour, dash, label=name)
        rim_marks(ax, steps, values, colour)
        value = now.get(name, {}).get("value")
        place = min(max(values[-1], bottom), top) if math.isfinite(values[-1]) else top
        ax.plot([end, 1], [place, place], color=colour, lw=0.6, alpha=0.8, transform=side, label="pointer")
        dot = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.6, "zorder": 4, "clip_on": False}
        ax.plot([at], [place], color=colour, transform=side, label="now", **dot)
        text = f"({short(values[-1])})" if value is None else short(value)
        labels.append((place, colour, dash, (name, text, verdict(terms[name], value))))
    units = {meta.get("unit") or "nats" for meta in terms.values()}
    ax.set_ylabel(f"{units.pop()}, log axis" if len(units) == 1 else "own unit, log axis", parse_math=False)
    ax.yaxis.set_major_locator(log_ticks(bottom, top))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plain(v)))
    ax.yaxis.set_minor_locator(NullLocator())
    note(ax, "bars: healthy range", reach=215)
    label_ends(ax, labels)


def _draw_contributions(ax: Axes, history: History) -> None:
    import numpy as np

    names, styles = list(history.terms), term_styles(history.terms)
    steps, totals = history.column("total")
    if not steps:
        return say(ax, "no steps yet")
    where = {step: i for i, step in enumerate(steps)}
    parts = np.zeros((len(names), len(steps)))
    for row, name in zip(parts, names, strict=True):
        for step, value in zip(*history.series(name, "contribution"), strict=True):
            if step in where and math.isfinite(value):
                row[where[step]] = max(value, 0.0)
    width = mean_width(len(steps))
    parts = np.array([running_mean(row, width) for row in parts]).reshape(len(names), len(steps))
    total = running_mean(totals, width)
    thin = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    x, total = np.asarray(steps, dtype=float)[thin], total[thin]
    edges = np.vstack([np.zeros(len(x)), np.cumsum(parts[:, thin], axis=0)])
    if len(x) == 1:  # one record: a bar as wide as the panel
        x, total, edges = np.array([x[0] - 1, x[0] + 1]), np.repeat(total, 2), np.repeat(edges, 2, axis=1)
    for i, name in enumerate(names):
        colour, dash = styles[name]
        fill = {"facecolor": colour, "lw": 0, "alpha": 0.75 if dash == "-" else 0.45}
        ax.fill_between(x, edges[i], edges[i + 1], label=name, **fill)
    ax.plot(x, total, color=INK, lw=1.4, label="total")
    ax.grid(False)
    step_axis(ax, steps)
    drawn = np.concatenate([edges[-1], total[np.isfinite(total)]])
    usual, highest = float(np.quantile(drawn, 0.95)), float(drawn.max())
    cut = highest > 3 * usual > 0
    top = 1.5 * usual if cut else 1.06 * highest
    ax.set_ylim(0, top if top > 0 else 1.0)
    ax.set_ylabel("weighted nats" + (f", cut (up to {short(highest)})" if cut else ""))
    plain_ticks(ax)
    last = history.last("train") or {"terms": {}}
    now, shares = last["terms"], {row[0]: row[-1] for row in loss_table(history).rows}
    labels = []
    for i, name in enumerate(names):
        middle = min((edges[i][-1] + edges[i + 1][-1]) / 2, ax.get_ylim()[1])
        part = now.get(name, {}).get("contribution")
        text = "absent" if part is None else _percent(shares[name]) if math.isfinite(part) else short(part)
        labels.append((middle, *styles[name], (name, text)))
    note(ax, f"total {short(last.get('total'))}", reach=132)
    label_ends(ax, labels)


def _draw_held_out(ax: Axes, history: History, control: History | None) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, bits = history.evaluations()
    others = control.evaluations() if control is not None else ([], [])
    levels = {name: value for name, value in history.references().items() if math.isfinite(value)}
    ax.set_ylabel("bits per byte")
    ax.set_xlabel("optimizer step")
    good = [v for v in [*bits, *others[1], *levels.values()] if math.isfinite(v)]
    if not good:
        return say(ax, "no evaluation yet")
    room = 0.06 * (max(good) - min(good)) or 0.05 * abs(good[0]) or 1.0
    ax.set_ylim(min(good) - room, max(good) + room)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    step_axis(ax, [*steps, *others[0]])
    labels = []
    dashes = (DOTTED, (0, (6, 2, 1.2, 2)), (0, (3, 3)))
    for i, (name, value) in enumerate(levels.items()):
        dash = dashes[i % len(dashes)]
        ax.axhline(value, color=GREY, ls=dash, lw=1.4, label=name)
        labels.append((value, GREY, dash, (name, f"{value:.3f}")))
    for name, (x, y), colour, dash in (
        ("control (LM only)", others, INK, DASHED),
        ("student", (steps, bits), BLUE, "-"),
    ):
        if not x:
            continue
        thin_x, thin_y = decimate(x, y)
        marker = "o" if len(x) <= 25 and name == "student" else "o" if len(x) == 1 else ""
        ax.plot(thin_x, thin_y, color=colour, ls=dash, lw=1.8, marker=marker, ms=3.5, label=name)
        rim_marks(ax, x, y, colour, positive=False)
        end = y[-1] if math.isfinite(y[-1]) else ax.get_ylim()[1]
        labels.append((end, colour, dash, (name, f"{y[-1]:.3f}")))
    both = sorted(set(steps) & set(others[0]))
    if both:
        gain = bits[steps.index(both[-1])] - others[1][others[0].index(both[-1])]
        note(ax, f"student - control at step {both[-1]:,}: {gain:+.3f}", reach=215)
    label_ends(ax, labels)


def _draw_schedule(weights: Axes, rates: Axes, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = term_styles(history.terms)
    greys = ((INK, "-"), (GREY, "-"), (GREY, DASHED), (INK, DOTTED))
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
        return say(ax, "no steps yet")
    for name, (steps, values, colour, dash) in lines.items():
        marker = "o" if len(steps) == 1 else ""
        ax.plot(*decimate(steps, values), color=colour, ls=dash, lw=1.6, marker=marker, ms=3.5, label=name)
    good = [v for _, values, *_ in lines.values() for v in values if math.isfinite(v)]
    top = max(good, default=0.0)
    ax.set_ylim(min(0.0, *good, 0.0), 1.08 * top if top > 0 else 1.0)
    step_axis(ax, [s for steps, *_ in lines.values() for s in steps])
    plain_ticks(ax)
    said = short if what == "weight" else plain  # weights are shares that a schedule works out
    labels = [(v[-1], colour, dash, (name, said(v[-1]))) for name, (_, v, colour, dash) in lines.items()]
    label_ends(ax, labels)


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
        ("taught_share", "{:.0%} of tokens taught"),
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
    figure.text(0.012, 0.965, clip(title, 55), size=LARGE, weight="bold", color=INK, parse_math=False)
    figure.text(0.012, 0.932, clip(_status(history), 150), size=NORMAL, color=GREY, parse_math=False)
    events = [e for e in history.events if e["what"] != "saved"]
    if events:
        text = f"{events[-1]['what']} at step {events[-1]['step']:,}: {events[-1]['text']}"
        figure.text(0.988, 0.968, clip(text, 80), size=NORMAL, ha="right", color=INK, parse_math=False)


def _percent(share: str) -> str:
    """A share of the table as a label; never "0 %" for something."""
    if share == "-":
        return share
    return "<1 %" if share.startswith("<") or 0 < float(share) < 1 else f"{float(share):.0f} %"


def _share(part: float) -> str:
    """Per cent with one digit behind the point; never "0.0" for something."""
    return "<0.1" if 0 < part < 0.0005 else f"{100 * part:.1f}"


def _span(meta: dict[str, Any]) -> str:
    band = meta.get("healthy")
    return f"{band[0]:g} - {band[1]:g}" if band else "-"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
