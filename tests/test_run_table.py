"""A run in words: its table, clock, gradients and alarms."""

from __future__ import annotations

import math

import pytest
from test_plots import build, constant, measure

from kd_kit.history import History
from kd_kit.run_table import (
    alarm_lines,
    clock,
    cosine_text,
    duration,
    gradient_word,
    last_events,
    last_measured,
    loss_table,
    status,
)


def event(what: str, text: str, **more) -> dict:
    return {"kind": "event", "step": 10, "what": what, "text": text, **more}


def test_table_has_every_figure():
    history = build({"lm": constant(4.0), "kd": constant(34.0), "feature": constant(None)})
    table = loss_table(history)
    assert table.columns == ("term", "value", "unit", "healthy", "verdict", "weight", "contribution", "share %")
    assert table.rows[0] == ("lm", "4.00", "nats/token", "2 - 6", "healthy", "0.5", "2.00", "10.5")
    assert table.rows[1] == ("kd", "34.0", "nats/token", "0.1 - 3", "impossible", "0.5", "17.0", "89.5")
    assert table.rows[2] == ("feature", "-", "1 - cos", "0.1 - 0.8", "absent", "0.5", "-", "-")
    assert table.rows[3][0] == "total"
    shares = [float(row[-1]) for row in table.rows[:2]]
    assert sum(shares) == pytest.approx(100)


def test_table_has_what_the_gradients_say():
    history = build({"lm": constant(4.0), "kd": constant(1.0), "feature": constant(0.5)})
    measure(history, 3, {"lm": 0.5, "kd": 0.4996, "feature": 0.0004}, {"kd": -0.456, "feature": 0.1})
    table = loss_table(history)
    assert table.columns[-2:] == ("gradient %", "cos lm")
    assert [row[-2:] for row in table.rows] == [("50.0", "-"), ("50.0", "-0.46"), ("<0.1", "0.10"), ("", "")]
    verdicts = [row[4] for row in table.rows]
    assert verdicts == ["healthy", "healthy, fights lm", "healthy, too weak", ""]
    assert table.note.endswith("gradients compared at step 3, state after layer 1")
    assert max(len(line) for line in str(table).splitlines()) < 128  # a notebook cell


@pytest.mark.parametrize(
    ("shares", "cosine", "words"),
    [
        ({"lm": 0.5, "kd": 0.5}, 0.1, ("", "")),
        ({"lm": 0.5, "kd": 0.5}, -0.29, ("", "")),
        ({"lm": 0.5, "kd": 0.5}, -0.31, ("", "fights lm")),
        ({"lm": 0.995, "kd": 0.005}, 0.1, ("too strong", "too weak")),
        ({"lm": 0.0, "kd": 0.0}, None, ("no gradient", "no gradient")),
        ({"lm": math.nan, "kd": math.nan}, None, ("no gradient", "no gradient")),
        ({"lm": 1.0}, None, ("", "")),  # alone it has all there is
    ],
)
def test_what_is_wrong_with_a_gradient(shares, cosine, words):
    history = build({name: constant(1.0) for name in shares})
    measure(history, 5, shares, {"kd": cosine})
    record = last_measured(history)
    assert record["step"] == 5
    assert (gradient_word(record, "lm"), gradient_word(record, "kd")) == words


def test_a_term_without_weight_or_positions_is_not_judged_by_its_gradient():
    history = build({"lm": constant(1.0), "kd": constant(1.0)})
    measure(history, 5, {"lm": 1.0, "kd": 0.0}, {})
    record = last_measured(history)
    record["terms"]["kd"]["weight"] = 0.0
    assert gradient_word(record, "kd") == ""
    assert gradient_word(record, "lm") == ""
    assert last_measured(build({"lm": constant(1.0)})) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (40.4, "40 s"), (59.6, "1 min"), (300, "5 min"), (3570, "1 h 00 min"), (7800, "2 h 10 min"),
     (400_000, "111 h 07 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_cosines():
    assert [cosine_text(c) for c in (None, -0.001, 0.004, -0.456, 1.0)] == ["-", "0.00", "0.00", "-0.46", "1.00"]


def test_the_clock_of_a_session():
    def at(left, needed, **settings):
        return clock(build({"lm": constant(1.0)}, seconds_left=left, seconds_to_finish=needed), settings)

    assert at(None, 3900.0) == ("1 h 05 min to finish", False)
    assert at(7800.0, 3900.0) == ("2 h 10 min left of the session, 1 h 05 min to finish", False)
    text = "1 h 05 min to finish, but 10 min left of the session: it will not finish in it"
    assert at(600.0, 3900.0) == (text, True)
    assert at(600.0, 3900.0, finish_in_session=True)[1] is False
    assert "end early" in at(600.0, 3900.0, finish_in_session=True)[0]
    assert at(None, None) == ("", False)
    assert clock(History()) == ("", False)


def test_the_clock_of_a_run_that_rests_or_is_over():
    history = build({"lm": constant(1.0)}, seconds_left=None, seconds_to_finish=60.0)
    history.append(event("rests", "by request; trainer.go_on() ends it"))
    assert clock(history)[0] == "rests by request; trainer.go_on() ends it"
    history.append(event("rests", "no longer"))
    assert clock(history)[0] == "1 min to finish"
    history.append(event("stopped", "stopped by request"))
    history.append(event("saved", "step-00000010"))
    assert clock(history) == ("at rest: stopped by request", False)
    history.append({"kind": "train", "step": 11, "total": 1.0, "terms": {}, "seconds_to_finish": 50.0})
    assert clock(history)[0] == "50 s to finish"  # it goes on


def test_alarms_that_stand_and_events():
    history = build({"lm": constant(1.0)})
    assert alarm_lines(history) == [] == last_events(history, 2)
    history.append(event("alarm", "kd is high, since step 3. Likely: a bug. Try: kd.verify", key="a"))
    assert alarm_lines(history) == ["Alarm: kd is high, since step 3.", "Likely: a bug.", "Try: kd.verify"]
    history.append(event("alarm", "of another form", key="b"))
    assert alarm_lines(history) == ["2 alarms stand, the newest: of another form"]
    history.append(event("cleared", "kd is well", key="b"))
    history.append(event("saved", "step-00000010"))
    assert alarm_lines(history)[0] == "Alarm: kd is high, since step 3."
    assert last_events(history, 2) == ["alarm at step 10: of another form", "cleared at step 10: kd is well"]


def test_the_header_says_what_is_usual_and_not_what_one_step_took():
    history = build({"lm": constant(4.0)})
    for times in (1.2, 1.3, 1.4, 9.0):
        history.append({**history.last("train"), "times_floor": times})
    assert "1.4 × the floor" in status(history)  # the median of 1.2, 1.3, 1.4 and 9 is 1.35
    assert "floor" not in status(build({"lm": constant(4.0)}))
