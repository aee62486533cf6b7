"""kd_kit/stages.py: shares and learning rates at every step of a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import make_trainer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kd_kit import (
    Schedule,
    constant,
    curriculum,
    kd_term,
    piecewise,
    progressive,
    two_stage,
)

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


# --- presets ---------------------------------------------------------------------------------------------------------

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
QUARTERS = (0, 0.25, 0.5, 0.75, 1)


def factors(schedule: Schedule, term: str) -> list[float]:
    """The factor of a term at every quarter of a run, read from the shares: lm keeps factor 1."""
    found = []
    for progress in QUARTERS:
        shares = schedule.shares(WEIGHTS, progress)
        found.append(shares[term] / WEIGHTS[term] / (shares["lm"] / WEIGHTS["lm"]))
    return found


@pytest.mark.parametrize(
    ("schedule", "hidden", "layerwise"),
    [
        (constant(), [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        (curriculum(), [0, 0.625, 1, 1, 1], [0, 0.625, 1, 1, 1]),
        (curriculum(start=0.2, full=0.5), [0.2, 0.6, 1, 1, 1], [0.2, 0.6, 1, 1, 1]),
        (curriculum(fade=0.5), [0, 0.625, 1, 0.5, 0], [0, 0.625, 1, 0.5, 0]),
        (curriculum(start=1, fade=0.3), [1, 1, 1, 5 / 6, 0], [1, 1, 1, 5 / 6, 0]),
        (curriculum("layerwise"), [1, 1, 1, 1, 1], [0, 0.625, 1, 1, 1]),
        (two_stage(), [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
        (two_stage(at=0.2, ramp=0.2, fade=0.4), [0, 0.25, 1, 0.625, 0], [0, 0.25, 1, 0.625, 0]),
        (two_stage(at=0.2, ramp=0), [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]),
        (progressive(), [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]),
        (progressive(until=0.4, fade=0.4), [0, 0.25, 1, 0.625, 0], [0, 1, 1, 0.625, 0]),
        (progressive(("router", "feature"), "layerwise"), [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_presets_at_every_quarter(schedule, hidden, layerwise):
    schedule.check(WEIGHTS)
    assert factors(schedule, "router") == pytest.approx(hidden)
    assert factors(schedule, "feature") == pytest.approx(hidden)
    assert factors(schedule, "layerwise") == pytest.approx(layerwise)
    assert factors(schedule, "kd") == pytest.approx([1] * 5)


TERMS = st.lists(st.sampled_from([n for n in WEIGHTS if n != "lm"]), unique=True, max_size=5)


@st.composite
def presets(draw):
    """Any preset with any arguments that it takes."""
    fade = draw(st.floats(0, 0.5))
    names = draw(TERMS)
    kind = draw(st.sampled_from(["curriculum", "two_stage", "progressive"]))
    if kind == "curriculum":
        return curriculum(*names, start=draw(st.floats(0, 1)), full=draw(st.floats(0.01, 0.5)), fade=fade)
    if kind == "two_stage":
        at = draw(st.floats(0.01, 0.49))
        return two_stage(*names, at=at, ramp=draw(st.floats(0, 1)) * (0.5 - at), fade=fade)
    cut = draw(st.integers(0, len(names)))
    groups = [group for group in (names[:cut], tuple(names[cut:])) if group]
    return progressive(*groups, until=draw(st.floats(0.01, 0.5)), fade=fade)


@settings(deadline=None, max_examples=300)
@given(
    schedule=presets(),
    weights=st.fixed_dictionaries({name: st.floats(1e-3, 10) for name in WEIGHTS}),
    total=st.integers(1, 40),
)
def test_half_way_every_term_of_every_preset_has_half_of_its_full_share(schedule, weights, total):
    schedule.check(weights)
    whole = sum(weights.values())  # the presets' full factor is 1
    for name, share in schedule.shares(weights, 0.5).items():
        assert share >= 0.5 * weights[name] / whole - 1e-12, name
    for step in range(total + 1):
        shares = schedule.shares(weights, step / total)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
        assert shares["lm"] > 0


@settings(deadline=None, max_examples=200)
@given(
    named=st.dictionaries(st.sampled_from(NAMES), lines(), min_size=1),
    weights=st.fixed_dictionaries({name: st.floats(1e-3, 10) for name in NAMES}),
)
def test_what_the_check_lets_pass_has_half_of_every_full_share_half_way(named, weights):
    """Half of the factor is half of the share, also when the other terms stand elsewhere on their own lines."""
    schedule = Schedule("random", named)
    try:
        schedule.check(weights)
    except ValueError:
        assume(False)
    full = {n: w * max([f for _, f in named[n]] if n in named else [1]) for n, w in weights.items()}
    for name, share in schedule.shares(weights, 0.5).items():
        assert share >= 0.5 * full[name] / sum(full.values()) * (1 - 1e-9)


PRESETS = (curriculum, two_stage, progressive)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_about_the_terms_that_the_run_has(preset):
    few = {"lm": 0.3, "kd": 0.7, "router": 0.3}
    preset().check(few)
    shares = preset(fade=0.2).shares(few, 0)
    assert shares == {"lm": 0.3, "kd": 0.7, "router": 0}
    for without in ({"lm": 0.3, "kd": 0.7}, {"lm": 0.3, "kd": 0.7, "router": 0.0}):
        with pytest.raises(
            ValueError, match=r"expected at least one of the terms .*router with a weight above 0, got lm"
        ):
            preset().check(without)
    with pytest.raises(ValueError, match="expected one of the terms lm, kd, router, got a line for 'feature'"):
        preset("router", "feature").check(few)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"fade": 0.6}, "expected fade between 0 and 0.5, got 0.6"),
        ({"fade": -0.1}, "expected fade between 0 and 0.5, got -0.1"),
        ({"fade": math.nan}, "expected fade between 0 and 0.5, got nan"),
        ({"fade": "0.1"}, "expected fade to be a number such as 0.25, got '0.1'"),
        ({"fade": None}, "expected fade to be a number such as 0.25, got None"),
    ],
)
def test_every_preset_refuses_a_fade_that_is_none(preset, arguments, said):
    with pytest.raises(ValueError, match=f"^{preset.__name__}: {said}"):
        preset(**arguments)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_refuses_names_that_are_none(preset):
    where = f"^{preset.__name__}: "
    with pytest.raises(ValueError, match=where + "expected every term once, got 'kd' twice"):
        preset("kd", "span", "kd")
    for wrong in (0.4, kd_term(), None):
        with pytest.raises(ValueError, match=where + "expected the names of terms such as 'feature', got"):
            preset("kd", wrong)
    with pytest.raises(ValueError, match=where + "expected the LM term to count at every step"):
        preset("lm")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda: curriculum(full=0.6),
            "curriculum: expected full between 0 and 0.5, got 0.6; every term must have half",
        ),
        (lambda: curriculum(full=0), "curriculum: expected full above 0"),
        (lambda: curriculum(start=1.5), "curriculum: expected start between 0 and 1"),
        (lambda: curriculum(start=True), "curriculum: expected start to be a number"),
        (lambda: curriculum("lm", start=0.3, fade=0.1), "curriculum: expected the LM term to count at every step"),
        (
            lambda: two_stage(at=0.3, ramp=0.3),
            r"two_stage: expected .* at \+ ramp of at most 0.5, got at=0.3, ramp=0.3",
        ),
        (lambda: two_stage(at=0.5, ramp=0), "two_stage: expected at between 0 and 0.5"),
        (lambda: two_stage(at=0), "two_stage: expected at between 0 and 0.5"),
        (lambda: two_stage(ramp=-0.1), "two_stage: expected ramp between 0 and 0.5"),
        (lambda: progressive(until=0.7), "progressive: expected until between 0 and 0.5, got 0.7; every term must"),
        (lambda: progressive(until=0), "progressive: expected until above 0"),
        (lambda: progressive("kd", ()), "progressive: expected a term or several in every group"),
        (lambda: progressive(("kd", "span"), "kd"), "progressive: expected every term once, got 'kd' twice"),
        (lambda: progressive(("kd", 3)), "progressive: expected the names of terms such as 'feature', got 3"),
    ],
)
def test_arguments_of_presets_that_cannot_be_are_refused_at_once(build, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        build()


def test_the_lm_term_may_rise_from_something():
    curriculum("lm", start=0.3).check({"lm": 0.5, "kd": 0.5})


def test_terms_that_all_fade_leave_a_moment_without_any():
    for preset in PRESETS:
        with pytest.raises(ValueError, match="expected at least one term with weight at progress"):
            preset("kd", "span").check({"kd": 0.5, "span": 0.5})
    with pytest.raises(ValueError, match="expected at least one term with weight at progress 100%"):
        curriculum("kd", "span", start=0.5, fade=0.2).check({"kd": 0.5, "span": 0.5})


def test_schedules_have_one_repr_however_they_are_written():
    ways = [
        piecewise(kd=[(0, 0), (0.5, 1)], span=[(0, 1)]),
        piecewise(span=((0.0, 1.0),), kd=np.array([[0, 0], [0.5, 1]])),
    ]
    assert len({repr(schedule) for schedule in ways}) == 1
    assert ways[0] == ways[1]
    assert repr(constant()) == "Schedule(name='constant', lines={})"
    assert repr(progressive({"kd": 1}, "span")) == repr(progressive("kd", "span"))


def test_a_schedule_keeps_its_own_copy():
    line = [(0, 0), (0.5, 1)]
    schedule = piecewise(kd=line)
    line[1] = (0.5, 0.067)
    schedule.check({"lm": 0.3, "kd": 0.7})
    assert schedule.shares({"lm": 1, "kd": 1}, 0.5)["kd"] == 0.5


@pytest.mark.parametrize("line", [3, None, [1, 2], ["ab"], [(0, "1")], [(0, 1, 2)], [(None, 1)], [(0, True)], "kd"])
def test_lines_that_are_no_pairs_of_numbers_are_refused(line):
    with pytest.raises(
        ValueError, match=r"^Schedule: expected pairs of numbers for 'kd', got .*; write a line such as"
    ):
        piecewise(kd=line)


@pytest.mark.parametrize("point", [(math.nan, 1), (0, math.nan), (0, math.inf), (math.inf, 1)])
def test_points_that_are_not_finite_are_refused(point):
    with pytest.raises(ValueError, match=r"^Schedule: expected (points with progress|finite factors)"):
        piecewise(kd=[point])


def test_schedules_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"^Schedule: expected lines as"):
        Schedule("mine", [("kd", [(0, 1)])])
    with pytest.raises(ValueError, match=r"^Schedule: expected lines by the names of terms"):
        Schedule("mine", {3: [(0, 1)]})


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, "0.5", None])
def test_progress_outside_of_a_run_is_refused(progress):
    with pytest.raises(ValueError, match=r"^Schedule 'constant': expected progress"):
        constant().shares({"lm": 1}, progress)


def test_weights_that_are_none_are_refused():
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^Schedule 'constant': expected weights of at least 0, got .* for 'kd'"):
            constant().shares({"lm": 1, "kd": weight}, 0.5)


# --- changes ---------------------------------------------------------------------------------------------------------

FEW = {"lm": 0.3, "kd": 0.7, "feature": 1.0, "layerwise": 1.0, "relation": 0.4}


def test_changes_of_a_run_are_said_in_one_sentence_per_step():
    assert two_stage(fade=0.1).changes(FEW, 1000) == [
        (250, "feature, layerwise and relation come in"),
        (300, "feature, layerwise and relation have their full weight"),
        (900, "feature, layerwise and relation fade out"),
    ]
    assert progressive("feature", "layerwise").changes(FEW, 480) == [
        (120, "feature has its full weight; layerwise comes in"),
        (240, "layerwise has its full weight"),
    ]
    assert curriculum("kd", start=0.5).changes(FEW, 100) == [(40, "kd has its full weight")]


def test_changes_of_lines_of_ones_own():
    schedule = piecewise(
        kd=[(0, 1), (0.2, 1), (0.4, 0.5), (0.5, 0.5), (0.6, 0.75), (0.7, 1)],
        feature=[(0.3, 0), (0.3, 2)],
        layerwise=[(0, 1), (0.6, 1), (0.8, 0)],
        relation=[(0.1, 1), (0.8, 1), (0.8, 0.25)],
    )
    schedule.check(FEW)
    assert schedule.changes(FEW, 100) == [
        (20, "kd falls to 50% of its full weight"),
        (31, "feature comes in with its full weight"),  # at 30 its factor is still 0
        (40, "kd has 50% of its full weight"),
        (50, "kd rises to its full weight"),
        (60, "layerwise fades out"),
        (70, "kd has its full weight"),
        (80, "layerwise is off"),
        (81, "relation falls to 25% of its full weight"),
    ]


def test_what_is_no_change():
    assert constant().changes(FEW, 100) == []
    assert curriculum().changes(FEW, 1) == []
    assert curriculum().changes({"lm": 1, "kd": 1, "feature": 0}, 100) == []  # never counts
    assert two_stage().changes(FEW, 3) == [(1, "feature, layerwise and relation come in with their full weight")]
    for total in (0, 1.5, None):
        with pytest.raises(ValueError, match=r"^Schedule\.changes: expected a whole number of at least 1"):
            constant().changes(FEW, total)


@settings(deadline=None, max_examples=200)
@given(at=st.integers(1, 49), total=st.sampled_from([7, 10, 100, 1000, 24914]))
def test_a_term_comes_in_at_the_last_step_without_it(at, total):
    """Or at the first one with it, where that moment lies between two steps."""
    schedule = two_stage("kd", at=at / 100, ramp=0.5 - at / 100)
    ((step, text), *_) = [change for change in schedule.changes(FEW, total) if "come" in change[1]]
    shares = [schedule.shares(FEW, s / total)["kd"] for s in (step - 1, step, step + 1)]
    assert text.startswith("kd comes in")
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0, abs=1e-6) or at * total % 100
    assert shares[2] > 0
