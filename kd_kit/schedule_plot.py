"""A run's plan as a picture, before anything runs: the share of every term and every learning rate, step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_kit.drawing import (
    DASHED,
    DOTTED,
    GREY,
    INK,
    LARGE,
    NORMAL,
    SMALL,
    clip,
    label_ends,
    new_figure,
    new_panel,
    note,
    plain_ticks,
    step_axis,
    term_styles,
)
from kd_kit.stages import Change
from kd_kit.table import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 400  # more than a panel can show
_ASKED = ("terms", "schedule", "lr_schedule", "total_steps", "planned_steps", "decay_from", "settings", "step",
          "shares_at", "rate_at", "rate_factors")  # fmt: skip
_STAIRS = 60  # steps up to which every single one is drawn as a stair
_LISTED = 12  # changes that are written below the panels


@dataclass(frozen=True)
class Plan:
    """What a run means to do, at up to some 400 of its steps, every corner among them.

    Attributes:
        title: the schedule's name and the peak rate, in words.
        steps: [n] optimizer steps, the first being 0, the last ``total - 1``.
        shares: {term: [n]}, at every step summing to 1. rates: {parameter group: [n]}.
        changes: (step, sentence), in order, of the terms and of the learning rate.
        rate_changes: those of them that are the learning rate's.
        total: steps of the run, fewer than planned where its decay began early. now: steps done.
    """

    title: str
    steps: tuple[int, ...]
    shares: Mapping[str, tuple[float, ...]]
    rates: Mapping[str, tuple[float, ...]]
    changes: tuple[Change, ...]
    rate_changes: tuple[Change, ...]
    total: int
    now: int


def plan_of(trainer) -> Plan:
    """The plan of a trainer as plain numbers, for pictures; nothing is computed but shares and rates.

    Raises:
        ValueError: it is no trainer.
    """
    missing = [name for name in _ASKED if not hasattr(trainer, name)]
    if missing:
        raise ValueError(
            f"plan_of: expected a trainer from kd.build_trainer(...), got {type(trainer).__name__} without {missing[0]}"
        )
    total, planned, rate = trainer.total_steps, trainer.planned_steps, trainer.lr_schedule
    weights = {t.name: t.weight for t in trainer.terms}
    stages = trainer.schedule.changes(weights, total)
    turns = rate.changes(planned, trainer.decay_from)
    corners = [step for step, _ in (*stages, *turns)]
    lines = (line for name, line in trainer.schedule.lines.items() if name in weights)
    corners += [math.floor(progress * total) + i for line in lines for progress, _ in line for i in (0, 1)]
    falls = rate.decay_start(planned, trainer.decay_from)
    if falls is not None:  # 1 - sqrt is steepest at its start
        corners += [falls + 2**i for i in range(total.bit_length())]
    steps = _thinned(total, corners)
    shares = [trainer.shares_at(step) for step in steps]
    rates = [trainer.rate_at(step) for step in steps]
    peak = trainer.settings["learning_rate"]
    return Plan(
        title=f"{total:,} optimizer steps · schedule {trainer.schedule.name} · peak learning rate {plain(peak)}",
        steps=steps,
        shares={t.name: tuple(share[t.name] for share in shares) for t in trainer.terms},
        rates={name: tuple(factor * r for r in rates) for name, factor in trainer.rate_factors.items()},
        changes=tuple(sorted([*stages, *turns], key=lambda change: change[0])),
        rate_changes=tuple(turns),
        total=total,
        now=trainer.step,
    )


def _thinned(total: int, corners: Iterable[int]) -> tuple[int, ...]:
    """At most some 400 of ``total`` steps: all corners with their neighbours, and others evenly between."""
    if total <= _POINTS:
        return tuple(range(total))
    near = {0, total - 1}.union(corner + i for corner in corners for i in (-1, 0, 1))
    near = {step for step in near if 0 <= step < total}
    count = max(2, _POINTS - len(near))
    return tuple(sorted(near.union(round(i * (total - 1) / (count - 1)) for i in range(count))))


def plot_schedule(trainer) -> Figure:
    """The plan of a run: shares of the terms, learning rates, and what changes when; 1000 pixels wide at 100 dpi.

    Above, the share of every term, stacked, since they sum to 1; beside it each term's share at the first step, at
    half time and at the last. Below, the learning rate of every parameter group with its peak. Numbers mark the
    changes that are listed under the panels. Once the run has begun, a line shows where it is.

    Raises:
        ValueError: ``trainer`` is no trainer.
    """
    plan = plan_of(trainer)
    more = len(plan.changes) - _LISTED
    rows = min(len(plan.changes), _LISTED) + (more > 0)
    tall = 506 + 17 * rows + (8 if rows else 0)  # pixels
    figure = new_figure(10, tall / 100)
    top = tall - 26
    figure.text(0.012, top / tall, "Plan of the run", size=LARGE, weight="bold", color=INK)
    figure.text(0.012, (top - 21) / tall, clip(plan.title, 150), size=NORMAL, color=GREY, parse_math=False)

    def panel(upper: int, height: int, title: str) -> Axes:
        """A panel whose upper edge is ``upper`` pixels below the figure's."""
        return new_panel(figure, (0.064, (tall - upper - height) / tall, 0.66, height / tall), title)

    shares, rates = panel(78, 220, "Share of the total"), panel(358, 100, "Learning rate of each group")
    listed = list(enumerate(plan.changes[:_LISTED], start=1))
    _draw_shares(shares, plan)
    _draw_rates(rates, plan)
    _mark(shares, plan, [(step, i) for i, (step, text) in listed if (step, text) not in plan.rate_changes])
    _mark(rates, plan, [(step, i) for i, (step, text) in listed if (step, text) in plan.rate_changes])
    _mark_times(shares, rates, plan)
    for number, (step, text) in listed:
        y = (tall - 502 - 17 * number) / tall
        figure.text(0.064, y, str(number), size=SMALL, weight="bold", color=INK, ha="center")
        figure.text(0.084, y, f"step {step:,}  ({step / plan.total:.0%})", size=SMALL, color=GREY)
        figure.text(0.235, y, clip(text, 120), size=SMALL, color=INK, parse_math=False)
    if more > 0:
        figure.text(0.084, (tall - 519 - 17 * _LISTED) / tall, f"and {more:,} more", size=SMALL, color=GREY)
    return figure


def _stairs(plan: Plan, values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The line to draw: through the points, or where steps are few each as wide as a step."""
    if plan.total > _STAIRS:
        return list(plan.steps), list(values)
    return [float(x) for step in plan.steps for x in (step, step + 1)], [v for v in values for _ in range(2)]


def _draw_shares(ax: Axes, plan: Plan) -> None:
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    styles = term_styles(list(plan.shares))
    half = min(range(len(plan.steps)), key=lambda i: abs(plan.steps[i] - plan.total / 2))
    labels, below = [], np.zeros(len(_stairs(plan, plan.steps)[0]))
    for name, values in plan.shares.items():
        x, y = _stairs(plan, values)
        colour, dash = styles[name]
        colour = _paler(colour, 0.75 if dash == "-" else 0.45)  # an area has no dashes
        ax.fill_between(x, below, below + y, label=name, facecolor=colour, lw=0)
        middle = below[-1] + y[-1] / 2
        below = below + y
        ax.plot(x, below, color="white", lw=0.8, label=f"up to {name}")
        said = " → ".join(_percent(values[i]) for i in (0, half, -1)) + " %"
        labels.append((middle, colour, "-", (name, said)))
    ax.grid(False)
    ax.set_ylim(0, 1.09)  # room for the numbers of the changes
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    step_axis(ax, [0, plan.total])
    ax.tick_params(labelbottom=False)
    label_ends(ax, labels)
    note(ax, "first step → half time → last", reach=max(_reach(ax), 190))


def _paler(colour: str, strength: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(1 - strength * (1 - part) for part in to_rgb(colour))


def _reach(ax: Axes) -> float:
    """Pixels from the panel to the right end of the labels beside it."""
    return max(text.get_window_extent().x1 for text in ax.texts) - ax.bbox.x1


def _percent(share: float) -> str:
    """Per cent without digits; never "0" for something."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def _draw_rates(ax: Axes, plan: Plan) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    greys = ((INK, "-"), (GREY, "-"), (GREY, DASHED), (INK, DOTTED))
    labels = []
    for (colour, dash), (name, values) in zip(itertools.cycle(greys), plan.rates.items(), strict=False):
        ax.plot(*_stairs(plan, values), color=colour, ls=dash, lw=1.6, label=name)
        labels.append((values[-1], colour, dash, (name, plain(max(values)))))
    highest = max(max(values) for values in plan.rates.values())
    ticks = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(0, highest)
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if t <= highest]))
    ax.set_ylim(0, 1.25 * highest)
    plain_ticks(ax)
    step_axis(ax, [0, plan.total])
    ax.set_xlabel("optimizer step")
    label_ends(ax, labels)
    note(ax, "peak", reach=_reach(ax))


def _mark(ax: Axes, plan: Plan, changes: Sequence[tuple[int, int]]) -> None:
    """A thin line at every change, with its number above, moved aside where numbers would meet."""
    width, gap = ax.bbox.width, 20.0
    right = width
    places = []
    for step, _ in reversed(changes):  # from the right, so that none leaves the panel
        right = min(step / plan.total * width, right)
        places.append(right)
        right -= gap
    places.reverse()
    left = 0.0
    for i, place in enumerate(places):  # and once more from the left, for those that were pushed out
        places[i] = left = max(place, left)
        left += gap
    for (step, number), place in zip(changes, places, strict=True):
        ax.axvline(step, 0, _below_numbers(ax), color=INK, lw=0.8, alpha=0.7, label=f"change {number}")
        look = {"size": SMALL, "weight": "bold", "color": INK, "ha": "center", "va": "center_baseline"}
        ax.text(place / width, 1 - 8 / ax.bbox.height, str(number), transform=ax.transAxes, **look)


def _below_numbers(ax: Axes) -> float:
    return 1 - 17 / ax.bbox.height


def _mark_times(shares: Axes, rates: Axes, plan: Plan) -> None:
    """Half time with its rule, and where the run is."""
    middle: dict[str, Any] = {"transform": shares.get_xaxis_transform(), "size": SMALL, "ha": "center", "va": "top"}
    for ax in (shares, rates):
        ax.axvline(plan.total / 2, 0, _below_numbers(ax), color=INK, ls=DOTTED, lw=1.2, label="half time")
        if plan.now:
            ax.axvline(plan.now, 0, _below_numbers(ax), color=INK, lw=2.0, label="now")
    rule = "half time: every term has at least half of its full share"
    shares.text(plan.total / 2, -0.03, rule, color=INK, **middle)
    if plan.now:
        shares.text(plan.now, -0.1, f"now, step {plan.now:,}", weight="bold", color=INK, **middle)
