"""Words of held-out text, counted by white space: what a likelihood is divided by to compare it across tokenizers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kd_kit.data import WindowSet

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Words:
    """How many words of a text begin in the scored parts of some windows, and how many bytes those parts have."""

    words: int
    bytes: int


def count_words(windows: WindowSet, limit: int | None = None) -> Words:
    """The words of all windows, or of ``limit`` of them, the same ones that evaluations take.

    A word is what ``str.split()`` makes of a document, with its punctuation, and belongs to the window in whose scored
    part it begins: over all windows every word counts once, whatever the windows cut through.
    """
    chosen = windows.chosen(limit)
    table = windows.table[chosen]
    count = 0
    for number in np.unique(table[:, 0]).tolist():
        document = windows.documents[number]
        written = windows.pair.student_vocab.bytes_of(document.student_ids)
        size = int(document.student_ends[-1])  # a first token may be written with a space that the text has not
        starts = byte_starts(written[len(written) - size :].decode(errors="surrogateescape"))
        scored = table[table[:, 0] == number][:, 2:4]
        count += int((np.searchsorted(starts, scored[:, 1]) - np.searchsorted(starts, scored[:, 0])).sum())
    return Words(count, int((table[:, 3] - table[:, 2]).sum()))


def byte_starts(text: str) -> np.ndarray:
    """[W] int64, the byte of the UTF-8 text at which each word begins.

    Bytes that are no UTF-8 are expected as the lone surrogates that ``errors="surrogateescape"`` makes of them.
    """
    at = np.array([found.start() for found in _WORD.finditer(text)], dtype=np.int64)
    if text.isascii():
        return at
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    sizes[(points >= 0xDC80) & (points <= 0xDCFF)] = 1
    return np.concatenate([[0], np.cumsum(sizes)])[at]
