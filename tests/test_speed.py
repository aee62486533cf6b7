"""kd_kit/speed.py: which tokens a speed counts. How fast is a matter of benchmarks."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import pages, pair, teacher, tiny_student

from kd_kit import build_data, speed
from kd_kit.speed import machine_words, tokens_per_second


@pytest.fixture(scope="module")
def windows():
    return build_data(pages(2), pair(), held_out=[pages()[3]], window=32).held_out


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_own_tokens_without_padding_over_the_time(windows, side, monkeypatch):
    """With a clock that moves one second at each look, a round takes one second."""
    clock = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    model = tiny_student() if side == "student" else teacher()
    mode = model.training
    found = tokens_per_second(model, windows, side=side, batch_size=2)
    chosen = windows.chosen(4)
    assert found == sum(len(windows.ids(number)[side == "teacher"]) for number in chosen)
    assert model.training is mode


def test_long_rounds_are_not_repeated(windows, monkeypatch):
    looks = []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: looks.append(1) or 10.0 * len(looks))
    tokens_per_second(tiny_student(), windows, batch_size=2)
    assert len(looks) == 6, "the start, two rounds of two looks, and the end"


def test_the_machine_is_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine_words(torch.device("cpu")) == "1 CPU thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine_words(torch.device("cpu")) == "3 CPU threads"
