"""What steers a run, as panels: read from the artists."""

from __future__ import annotations

import math

import pytest
from test_plots import a_plan, build, constant, line, measure, texts

from kd_kit.plots import loss_figure

np = pytest.importorskip("numpy")

GRADIENTS, SHARES, RATES, SPEED = 2, 3, 5, 6


def areas(ax) -> dict[str, tuple[float, float, float]]:
    """{label: (first step, last step, height at its right end)} of stacked areas."""
    found = {}
    for fill in ax.collections:
        points = np.vstack([path.vertices for path in fill.get_paths()])
        right = points[points[:, 0] == points[:, 0].max()]
        found[fill.get_label()] = (points[:, 0].min(), points[:, 0].max(), float(np.ptp(right[:, 1])))
    return found


def test_gradient_shares_are_stacked_over_the_measured_steps():
    history = build({"lm": constant(4.0), "kd": constant(1.0)}, steps=range(1, 302))
    for step, share in ((1, 0.2), (101, 0.3), (301, 0.995)):
        measure(history, step, {"lm": 1 - share, "kd": share}, {"kd": -0.4})
    measure(history, 201, {"lm": 0.0, "kd": 0.0}, {})  # what a gradient that is not finite leaves
    figure = loss_figure(history)
    found = areas(figure.axes[GRADIENTS])
    assert found["kd"] == pytest.approx((1, 301, 0.995))
    assert len(figure.axes[GRADIENTS].collections[0].get_paths()) == 2  # a gap where nothing was finite
    assert {"100 %", "<1 %", "-0.40", "fights lm", "too weak"} <= set(texts(figure))
    assert "at step 301: share, cosine with lm" in texts(figure)


def test_without_gradients_the_panel_says_why():
    assert "not measured yet" in texts(loss_figure(build({"lm": constant(4.0), "kd": constant(1.0)})))
    assert "one term: nothing to compare" in texts(loss_figure(build({"lm": constant(4.0)})))


def test_a_step_without_a_finite_gradient_says_so():
    history = build({"lm": constant(4.0), "kd": constant(math.nan)})
    measure(history, 1, {"lm": 0.0, "kd": 0.0}, {})
    assert "no gradient" in texts(loss_figure(history))


def test_weights_are_drawn_as_shares_of_their_sum():
    history = build({"lm": constant(4.0), "kd": constant(2.0)})  # both weigh 0.5
    figure = loss_figure(history)
    assert areas(figure.axes[SHARES]) == {"lm": (1, 10, 0.5), "kd": (1, 10, 0.5)}
    assert "now" not in [found.get_label() for found in figure.axes[SHARES].lines]
    assert texts(figure).count("50 %") == 2


def test_the_plan_goes_on_where_the_record_ends():
    history = build({"lm": constant(4.0), "kd": constant(2.0)}, steps=range(1, 101))
    figure = loss_figure(history, plan=a_plan(lm=(1.0, 0.25), kd=(0.0, 0.75)))
    for index in (SHARES, RATES):
        assert set(line(figure.axes[index], "now").get_xdata()) == {100}
        assert figure.axes[index].get_xlim() == (0, 400)
    found = areas(figure.axes[SHARES])
    assert found["kd"] == pytest.approx((1, 100, 0.5))
    assert found["kd, planned"] == pytest.approx((100, 399, 0.75))
    assert {"50 → 25", "50 → 75", "%, now → at the end"} <= set(texts(figure))
    assert line(figure.axes[RATES], "student").get_xdata().max() == 100
    planned = line(figure.axes[RATES], "student, planned")
    assert (min(planned.get_xdata()), max(planned.get_xdata())) == (100, 399)
    assert planned.get_alpha() < 1


def test_a_plan_alone_is_drawn():
    figure = loss_figure(build({}, steps=()), plan=a_plan(lm=(1.0, 0.4), kd=(0.0, 0.6)))
    assert areas(figure.axes[SHARES])["kd, planned"] == pytest.approx((0, 399, 0.6))
    assert {"100 → 40", "0 → 60", "peak", "1e-3"} <= set(texts(figure))


def test_speed_and_floor():
    history = build({"lm": constant(4.0)}, tokens_per_second=7000.0, times_floor=1.84)
    figure = loss_figure(history)
    assert set(line(figure.axes[SPEED], "speed").get_ydata()) == {7000.0}
    assert {"a step takes 1.8 × its floor", "7,000", "Speed, tokens per second"} <= set(texts(figure))
    assert not any("floor" in text for text in texts(loss_figure(build({"lm": constant(4.0)}, tokens_per_second=7e3))))
