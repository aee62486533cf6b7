"""kd_kit/balance.py: weights that stay, and weights that follow from wanted shares of the gradient."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kd_kit import fixed, gradient_share
from kd_kit.balance import Balance

GIVEN = {"lm": 0.3, "kd": 0.7, "span": 0.05}


def test_fixed_weights_stay():
    assert fixed().weights(GIVEN, {"lm": 1.0, "kd": 100.0, "span": 3.0}) == GIVEN
    fixed().check({"anything": 1.0})


def test_shares_of_the_gradient_come_out_as_wanted():
    balance = gradient_share(lm=0.5, kd=0.4, span=0.1, most=100.0)
    norms = {"lm": 2.0, "kd": 0.5, "span": 1.0}
    found = balance.weights(GIVEN, norms)
    pulled = {n: found[n] * norms[n] for n in found}
    whole = sum(pulled.values())
    assert {n: p / whole for n, p in pulled.items()} == pytest.approx({"lm": 0.5, "kd": 0.4, "span": 0.1})
    assert sum(found.values()) == pytest.approx(sum(GIVEN.values()))


def test_a_weight_stays_within_its_clamp():
    """Before everything is brought back to one sum, a weight is at most 4 times more or less than its own."""
    found = gradient_share(lm=0.5, kd=0.5).weights({"lm": 0.5, "kd": 0.5}, {"lm": 1.0, "kd": 1e6})
    assert found == pytest.approx({"lm": 1 / 1.125, "kd": 0.125 / 1.125}, rel=1e-5), "kd falls to a quarter of 0.5"
    gentle = gradient_share(lm=0.5, kd=0.5, most=1.0).weights({"lm": 0.3, "kd": 0.7}, {"lm": 1.0, "kd": 1e6})
    assert gentle == pytest.approx({"lm": 0.3, "kd": 0.7}), "most=1 leaves the weights as they are"


def test_what_was_not_seen_keeps_its_weight():
    balance = gradient_share()
    assert balance.weights(GIVEN, {}) == GIVEN
    found = balance.weights(GIVEN, {"lm": 1.0, "kd": 1.0})
    assert found["span"] / sum(found.values()) == pytest.approx(0.05 / 1.05, rel=0.05)


def test_a_term_that_is_switched_off_stays_off():
    found = gradient_share(lm=0.5, kd=0.5).weights({"lm": 0.5, "kd": 0.5, "span": 0.0}, {"lm": 1, "kd": 2, "span": 3})
    assert found["span"] == 0.0


def test_the_usual_shares_are_rescaled_to_the_terms_there_are():
    assert gradient_share().wanted({"lm": 0.1, "kd": 5.0}) == pytest.approx({"lm": 0.35 / 0.8, "kd": 0.45 / 0.8})


def test_the_average_forgets_slowly_and_ignores_what_says_nothing():
    balance = gradient_share(smoothing=0.8)
    norms = balance.smoothed({}, {"lm": 1.0, "kd": 0.0, "span": math.nan})
    assert norms == {"lm": 1.0}
    norms = balance.smoothed(norms, {"lm": 2.0, "kd": 3.0, "span": math.inf})
    assert norms == pytest.approx({"lm": 0.8 * 1 + 0.2 * 2, "kd": 3.0})


def test_the_lm_term_cannot_be_balanced_away():
    shares = gradient_share(lm_floor=0.2).floored({"lm": 0.05, "kd": 0.9, "span": 0.05})
    assert shares["lm"] == 0.2
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["kd"] / shares["span"] == pytest.approx(18)
    assert fixed().floored({"lm": 0.001, "kd": 0.999}) == {"lm": 0.001, "kd": 0.999}
    assert gradient_share().floored({"kd": 1.0}) == {"kd": 1.0}, "a run without an LM term has none to keep"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradient_share(lm=0.5, kd=0.6), r"sum to 1, got .*which sum to 1\.1; change one of them by -0\.1"),
        (lambda: gradient_share(lm=1.5, kd=-0.5), r"expected shares above 0 and at most 1, got \{'lm': 1\.5, 'kd'"),
        (lambda: gradient_share(lm="half", kd=0.5), "expected shares above 0"),
        (lambda: gradient_share(lm=40, kd=60), "these look like per cent: divide by 100"),
        (lambda: gradient_share(lm=0.5, kb=0.5).check({"lm": 1, "kd": 1}), "none for kd; no such term: kb"),
        (lambda: gradient_share(smoothing=1.0), "0 <= smoothing < 1"),
        (lambda: gradient_share(most=0.5), "most of at least 1"),
        (lambda: gradient_share(lm_floor=1.0), "lm_floor from 0 to below 1"),
        (lambda: gradient_share(lm=0.5, kd=0.5).check({"lm": 1, "kd": 1, "span": 1}), "each of kd, lm, span"),
        (lambda: gradient_share(lm=0.5, kd=0.5).check({"lm": 1, "kd": 0}), r"each of lm \(terms with a weight"),
        (lambda: gradient_share().check({"lm": 1, "mine": 1}), r"nothing is usual for mine; name all of them"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_usual_shares_need_no_names():
    gradient_share().check({"lm": 1, "kd": 1, "router": 0.1, "mine": 0})


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["lm", "kd", "span", "feature", "router"]), st.floats(0.01, 10), min_size=1, max_size=5
    ),
    st.dictionaries(st.sampled_from(["lm", "kd", "span", "feature"]), st.floats(1e-6, 1e6), max_size=4),
    st.floats(1, 10),
    st.floats(0, 0.5),
)
def test_weights_are_positive_and_keep_their_sum(weights, norms, most, floor):
    assume(weights)
    balance = gradient_share(most=most, lm_floor=floor)
    found = balance.weights(weights, norms)
    assert found.keys() == weights.keys()
    assert all(v > 0 for v in found.values())
    assert sum(found.values()) == pytest.approx(sum(weights.values()))
    shares = balance.floored({n: v / sum(found.values()) for n, v in found.items()})
    assert sum(shares.values()) == pytest.approx(1)
    if "lm" in shares and len(shares) > 1:
        assert shares["lm"] >= floor - 1e-9


def test_a_balance_prints_what_it_is():
    assert "gradient_share" in repr(gradient_share(lm=0.5, kd=0.5))
    assert repr(gradient_share(lm=0.5, kd=0.5)) == repr(gradient_share(lm=0.5, kd=0.5)), "kept in the run's record"
    assert Balance() == fixed()
