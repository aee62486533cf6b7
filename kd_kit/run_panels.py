"""The panels of a run's figure that show what steers it: gradient shares, weights, learning rates, speed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kd_kit.drawing import (
    DASHED,
    DOTTED,
    GREY,
    INK,
    MAX_POINTS,
    decimate,
    draw_line,
    label_ends,
    mean_width,
    note,
    now_line,
    plain_ticks,
    running_mean,
    say,
    stack,
    step_axis,
    term_styles,
)
from kd_kit.history import History
from kd_kit.run_table import cosine_text, gradient_word
from kd_kit.table import plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kd_kit.schedule_plot import Plan

WIDE, TALL = 1000, 916  # pixels of the figure at 100 dpi; a notebook cell shows some 1000
_LEFT_END, _RIGHT_END = 561, 988  # pixels, where the labels of the left and the right column end


def remark(ax: Axes, text: str) -> None:
    """A remark on the title's line that ends where the labels of the column end."""
    note(ax, text, reach=(_LEFT_END if ax.bbox.x0 < WIDE / 2 else _RIGHT_END) - ax.bbox.x1)


def draw_gradients(ax: Axes, history: History) -> None:
    """Measured steps only; a step whose gradient was not finite leaves a gap."""
    import numpy as np

    names, styles = list(history.terms), term_styles(history.terms)
    measured = [r for r in history.records if r["kind"] == "train" and "gradients" in r]
    if not measured:
        one = len(names) == 1 and history.last("train") is not None
        return say(ax, "one term: nothing to compare" if one else "not measured yet")
    parts = np.array([[r["terms"].get(n, {}).get("grad_share") or 0.0 for r in measured] for n in names], dtype=float)
    sums = parts.sum(axis=0)
    parts[:, ~(np.isfinite(sums) & (sums > 0))] = np.nan
    steps = [r["step"] for r in measured]
    thin = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    edges = stack(ax, np.asarray(steps)[thin], parts[:, thin], styles)
    step_axis(ax, steps)
    _percent_axis(ax)
    labels = []
    for i, name in enumerate(names):
        term = measured[-1]["terms"].get(name, {})
        share, cosine, word = term.get("grad_share"), term.get("cosine"), gradient_word(measured[-1], name)
        good = share is not None and word != "no gradient"
        said = per_cent(100 * share) if good else "-"
        word = word or ("absent" if share is None or not term.get("count") else "")
        numbers = (said, "" if name == "lm" else cosine_text(cosine))
        labels.append(((edges[i][-1] + edges[i + 1][-1]) / 2, *styles[name], (name, *numbers, word)))
    remark(ax, f"at step {steps[-1]:,}: share, cosine with lm")
    label_ends(ax, labels, numbers=2, length=12)


def draw_shares(ax: Axes, history: History, plan: Plan | None) -> None:
    """The weights as parts of their sum: recorded up to now, planned from there on."""
    import numpy as np

    names = list(dict.fromkeys([*history.terms, *(plan.shares if plan is not None else ())]))
    styles = term_styles(names)
    records = [r for r in history.records if r["kind"] == "train"]
    if not records and plan is None:
        return say(ax, "no steps yet")
    past = plan.now if plan is not None else 0
    ends, labels = None, []
    if records:
        past = records[-1]["step"]
        thin = np.unique(np.linspace(0, len(records) - 1, min(len(records), MAX_POINTS)).round().astype(int))
        kept = [records[i] for i in thin]
        rows = [[r["terms"].get(name, {}).get("weight") or 0.0 for r in kept] for name in names]
        edges = stack(ax, [r["step"] for r in kept], _normalised(rows), styles)
        ends = edges[:, -1]
    if plan is not None:
        ahead = [i for i, step in enumerate(plan.steps) if step >= past]
        if ahead:
            rows = [[plan.shares[name][i] if name in plan.shares else 0.0 for i in ahead] for name in names]
            edges = stack(ax, [plan.steps[i] for i in ahead], _normalised(rows), styles, faint=True)
            ends, first = edges[:, -1], edges[:, 0]
        step_axis(ax, [0, plan.total])
        if records:
            now_line(ax, past)
    else:
        step_axis(ax, [r["step"] for r in records])
    _percent_axis(ax)
    if records:
        now = _normalised([[records[-1]["terms"].get(name, {}).get("weight") or 0.0] for name in names])[:, 0]
    else:
        now = np.diff(first)
    for i, name in enumerate(names):
        said = _whole(100 * now[i])
        said += f" → {_whole(100 * (ends[i + 1] - ends[i]))}" if plan is not None else " %"
        labels.append(((ends[i] + ends[i + 1]) / 2, *styles[name], (name, said)))
    remark(ax, "%, now → at the end" if plan is not None else "now")
    label_ends(ax, labels)


def _normalised(rows: Any) -> Any:
    """Columns that sum to 1; those without any weight stay 0."""
    import numpy as np

    rows = np.asarray(rows, dtype=float)
    rows = np.where(np.isfinite(rows), np.maximum(rows, 0.0), 0.0)
    sums = rows.sum(axis=0)
    return rows / np.where(sums > 0, sums, 1.0)


def _percent_axis(ax: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_rates(ax: Axes, history: History, plan: Plan | None) -> None:
    from matplotlib.ticker import MaxNLocator

    greys = ((INK, "-"), (GREY, "-"), (GREY, DASHED), (INK, DOTTED))
    groups = list(dict.fromkeys([*history.groups, *(plan.rates if plan is not None else ())]))
    now = history.last("train")
    if not groups:
        return say(ax, "no steps yet")
    labels, highest, steps = [], 0.0, []
    for i, name in enumerate(groups):
        colour, dash = greys[i % len(greys)]
        x, y = history.column("lr", name)
        if x:
            ax.plot(
                *decimate(x, y), color=colour, ls=dash, lw=1.6, marker="o" if len(x) == 1 else "", ms=3.5, label=name
            )
            steps += [x[0], x[-1]]
        end = y[-1] if y else math.nan
        if plan is not None and name in plan.rates:
            ahead = [j for j, step in enumerate(plan.steps) if now is None or step >= now["step"]]
            line = [plan.rates[name][j] for j in ahead]
            ax.plot(
                [plan.steps[j] for j in ahead], line, color=colour, ls=dash, lw=1.6, alpha=0.4, label=f"{name}, planned"
            )
            highest, end = max([highest, *plan.rates[name]]), line[-1] if line else end
        highest = max([highest, *(v for v in y if math.isfinite(v))])
        labels.append((end, colour, dash, (name, plain(y[-1]) if y else f"{plain(max(plan.rates[name]))}")))
    ax.set_ylim(0, 1.12 * highest if highest > 0 else 1.0)
    ax.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    plain_ticks(ax)
    step_axis(ax, steps if plan is None else [0, plan.total])
    if plan is not None and now is not None:
        now_line(ax, now["step"])
    remark(ax, "now" if now is not None else "peak")
    label_ends(ax, labels)


def draw_speed(ax: Axes, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, speeds = history.column("tokens_per_second")
    good = [v for v in speeds if math.isfinite(v)]
    ax.set_xlabel("optimizer step")
    if not good:
        return say(ax, "not measured yet")
    draw_line(ax, steps, speeds, INK, "-", label="speed")
    usual = sorted(good)[int(0.98 * (len(good) - 1))]
    ax.set_ylim(0, 1.25 * usual)
    ax.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    plain_ticks(ax)
    step_axis(ax, steps)
    mean = running_mean(speeds, mean_width(len(speeds)))
    floors, times = history.column("times_floor")
    if floors:
        usual_times = running_mean(times, mean_width(len(times)))[-1]
        remark(ax, f"a step takes {usual_times:.1f} × its floor")
    label_ends(ax, [(float(mean[-1]), INK, "-", ("now", short(float(mean[-1]))))])


def per_cent(share: float) -> str:
    """A whole number of per cent; never "0 %" for something."""
    return f"{_whole(share)} %"


def _whole(share: float) -> str:
    """Per cent without digits; never "0" for something."""
    return "<1" if 0 < share < 1 else f"{share:.0f}"
