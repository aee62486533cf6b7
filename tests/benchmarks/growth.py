"""Seconds and memory of a step per token, as the window, the batch, K, the vocabularies and the depth grow.

    OMP_NUM_THREADS=1 python tests/benchmarks/growth.py [--rounds 5]

Small models of the mission's families, lm + kd with the teacher beside. One thing at a time is doubled twice, the rest
stays. Writes the figure growth.png beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mission
import torch
from measure import Target, added_memory, alone, alternate, save
from overhead import Ours

import kd_kit as kd
from kd_kit.drawing import BLUE, GREY, SMALL, figure_png, label_ends, new_figure, new_panel, quiet_glyphs
from kd_kit.session import Session

FIGURE = Path(__file__).parent / "growth.png"
FACTORS = (1, 2, 4)
AXES = ("window", "batch", "cells", "vocabulary", "depth")
_TICKS = (0.25, 0.5, 1, 2, 4)
FLAT = ("window", "batch", "cells")
"""What a token's cost should hardly depend on; with the vocabularies and the depth it may grow in proportion."""


@dataclass(frozen=True)
class Point:
    """A step: positions of a window, windows, K, entries of the student's vocabulary (the teacher's has twice as many),
    layers of both models."""

    window: int = 64
    batch: int = 4
    cells: int = 32
    vocabulary: int = 8_192
    depth: int = 2

    @property
    def tokens(self) -> int:
        return self.window * self.batch


def points() -> dict[tuple[str, int], Point]:
    base = Point()
    every = {(axis, factor): factor * getattr(base, axis) for axis in AXES for factor in FACTORS}
    return {key: dataclasses.replace(base, **{key[0]: value}) for key, value in every.items()}


def step_of(point: Point, folder: Path) -> Ours:
    """A step at this point: forward, backward and the optimizer's part."""
    sizes = point.vocabulary, 2 * point.vocabulary
    data = mission.made_data(point.window, windows=point.batch, batch_size=point.batch, sizes=sizes)
    teacher = mission.build_teacher(
        vocab_size=sizes[1],
        hidden_size=256,
        num_hidden_layers=point.depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=768,
    )
    student = mission.build_student(
        vocab_size=sizes[0],
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=point.depth,
        num_attention_heads=3,
        num_key_value_heads=3,
    )
    terms = [kd.lm_term(0.3), kd.kd_term(0.7, top_k=point.cells)]
    session = Session(folder, device="cpu", precision="no")
    return Ours(terms, session, data, mission.full_batch(data, point.batch), student, teacher)


def memory(point: Point) -> int:
    """Bytes that a first step adds to the models: activations, gradients, the optimizer's state."""
    with tempfile.TemporaryDirectory() as folder:
        return added_memory(step_of(point, Path(folder)))


def draw(rows: list[dict]) -> None:
    """Both figures per token, relative to those at the smallest size."""
    figure = new_figure(9.2, 3.9)
    dashes = ("-", "-", "-", (0, (5, 2)), (0, (2, 2)))
    colours = (BLUE, "#009E73", "#CC79A7", "#D55E00", "#E69F00")
    with quiet_glyphs():
        for left, field, title in (
            (0.06, "time per token, x", "Seconds per token"),
            (0.56, "memory per token, x", "Added memory per token"),
        ):
            ax = new_panel(figure, (left, 0.17, 0.27, 0.68), title)
            labels = []
            for axis, colour, dash in zip(AXES, colours, dashes, strict=True):
                values = [row[field] for row in rows if row["what grows"] == axis]
                ax.plot(FACTORS, values, color=colour, ls=dash, lw=1.8, marker="o", ms=4)
                labels.append((values[-1], colour, dash, (axis, f"x {values[-1]:.2f}")))
            ax.plot(FACTORS, FACTORS, color=GREY, lw=0.8, ls=(0, (1, 3)))
            ax.text(1.9, 2.1, "in proportion", color=GREY, size=SMALL, ha="right")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(FACTORS, [f"x {factor}" for factor in FACTORS])
            ax.set_yticks(_TICKS, [f"x {tick:g}" for tick in _TICKS])
            ax.minorticks_off()
            ax.set_ylim(0.22, 4.6)
            ax.set_xlabel("size, over the smallest")
            label_ends(ax, labels)
    FIGURE.write_bytes(figure_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(json.dumps({"bytes": memory(Point(**json.loads(given.peak)))}))
        return
    every = points()
    distinct = dict.fromkeys(every.values())
    with tempfile.TemporaryDirectory() as folder:
        steps = {point: step_of(point, Path(folder)) for point in distinct}
        times = alternate(steps, rounds=given.rounds, clock=time.process_time)
    seconds = {point: statistics.median(found) / point.tokens for point, found in times.items()}
    room = {
        point: alone(__file__, "--peak", json.dumps(dataclasses.asdict(point)))["bytes"] / point.tokens
        for point in distinct
    }
    base = Point()
    rows = [
        {
            "what grows": axis,
            "size": getattr(point, axis),
            "ms per token": 1e3 * seconds[point],
            "KiB per token": room[point] / 2**10,
            "time per token, x": seconds[point] / seconds[base],
            "memory per token, x": room[point] / room[base],
        }
        for (axis, _), point in every.items()
    ]
    largest = {row["what grows"]: row for row in rows}  # the last one of every axis
    targets = [Target(f"time per token, 4 x {axis}", largest[axis]["time per token, x"], 1.15) for axis in FLAT]
    targets += [
        Target(f"time per token, 4 x {axis}", largest[axis]["time per token, x"], 4.0)
        for axis in AXES
        if axis not in FLAT
    ]
    targets += [
        Target(f"memory per token, 4 x {axis}", largest[axis]["memory per token, x"], 1.15 if axis in FLAT else 4.0)
        for axis in AXES
    ]
    draw(rows)
    notes = (
        "At the base 4 windows of 64 tokens, K = 32, vocabularies of 8,192 and 16,384 entries, 2 layers each side. "
        "Time is processor time of one thread. "
        "Memory is what a first step adds to the models, in a process of its own: with more tokens the gradients and "
        "the optimizer's state, which do not grow, weigh less. Figure: growth.png."
    )
    save("growth", rows, targets, notes)


if __name__ == "__main__":
    main()
