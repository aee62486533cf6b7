"""Draws how_it_works.png, the picture in the README: ``python notebooks/how_it_works.py``.

The tokens in it are those of the embedded pair.
"""

from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import kd_kit as kd
from kd_kit.drawing import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION

TEXT = "Anne had not wanted this visit"
WIDTH, HEIGHT = 112, 62  # units of the drawing; ten units are an inch of paper
BIG, PLAIN, SMALL = 12.5, 10.5, 8.5  # points
TERMS = {
    "lm": ("the text itself", BLUE),
    "kd": ("next-token distribution", VERMILION),
    "span": ("likelihood of spans", ORANGE),
    "feature, layerwise": ("hidden states", GREEN),
    "relation, contrastive": ("states among states", INK),
    "attention": ("what relates to what", PURPLE),
    "router": ("which experts", SKY),
}


def box(ax, left, bottom, width, height, title, lines=(), *, colour=INK, fill="white", dashed=False):
    """A box with a bold title and lines below it."""
    style = "round,pad=0,rounding_size=1.2"
    edge = {"ec": colour, "fc": fill, "lw": 1.4, "ls": (0, (4, 2)) if dashed else "-", "zorder": 2}
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, **edge))
    middle, top = left + width / 2, bottom + height - 2.2
    ax.text(middle, top, title, size=BIG, weight="bold", color=colour, ha="center", va="center", zorder=3)
    for number, line in enumerate(lines, start=1):
        ax.text(middle, top - 2.5 * number, line, size=PLAIN, color=INK, ha="center", va="center", zorder=3)


def arrow(ax, start, end, *, colour=INK, bend=0.0, dashed=False, both=False):
    """An arrow; ``bend`` is how far it bows, as a share of its length."""
    look = {"color": colour, "lw": 1.6, "ls": (0, (4, 2)) if dashed else "-", "zorder": 1.5}
    head = "<|-|>" if both else "-|>"
    path = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=head, connectionstyle=path, mutation_scale=14, shrinkA=0, shrinkB=0, **look
        )
    )


def pieces(tokenizer, text):
    """The tokens of a text as strings, for text of ASCII."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def tokens(ax, pair, left, width, rows):
    """Both tokenizations over the bytes of a text, with lines at boundaries in common."""
    step = width / len(TEXT)
    cuts = {}
    for who, tokenizer, bottom, fill in (
        ("teacher", pair.teacher, rows[0], "#FBE9DD"),
        ("student", pair.student, rows[1], "#DDEBF5"),
    ):
        parts = pieces(tokenizer, TEXT)
        ends = list(accumulate(map(len, parts)))
        cuts[who] = set(ends)
        for part, end in zip(parts, ends, strict=True):
            x = left + (end - len(part)) * step
            ax.add_patch(Rectangle((x, bottom), len(part) * step, 4, fc=fill, ec=GREY, lw=0.9, zorder=2))
            words = part.replace(" ", "␣")
            ax.text(x + len(part) * step / 2, bottom + 2, words, size=SMALL, family="DejaVu Sans Mono",
                    ha="center", va="center", color=INK, zorder=3)  # fmt: skip
    for cut in {0} | cuts["teacher"] & cuts["student"]:
        x = left + cut * step
        ax.plot([x, x], [rows[1] - 0.6, rows[0] + 4.6], color=INK, lw=1.1, zorder=2.5)
    return cuts


def drawing() -> Figure:
    pair = kd.build_tokenizers()
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=150, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")

    # one text, two tokenizations, their common bytes
    ax.text(2, 56, "One text, two tokenizers", size=BIG, weight="bold", color=INK)
    tokens(ax, pair, 2, 37, (43, 14))
    ax.text(2, 49, "the teacher's tokens", size=PLAIN, color=VERMILION)
    ax.text(2, 12, "the student's tokens", size=PLAIN, color=BLUE, va="top")
    for number, line in enumerate(("lines: bytes at which both have a", "boundary, and predict what comes next")):
        ax.text(20.5, 32 - 2.9 * number, line, size=PLAIN, color=INK, ha="center", va="center", zorder=4,
                bbox={"fc": "white", "ec": "none", "pad": 2})  # fmt: skip

    # two models, and the way from one vocabulary to the other
    box(ax, 44, 40.5, 20, 9, "Teacher", ("frozen; dense or a", "mixture of experts"), colour=VERMILION, fill="#FDF4EE")
    box(ax, 44, 26.5, 20, 9, "Bridge", ("what it says, in the", "student's tokens"), colour=VERMILION, fill="#FDF4EE")
    box(ax, 44, 11.5, 20, 9, "Student", ("trained; one pass", "of its body"), colour=BLUE, fill="#EEF5FA")
    arrow(ax, (39.6, 45), (43.6, 45), colour=VERMILION)
    arrow(ax, (54, 40.1), (54, 35.9), colour=VERMILION)
    arrow(ax, (39.6, 16), (43.6, 16), colour=BLUE)

    # what is compared
    box(ax, 70, 26.5, 40, 23, "Terms")
    for number, (name, (what, colour)) in enumerate(TERMS.items()):
        y = 43.9 - 2.6 * number
        ax.add_patch(Rectangle((72, y - 0.8), 1.6, 1.6, fc=colour, ec="none", zorder=3))
        ax.text(74.8, y, name, size=PLAIN, weight="bold", color=INK, va="center", zorder=3)
        ax.text(108.4, y, what, size=PLAIN, color=GREY, va="center", ha="right", zorder=3)
    arrow(ax, (64.4, 45), (69.6, 45), colour=VERMILION)
    arrow(ax, (64.4, 31), (69.6, 31), colour=VERMILION)
    arrow(ax, (64.4, 19), (69.6, 26.2), colour=BLUE)

    # the head, the sum, the step
    box(ax, 70, 11.5, 20, 9, "Student's head", ("one pass in chunks,", "for all terms"), colour=BLUE, fill="#EEF5FA")
    arrow(ax, (64.4, 15), (69.6, 15), colour=BLUE)
    arrow(ax, (80, 20.9), (80, 26.1), colour=BLUE)
    box(ax, 94, 11.5, 16, 9, "Optimizer", ("a step on the", "weighted sum"))
    arrow(ax, (102, 26.1), (102, 20.9))
    for start, end in (((102, 11.1), (102, 7)), ((102, 7), (61, 7))):
        ax.plot(*zip(start, end, strict=True), color=INK, lw=1.6, zorder=1.5)
    arrow(ax, (61, 7), (61, 11.1))
    ax.text(81, 6, "new weights", size=PLAIN, color=INK, ha="center", va="top")
    ax.text(103.2, 23.5, "gradient", size=PLAIN, color=INK, va="center")

    # beside: what is kept on the disk
    box(ax, 44, 54, 20, 6.4, "Cache", ("read in its place",), colour=GREY, fill="#F4F4F4", dashed=True)
    arrow(ax, (54, 53.6), (54, 49.9), colour=GREY, dashed=True, both=True)
    box(ax, 44, 1.6, 15, 6.4, "Checkpoint", ("the run goes on",), colour=GREY, fill="#F4F4F4", dashed=True)
    arrow(ax, (51.5, 8.4), (51.5, 11.1), colour=GREY, both=True)
    ax.add_patch(Rectangle((0.15, 0.15), WIDTH - 0.3, HEIGHT - 0.3, fc="none", ec=FAINT, lw=1))
    return figure


if __name__ == "__main__":
    drawing().savefig(Path(__file__).with_suffix(".png"))
