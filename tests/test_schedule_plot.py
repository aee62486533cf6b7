"""kd_kit/schedule_plot.py: the plan as numbers and as a picture, read from the artists rather than from pixels."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_trainer

from kd_kit import LearningRate, constant, cosine, curriculum, piecewise, progressive, two_stage
from kd_kit.drawing import figure_png, term_styles
from kd_kit.schedule_plot import Plan, plan_of, plot_schedule

WEIGHTS = {
    "lm": 0.3,
    "kd": 0.7,
    "span": 0.3,
    "feature": 1.5,
    "layerwise": 1.5,
    "relation": 0.4,
    "attention": 0.4,
    "contrastive": 0.3,
    "router": 0.3,
}
FACTORS = {"student": 1.0, "projectors": 5.0, "routers": 2.0}


def stand_in(schedule=None, rate=None, planned=1000, *, weights=WEIGHTS, step=0, decay_from=None, peak=5e-4):
    """What a trainer says of its plan."""
    schedule, rate = schedule or constant(), rate or LearningRate()
    total = planned if decay_from is None else decay_from + rate.decay_steps(planned)
    return SimpleNamespace(
        terms=[SimpleNamespace(name=name, weight=weight) for name, weight in weights.items()],
        schedule=schedule,
        lr_schedule=rate,
        total_steps=total,
        planned_steps=planned,
        decay_from=decay_from,
        settings={"learning_rate": peak},
        step=step,
        shares_at=lambda s: schedule.shares(weights, s / total),
        rate_at=lambda s: peak * rate.factor(s, planned, decay_from),
        rate_factors=FACTORS,
    )


ZIGZAG = piecewise(**{"lm": [(i / 40, 1 + i % 2) for i in range(41)]})
CASES = {
    "constant": stand_in(),
    "curriculum with fade": stand_in(curriculum(fade=0.2), planned=12_500, step=3100),
    "two_stage": stand_in(two_stage(), planned=12_500),
    "progressive": stand_in(progressive(fade=0.1), cosine(), planned=24_914, step=24_914),
    "piecewise": stand_in(
        piecewise(kd=[(0, 1), (0.4, 1), (0.4, 0.5)], feature=[(0.3333, 0), (0.3334, 1)]), planned=9000
    ),
    "many changes": stand_in(ZIGZAG, planned=5000),
    "changes at both ends": stand_in(
        piecewise(lm=[(p / 1000, 1 + i % 2) for i, p in enumerate((4, 8, 12, 16, 984, 988, 992, 996))]), planned=3000
    ),
    "three steps": stand_in(curriculum(fade=0.2), planned=3, step=1),
    "one step": stand_in(two_stage(), planned=1),
    "two terms": stand_in(weights={"lm": 0.3, "kd": 0.7}, planned=300),
    "decay begun early": stand_in(curriculum(fade=0.2), planned=12_500, step=7100, decay_from=7000),
    "strange names": stand_in(weights={"lm": 1, "a term of a very long $name_{x}$": 1, "low": 1}, planned=50),
}


@pytest.fixture(params=CASES)
def trainer(request):
    return CASES[request.param]


def texts(figure) -> list[str]:
    found = list(figure.texts)
    for ax in figure.axes:
        found += [*ax.texts, ax.xaxis.label, ax.yaxis.label]
    return [text.get_text() for text in found if text.get_text()]


def lines(ax) -> dict:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_a_plan_says_what_the_trainer_will_do(trainer):
    plan = plan_of(trainer)
    assert list(plan.steps) == sorted(set(plan.steps))
    assert (plan.steps[0], plan.steps[-1]) == (0, trainer.total_steps - 1)
    assert len(plan.steps) <= 410 or len(trainer.schedule.lines) > 6
    assert list(plan.shares) == [t.name for t in trainer.terms]
    for i, step in enumerate(plan.steps):
        shares = trainer.shares_at(step)
        assert {name: values[i] for name, values in plan.shares.items()} == shares
        assert sum(shares.values()) == pytest.approx(1)
        assert {name: values[i] for name, values in plan.rates.items()} == pytest.approx(
            {name: factor * trainer.rate_at(step) for name, factor in FACTORS.items()}
        )
    assert (plan.total, plan.now) == (trainer.total_steps, trainer.step)


def test_thinning_loses_no_corner(trainer):
    """Straight lines between the points that were kept come close to every step that was left out."""
    plan = plan_of(trainer)
    every = range(0, plan.total)
    rates = [trainer.rate_at(step) for step in every]
    assert np.interp(every, plan.steps, plan.rates["student"]) == pytest.approx(rates, abs=0.01 * max(rates))
    if plan.total <= 400:
        assert list(plan.steps) == list(every)
    shares = [trainer.shares_at(step) for step in every]
    for name, values in plan.shares.items():
        exact = [share[name] for share in shares]
        assert np.interp(every, plan.steps, values) == pytest.approx(exact, abs=0.005), name


def test_a_spike_between_two_points_of_the_grid_is_kept():
    spike = piecewise(kd=[(0, 1), (0.61234, 1), (0.61235, 9), (0.61236, 1)], lm=[(0, 1)])
    spiky = stand_in(piecewise(kd=[(0, 1), (0.4, 1), (0.40001, 1.9), (0.40002, 1)]), planned=100_000)
    for trainer in (stand_in(spike, planned=100_000), spiky):
        exact = max(trainer.shares_at(step)["kd"] for step in range(100_000))
        assert max(plan_of(trainer).shares["kd"]) == exact


def test_a_bend_is_kept_though_it_is_no_change():
    """A line that goes on rising, but more slowly."""
    trainer = stand_in(piecewise(kd=[(0, 0), (0.31234, 0.9), (0.5, 1)]), planned=100_000)
    plan = plan_of(trainer)
    assert 31_234 in plan.steps
    assert [text for _, text in plan.changes] == [
        "warm-up is over",
        "kd has its full weight",
        "the learning rate decays from here on",
    ]


def test_changes_of_terms_and_rates_stand_in_order():
    plan = plan_of(CASES["curriculum with fade"])
    hidden = "feature, layerwise, relation, attention, contrastive and router"
    assert plan.changes == (
        (250, "warm-up is over"),
        (5000, f"{hidden} have their full weight"),
        (10_000, f"{hidden} fade out"),
        (10_000, "the learning rate decays from here on"),
    )
    assert plan.rate_changes == (plan.changes[0], plan.changes[3])
    early = plan_of(CASES["decay begun early"])
    assert early.total == 9500
    assert early.rate_changes == ((250, "warm-up is over"), (7000, "the learning rate decays from here on"))
    assert [step for step, text in early.changes if hidden in text] == [3800, 7600]


def test_the_picture_shows_the_shares_and_the_rates_of_the_plan(trainer):
    plan, figure = plan_of(trainer), plot_schedule(trainer)
    shares, rates = figure.axes
    width = 2 if plan.total <= 60 else 1  # a step of a short run is a stair
    below = np.zeros(len(plan.steps))
    drawn = lines(shares)
    for name, values in plan.shares.items():
        below = below + np.array(values)
        line = drawn[f"up to {name}"]
        assert line.get_ydata() == pytest.approx(np.repeat(below, width))
        assert line.get_xdata()[::width] == pytest.approx(plan.steps)
    assert below == pytest.approx(np.ones(len(below)))
    for name, values in plan.rates.items():
        line = lines(rates)[name]
        assert line.get_ydata() == pytest.approx(np.repeat(values, width))
        assert line.get_xdata()[::width] == pytest.approx(plan.steps)
        assert max(values) <= rates.get_ylim()[1]
    assert [fill.get_label() for fill in shares.collections] == list(plan.shares)


def test_a_short_run_is_drawn_as_stairs_of_one_step():
    figure = plot_schedule(CASES["three steps"])
    for ax in figure.axes:
        line = next(iter(lines(ax).values()))
        assert list(line.get_xdata()) == [0, 1, 1, 2, 2, 3]


def test_terms_keep_their_colours():
    figure = plot_schedule(CASES["constant"])
    fills = {fill.get_label(): fill.get_facecolor()[0][:3] for fill in figure.axes[0].collections}
    assert len({tuple(colour) for colour in fills.values()}) == len(WEIGHTS), "no two terms look the same"
    from matplotlib.colors import to_rgb

    for name, (colour, _) in term_styles(list(WEIGHTS)).items():
        pale = (1 - fills[name]) / np.maximum(1 - np.array(to_rgb(colour)), 1e-9)
        kept = np.array(to_rgb(colour)) < 1
        assert pale[kept] == pytest.approx(np.full(kept.sum(), pale[kept][0])), "the same hue, mixed with white"


def test_marks_and_words(trainer):
    plan, figure = plan_of(trainer), plot_schedule(trainer)
    found = texts(figure)
    for number, (step, text) in enumerate(plan.changes[:12], start=1):
        panel = figure.axes[1 if (step, text) in plan.rate_changes else 0]
        assert list(lines(panel)[f"change {number}"].get_xdata()) == [step, step]
        (written,) = [text for text in panel.texts if text.get_text() == str(number)]
        assert 0 <= written.get_position()[0] <= 1, "above the panel, not beside it"
        assert text in found or text[:60] in " ".join(found)
        assert f"step {step:,}  ({step / plan.total:.0%})" in found
    for ax in figure.axes:
        assert list(lines(ax)["half time"].get_xdata()) == [plan.total / 2] * 2
        assert ("now" in lines(ax)) == (trainer.step > 0)
        if trainer.step:
            assert list(lines(ax)["now"].get_xdata()) == [trainer.step] * 2
    assert "half time: every term has at least half of its full share" in found
    assert any(text.startswith("now, step") for text in found) == (trainer.step > 0)
    assert any(plan.title in text for text in found)
    peaks = [line.get_text() for line in figure.axes[1].texts]
    assert "5e-4" in peaks or plan.total < 3


def test_labels_say_each_share_at_the_start_at_half_time_and_at_the_end():
    found = texts(plot_schedule(CASES["curriculum with fade"]))
    assert "0 → 26 → <1 %" in found
    assert "54 → 12 → 54 %" in found


def test_many_changes_are_counted_and_not_drawn_over_each_other():
    plan, figure = plan_of(CASES["many changes"]), plot_schedule(CASES["many changes"])
    assert len(plan.changes) > 12
    assert f"and {len(plan.changes) - 12} more" in texts(figure)
    assert not any(label == "change 13" for ax in figure.axes for label in lines(ax))


def boxes(figure) -> list[tuple[str, object]]:
    found = list(figure.texts)
    for ax in figure.axes:
        found += [*ax.texts, ax.xaxis.label, ax._left_title]
        found += [label for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels() if axis.get_visible()]
    return [(t.get_text(), t.get_window_extent()) for t in found if t.get_text() and t.get_visible()]


def test_no_text_lies_on_another_or_outside(trainer):
    figure = plot_schedule(trainer)
    png = figure_png(figure)
    assert int.from_bytes(png[16:20], "big") == 1000
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes(figure):
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(boxes(figure), 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        tall = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide < 1 or tall < 4, (one, other)  # a box has room above and below its letters


def test_something_else_is_no_trainer():
    with pytest.raises(ValueError, match=r"^plan_of: expected a trainer from kd\.build_trainer\(\.\.\.\), got dict"):
        plot_schedule({})
    bare = stand_in()
    del bare.rate_at
    with pytest.raises(ValueError, match="got SimpleNamespace without rate_at"):
        plan_of(bare)


def test_the_plan_of_a_real_trainer_is_what_it_then_does(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", steps=8, schedule=piecewise(kd=[(0, 0.2), (0.5, 1)]), lr_schedule=LearningRate(0.25, 0.25)
    )
    plan = plan_of(trainer)
    assert isinstance(plan, Plan)
    plot_schedule(trainer)
    trainer.fit()
    for name, values in plan.shares.items():
        assert trainer.history.series(name, "weight")[1] == pytest.approx(values)
    assert trainer.history.column("lr", "student")[1] == pytest.approx(plan.rates["student"])
    assert plan_of(trainer).now == 8


def test_drawing_touches_no_pyplot():
    code = "import kd_kit.schedule_plot, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    before = "matplotlib.pyplot" in sys.modules
    plot_schedule(CASES["constant"])
    assert ("matplotlib.pyplot" in sys.modules) == before
