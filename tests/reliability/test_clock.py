"""Sessions end in time whatever things take, and chained together they are the uninterrupted run."""

from __future__ import annotations

import pytest
from campaign import uninterrupted
from same_run import begin, build_run, differences, leftovers, outcome
from simulated_clock import (
    EVAL_EVERY,
    STEPS,
    Clock,
    Pace,
    clock_campaign,
    faults_of,
    run_at_pace,
    session_at_pace,
    simulated,
)

from kd_kit.session import Session

HOUR = 3600.0


def whole() -> dict[str, str]:
    return uninterrupted(steps=STEPS, eval_every=EVAL_EVERY)


PACES = {
    "nothing takes long": Pace(40, 1, 0.5, 0.5, 0.5, 5),
    "slow steps": Pace(600, 5, 90, 1, 1, 1e6),
    "slow saves": Pace(400, 5, 2, 100, 1, 10),
    "slow evaluations": Pace(600, 5, 2, 1, 120, 10),
    "an evaluation that this session has not seen yet": Pace(385, 5, 20, 5, 100, 1e6),
    "only room for a step or two": Pace(300, 100, 25, 10, 20, 1e6),
    "as on a notebook server": Pace(11 * HOUR, 300, 0.8 * HOUR, 120, 0.4 * HOUR, HOUR),
}


@pytest.mark.parametrize("name", PACES)
def test_no_session_exceeds_its_time_or_wastes_it(tmp_path, name):
    sessions = run_at_pace(tmp_path, PACES[name])
    assert faults_of(PACES[name], sessions) == []
    assert len(sessions) > 1 or name == "nothing takes long"
    assert differences(outcome(tmp_path), whole()) == []
    assert leftovers(tmp_path) == []


def test_at_random_paces_too(tmp_path):
    counts = clock_campaign(tmp_path, seed=1, count=6)
    assert (counts.survived, counts.lost, counts.silent) == (6, 0, 0), counts.notes


@pytest.mark.parametrize("jump", [10 * HOUR, 100 * HOUR])
def test_a_clock_that_jumps_ends_the_session_saved_and_harms_nothing(tmp_path, jump):
    """As after a laptop was asleep."""
    clock, pace = Clock(), Pace(9 * HOUR, 0, 1, 1, 1, 1e6)
    with simulated(clock):
        session = session_at_pace(tmp_path, pace, 0, clock, before_step={4: jump})
        assert session[0] == "the session's time is over"
        again = session_at_pace(tmp_path, pace, 1, clock)
    assert again[0] == "finished"
    assert differences(outcome(tmp_path), whole()) == []


def test_without_a_budget_a_jump_means_no_more_than_a_save(tmp_path):
    clock, pace = Clock(), Pace(1e12, 0, 1, 1, 1, 600)
    with simulated(clock):
        assert session_at_pace(tmp_path, pace, 0, clock, before_step={3: HOUR, 4: 1000 * HOUR})[0] == "finished"
    assert differences(outcome(tmp_path), whole()) == []


def test_a_clock_that_stands_still_harms_nothing(tmp_path):
    session = Session(tmp_path, device="cpu", precision="no", clock=Clock())
    with simulated(session.now):
        begin(5)
        trainer = build_run(tmp_path, steps=STEPS, eval_every=EVAL_EVERY, session=session)
        assert trainer.fit() == "finished"
    assert trainer.seconds == 0
    assert differences(outcome(tmp_path), whole()) == []
