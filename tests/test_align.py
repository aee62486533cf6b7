"""Alignment against a walk with two pointers, and the windows that are cut along it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit.align import Ragged, align, align_many, byte_ends, cut_many, cut_windows


@st.composite
def two_tokenizations(draw, most: int = 60, starts: bool = True, longest: int = 6):
    """Byte lengths of two tokenizations of one text of at least a byte, with or without start tokens of no bytes."""
    size = draw(st.integers(1, most))
    sides = []
    for _ in range(2):
        pieces = []
        while sum(pieces) < size:
            pieces.append(min(draw(st.integers(1, longest)), size - sum(pieces)))
        zeros = draw(st.integers(0, 2)) if starts else 0
        sides.append(np.array([0] * zeros + pieces))
    return sides


def walk(student_ends, teacher_ends):
    """Two pointers, one position at a time: teacher_index, aligned, boundaries."""
    index, aligned, boundaries = [], [], []
    for i, here in enumerate(student_ends):
        j = -1
        while j + 1 < len(teacher_ends) and teacher_ends[j + 1] <= here:
            j += 1
        index.append(j)
        last_here = i + 1 == len(student_ends) or student_ends[i + 1] != here
        aligned.append(j >= 0 and teacher_ends[j] == here and last_here)
        if aligned[-1]:
            boundaries.append((i, j))
    return index, aligned, boundaries


def check_against_walk(student_ends, teacher_ends):
    ours = align(student_ends, teacher_ends)
    index, aligned, boundaries = walk(student_ends, teacher_ends)
    assert ours.teacher_index.tolist() == index
    assert ours.aligned.tolist() == aligned
    assert list(zip(ours.student_boundaries.tolist(), ours.teacher_boundaries.tolist(), strict=True)) == boundaries
    assert ours.spans == max(len(boundaries) - 1, 0)
    return ours


@settings(max_examples=300)
@given(two_tokenizations())
def test_align_is_the_walk(lengths):
    ours = check_against_walk(*(byte_ends(side) for side in lengths))
    assert ours.aligned[-1], "both end where the text ends"


@settings(max_examples=100)
@given(two_tokenizations(), st.integers(0, 5), st.integers(0, 5))
def test_align_with_incomplete_tails(lengths, drop_student, drop_teacher):
    student, teacher = (byte_ends(side) for side in lengths)
    check_against_walk(student[: max(len(student) - drop_student, 1)], teacher[: max(len(teacher) - drop_teacher, 1)])


@settings(max_examples=100)
@given(two_tokenizations())
def test_spans_hold_the_same_bytes(lengths):
    student, teacher = (byte_ends(side) for side in lengths)
    ours = align(student, teacher)
    assert (student[ours.student_boundaries] == teacher[ours.teacher_boundaries]).all()
    assert (np.diff(student[ours.student_boundaries]) > 0).all()


def test_the_example_with_a_start_token_on_both_sides():
    # "the|re| now" and "there| now"
    ours = align(np.array([0, 3, 5, 9]), np.array([0, 5, 9]))
    assert ours.aligned.tolist() == [True, False, True, True]
    assert ours.teacher_index.tolist() == [0, 0, 1, 2]


def test_without_a_start_token_the_teacher_has_nothing_yet():
    ours = align(np.array([2, 5]), np.array([5]))
    assert ours.teacher_index.tolist() == [-1, 0]
    assert ours.aligned.tolist() == [False, True]
    ours = align(np.array([0, 2, 5]), np.array([2, 5]))
    assert ours.teacher_index.tolist() == [-1, 0, 1]
    assert ours.aligned.tolist() == [False, True, True]


def test_of_several_tokens_at_one_byte_the_last_predicts():
    ours = align(np.array([0, 0, 4]), np.array([0, 0, 0, 4]))
    assert ours.aligned.tolist() == [False, True, True]
    assert ours.teacher_index.tolist() == [2, 2, 3]


def test_an_incomplete_tail_belongs_to_no_span():
    ours = align(np.array([0, 3, 6, 7]), np.array([0, 3, 5]))
    assert ours.aligned.tolist() == [True, True, False, False]
    assert ours.teacher_index.tolist() == [0, 1, 2, 2]
    assert ours.spans == 1


@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (3, 0), (0, 3)])
def test_empty_sides(student, teacher):
    ours = align(np.arange(student), np.arange(teacher))
    assert ours.teacher_index.tolist() == [-1] * student
    assert ours.aligned.tolist() == [False] * student
    assert ours.aligned.dtype == bool
    assert len(ours.student_boundaries) == len(ours.teacher_boundaries) == ours.spans == 0


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_ends_that_decrease_are_refused(who):
    good, bad = np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4])
    with pytest.raises(ValueError, match=rf"align: .*{who} tokenization that goes back at position 2"):
        align(*((bad, good) if who == "student" else (good, bad)))


def test_byte_ends_of_small_integers_do_not_wrap():
    assert byte_ends(np.full(300, 100, dtype=np.uint8)).tolist()[-1] == 30_000


def common_bytes(student, teacher):
    return sorted({0} | (set(student.tolist()) & set(teacher.tolist())))


def tokens_in(ends, first, last):
    return int(((ends > first) & (ends <= last)).sum())


def naive_windows(student, teacher, length, stride):
    """One common boundary at a time."""
    at = common_bytes(student, teacher)

    def most(first, last):
        return max(tokens_in(student, first, last), tokens_in(teacher, first, last))

    out, here = [], 0
    while here + 1 < len(at):
        if most(at[here], at[here + 1]) > length:  # fits nowhere
            here += 1
            continue
        first = min(f for f in range(here + 1) if most(at[f], at[here]) <= length - stride)
        if most(at[first], at[here + 1]) > length:
            first = here
        end = max(e for e in range(here + 1, len(at)) if most(at[first], at[e]) <= length)
        out.append((at[first], at[here], at[end]))
        here = end
    return out


@settings(max_examples=300)
@given(two_tokenizations(most=80, starts=False, longest=9), st.integers(1, 12), st.data())
def test_windows(lengths, length, data):
    student, teacher = (byte_ends(side) for side in lengths)
    stride = data.draw(st.one_of(st.none(), st.integers(1, length)))
    windows = cut_windows(student, teacher, length=length, stride=stride)
    assert windows.dtype == np.int64
    assert windows.shape[1:] == (3,)
    at = common_bytes(student, teacher)
    scored = []
    for first, begin, end in windows.tolist():
        assert first <= begin < end
        assert {first, begin, end} <= set(at)
        assert tokens_in(student, first, end) <= length
        assert tokens_in(teacher, first, end) <= length
        scored += range(begin, end)
    assert len(scored) == len(set(scored)), "a byte is scored twice"
    assert scored == sorted(scored)
    fits = []
    for left, right in pairwise(at):
        if max(tokens_in(student, left, right), tokens_in(teacher, left, right)) <= length:
            fits += range(left, right)
    assert scored == fits, "what is left out is what fits nowhere, and only that"
    if stride is None or stride == length:
        assert (windows[:, 0] == windows[:, 1]).all()
    assert [tuple(w) for w in windows.tolist()] == naive_windows(student, teacher, length, stride or length)


def test_stride_gives_context():
    ends = np.arange(1, 101)
    windows = cut_windows(ends, ends, length=20, stride=5).tolist()
    assert windows[0] == [0, 0, 20]
    assert windows[1:] == [[b - 15, b, b + 5] for b in range(20, 100, 5)]


def test_context_is_counted_on_the_side_with_more_tokens():
    student, teacher = np.arange(2, 101, 2), np.arange(1, 101)
    windows = cut_windows(student, teacher, length=20, stride=10).tolist()
    assert windows[1] == [10, 20, 30]


def test_a_long_stretch_is_left_out_alone():
    # the teacher ends no token between bytes 10 and 30
    student, teacher = np.arange(1, 41), np.array([*range(1, 11), *range(30, 41)])
    windows = cut_windows(student, teacher, length=10)
    assert windows.tolist() == [[0, 0, 10], [30, 30, 40]]


def test_a_stretch_that_fits_only_without_context_goes_without():
    student, teacher = np.arange(1, 21), np.array([*range(1, 11), 19, 20])
    assert cut_windows(student, teacher, length=10, stride=5).tolist()[1] == [10, 10, 20]


def test_nothing_in_common_gives_no_window():
    windows = cut_windows(np.array([2, 4]), np.array([3, 5]), length=8)
    assert windows.shape == (0, 3)
    assert cut_windows(np.zeros(0, np.int64), np.zeros(0, np.int64), length=8).shape == (0, 3)


@pytest.mark.parametrize(("length", "stride"), [(8, 9), (8, 0), (8, -1), (0, None)])
def test_a_stride_beyond_the_window_is_refused(length, stride):
    with pytest.raises(ValueError, match=r"cut_windows: expected 1 <= stride <= length"):
        cut_windows(np.arange(1, 40), np.arange(1, 40), length=length, stride=stride)


@settings(max_examples=150)
@given(st.lists(two_tokenizations(), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 12))
def test_many_texts_at_once_are_each_alone(texts, length, stride):
    stride = min(stride, length)
    each = [[byte_ends(side) for side in text] for text in [*texts, ([], [])]]
    student, teacher = (Ragged.of(side) for side in zip(*each, strict=True))
    index, aligned = align_many(student, teacher)
    alone = [align(*text) for text in each]
    assert index.tolist() == np.concatenate([a.teacher_index for a in alone]).tolist()
    assert aligned.tolist() == np.concatenate([a.aligned for a in alone]).tolist()
    windows = [[n, *w] for n, t in enumerate(each) for w in cut_windows(*t, length=length, stride=stride).tolist()]
    assert cut_many(student, teacher, length=length, stride=stride).tolist() == windows


def test_a_byte_between_two_texts_keeps_them_apart():
    """The second text begins where the first one ends, if nothing lies between them."""
    student, teacher = Ragged.of([np.array([1, 3]), np.array([0, 2])]), Ragged.of([np.array([3]), np.array([2])])
    index, aligned = align_many(student, teacher)
    assert index.tolist() == [-1, 0, -1, 0]
    assert aligned.tolist() == [False, True, False, True]
