"""Interrupt and SIGTERM at any moment: the step is finished and saved; a second Interrupt acts at once, unharmed."""

from __future__ import annotations

import random
import signal
import time

import pytest
from campaign import nursery, uninterrupted
from same_run import differences, leftovers, newest_good, outcome

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def assert_ends_as_uninterrupted(folder) -> None:
    nursery().run("train", folder, session=9)
    assert differences(outcome(folder), uninterrupted()) == []
    assert leftovers(folder) == []


@pytest.mark.parametrize("number", REASONS, ids=lambda number: number.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_signal_at_any_moment_ends_the_session_saved_and_said(tmp_path, number, seed):
    chance = random.Random(f"{seed} {number.name}")
    step, session = 0, 0
    for session in range(2):
        child = nursery().start("train", tmp_path, session=session)
        child.wait_for("saving", chance.randint(1, 5))  # of one save after every step
        time.sleep(chance.uniform(0, 0.06))
        child.kill(number)
        assert child.wait() == 0, child.output()
        if child.last("stopped") == "finished":  # it was faster
            break
        assert child.last("stopped") == REASONS[number]
        assert f"{REASONS[number]}: finishing the step and saving" in child.output()
        newest, refusals = newest_good(tmp_path)
        assert refusals == []
        assert f"stopped at step {newest:,}: {REASONS[number]}" in child.output()
        assert newest >= step + 1, "at least the step that was begun"
        step = newest
    assert step, "every session was faster than its signal: the test shows nothing"
    assert_ends_as_uninterrupted(tmp_path)


@pytest.mark.parametrize("moment", ["saving", "evaluating"])
@pytest.mark.parametrize("number", REASONS, ids=lambda number: number.name)
def test_a_signal_inside_a_save_or_an_evaluation(tmp_path, number, moment):
    child = nursery().start("train", tmp_path)
    child.wait_for("running")
    assert child.wait_for(moment, 3)
    child.kill(number)
    assert child.wait() == 0, child.output()
    assert child.last("stopped") == REASONS[number]
    assert newest_good(tmp_path) == (int(child.last("saved")), [])
    assert_ends_as_uninterrupted(tmp_path)


@pytest.mark.parametrize("moment", ["running", "saving", "evaluating"])
@pytest.mark.parametrize("seed", range(3))
def test_a_second_interrupt_acts_at_once_and_harms_nothing(tmp_path, moment, seed):
    """In a step, in a save and in an evaluation; the second follows the first at once, or a little later."""
    chance = random.Random(f"{seed} {moment}")
    child = nursery().start("train", tmp_path)
    child.wait_for("running")
    child.wait_for(moment, chance.randint(2, 4) if moment != "running" else 1)
    time.sleep(chance.uniform(0, {"running": 0.4, "saving": 0.01, "evaluating": 0.005}[moment]))
    child.kill(signal.SIGINT)
    time.sleep(chance.choice([0.0, 0.001, 0.005]))
    child.kill(signal.SIGINT)
    code = child.wait()
    assert code in (0, 130), child.output()
    newest, refusals = newest_good(tmp_path)
    assert refusals == []
    assert newest >= int(child.last("saved") or -1), "what was saved stays"
    if code == 130:  # the second one came before the run had rested
        assert child.last("failed") == "KeyboardInterrupt:"
    else:
        assert child.last("stopped") == "interrupted"
    assert_ends_as_uninterrupted(tmp_path)


@pytest.mark.parametrize("moment", ["saving", "evaluating"])
def test_a_second_interrupt_in_the_middle_of_a_save_or_an_evaluation(tmp_path, moment):
    """What was begun is given up, and the run says from where it goes on."""
    child = nursery().start("train", tmp_path, rest_in=moment)
    child.wait_for("resting")
    child.kill(signal.SIGINT)
    child.wait_until(lambda: "finishing the step and saving" in child.output())
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    saved = int(child.last("saved"))
    assert newest_good(tmp_path) == (saved, [])
    assert leftovers(tmp_path) == [], "an interrupt takes away what it broke off"
    assert f"fit() goes on from the checkpoint of step {saved:,}" in child.output()
    assert_ends_as_uninterrupted(tmp_path)
