"""SIGKILL at any moment costs at most what was not saved, and the run ends as if nothing had been."""

from __future__ import annotations

import pytest
from campaign import kill_campaign, nursery, uninterrupted
from same_run import build_run, differences, leftovers, newest_good, outcome

from kd_kit.checkpoint import find_checkpoint


def test_an_uninterrupted_run_repeats_bit_for_bit_and_another_seed_shows(tmp_path):
    """Or else the comparisons of this folder would show nothing."""
    child = nursery().run("train", tmp_path / "again")
    assert len([line for line in child.told if line.startswith("saved")]) >= 4
    assert differences(outcome(tmp_path / "again"), uninterrupted()) == []
    assert leftovers(tmp_path / "again") == []
    nursery().run("train", tmp_path / "other", seed=1)
    different = differences(outcome(tmp_path / "other"), uninterrupted())
    assert {name.split("/")[0] for name in different} >= {"model", "aux", "optim", "state", "history", "best"}


def test_a_lost_random_state_would_show(tmp_path):
    """The student draws random numbers in every step: a session that resumes with others ends elsewhere."""
    nursery().run("train", tmp_path, steps_now=9)
    nursery().run("train", tmp_path, forget_random_state=True)
    different = differences(outcome(tmp_path), uninterrupted())
    assert {name.split("/")[0] for name in different} >= {"model", "rng", "history"}


def test_thirty_kills_lose_nothing_and_change_nothing(tmp_path):
    counts = kill_campaign(tmp_path, seed=1, count=30)
    assert (counts.lost, counts.silent) == (0, 0), counts.notes
    assert counts.survived == counts.tried >= 30
    assert counts.inside >= 5, "too few kills hit the inside of a save: the test shows nothing"


def test_a_campaign_sees_what_is_lost(tmp_path, monkeypatch):
    """A save that is gone after the kill is a loss, whatever comes of the run."""
    monkeypatch.setattr("campaign.newest_good", lambda folder: (newest_good(folder)[0] - 1, []))
    counts = kill_campaign(tmp_path, seed=2, count=1)
    assert counts.lost == 1
    assert "was saved, and the newest good checkpoint is" in counts.notes[0]


@pytest.mark.parametrize("moment", ["initial", "best"])
def test_a_kill_while_weights_are_written_leaves_nothing_about(tmp_path, moment):
    """The start of a run, and its best weights, are files beside the checkpoints."""
    child = nursery().start("train", tmp_path, die_writing=f"{moment}.safetensors")
    assert child.wait() == -9
    assert leftovers(tmp_path), "the kill came too late: the test shows nothing"
    nursery().run("train", tmp_path, session=1)
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []


def test_a_run_goes_on_in_a_process_of_another_kind(tmp_path):
    """Not every session is a child of the same nursery."""
    nursery().start("train", tmp_path, crash_at="before-rename", crash_save=4).wait()
    step = find_checkpoint(tmp_path)[0].step
    trainer = build_run(tmp_path, again=True)
    assert trainer.resume()
    assert trainer.step == step
    assert trainer.fit() == "finished"
    assert differences(outcome(tmp_path), uninterrupted()) == []
