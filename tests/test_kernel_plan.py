"""How many sessions and weeks a run still needs, from its newest checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import make_trainer

from kd_kit.checkpoint import save_checkpoint
from kd_kit.kernel_plan import plan


def a_run(folder, step, each, *, steps=1000, name="distil", **state):
    """A run folder as a session leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RUN.json").write_text(json.dumps({"run_id": "a1", "config": {"steps": steps}}))
    state = {"step_seconds": each, "run": {"name": name, "config": {"steps": steps}}, "stopped_early": False} | state
    groups = {"model": {"w": torch.zeros(2)}}
    save_checkpoint(folder, step=step, save_number=step, run_id="a1", groups=groups, state=state)
    return folder


def test_a_run_in_its_first_phase_has_no_plan_yet(tmp_path):
    (tmp_path / "kd_runs" / "distil" / "cache").mkdir(parents=True)
    (tmp_path / "kd_runs" / "distil" / "cache" / "CACHE.json").write_text("{}")
    with pytest.raises(ValueError, match=r"still in its first phase.*push it again"):
        plan(tmp_path)


def test_sessions_hours_and_weeks(tmp_path):
    """900 steps of 400 s are 100 h: of sessions with 10 h for training, 10; with an hour each for the rest, 110 h."""
    found = plan(a_run(tmp_path / "distil", 100, 400.0), hours=11, quota=30, lead=3600)
    assert (found.run, found.step, found.steps, found.to_go) == ("distil", 100, 1000, 900 * 400.0)
    assert (found.sessions, found.gpu_hours, found.weeks) == (10, 110.0, 4)
    assert str(found).startswith(
        "distil: step 100 of 1,000, 400 s per step, about 100.0 h of training to go: 10 more sessions, "
        "110.0 GPU hours, 4 weeks of the quota"
    )
    assert plan(tmp_path / "distil", hours=11.5, quota=30, lead=3600).sessions == 10, "9.52 are 10"
    assert plan(tmp_path / "distil", hours=101, quota=30, lead=3600).sessions == 1
    assert "1 more session, 100.0 GPU hours, 4 weeks" in str(plan(tmp_path / "distil", hours=101, lead=0))


def test_the_newest_checkpoint_that_can_be_read_counts(tmp_path):
    run = a_run(tmp_path / "distil", 100, 10.0)
    a_run(run, 200, 20.0)
    assert (plan(run).step, plan(run).step_seconds) == (200, 20.0)
    state = run / "ckpt" / "step-00000200" / "state.json"
    state.write_text(state.read_text().replace("20.0", "21.0"))
    assert (plan(run).step, plan(run).step_seconds) == (100, 10.0)
    (run / "ckpt" / "step-00000100" / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"plan: expected a checkpoint that can be read in .*step-00000200: .*again"):
        plan(run)


def test_the_steps_are_those_of_the_run_now(tmp_path):
    run = a_run(tmp_path / "distil", 100, 10.0)
    (run / "RUN.json").write_text(json.dumps({"run_id": "a1", "config": {"steps": 5000}}))
    assert plan(run).steps == 5000
    (run / "RUN.json").unlink()
    assert plan(run).steps == 1000


def test_a_finished_run(tmp_path):
    found = plan(a_run(tmp_path / "a", 1000, 10.0))
    assert (found.sessions, found.to_go, str(found)) == (0, 0.0, "a: step 1,000 of 1,000, finished")
    assert str(plan(a_run(tmp_path / "b", 400, 10.0, stopped_early=True))).endswith("finished (stopped early)")


def test_a_run_without_a_measured_speed(tmp_path):
    found = plan(a_run(tmp_path / "a", 0, 0.0))
    assert found.sessions is None and "no step was measured yet" in str(found)


def test_a_session_that_is_too_short(tmp_path):
    for lead in (3600, 7200):
        found = plan(a_run(tmp_path / "a", 10, 1.0), hours=1, lead=lead)
        assert math.isinf(found.sessions) and "has no time for training: give it more hours" in str(found)


def test_a_run_below_a_folder_is_found_and_named(tmp_path):
    a_run(tmp_path / "out" / "kd_runs" / "distil", 100, 10.0)
    a_run(tmp_path / "out" / "kd_runs" / "distil" / "control", 300, 10.0)
    assert plan(tmp_path).run == "distil", "the control is no run of its own"
    a_run(tmp_path / "out" / "kd_runs" / "second", 500, 10.0)
    with pytest.raises(ValueError, match="plan: expected one run, got distil, second; name one: --run NAME"):
        plan(tmp_path)
    assert plan(tmp_path, "second").step == 500
    with pytest.raises(ValueError, match=r"plan: expected a run of \['distil', 'second'\], got 'third'"):
        plan(tmp_path, "third")


def test_no_run_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"plan: expected a run with checkpoints below .*, got none; fetch"):
            plan(folder)
    with pytest.raises(ValueError, match="plan: expected positive hours and quota, got hours=0"):
        plan(tmp_path, hours=0)


def test_a_run_of_the_trainer(tmp_path):
    """The names in the state are those that a trainer writes."""
    trainer = make_trainer(tmp_path, steps=4)
    trainer.fit(steps=2)
    found = plan(trainer.session.folder)
    assert (found.step, found.steps) == (2, 4) and found.step_seconds > 0 and found.sessions == 1
