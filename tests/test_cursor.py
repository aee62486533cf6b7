"""kd_kit/cursor.py: the place of a run in its text."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from kd_kit.cursor import Cursor

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


def left_out(ranges) -> Cursor:
    cursor = Cursor()
    for first, behind in ranges:
        cursor = cursor.without(first, behind)
    return cursor


@given(ranges=RANGES, count=st.integers(0, 60))
def test_what_comes_is_every_position_in_order_but_those_left_out(ranges, count):
    out = {p for first, behind in ranges for p in range(first, behind)}
    expected = [p for p in range(200) if p not in out][:count]
    assert list(left_out(ranges).upcoming(count)) == expected


@given(ranges=RANGES, count=st.integers(1, 30), stop=st.integers(1, 29))
def test_a_run_that_stops_anywhere_goes_on_with_what_would_have_come(ranges, count, stop):
    whole = list(left_out(ranges).upcoming(count + stop))
    again = left_out(ranges).behind(whole[stop - 1])
    again = Cursor.from_json(json.loads(json.dumps(again.to_json())))
    assert list(again.upcoming(count)) == whole[stop:]


def test_ranges_that_touch_become_one():
    assert left_out([(5, 7), (1, 2), (7, 9), (6, 8)]).left_out == ((1, 2), (5, 9))


def test_what_is_left_out_does_not_move_the_place():
    assert Cursor(12).without(3, 5) == Cursor(12, ((3, 5),))
