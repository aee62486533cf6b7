"""kd_kit/packing.py: every item once, no row too full, and few rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit.packing import LEAST_SAVED, best_fit, side_by_side

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def naive_best_fit(sizes: list[int], room: int) -> list[int]:
    """Row by row, looking through all of them."""
    left, rows = [], [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [(space, row) for row, space in enumerate(left) if space >= sizes[item]]
        if not fitting:
            left.append(room)
            fitting = [(room, len(left) - 1)]
        row = min(fitting)[1]
        left[row] -= sizes[item]
        rows[item] = row
    return rows


def room_left(sizes, rows, room) -> list[int]:
    return sorted((room - np.bincount(rows, sizes)).astype(int).tolist())


@settings(max_examples=200)
@given(SIZES, st.integers(40, 100))
def test_rows_are_as_full_as_those_of_a_search_through_all_of_them(sizes, room):
    found = best_fit(sizes, room)
    assert room_left(sizes, found, room) == room_left(sizes, naive_best_fit(sizes, room), room)
    assert min(room_left(sizes, found, room)) >= 0
    assert found.tolist() == best_fit(sizes, room).tolist()


@pytest.mark.parametrize("sizes", [[5, 0], [41]])
def test_what_fits_nowhere_is_refused(sizes):
    with pytest.raises(ValueError, match="best_fit: expected sizes between 1 and 40"):
        best_fit(sizes, 40)


@settings(max_examples=200)
@given(SIZES)
def test_windows_stand_whole_and_in_order_side_by_side(sizes):
    lengths = np.array(sizes)
    packed, width = side_by_side(lengths), max(sizes)
    if not packed.size:
        return
    assert packed.size <= (1 - LEAST_SAVED) * len(sizes) * width
    places = packed[packed >= 0]
    assert sorted(places.tolist()) == [n * width + t for n, size in enumerate(sizes) for t in range(size)]
    for row in packed:
        there = row[row >= 0]
        assert (row[: len(there)] >= 0).all(), "nothing between the windows"
        begins = np.flatnonzero(there % width == 0)
        for window in np.split(there, begins[1:]):
            assert (np.diff(window) == 1).all()
            assert len(window) == sizes[window[0] // width]


def test_windows_of_one_length_stay_as_they_are():
    assert side_by_side(np.full(8, 512)).shape == (0, 0)
    assert side_by_side(np.array([512] * 7 + [200])).shape == (0, 0), "a twelfth is too little"
    assert side_by_side(np.array([512] * 6 + [200, 200])).shape == (7, 512)


def test_wider_rows_where_they_fill_better():
    assert side_by_side(np.array([100] + [60] * 5)).shape == (1, 400)
    assert side_by_side(np.array([1000] + [600] * 5)).shape == (0, 0), "but not of thousands of places"
