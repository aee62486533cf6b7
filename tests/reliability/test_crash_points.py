"""A process that dies at any point of a save: the run goes on from what was whole and ends as it would have."""

from __future__ import annotations

import pytest
from campaign import nursery, uninterrupted
from same_run import STEPS, differences, leftovers, newest_good, outcome

BEFORE = ["after-model", "after-aux", "after-optim", "after-rng", "before-manifest", "before-rename"]
AFTER = ["after-rename", "during-cleanup"]


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("point", [*BEFORE, *AFTER])
def test_a_save_that_dies_at_this_point(tmp_path, point, number):
    child = nursery().start("train", tmp_path, crash_at=point, crash_save=number)
    assert child.wait() == 137
    assert child.last("saving") is not None
    dying, saved = int(child.last("saving")), int(child.last("saved") or -1)
    assert dying > saved
    newest, refusals = newest_good(tmp_path)
    assert refusals == []
    assert newest == (dying if point in AFTER else saved)
    assert any(name.startswith((".tmp-", ".del-")) for name in leftovers(tmp_path)) == (point != "after-rename")
    resumed = nursery().run("train", tmp_path, session=1)
    assert resumed.last("stopped") == "finished"
    assert int(resumed.last("running")) == max(newest, 0)
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []


def test_dying_in_every_save_the_run_still_ends(tmp_path):
    """Each session brings the run on by four saves, and dies behind the last of them."""
    ends, session = [], 0
    while not ends or ends[-1] == 137:
        child = nursery().start("train", tmp_path, session=session, crash_at="after-rename", crash_save=4)
        ends.append(child.wait())
        session += 1
        assert session < STEPS
    assert ends == [137] * (STEPS // 4) + [0]
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []


def test_dying_in_the_clean_up_behind_the_last_step_leaves_nothing_about(tmp_path):
    """The session after has nothing to train and nothing to save."""
    quiet = {"save_minutes": 60, "eval_every": 100}
    nursery().run("train", tmp_path, steps_now=5, **quiet)
    nursery().run("train", tmp_path, session=1, steps_now=5, **quiet)
    child = nursery().start("train", tmp_path, session=2, crash_at="during-cleanup", **quiet)
    assert child.wait() == 137
    assert newest_good(tmp_path) == (STEPS, [])
    assert leftovers(tmp_path) == [".del-step-00000005"]
    assert "nothing is trained" in nursery().run("train", tmp_path, session=3, **quiet).output()
    assert leftovers(tmp_path) == []
