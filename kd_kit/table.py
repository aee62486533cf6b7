"""Small tables that print as aligned text and show as HTML, and the numbers in them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass


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
                f'<{tag} style="text-align:{side};white-space:pre;padding:2px 6px">{html.escape(text)}</{tag}>'
                for side, text in zip(sides, texts, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(row("td", texts) for texts in self.rows)
        return (
            f"<div>{html.escape(self.title)}<table><thead>{row('th', self.columns)}</thead>"
            f'<tbody>{body}</tbody></table><span style="white-space:pre-line">{html.escape(self.note)}</span></div>'
        )


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


def span(seconds: float) -> str:
    """How long something takes: "40 s", "25 min", "3.2 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
