"""kd_kit/alarms.py: what is wrong, since when, why, and what to try; said once, and said when it is over."""

from __future__ import annotations

import math
import re

import pytest

from kd_kit import EarlyStopping, lm_term
from kd_kit.alarms import MEASUREMENTS, STEPS, Watch, standing_alarms
from kd_kit.history import History
from kd_kit.ranges import RANGES
from kd_kit.readings import Needs, SortedReading
from kd_kit.terms import LossTerm


def term(name: str, weight: float = 0.5, **changes) -> LossTerm:
    known = {"unit": "nats", "healthy": (0.1, 3.0), "impossible_below": 0.0, "impossible_above": 13.5}
    return LossTerm(name=name, weight=weight, **(known | {"value": lambda *_: None} | changes))


TERMS = (lm_term(0.5), term("kd", needs=Needs((SortedReading(100, 8),))), term("feature", 0.1, impossible_above=None))


class Run:
    """A history that grows by one record at a time, watched as a run's is."""

    def __init__(self, terms=TERMS, *, grace: int = 0, history: History | None = None):
        self.terms, self.history = terms, history or History()
        self.watch = Watch(self.history, terms, grace)
        self.step = (self.history.last("train") or {"step": 0})["step"]

    def steps(self, count: int = 1, **changed) -> Run:
        """``changed``: {term: fields of its record, or its value}; grad_norm and loss_scale of the step."""
        for _ in range(count):
            self.step += 1
            terms = {}
            for one in self.terms:
                given = changed.get(one.name, {})
                given = given if isinstance(given, dict) else {"value": given}
                record = {"value": 2.0, "weight": one.weight, "count": 10} | given
                record.setdefault(
                    "contribution", None if record["value"] is None else record["weight"] * record["value"]
                )
                terms[one.name] = record
            total = sum(t["contribution"] for t in terms.values() if t["contribution"] is not None)
            record = {"kind": "train", "step": self.step, "total": total, "terms": terms}
            record |= {
                k: v
                for k, v in changed.items()
                if k in ("grad_norm", "loss_scale", "gradients", "total", "times_floor")
            }
            self.history.append(record)
            self.watch.look([record])
        return self

    def measured(self, count: int = 1, **changed) -> Run:
        return self.steps(count, gradients={}, **changed)

    @property
    def alarms(self) -> list[str]:
        return [e["text"] for e in self.history.events if e["what"] == "alarm"]

    @property
    def cleared(self) -> list[str]:
        return [e["text"] for e in self.history.events if e["what"] == "cleared"]


def shares(**known) -> dict:
    return {name: {"grad_share": share, "cosine": None if name == "lm" else 0.5} for name, share in known.items()}


def test_a_healthy_run_has_no_alarms():
    run = Run().steps(300, grad_norm=1.0, loss_scale=1024.0)
    run.measured(10, **shares(lm=0.4, kd=0.5, feature=0.1))
    assert run.history.events == []


def test_a_value_out_of_its_range_is_said_after_a_while_with_cause_and_cure():
    run = Run().steps(10).steps(STEPS - 1, kd=5.0)
    assert run.alarms == []
    run.steps(1, kd=5.0)
    (text,) = run.alarms
    assert re.match(r"kd is above its range: 5\.00 nats, healthy 0\.1 to 3, since step 11\. Likely: .+\. Try: .+", text)
    run.steps(200, kd=5.0)
    assert len(run.alarms) == 1, "said once"


def test_a_value_that_goes_in_and_out_is_no_alarm():
    run = Run()
    for _ in range(100):
        run.steps(STEPS // 2, kd=5.0).steps(1)
    assert run.alarms == []


def test_low_is_out_of_range_too():
    (text,) = Run().steps(STEPS, feature=0.001).alarms
    assert text.startswith("feature is below its range: 0.00100 nats, healthy 0.1 to 3, since step 1.")


def test_an_untrained_student_may_be_out_of_range_during_the_grace():
    run = Run(grace=100).steps(100, lm=7.7, kd=5.0)
    assert run.alarms == []
    run.steps(STEPS, lm=7.7)
    (text,) = run.alarms
    assert "since step 101" in text


def test_what_no_run_can_give_is_said_at_once_also_during_the_grace():
    run = Run(grace=1000).steps(3).steps(1, kd=34.0)
    (text,) = run.alarms
    assert text.startswith("kd is 34.0 nats, which no run can give (healthy: 0.1 to 3), since step 4. Likely: ")
    assert "not normalised" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said_at_once(value):
    run = Run().steps(1, kd=value)
    (text,) = run.alarms
    assert text.startswith("kd was not finite; its steps are skipped, since step 1.")
    assert run.steps(1).cleared == ["kd is finite again"]


def test_a_gradient_that_is_not_finite_though_every_loss_is():
    run = Run().steps(1, grad_norm=math.nan)
    assert run.alarms[0].startswith("the gradient was not finite although every loss was")
    (text,) = Run().steps(1, grad_norm=math.nan, kd=math.nan).alarms
    assert text.startswith("kd was not finite"), "the cause, and not what follows from it"
    assert Run().steps(5, grad_norm=math.inf, loss_scale=1024.0).alarms == [], "a scaler looks for its scale"


def test_a_loss_scale_that_has_collapsed():
    assert Run().steps(9, loss_scale=0.5).alarms == []
    assert Run().steps(10, loss_scale=0.5).alarms[0].startswith("the scale of the fp16 loss has fallen to 0.5")


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.004, "feature has 0.4% of the gradient: it changes next to nothing"),
        (0.95, "feature has 95% of the gradient"),
    ],
)
def test_a_term_that_is_nothing_or_everything_of_the_gradient(share, said):
    run = Run().measured(MEASUREMENTS - 1, **shares(lm=0.3, kd=0.3, feature=share))
    assert run.alarms == []
    run.measured(1, **shares(lm=0.3, kd=0.3, feature=share))
    (text,) = run.alarms
    assert text.startswith(said)


def test_where_one_term_drowns_all_others_that_one_is_named():
    run = Run().measured(MEASUREMENTS, **shares(lm=0.004, kd=0.004, feature=0.992))
    (text,) = run.alarms
    assert text.startswith("feature has 99% of the gradient")


def test_nobody_is_advised_to_leave_the_lm_term_out():
    (text,) = Run().measured(MEASUREMENTS, **shares(lm=0.0004, kd=0.5, feature=0.4996)).alarms
    assert text.startswith("lm has less than 0.1% of the gradient: it changes next to nothing")
    assert "leave" not in text


def test_far_above_its_range_is_said_soon_also_during_the_grace():
    run = Run(grace=1000).steps(MEASUREMENTS, feature=150.0)
    (text,) = [a for a in run.alarms if "feature" in a]
    assert text.startswith("feature is 50 times the top of its range: 150 nats, healthy 0.1 to 3, since step 1. ")
    assert Run(terms=TERMS, grace=1000).steps(60, lm=12.0, kd=8.0).alarms == [], "an untrained student"


def test_a_kd_term_that_has_nothing_to_do_with_the_text():
    """Position 40 of the one compared with position 40 of the other: large, and at right angles to the text."""
    apart = {"grad_share": 0.4, "cosine": 0.02}
    (text,) = Run().measured(MEASUREMENTS, kd=apart).alarms
    assert text.startswith("kd compares next-token distributions and does not pull with the text: the cosine of its")
    assert "positions that do not belong together" in text
    assert Run().measured(9, feature=apart).alarms == [], "hidden states have other directions"
    assert Run().measured(9, kd={"grad_share": 0.4, "cosine": 0.3}).alarms == []


def test_a_term_that_is_switched_off_needs_no_gradient():
    off = {"weight": 0.0, "grad_share": 0.0, "cosine": 0.1}
    run = Run().measured(
        9, feature=off, lm={"grad_share": 0.95, "cosine": None}, kd={"grad_share": 0.05, "cosine": 0.5}
    )
    assert [a.split(" has")[0] for a in run.alarms] == ["lm"]
    alone = {"weight": 0.0, "grad_share": 0.0, "cosine": None}
    run = Run().measured(9, feature=alone, kd=alone, lm={"grad_share": 1.0, "cosine": None})
    assert run.alarms == [], "one term alone has all of it"


def test_a_term_that_fights_the_text():
    against = {"grad_share": 0.3, "cosine": -0.5}
    run = Run().measured(MEASUREMENTS, kd=against).steps(500)
    (text,) = run.alarms
    assert text.startswith(
        "kd pulls against the text: the cosine of its gradient with that of lm is -0.50, since step 1"
    )
    assert run.cleared == [], "a step without a measurement says nothing"
    run.measured(MEASUREMENTS, kd={"grad_share": 0.3, "cosine": 0.2})
    assert run.cleared == ["kd no longer pulls against lm"]
    assert Run().measured(9, feature={"grad_share": 0.3, "cosine": -0.2}).alarms == []


@pytest.mark.parametrize(
    "lm",
    [
        {"value": None, "count": 0},
        {"weight": 0.0},
        {"weight": 1e-5},
    ],
)
def test_the_lm_loss_cannot_vanish_unnoticed(lm):
    run = Run().steps(10, lm=lm)
    assert any(text.startswith("the LM loss has vanished from the total (") for text in run.alarms)
    assert run.steps(10).cleared[-1] == "the LM loss is part of the total again"


def test_the_lm_loss_beside_one_that_is_far_too_large():
    """As an earlier run had it: feature and attention losses of 150 and 100 beside an LM loss of 1.4."""
    run = Run(terms=(lm_term(0.001), term("feature", impossible_above=None)))
    (text,) = [a for a in run.steps(10, lm=1.4, feature=1500.0).alarms if a.startswith("the LM")]
    assert re.search(
        r"has vanished from the total \(weight 0\.001, 0\.00% of it\), since step 1\. Likely: .*so large", text
    )


def test_a_run_of_the_lm_loss_alone_has_nothing_else_to_vanish_beside():
    assert Run(terms=(lm_term(1.0),)).steps(20, lm={"value": None, "count": 0}).alarms == [
        "lm had nothing to look at, since step 1. Likely: no such position in the text. Try: see kd_kit.audit, or "
        "leave lm out"
    ]


def test_an_expert_that_is_never_chosen():
    load = {"extras": {"load": [[0.5, 0.5, 0.0, 0.0]]}}
    (text,) = Run().steps(12, feature=load).alarms
    assert text.startswith("feature: the knowledge router of its pair 1 has collapsed or lost an expert (shares 50%")
    assert Run().steps(50, feature={"extras": {"load": [[0.3, 0.3, 0.2, 0.2]]}}).alarms == []


def test_one_expert_of_two_that_takes_nearly_everything():
    (text,) = Run().steps(12, feature={"extras": {"load": [[0.85, 0.15]]}}).alarms
    assert "(shares 85%, 15%)" in text
    assert Run().steps(50, feature={"extras": {"load": [[0.75, 0.25]]}}).alarms == []


def test_experts_are_judged_over_several_batches():
    run = Run()
    for _ in range(30):
        run.steps(1, feature={"extras": {"load": [[1.0, 0.0]]}}).steps(1, feature={"extras": {"load": [[0.0, 1.0]]}})
    assert run.alarms == []


def test_one_batch_without_an_expert_is_no_collapse():
    run = Run().steps(40, feature={"extras": {"load": [[0.25, 0.25, 0.25, 0.25]]}})
    assert run.steps(1, feature={"extras": {"load": [[1.0, 0.0, 0.0, 0.0]]}}).alarms == []


def rising(run: Run, steps: int, slope: float) -> Run:
    for i in range(steps):
        noise = 0.02 * math.sin(3.7 * i)
        run.steps(1, kd=1.0 + slope * i + noise, lm=4.0 - 0.005 * i)
    return run


def test_kd_that_rises_while_the_total_falls():
    (text,) = rising(Run(), 230, 0.002).alarms
    assert text.startswith("kd rises while the total falls: ")
    assert rising(Run(), 230, -0.002).alarms == []
    assert rising(Run(), 230, 0.0).alarms == []


def test_a_term_without_a_teachers_distribution_may_rise():
    run = Run()
    for i in range(230):
        run.steps(1, feature=0.5 + 0.002 * i, lm=4.0 - 0.01 * i)
    assert run.alarms == []


def test_an_alarm_that_is_over_is_said_so_and_can_come_again_a_few_times():
    run = Run()
    for _ in range(6):
        run.steps(STEPS, kd=5.0).steps(STEPS)
    assert len(run.alarms) == 3
    assert [("not said again" in text) for text in run.alarms] == [False, False, True]
    assert run.cleared == ["kd is back in its range"] * 3


def test_one_good_step_is_no_all_clear():
    run = Run().steps(STEPS, kd=5.0).steps(STEPS - 1).steps(1, kd=5.0).steps(STEPS - 1)
    assert run.cleared == []
    assert run.steps(1).cleared == ["kd is back in its range"]


def test_a_resumed_run_repeats_nothing_and_knows_what_stands():
    run = Run().steps(STEPS + 5, kd=5.0)
    again = Run(history=run.history)
    again.steps(STEPS, kd=5.0)
    assert len(again.alarms) == 1
    assert [e["key"] for e in standing_alarms(again.history)] == ["range:kd"]
    again.steps(STEPS)
    assert again.cleared == ["kd is back in its range"]
    assert standing_alarms(again.history) == []


GOOD = {"grad_share": 0.4, "cosine": 0.5}


@pytest.mark.parametrize(
    ("sick", "next_"),
    [
        ([{"kd": 5.0}] * STEPS, {"kd": 100.0}),
        ([{"kd": 5.0}] * STEPS, {"kd": {"value": None, "count": 0}}),
        ([{"kd": 50.0}], {"kd": math.nan}),
        ([{"kd": math.nan}], {"kd": {"value": None, "count": 0}}),
        ([{"grad_norm": math.nan}], {"grad_norm": math.nan, "kd": math.nan}),
        ([{"feature": GOOD | {"grad_share": 0.001}}] * 3, {"lm": {"grad_share": 0.99, "cosine": None}}),
        ([{"feature": GOOD | {"grad_share": 0.001}}] * 3, {"feature": GOOD | {"grad_share": 0.0, "weight": 0.0}}),
        ([{"feature": GOOD | {"cosine": -0.5}}] * 3, {"feature": GOOD | {"cosine": None}}),
        ([{"kd": GOOD | {"cosine": 0.0}}] * 3, {"kd": GOOD | {"cosine": -0.6}}),
    ],
)
def test_what_says_nothing_clears_nothing(sick, next_):
    run = Run()
    for fields in sick:
        run.measured(1, **({"lm": {"grad_share": 0.4, "cosine": None}} | fields))
    assert run.alarms
    run.measured(2 * STEPS, **next_)
    assert run.cleared == []


def test_an_alarm_of_long_ago_is_cleared_after_a_resume():
    run = Run().measured(MEASUREMENTS, kd={"grad_share": 0.3, "cosine": -0.5}).steps(600)
    again = Run(history=run.history).measured(MEASUREMENTS, kd={"grad_share": 0.3, "cosine": 0.5})
    assert again.cleared == ["kd no longer pulls against lm"]


def test_a_resumed_run_goes_on_counting():
    run = Run().steps(STEPS - 10, kd=5.0)
    again = Run(history=run.history).steps(10, kd=5.0)
    (text,) = again.alarms
    assert "since step 1." in text


def test_standing_alarms_are_in_order_and_without_those_of_others():
    history = History()
    for step, what, key in ((1, "alarm", "a"), (2, "alarm", "b"), (3, "cleared", "a"), (4, "alarm", None)):
        history.append({"kind": "event", "step": step, "what": what, "text": "x"} | ({"key": key} if key else {}))
    assert [e["key"] for e in standing_alarms(history)] == ["b"]


def test_the_kits_own_ranges_are_judged():
    """Every range of the table can be left in both directions that it has."""
    for name, known in RANGES.items():
        meta = {k: known[k] for k in ("unit", "healthy") if k in known}
        run = Run(terms=(lm_term(), term(name, **meta, impossible_above=None)))
        assert len(run.steps(STEPS, **{name: meta["healthy"][1] * 1.5}).alarms) == 1, name


def test_early_stopping_is_not_an_alarm():
    assert "EarlyStopping(patience=20" in repr(EarlyStopping())


def test_a_slow_run_is_said_with_what_to_look_at():
    run = Run().steps(STEPS - 1, times_floor=4.2)
    assert not run.alarms
    run.steps(times_floor=4.2)
    (text,) = run.alarms
    assert text.startswith("a step takes 4.2 times the least that it can cost here, since step 1. Likely: ")
    assert all(what in text for what in ("kd.run_preflight(trainer)", "workers=2", "kd.build_cache(trainer)"))
    run.steps(STEPS, times_floor=1.4)
    assert [e["what"] for e in run.history.events] == ["alarm", "cleared"]


def test_what_is_slow_now_and_then_is_no_alarm():
    run = Run()
    for _ in range(4):
        run.steps(STEPS - 1, times_floor=9.0).steps(times_floor=2.0)
    assert not run.alarms
    # steps that compare gradients take long by nature, and say nothing of the others
    run = Run().measured(2 * STEPS, times_floor=9.0)
    assert not [text for text in run.alarms if "least" in text]
    # nor does a run whose floor is not known
    assert not Run().steps(2 * STEPS, times_floor=None).alarms
    run = Run().steps(STEPS - 1, times_floor=9.0).measured(times_floor=1.0).steps(times_floor=9.0)
    assert len([text for text in run.alarms if "least" in text]) == 1
