"""The last cell: what was reached, what lies in the output, how to go on; and the card of the exported student."""

from __future__ import annotations

import pytest
from helpers import make_trainer, session_at

from kd_kit import evaluate, export
from kd_kit.checkpoint import CheckpointError
from kd_kit.kaggle_place import MOST_BYTES, room
from kd_kit.trainer import Trainer


@pytest.fixture
def working(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    folder = tmp_path / "working"
    folder.mkdir()
    return folder


def lines_of(summary) -> dict[str, str]:
    return dict(summary.lines)


def test_of_a_run_that_is_not_at_its_end(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=6)
    trainer.fit(steps=3)
    assert not trainer.done
    summary = trainer.summary()
    said = lines_of(summary)
    assert not summary.done
    assert said["run"].endswith("step 3 of 6, paused")
    assert "held-out bits per byte" in said["reached"]
    assert "at step 2" in said["reached"]
    assert said["next"].startswith("to go on: run the notebook again")
    assert "s per step" in said["time"]


def test_of_a_run_that_another_session_finished(tmp_path):
    make_trainer(tmp_path / "run", steps=4).fit()
    later = make_trainer(tmp_path / "run", steps=4)
    assert later.done
    said = lines_of(later.summary())
    assert said["run"].endswith("step 4 of 4, finished")
    assert said["next"] == "nothing: the run is at its end"


def test_before_the_first_step(tmp_path):
    said = lines_of(make_trainer(tmp_path / "run").summary())
    assert said["run"].endswith("step 0 of 6, not begun in this session")
    assert said["reached"] == "nothing was measured yet"


def test_with_a_report_its_sentences_are_part_of_it(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit()
    report = evaluate(trainer, limit=2)
    assert all(sentence in repr(trainer.summary(report)) for sentence in report.sentences())


def test_what_is_no_part_of_the_run_is_named_in_kaggles_output(working):
    trainer = make_trainer(working / "kd_runs" / "mine", steps=2)
    trainer.fit()
    export(trainer.student, working / "student")
    (working / ".cache").mkdir()
    (working / ".cache" / "model.bin").write_bytes(b"x" * 10)
    (working / "__notebook__.ipynb").write_text("{}")  # Kaggle's own
    summary = trainer.summary(expected=[working / "student"])
    assert [p.split(" in ")[0] for p in summary.problems] == [".cache"]
    (working / ".cache" / "model.bin").unlink()
    assert trainer.summary(expected=[working / "student"]).problems == ()


def test_a_run_that_kaggle_does_not_keep_is_named(working, tmp_path):
    trainer = make_trainer(tmp_path / "temp" / "mine", steps=2)
    trainer.fit()
    (working / "student").mkdir()
    [problem] = trainer.summary(expected=[working / "student"]).problems
    assert "which Kaggle does not keep" in problem


def test_too_many_files_are_named(working):
    trainer = make_trainer(working / "kd_runs" / "mine", steps=2)
    for number in range(501):
        (trainer.session.folder / f"{number}").touch()
    [problem] = trainer.summary().problems
    assert "Kaggle keeps outputs of more than 500 badly" in problem


def test_a_save_that_would_pass_kaggles_limit_is_not_begun(working, monkeypatch):
    trainer = make_trainer(working / "kd_runs" / "mine", steps=2)
    trainer.fit(steps=1)
    with (working / "large").open("wb") as file:
        file.truncate(MOST_BYTES)  # a hole: it takes no room of this disk
    assert room(trainer.session.folder, 10**12) < 0
    assert room(working.parent, 10**12) == 10**12, "only what is kept is limited"
    with pytest.raises(CheckpointError, match="nothing was written"):
        trainer.fit()
    assert any("Kaggle keeps 20.00 GB" in problem for problem in trainer.summary().problems)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert room(trainer.session.folder, 10**12) == 10**12


def test_a_control_that_is_not_at_its_end_is_to_be_gone_on_with(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_time_is_over", lambda self: self.step == 2)
        report = evaluate(trainer, control=True, limit=2)
    assert "LM-only control" not in report.rows
    summary = trainer.summary(report)
    assert not summary.done
    assert lines_of(summary)["next"].startswith(
        "the LM-only control has 2 steps left; to go on: run the notebook again"
    )
    later = make_trainer(tmp_path / "run", steps=4)
    report = evaluate(later, control=True, limit=2)
    assert "LM-only control" in report.rows
    assert later.summary(report).done


def test_the_clock_is_part_of_it(tmp_path):
    session = session_at(tmp_path / "run")
    session.budget = 3600.0
    said = lines_of(make_trainer(tmp_path / "run", session=session).summary())
    assert said["time"].endswith("of 60 min")
