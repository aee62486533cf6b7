"""Two tokenizations of one text, matched by bytes.

Bytes, not characters: byte-level tokenizers cut inside a character, and every tokenizer that can be read exactly
agrees on the bytes. All of it is cumulative sums and one binary search, so it costs far less than tokenising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_kit.types import Alignment


def byte_ends(lengths: np.ndarray) -> np.ndarray:
    """The byte at which each position stands: cumulative sum of the tokens' byte lengths, [n] int64."""
    return np.cumsum(lengths, dtype=np.int64)


def _last_of_equal(ends: np.ndarray) -> np.ndarray:
    """True at the last of several positions that stand at the same byte (tokens of no bytes), [n] bool."""
    last = np.ones(len(ends), dtype=bool)
    last[:-1] = ends[1:] != ends[:-1]
    return last


def align(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Alignment:
    """Match the positions of two tokenizations of one text.

    Where a token of no bytes (a document-start token) makes several positions stand at one byte, only the last of
    them predicts what follows it, so only that one is aligned.

    Shapes:
        student_ends: [T] int64, non-decreasing, from :func:`byte_ends`
        teacher_ends: [S] int64, likewise, over the same text

    Raises:
        ValueError: ends that decrease, which no tokenization of a text has.

    Example:
        >>> a = align(np.array([0, 3, 5, 9]), np.array([0, 5, 9]))   # "the|re| now" and "there| now"
        >>> a.aligned.tolist(), a.student_boundaries.tolist()
        ([True, False, True, True], [0, 2, 3])
    """
    for who, ends in (("student", student_ends), ("teacher", teacher_ends)):
        if len(ends) > 1 and (np.diff(ends) < 0).any():
            raise ValueError(
                f"align: expected non-decreasing byte ends, got a {who} tokenization that goes back at position "
                f"{int(np.argmax(np.diff(ends) < 0)) + 1}; pass cumulative byte lengths (align.byte_ends)"
            )
    if len(teacher_ends) == 0 or len(student_ends) == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return Alignment(np.full(len(student_ends), -1), np.zeros(len(student_ends), bool), nothing, nothing)
    index = np.searchsorted(teacher_ends, student_ends, side="right") - 1
    aligned = (index >= 0) & (teacher_ends[np.maximum(index, 0)] == student_ends) & _last_of_equal(student_ends)
    boundaries = np.flatnonzero(aligned)
    return Alignment(index, aligned, boundaries, index[boundaries])


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one behind the other in one array.

    Attributes:
        values: [n] of any dtype. starts: [R + 1] int64, where each row begins; the last is n.
    """

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Ragged:
        """These rows; at least one."""
        return cls(np.concatenate(rows), starts_of([len(row) for row in rows]))

    @property
    def counts(self) -> np.ndarray:
        """[R] int64, the length of every row."""
        return np.diff(self.starts)

    def row_of(self) -> np.ndarray:
        """[n] int64, the row that every value stands in."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)


def starts_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """[R + 1] int64, where rows of these lengths begin in one array, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def align_many(student_ends: Ragged, teacher_ends: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """:func:`align` for many texts at once: of short ones it takes a small part of the time of as many calls.

    Args:
        student_ends, teacher_ends: byte ends, a text a row.

    Returns:
        ``teacher_index`` and ``aligned`` of :class:`Alignment`, [n] each, row behind row; the index counts within its
        row.

    Raises:
        ValueError: ends that decrease.
    """
    sides = (student_ends, teacher_ends)
    # the texts one after the other, with a byte between them so that no two of them meet at one
    last = np.maximum(*map(_last_of_rows, sides))
    before = starts_of(last + 1)[:-1]
    whole = align(*(side.values + np.repeat(before, side.counts) for side in sides))
    index = whole.teacher_index - np.repeat(teacher_ends.starts[:-1], student_ends.counts)
    return np.maximum(index, -1), whole.aligned


def _last_of_rows(rows: Ragged) -> np.ndarray:
    """[R], the last value of every row, 0 of an empty one."""
    out = np.zeros(len(rows.starts) - 1, dtype=np.int64)
    there = rows.counts > 0
    out[there] = rows.values[rows.starts[1:][there] - 1]
    return out


def cut_windows(
    student_ends: np.ndarray, teacher_ends: np.ndarray, *, length: int, stride: int | None = None
) -> np.ndarray:
    """Cut one document into windows at bytes where both tokenizers have a boundary.

    Every window holds at most ``length`` tokens of either side. A stretch between two common boundaries that is
    longer than a window (one side never ends a token there) fits nowhere and is left out. With ``stride`` smaller
    than ``length`` the windows overlap: each starts at the earliest common boundary that is at most
    ``length - stride`` tokens (of the side that has more of them) before the bytes that it scores, so that these are
    predicted with context. Where the next stretch fits only without that context, it goes without.

    Shapes:
        student_ends: [n] int64, byte ends of the document's tokens, no document-start token
        teacher_ends: [m] int64
        returns: [W, 3] int64, first byte, first scored byte and end byte of every window; the scored bytes of all
            windows are disjoint and together all bytes that fit

    Raises:
        ValueError: ``length`` below 1, or a ``stride`` outside 1 .. ``length``.
    """
    return cut_many(Ragged.of([student_ends]), Ragged.of([teacher_ends]), length=length, stride=stride)[:, 1:]


def cut_many(student_ends: Ragged, teacher_ends: Ragged, *, length: int, stride: int | None = None) -> np.ndarray:
    """:func:`cut_windows` for many documents at once.

    Shapes:
        returns: [W, 4] int64, the number of its document and the three bytes of every window, document by document

    Raises:
        ValueError: as :func:`cut_windows`.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(
            f"cut_windows: expected 1 <= stride <= length, got stride {stride} and length {length}; "
            "a longer stride would leave bytes out"
        )
    index, aligned = align_many(student_ends, teacher_ends)
    student_boundaries = np.flatnonzero(aligned)
    row = student_ends.row_of()[student_boundaries]
    # token counts on both sides at every common boundary
    student = student_boundaries + 1 - student_ends.starts[row]
    teacher = index[student_boundaries] + 1
    at = student_ends.values[student_boundaries]
    ends = np.cumsum(np.bincount(row, minlength=len(student_ends.starts) - 1))
    found, begin = [], 0
    for number, end in enumerate(ends.tolist()):
        inside = slice(begin, end)
        if begin == end:
            continue
        if student[end - 1] <= length and teacher[end - 1] <= length:  # all of it is one window
            found.append([(number, 0, 0, at[end - 1])])
        else:
            found.append([(number, *w) for w in _cut(student[inside], teacher[inside], at[inside], length, stride)])
        begin = end
    return np.array([w for windows in found for w in windows], dtype=np.int64).reshape(-1, 4)


def _cut(student, teacher, at, length: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of one document, from the token counts and bytes of its common boundaries."""
    # with the document's start as boundary 0
    s, t, at = (np.concatenate([[0], some]) for some in (student, teacher, at))
    context = length - stride

    def reach(first: int) -> int:
        """The last boundary that a window starting at boundary ``first`` can hold."""
        by_student = np.searchsorted(s, s[first] + length, side="right")
        return int(min(by_student, np.searchsorted(t, t[first] + length, side="right"))) - 1

    windows, here = [], 0
    while here < len(at) - 1:
        first = int(max(np.searchsorted(s, s[here] - context), np.searchsorted(t, t[here] - context)))
        end = reach(first)
        if end <= here:  # the next stretch is long: it may still fit without context
            first, end = here, reach(here)
        if end <= here:
            here += 1
            continue
        windows.append((at[first], at[here], at[end]))
        here = end
    return windows
