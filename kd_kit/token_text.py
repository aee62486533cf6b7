"""The tokens of a window as people read them, and where they lie in its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kd_kit.data import WindowSet
from kd_kit.types import DistillBatch

_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def readable(token: bytes) -> str:
    """A token's bytes as text of visible signs: spaces as ␣, line ends as ⏎, what is no UTF-8 as its bytes in hex.

    Example:
        >>> readable(b" the\\n"), readable(b"\\xe6\\x9d")
        ('␣the⏎', 'E6·9D')
    """
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "·".join(f"{byte:02X}" for byte in token)
    return "".join(_SIGNS.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)


def drawable(text: str) -> str:
    """The text with every character that figures have no glyph for as its number."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans Mono")).get_charmap()
    return "".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in text)


@dataclass(frozen=True)
class Side:
    """One side's tokens of a window; a document-start token has no bytes.

    Attributes:
        ids: [n]. starts, ends: [n], bytes from the start of the window. texts: bytes that each covers.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    texts: tuple[bytes, ...]


@dataclass(frozen=True)
class WindowTokens:
    """Both tokenizations of one window. Position ``i`` predicts token ``i + 1``.

    Attributes:
        number: of the window. batch: of this window alone, on the host.
        kinds: of every student position, "aligned", "inside" (a teacher token) or "untaught"; "" where it predicts
            nothing.
        common: bytes at which both sides have a boundary.
    """

    number: int
    batch: DistillBatch
    student: Side
    teacher: Side
    kinds: tuple[str, ...]
    common: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.student.ends[-1]


def window_tokens(windows: WindowSet, number: int) -> WindowTokens:
    """Both tokenizations of window ``number``."""
    row, first, _, last = (int(x) for x in windows.table[number])
    document, batch = windows.documents[row], windows.collate([number])
    sides = []
    for ids, ends, vocab in (
        (document.student_ids, document.student_ends, windows.pair.student_vocab),
        (document.teacher_ids, document.teacher_ends, windows.pair.teacher_vocab),
    ):
        begin = np.searchsorted(ends, first, side="right") if first else 0
        part = slice(int(begin), int(np.searchsorted(ends, last, side="right")))
        ids, ends = ids[part].tolist(), (ends[part] - first).tolist()
        if vocab.start_id is not None:
            ids, ends = [vocab.start_id, *ids], [0, *ends]
        starts = [0, *ends[:-1]]
        # a tokenizer may have written a space before the text that the text has not
        texts = [vocab.tokens[i][len(vocab.tokens[i]) - (b - a) :] for i, a, b in zip(ids, starts, ends, strict=True)]
        sides.append(Side(tuple(ids), tuple(starts), tuple(ends), tuple(texts)))
    aligned, taught = batch.aligned[0].tolist(), batch.taught[0].tolist()
    predicts = set(batch.rows.tolist())
    kinds = [
        "" if i not in predicts else "aligned" if aligned[i] else "inside" if taught[i] else "untaught"
        for i in range(len(sides[0].ids))
    ]
    common = sorted(set(sides[0].ends) & set(sides[1].ends))
    return WindowTokens(number, batch, *sides, tuple(kinds), tuple(common))
