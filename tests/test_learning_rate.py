"""kd_kit/learning_rate.py: warm-up, stable, decay, and a decay that begins before its time."""

from __future__ import annotations

import itertools
import math

import pytest
from helpers import make_trainer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kd_kit import (
    LearningRate,
    cosine,
    kd_term,
    lm_term,
)


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


@pytest.mark.parametrize("wrong", ["0.1", None, True, [0.1]])
@pytest.mark.parametrize("name", ["warmup", "decay", "floor"])
def test_rates_of_another_kind_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"^LearningRate: expected {name} to be a number such as 0.1, got"):
        LearningRate(**{name: wrong})


@pytest.mark.parametrize("wrong", ["exp", None, 1, ["sqrt"]])
def test_shapes_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^LearningRate: expected shape to be one of 'sqrt', 'linear', 'cosine', got"):
        LearningRate(shape=wrong)


def test_steps_that_are_none_are_refused():
    for step, total in ((-1, 10), (0.5, 10), (None, 10), (0, 0), (0, 2.5), (0, "10")):
        with pytest.raises(ValueError, match=r"^LearningRate\.factor: expected a"):
            LearningRate().factor(step, total)


def test_shapes_of_the_decay():
    """9 falling steps are tenths of the way down."""
    for shape, by_hand in (
        ("sqrt", lambda x: 1 - x**0.5),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
    ):
        rate = LearningRate(warmup=0.1, decay=0.45, floor=0.2, shape=shape)
        found = [rate.factor(step, 20) for step in range(11, 20)]
        assert found == pytest.approx([0.2 + 0.8 * by_hand(k / 10) for k in range(1, 10)])
        assert rate.factor(10, 20) == 1
        assert rate.factor(20, 20) == rate.factor(19, 20) == rate.factor(500, 20)


def test_cosine_falls_from_the_warm_up_to_its_floor():
    rate = cosine(warmup=0.1, floor=0.1)
    found = [rate.factor(step, 1000) for step in range(1000)]
    assert found[99] == 1
    assert all(a > b for a, b in itertools.pairwise(found[99:]))
    assert found[549] == pytest.approx(0.55, abs=1e-3)  # half way between 1 and the floor
    assert found[-1] == pytest.approx(0.1, abs=1e-5)
    assert found[-1] > 0.1
    with pytest.raises(ValueError, match=r"^cosine: expected warmup"):
        cosine("0.1")
    with pytest.raises(ValueError, match=r"^cosine: expected floor"):
        cosine(floor=2)


@settings(deadline=None, max_examples=300)
@given(
    warmup=st.floats(0, 1),
    decay=st.floats(0.01, 1),
    floor=st.floats(0, 1),
    shape=st.sampled_from(["sqrt", "linear", "cosine"]),
    total=st.integers(1, 200),
    data=st.data(),
)
def test_an_early_decay_never_raises_the_rate_and_ends_like_the_planned_one(warmup, decay, floor, shape, total, data):
    assume(warmup + decay <= 1)
    rate = LearningRate(warmup, decay, floor, shape)
    falling = rate.decay_steps(total)
    assert falling == round(decay * total)
    start = data.draw(st.integers(0, total - 1), label="decay_from")
    end = start + falling
    plan = [rate.factor(step, total) for step in range(total)]
    early = [rate.factor(step, total, decay_from=start) for step in range(max(end, start + 1) + 5)]
    assert early[:start] == plan[:start]
    assert all(factor > 0 for factor in early)
    assert early[start] <= plan[start] + 1e-12
    falls = early[max(0, start - 1) :]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falls))
    if start + falling <= total:
        assert all(e <= p + 1e-12 for e, p in zip(early, plan, strict=False)), "never above the plan"
    if falling and start and rate.warmup_steps(total) + falling <= total:
        assert early[end - 1] == pytest.approx(min(plan[-1], plan[start - 1], plan[start]), abs=1e-9)
    assert early[end:] == [early[-1]] * (len(early) - end)
    # no step is longer than the planned decay's longest; one that falls already may take two at once
    if falling and start >= rate.warmup_steps(total) and rate.warmup_steps(total) + falling <= total:
        longest = max(a - b for a, b in itertools.pairwise([1.0, *plan[total - falling :]]))
        assert all(a - b <= longest * (1 + (start > total - falling)) + 1e-9 for a, b in itertools.pairwise(falls))


def test_the_planned_start_given_as_an_early_one_changes_nothing():
    for rate in (LearningRate(0.1, 0.2), LearningRate(0, 0.5, 0.1, "linear"), cosine(0.1)):
        start = rate.decay_start(100)
        assert [rate.factor(s, 100, start) for s in range(100)] == pytest.approx(
            [rate.factor(s, 100) for s in range(100)]
        )


def test_an_early_decay_by_hand():
    rate = LearningRate(warmup=0.1, decay=0.2)
    early = [rate.factor(step, 100, decay_from=40) for step in range(60)]
    assert early[40:] == pytest.approx([rate.factor(step, 100) for step in range(80, 100)])
    assert rate.factor(39, 100, decay_from=40) == 1
    warm = [rate.factor(step, 100, decay_from=5) for step in range(25)]
    assert warm[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert warm[5] < 0.5
    assert warm[-1] == pytest.approx(rate.factor(99, 100))
    late = cosine(0, floor=0.1)
    assert late.factor(50, 100, decay_from=50) < late.factor(49, 100) < 0.6


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_rate_without_a_decay_has_none_early(step):
    with pytest.raises(ValueError, match=r"^LearningRate: expected a decay above 0 for one that starts early"):
        LearningRate(decay=0).factor(step, 10, decay_from=3)


@pytest.mark.parametrize("wrong", [-1, 10, 2.5, "3", True])
def test_decays_from_no_step_of_the_run_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^LearningRate: expected decay_from to be a step from 0 to 9, got"):
        LearningRate().factor(5, 10, decay_from=wrong)


def test_changes_of_the_rate():
    warm, falls = "warm-up is over", "the learning rate decays from here on"
    rate = LearningRate(0.1, 0.2)
    assert rate.changes(100) == [(10, warm), (80, falls)]
    assert rate.changes(100, decay_from=30) == [(10, warm), (30, falls)]
    assert rate.changes(100, decay_from=5) == [(5, falls)]
    assert rate.changes(100, decay_from=0) == []
    assert cosine(0.1).changes(100) == [(10, f"{warm}; {falls}")]
    assert LearningRate(0, 0).changes(100) == LearningRate(1, 0).changes(100) == LearningRate().changes(1) == []
    for total in (3, 10, 99, 1000):
        for step, text in rate.changes(total):
            falling = text == falls
            assert (rate.factor(step, total) < rate.factor(step - 1, total)) == falling
            assert rate.factor(step - 1, total) == 1


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
