"""Two tokenizations of one text, matched by bytes.

Bytes, not characters: byte-level tokenizers cut inside a character, and every tokenizer that can be read exactly
agrees on the bytes. All of it is cumulative sums and one binary search, so it costs far less than tokenising.
"""

from __future__ import annotations

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
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(
            f"cut_windows: expected 1 <= stride <= length, got stride {stride} and length {length}; "
            "a longer stride would leave bytes out"
        )
    alignment = align(student_ends, teacher_ends)
    # token counts on both sides at every common boundary, with the document's start as boundary 0
    s = np.concatenate([[0], alignment.student_boundaries + 1])
    t = np.concatenate([[0], alignment.teacher_boundaries + 1])
    at = np.concatenate([[0], student_ends[alignment.student_boundaries]]).astype(np.int64)
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
    return np.array(windows, dtype=np.int64).reshape(-1, 3)
