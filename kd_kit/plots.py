"""A history as pictures: the magnitude of every loss term against its healthy band, and what it adds up to.

Pure: a history goes in, a ``matplotlib`` Figure comes out, nothing is shown and no pyplot state is touched.
Labels stand at the ends of the lines, so that a value is read without a legend and without colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd_kit.drawing import (
    BLUE,
    DASHED,
    DOTTED,
    FAINT,
    GREY,
    INK,
    LARGE,
    MAX_POINTS,
    NORMAL,
    SMALL,
    VERMILION,
    clip,
    decimate,
    draw_line,
    fit,
    label_ends,
    log_limits,
    log_ticks,
    mean_width,
    new_figure,
    new_panel,
    plain_ticks,
    quiet_glyphs,
    rim_marks,
    running_mean,
    say,
    stack,
    step_axis,
    term_styles,
)
from kd_kit.history import History, verdict
from kd_kit.run_panels import TALL, WIDE, draw_gradients, draw_rates, draw_shares, draw_speed, per_cent, remark
from kd_kit.run_table import (
    alarm_lines,
    clock,
    last_events,
    loss_table,
    measurements,
)
from kd_kit.table import plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kd_kit.schedule_plot import Plan

_LEFT, _RIGHT = (64, 282), (624, 214)  # start and width of the panels; the labels need the rest
_NARROW = (64, 236)  # where labels have four columns


def loss_figure(
    history: History,
    *,
    control: History | None = None,
    title: str | None = None,
    plan: Plan | None = None,
    settings: Mapping[str, Any] | None = None,
    failure: str | None = None,
    footer: str = "",
) -> Figure:
    """A run in seven panels, 1000 x 916 pixels at 100 dpi, whatever the history holds, even nothing.

    Above, where the run is: progress, the session's clock, alarms that stand. Then, from the upper left:

    - the raw value of every term on a log axis with its healthy band, last value and verdict in words; a cross at
      the upper rim is a value that is not finite, a triangle at the lower rim one that is not positive;
    - weight x value, stacked, with the share of each term;
    - shares of the gradient at the steps where it was measured, with the cosine of each term's gradient with that
      of lm, and what is wrong with it in words;
    - the weights of the terms as shares: what was, and paler, with a ``plan``, what is to come;
    - held-out bits per byte of the student, of ``control`` (the same student trained by LM loss alone), and the
      references;
    - the learning rate of each group, and the speed.

    Long lines are thinned to 800 points, keeping the extremes. Thin lines are single steps, thick ones their
    running mean.

    Args:
        plan: of the run, from :func:`kd_kit.schedule_plot.plan_of`; without it only what was recorded is drawn.
        settings: of the trainer, ``trainer.settings``. failure: what ended the run, if it failed.
        footer: written small below everything.
    """
    figure = new_figure(WIDE / 100, TALL / 100)

    def panel(column: tuple[int, int], top: int, tall: int, title: str) -> Axes:
        """A panel whose upper edge is ``top`` pixels below the figure's."""
        left, width = column
        return new_panel(figure, (left / WIDE, 1 - (top + tall) / TALL, width / WIDE, tall / TALL), title)

    with quiet_glyphs():
        _draw_header(figure, history, title, settings, failure)
        _draw_magnitudes(panel(_LEFT, 168, 200, "Raw value of each term"), history)
        _draw_contributions(panel(_RIGHT, 168, 200, "Weight × value"), history)
        draw_gradients(panel(_NARROW, 426, 180, "Share of the gradient"), history)
        draw_shares(panel(_RIGHT, 426, 180, "Share of the weights"), history, plan)
        _draw_held_out(panel(_LEFT, 664, 190, "Held-out text"), history, control, settings)
        draw_rates(panel(_RIGHT, 664, 66, "Learning rate"), history, plan)
        draw_speed(panel(_RIGHT, 782, 72, "Speed, tokens per second"), history)
        figure.text(0.988, 8 / TALL, footer, size=SMALL, color=GREY, ha="right", parse_math=False)
    return figure


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
    remark(ax, "bars: healthy range")
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
    edges = stack(ax, x, parts[:, thin], styles)
    around = ([x[0] - 1, x[0] + 1], [total[0]] * 2) if len(x) == 1 else (x, total)
    ax.plot(*around, color=INK, lw=1.4, label="total")
    step_axis(ax, steps)
    drawn = np.concatenate([edges[-1], total[np.isfinite(total)]])
    usual, highest = float(np.quantile(drawn, 0.95)), float(drawn.max())
    cut = highest > 3 * usual > 0
    top = 1.5 * usual if cut else 1.06 * highest
    ax.set_ylim(0, top if top > 0 else 1.0)
    ax.set_ylabel("weighted nats" + (f", cut (up to {short(highest)})" if cut else ""))
    plain_ticks(ax)
    last = history.last("train") or {"terms": {}}
    table = loss_table(history)
    now, shares = last["terms"], {row[0]: row[table.columns.index("share %")] for row in table.rows}
    labels = []
    for i, name in enumerate(names):
        middle = min((edges[i][-1] + edges[i + 1][-1]) / 2, ax.get_ylim()[1])
        part = now.get(name, {}).get("contribution")
        text = "absent" if part is None else _percent(shares[name]) if math.isfinite(part) else short(part)
        labels.append((middle, *styles[name], (name, text)))
    remark(ax, f"total {short(last.get('total'))}")
    label_ends(ax, labels)


def _draw_held_out(ax: Axes, history: History, control: History | None, settings: Mapping[str, Any] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, bits = history.evaluations()
    others = control.evaluations() if control is not None else ([], [])
    levels = {name: value for name, value in history.references().items() if math.isfinite(value)}
    ax.set_ylabel("bits per byte, lower is better")
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
    windows, words = (settings or {}).get("eval_windows"), []
    both = sorted(set(steps) & set(others[0]))
    if both:
        gain = bits[steps.index(both[-1])] - others[1][others[0].index(both[-1])]
        words.append(f"student - control at step {both[-1]:,}: {gain:+.3f}")
    if windows:
        words.insert(0, f"{windows:,} windows" if words else f"on {windows:,} evaluation windows")
    remark(ax, " · ".join(words))
    label_ends(ax, labels)


# Words


def _draw_header(
    figure: Figure, history: History, title: str | None, settings: Mapping[str, Any] | None, failure: str | None
) -> None:
    from matplotlib.patches import Rectangle

    def write(x: float, top: float, text: str, room: float, **how: Any) -> None:
        look = {"size": NORMAL, "color": INK, "parse_math": False} | how
        if text:
            fit(figure.text(x / WIDE, 1 - top / TALL, clip(text, 200), **look), room)

    if title is None:
        title = f"Run {history.run_id}" if history.run_id else "Loss terms of the run"
    write(12, 27, title, 430, size=LARGE, weight="bold")
    now, whole = history.last("train"), history.total_steps
    step = 0 if now is None else now["step"]
    done = min(1.0, step / whole) if whole else 0.0
    place = "no steps yet" if now is None else f"step {step:,}" + (f" of {whole:,} · {done:.0%}" if whole else "")
    write(12, 50, place, 300, weight="bold")
    said, warned = (failure, True) if failure else clock(history, settings)
    weight = "bold" if warned else "normal"
    write(988, 50, said, 660, ha="right", color=VERMILION if warned else INK, weight=weight)
    for share, colour in ((1.0, FAINT), (done, BLUE)):
        box = (12 / WIDE, 1 - 62 / TALL), share * 976 / WIDE, 6 / TALL
        figure.add_artist(Rectangle(*box, facecolor=colour, lw=0, transform=figure.transFigure))
    write(12, 80, " · ".join(measurements(now or {})), 976, color=GREY)
    lines, events = alarm_lines(history), last_events(history, 2)
    look: dict[str, Any] = {"color": VERMILION, "weight": "bold"}
    if lines:
        write(988, 27, events[-1] if events else "", 530, ha="right")
    else:
        lines, look = ["No alarm stands." if now is not None else "", *events], {"color": GREY}
    for i, line in enumerate(lines[:3]):
        write(12, 102 + 17 * i, line, 976, size=SMALL, **({} if i else look))


def _percent(share: str) -> str:
    """A share of the table as a label; never "0 %" for something."""
    if share == "-":
        return share
    return "<1 %" if share.startswith("<") else per_cent(float(share))
