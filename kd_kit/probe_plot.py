"""What a probe found as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_kit.drawing import BLUE, GREY, INK, LARGE, NORMAL, SMALL, VERMILION, clip, new_figure, new_panel
from kd_kit.table import Table, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def probe_table(rows: Sequence[dict], *, title: str, note: str) -> Table:
    """The rows of a probe; a star marks a term whose settings differ from those of the run."""
    columns = ("term", "value", "unit", "healthy", "verdict", "weight", "contribution", "share %")
    columns = (*columns, "gradient", "gradient %", "cosine with lm")

    def percent(share: float | None) -> str:
        return "-" if share is None else "<0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}"

    lines = tuple(
        (
            r["name"] + ("*" if r["changed"] else ""),
            short(r["value"]),
            r["unit"] or "-",
            "{:g} - {:g}".format(*r["healthy"]),
            r["verdict"],
            short(r["weight"]),
            short(r["contribution"]),
            percent(r["share"]),
            short(r["grad_norm"]),
            percent(r["grad_share"]),
            "-" if r["cosine"] is None else f"{r['cosine']:+.2f}",
        )
        for r in rows
    )
    return Table(title, columns, lines, note, ("term", "unit", "verdict"))


def probe_figure(rows: Sequence[dict], cosines: Sequence[Sequence[float | None]], *, title: str, at: str) -> Figure:
    """Shares of the total side by side, and which terms pull the same way; 1000 pixels wide at 100 dpi.

    Args:
        rows, cosines: of a probe. at: where the gradients were taken, in words.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    names = [clip(r["name"], 14) for r in rows]
    sick = [r["verdict"] if r["verdict"] != "healthy" else "" for r in rows]
    read = [f"{name}  {short(r['value'])}" for name, r in zip(names, rows, strict=True)]
    n = len(names)
    height = max(2.6, 1.35 + 0.34 * n)
    figure = new_figure(10, height)
    figure.text(0.012, 1 - 0.24 / height, title, size=LARGE, weight="bold", color=INK, parse_math=False)
    bottom, tall = 0.52 / height, 1 - 1.15 / height

    ax = new_panel(figure, (0.2, bottom, 0.29, tall), "Share of the contribution, of the gradient")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    longest = max([abs(r[k]) for r in rows for k in ("share", "grad_share") if _finite(r[k])], default=1.0)
    for i, row in enumerate(rows):
        for key, shift, colour in (("share", -0.19, BLUE), ("grad_share", 0.19, VERMILION)):
            value = row[key]
            if not _finite(value):
                ax.text(0, i + shift, " absent" if row["value"] is None else " not finite", va="center", size=SMALL,
                        color=GREY)  # fmt: skip
                continue
            ax.barh(i + shift, 100 * value, 0.34, color=colour, lw=0)
            text = "<0.1" if 0 < abs(value) < 0.0005 else f"{100 * value:.1f}"
            ax.text(100 * max(value, 0), i + shift, f" {text}", va="center", size=SMALL, color=INK)
    ax.set_yticks(range(n), [f"{text}  {word}".strip() for text, word in zip(read, sick, strict=True)])
    for label, word in zip(ax.get_yticklabels(), sick, strict=True):
        label.set_weight("bold" if word else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(n - 0.4, -0.6)
    ax.set_xlim(min(0, *[100 * (r["share"] or 0) for r in rows]), 114 * longest or 1)
    ax.set_xlabel("% of the total")
    ax.yaxis.set_label_coords(0, 0)
    handles = [Patch(color=BLUE, label="weight × value"), Patch(color=VERMILION, label="weight × gradient")]
    look = {"ncols": 2, "fontsize": SMALL, "frameon": False, "borderaxespad": 0}
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.985, 1 - 0.12 / height), **look)

    side = min(tall * height, 3.6 if n < 7 else 4.4) / 10
    ax = figure.add_axes((0.60, bottom, min(0.385, max(side, 0.385)), tall))
    ax.set_title(f"Cosine of gradients, {at}", loc="left", size=NORMAL, weight="bold", color=INK, pad=5)
    colours = LinearSegmentedColormap.from_list("pulls", [VERMILION, "white", BLUE])
    grid = [[math.nan if c is None else c for c in line] for line in cosines]
    ax.imshow(grid, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for i, line in enumerate(cosines):
        for j, cosine in enumerate(line):
            dark = cosine is not None and abs(cosine) > 0.75
            text = "-" if cosine is None else "1" if i == j else f"{cosine:+.2f}"
            ax.text(j, i, text, ha="center", va="center", size=SMALL, color="white" if dark else INK)
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if n > 5 else {}
    ax.set_xticks(range(n), [clip(name, 14 if n <= 5 else 8) for name in names], **turned)
    ax.set_yticks(range(n), names)
    ax.tick_params(labelsize=SMALL, colors=INK, length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
