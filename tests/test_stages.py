"""kd_kit/stages.py: shares and learning rates at every step of a run."""

from __future__ import annotations

import itertools
import math

import pytest
from helpers import make_trainer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kd_kit import LearningRate, Schedule, constant, kd_term, lm_term, piecewise

NAMES = ("lm", "kd", "span")


@st.composite
def lines(draw):
    """A line of one to five points, at least one of them above 0."""
    progress = sorted(draw(st.lists(st.floats(0, 1), min_size=1, max_size=5)))
    factors = draw(st.lists(st.floats(0, 100), min_size=len(progress), max_size=len(progress)))
    return list(zip(progress, factors, strict=True))


@settings(deadline=None, max_examples=200)
@given(
    weights=st.fixed_dictionaries({name: st.floats(0, 10) for name in NAMES}),
    named=st.dictionaries(st.sampled_from(NAMES), lines()),
    total=st.integers(1, 40),
)
def test_shares_sum_to_one_at_every_step_of_any_schedule(weights, named, total):
    schedule = Schedule("random", named)
    for step in range(total + 1):
        try:
            shares = schedule.shares(weights, step / total)
        except ValueError as error:
            assert "expected at least one term with weight at progress" in str(error)
            continue
        assert shares.keys() == weights.keys()
        assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
        assert all(0 <= share <= 1 for share in shares.values())


@settings(deadline=None, max_examples=200)
@given(line=lines())
def test_half_way_every_enabled_term_has_half_of_its_factor_or_is_named(line):
    schedule = Schedule("random", {"kd": line})
    full = max(factor for _, factor in line)
    weights = {"lm": 0.5, "kd": 0.5}
    lm = schedule.shares(weights, 0.5)["lm"]
    at_half = (1 - lm) / lm if lm > 0 else math.inf  # both weights are equal and lm keeps factor 1
    assume(abs(at_half - full / 2) > 1e-6 * max(full, 1))
    if at_half >= full / 2 and full > 0:
        schedule.check(weights)
    else:
        with pytest.raises(ValueError, match=r"at least half of the full factor .* of 'kd' at 50% progress"):
            schedule.check(weights)


def test_a_line_that_falls_to_0_never_goes_below():
    """(23 - 0) * 0.378 / 0.378 rounds to more than 23."""
    schedule = piecewise(lm=[(0.0, 0.0), (0.622, 23.0), (1.0, 0.0)])
    assert schedule.shares({"lm": 1.0, "kd": 1.0}, 1.0) == {"lm": 0.0, "kd": 1.0}


def test_the_curriculum_that_never_taught_is_refused():
    """6.7% of the full weight at half time, as an earlier run had for 12,500 steps."""
    slow = piecewise(kd=[(0, 0), (0.5, 0.067), (1, 1)])
    with pytest.raises(
        ValueError, match=r"Schedule 'piecewise': .*half of the full factor 1 of 'kd' at 50% progress, got 0\.067"
    ):
        slow.check({"lm": 0.3, "kd": 0.7})
    piecewise(kd=[(0, 0), (0.5, 0.5), (1, 1)]).check({"lm": 0.3, "kd": 0.7})


def test_the_trainer_refuses_it_before_anything_begins(tmp_path):
    for schedule, said in (
        (piecewise(kd=[(0, 0), (0.5, 0.067), (1, 1)]), "half of the full factor 1 of 'kd'"),
        (piecewise(feature=[(0, 1)]), "expected one of the terms lm, kd, got a line for 'feature'"),
        (piecewise(kd=[(0, 0)], lm=[(0, 0)]), "at least half of the full factor 0 of 'kd'"),
    ):
        with pytest.raises(ValueError, match=said):
            make_trainer(tmp_path / "run", schedule=schedule)
    assert not (tmp_path / "run" / "RUN.json").exists()


def test_a_moment_without_any_term_is_refused():
    weights = {"span": 0.5, "kd": 0.5}
    for at in (0.0, 0.1, 0.77, 1.0):  # the factor is 1 but at one moment
        hole = [(p, float(p != at)) for p in sorted({0.0, 0.5, 1.0, at})]
        with pytest.raises(ValueError, match=r"expected at least one term with weight at progress"):
            piecewise(kd=hole, span=hole).check(weights)
    with pytest.raises(ValueError, match=r"at least one term with weight"):
        constant().check({"lm": 0.0, "kd": 0.0})


def test_the_lm_term_never_vanishes():
    with pytest.raises(ValueError, match="expected the LM term to count at every step"):
        piecewise(lm=[(0.0, 1.0), (0.8, 1.0), (1.0, 0.0)]).check({"lm": 0.5, "kd": 0.5})


@pytest.mark.parametrize(
    "line",
    [[], [(0.5, 1), (0.2, 1)], [(-0.1, 1)], [(0, 1), (1.1, 1)], [(0, -1)], [(0, 1), (1, -0.01)]],
)
def test_lines_that_are_none_are_refused(line):
    with pytest.raises(ValueError, match=r"^Schedule: expected .*'kd'"):
        piecewise(kd=line)


def test_a_line_is_straight_between_points_and_flat_outside():
    schedule = piecewise(kd=[(0.2, 1.0), (0.4, 3.0)])
    weights = {"lm": 1.0, "kd": 1.0}
    for progress, factor in ((0, 1), (0.2, 1), (0.25, 1.5), (0.3, 2), (0.4, 3), (0.5, 3), (1, 3)):
        assert schedule.shares(weights, progress)["kd"] == pytest.approx(factor / (1 + factor))
    jump = piecewise(kd=[(0.3, 1.0), (0.3, 2.0)])
    assert jump.shares(weights, 0.29)["kd"] == pytest.approx(0.5)
    assert jump.shares(weights, 0.31)["kd"] == pytest.approx(2 / 3)


def test_constant_keeps_the_weights():
    for progress in (0, 0.25, 0.5, 0.75, 1):
        assert constant().shares({"lm": 1, "kd": 3}, progress) == {"lm": 0.25, "kd": 0.75}


# --- learning rate ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
    total=st.integers(1, 300),
)
def test_the_rate_is_never_zero_rises_once_and_falls_once(warmup, decay, floor, total):
    assume(warmup + decay <= 1)
    rate = LearningRate(warmup, decay, floor)
    factors = [rate.factor(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    rising = max(1, round(warmup * total))
    if rising <= total:
        assert factors[rising - 1] == 1.0, "the peak is reached at the stated step"
    assert all(a < b for a, b in itertools.pairwise(factors[:rising]))
    falling = factors[rising - 1 :]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(factor >= floor for factor in falling)


def test_known_factors():
    rate = LearningRate(warmup=0.1, decay=0.2)
    assert [rate.factor(step, 100) for step in (0, 4, 9, 10, 79)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert rate.factor(80, 100) < 1
    assert rate.factor(99, 100) == pytest.approx(1 - math.sqrt(1 - 1 / 21))
    assert LearningRate(warmup=0, decay=0).factor(0, 10) == 1.0
    assert LearningRate(warmup=0, decay=0).factor(9, 10) == 1.0
    assert LearningRate(warmup=0, decay=0.5, floor=0.3).factor(9, 10) > 0.3
    assert LearningRate().factor(0, 1) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup": -0.1},
        {"decay": -0.1},
        {"warmup": 0.6, "decay": 0.6},
        {"floor": -0.1},
        {"floor": 1.1},
        {"warmup": float("nan")},
    ],
)
def test_rates_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^LearningRate: expected warmup and decay"):
        LearningRate(**arguments)


def test_the_rate_counts_optimizer_steps_whatever_the_accumulation(tmp_path):
    """The earlier run's rate was shown as 0 for many steps, and its warm-up counted in another unit."""
    plan = LearningRate(warmup=0.5, decay=0.25)
    terms = [lm_term(0.1), kd_term(0.9, top_k=8)]
    for accumulation in (1, 3):
        trainer = make_trainer(
            tmp_path / str(accumulation), steps=8, lr_schedule=plan, accumulation=accumulation, terms=terms
        )
        trainer.fit()
        steps, rates = trainer.history.column("lr", "student")
        assert steps == list(range(1, 9))
        assert rates == pytest.approx([1e-2 * plan.factor(step, 8) for step in range(8)])
        assert rates[3] == pytest.approx(1e-2)
        assert min(rates) > 0
