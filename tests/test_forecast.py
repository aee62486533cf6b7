"""kd_kit/forecast.py: how many sessions, and how to go on."""

from __future__ import annotations

import math

import pytest

from kd_kit import forecast as module
from kd_kit.forecast import forecast, how_to_go_on, sessions_needed
from kd_kit.session import Session


def session(tmp_path, *, budget=None, gone=0.0, **more) -> Session:
    made = Session(tmp_path / "run", device="cpu", precision="no", budget=budget, clock=lambda: gone, **more)
    made._started = 0.0
    return made


@pytest.mark.parametrize(
    ("to_go", "left", "later", "count"),
    [(0, 0, 0, 1), (100, 100, 50, 1), (101, 100, 50, 2), (200, 100, 50, 3), (100, -5, 50, 3), (10, 5, 0, math.inf)],
)
def test_sessions_are_counted_with_this_one(to_go, left, later, count):
    assert sessions_needed(to_go, left, later) == count


def test_without_a_limit_only_the_time_is_said(tmp_path):
    assert forecast(session(tmp_path), to_go=7200, reserve=60, lead=30) == "about 2.0 h to go"


def test_what_fits_is_said_to_fit(tmp_path):
    text = forecast(session(tmp_path, budget=3600, gone=600), to_go=2000, reserve=60, lead=30)
    assert text == "about 33 min to go, this session has 49 min for it"


def test_what_does_not_fit_says_how_many_sessions(tmp_path):
    text = forecast(session(tmp_path, budget=3600, gone=600), to_go=10000, reserve=100, lead=500)
    # 2,900 s now and 3,000 s in every later one
    assert text == "about 2.8 h to go, this session has 48 min for it: 4 sessions of 60 min, this one included"


def test_sessions_without_time_for_training_are_no_plan(tmp_path):
    text = forecast(session(tmp_path, budget=100, gone=90), to_go=500, reserve=40, lead=70)
    assert "a session of 2 min has no time for training: 70 s go by before the first step" in text


def test_how_to_go_on_names_the_run_and_where_it_is_found(tmp_path, monkeypatch):
    assert how_to_go_on(session(tmp_path)) == (
        "to go on: run the notebook again, with the same build_session(run='run')"
    )
    mirrored = session(tmp_path, mirror="hf://datasets/me/it", name="mine")
    assert how_to_go_on(mirrored) == (
        "to go on: run the notebook again, with the same build_session(run='mine'); in an empty folder it is found in "
        "hf://datasets/me/it"
    )
    monkeypatch.setattr(module, "on_kaggle", lambda: True)
    assert "with this version's output as its input (Add Input, Your Work)" in how_to_go_on(session(tmp_path))
