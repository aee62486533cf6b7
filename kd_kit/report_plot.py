"""An evaluation as a picture: how good each model is, how far it agrees with its teacher, and how sure it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kd_kit.drawing import (
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SMALL,
    new_figure,
    new_panel,
    quiet_glyphs,
    say,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Mapping[str, Mapping[str, float | None]]

_WIDE, _TALL = 1000, 300
_LOOKS = {
    "before": (GREY, DOTTED),
    "LM-only control": (ORANGE, DASHED),
    "distilled": (BLUE, "-"),
    "teacher": (GREEN, "-"),
}


def report_figure(rows: Rows, reliability: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Three panels, 1000 x 300 pixels at 100 dpi: bits per byte, agreement with the teacher, reliability.

    In the reliability diagram a model that is as sure as it is right lies on the diagonal, an over-confident one below.
    Bins with less than a thousandth of the positions, or fewer than ten, are not drawn.

    Args:
        rows, reliability: of a :class:`kd_kit.report.Report`.
    """
    figure = new_figure(_WIDE / 100, _TALL / 100)

    def panel(left: int, width: int, title: str) -> Axes:
        return new_panel(figure, (left / _WIDE, 52 / _TALL, width / _WIDE, (_TALL - 52 - 34) / _TALL), title)

    with quiet_glyphs():
        _draw_bits(panel(112, 150, "Held-out bits per byte"), rows)
        _draw_agreement(panel(384, 150, "Agreement with teacher"), rows)
        _draw_reliability(panel(610, 190, "Is it as sure as it is right?"), rows, reliability)
    return figure


def _bars(ax: Axes, names: list[str], labels: bool = True) -> list[int]:
    """Places of horizontal bars, the first name uppermost."""
    places = list(range(len(names)))[::-1]
    ax.grid(False)
    ax.set_yticks(places, names if labels else [])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.6, len(names) - 0.4)
    return places


def _draw_bits(ax: Axes, rows: Rows) -> None:
    names = list(rows)
    values = [rows[name]["bits_per_byte"] for name in names]
    finite = [v for v in values if math.isfinite(v)]
    ax.set_xlabel("lower is better")
    for place, name, value in zip(_bars(ax, names), names, values, strict=True):
        length = value if math.isfinite(value) else max(finite, default=1.0)
        ax.barh(place, length, height=0.62, color=_LOOKS.get(name, (INK, "-"))[0], label=name)
        ax.annotate(f"{value:.3f}", (length, place), (4, 0), textcoords="offset points", va="center", size=SMALL)
    ax.set_xlim(0, 1.22 * max(finite, default=1.0))


def _draw_agreement(ax: Axes, rows: Rows) -> None:
    names = [name for name, row in rows.items() if row.get("top1") is not None]
    if not names:
        return say(ax, "not measured")
    ax.set_xlabel("dark: first choice, pale: top 5")
    for place, name in zip(_bars(ax, names), names, strict=True):
        colour = _LOOKS.get(name, (INK, "-"))[0]
        for shift, key, alpha in ((0.18, "top1", 1.0), (-0.18, "top5", 0.45)):
            share = rows[name][key]
            ax.barh(place + shift, share, height=0.32, color=colour, alpha=alpha, label=f"{name}, {key}")
            ax.annotate(
                f"{share:.0%}", (share, place + shift), (4, 0), textcoords="offset points", va="center", size=SMALL
            )
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])


def _draw_reliability(ax: Axes, rows: Rows, reliability: Mapping[str, Sequence[Sequence[float]]]) -> None:
    if not reliability:
        return say(ax, "not measured")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the first choice", ylabel="share that was right")
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8, label="as sure as right")
    for name, points in reliability.items():
        # a bin of a handful of positions says nothing, and would draw the eye
        total = sum(n for *_, n in points)
        some = [(sure, right) for sure, right, n in points if n >= max(10, 0.001 * total)]
        colour, dash = _LOOKS.get(name, (INK, "-"))
        label = f"{name}  {rows[name]['ece']:.3f}"
        ax.plot(
            *zip(*some, strict=True) if some else ((), ()), color=colour, ls=dash, lw=1.6, marker="o", ms=3, label=label
        )
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[1:],
        names[1:],
        title="ECE",
        fontsize=SMALL,
        title_fontsize=SMALL,
        frameon=False,
        handlelength=1.6,
        borderaxespad=0,
        loc="upper left",
        bbox_to_anchor=(1.03, 1),
    )
