"""A run whose folder is gone: found again in a mirror, below an input, or where its user says."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import assert_same_run, make_trainer, measured, part_term, tiny_student, weights_of

from kd_kit import evaluate, kd_term, lm_term
from kd_kit.checkpoint import CheckpointError, find_checkpoint
from kd_kit.history import History
from kd_kit.session import Session, build_session


def terms(seed: int = 0):
    return [lm_term(0.2), kd_term(0.7, top_k=8), part_term(0.1, seed=seed)]


def trainer_in(folder, *, seed: int = 0, name: str = "run", **where):
    """A trainer of the run of this name, as a session on another machine builds it."""
    torch.manual_seed(5 + seed)
    session = Session(folder, device="cpu", precision="no", name=name, **where)
    return make_trainer(folder, student=tiny_student(seed, attention_dropout=0.2), terms=terms(seed), session=session)


@pytest.fixture
def whole(tmp_path):
    trainer = trainer_in(tmp_path / "whole")
    trainer.fit()
    return trainer


def events(trainer, what: str) -> list[str]:
    return [e["text"] for e in trainer.history.events if e["what"] == what]


def test_a_run_goes_on_from_its_mirror_on_an_empty_disk(tmp_path, whole, capsys):
    mirror = str(tmp_path / "mirror")
    first = trainer_in(tmp_path / "one", mirror=mirror)
    first.fit(steps=4)
    assert any(text.startswith("step 4") and mirror in text for text in events(first, "mirrored"))
    shutil.rmtree(tmp_path / "one")
    second = trainer_in(tmp_path / "two", seed=1, mirror=mirror)
    assert "goes on from step 4" in capsys.readouterr().out
    assert second.run_id == first.run_id
    assert second.fit() == "finished"
    assert_same_run(whole, second)
    assert measured(History.load(tmp_path / "two" / "metrics.jsonl")) == measured(whole.history)
    report = evaluate(second, control=True, limit=2)
    assert "LM-only control" in report.rows, "the start that a control needs came along"


@pytest.mark.parametrize("layout", ["a-notebook/kd_runs/run", "run", "deep/er/than/that/run"])
def test_a_run_goes_on_from_an_attached_output(tmp_path, whole, layout):
    first = trainer_in(tmp_path / "one")
    first.fit(steps=3)
    inputs = tmp_path / "input"
    (inputs / layout).parent.mkdir(parents=True)
    shutil.move(tmp_path / "one", inputs / layout)
    before = {p: p.read_bytes() for p in inputs.rglob("*") if p.is_file()}
    second = trainer_in(tmp_path / "two", seed=1, inputs=(inputs,))
    assert second.fit() == "finished"
    assert_same_run(whole, second)
    assert {p: p.read_bytes() for p in inputs.rglob("*") if p.is_file()} == before


def test_the_newest_of_all_places_wins(tmp_path, whole):
    first = trainer_in(tmp_path / "one", mirror=str(tmp_path / "mirror"))
    first.fit(steps=2)
    shutil.copytree(tmp_path / "one", tmp_path / "input" / "it")
    first.fit(steps=3)  # the mirror has step 5, the input step 2
    second = trainer_in(tmp_path / "two", seed=1, inputs=(tmp_path / "input",), mirror=str(tmp_path / "mirror"))
    second.resume()
    assert second.step == 5


def test_a_bare_checkpoint_is_enough_to_go_on(tmp_path, whole):
    first = trainer_in(tmp_path / "one")
    first.fit(steps=4)
    info, _ = find_checkpoint(tmp_path / "one")
    shutil.copytree(info.path, tmp_path / "input" / "only this")
    second = trainer_in(tmp_path / "two", inputs=(tmp_path / "input",))
    second.fit()
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(second)[name]), name
    assert second.history.evaluations() == whole.history.evaluations()
    assert "LM-only control" in evaluate(second, control=True, limit=2).rows, "the same start was built again"


def test_a_bare_checkpoint_with_a_student_of_another_start_has_no_control(tmp_path):
    first = trainer_in(tmp_path / "one")
    first.fit(steps=4)
    info, _ = find_checkpoint(tmp_path / "one")
    shutil.copytree(info.path, tmp_path / "input" / "only this")
    second = trainer_in(tmp_path / "two", seed=1, inputs=(tmp_path / "input",))
    second.fit()
    with pytest.raises(ValueError, match="expected the student's weights before its first step"):
        second.train_control()
    assert list(evaluate(second, control=True, limit=2).rows) == ["distilled", "teacher"]


def test_another_runs_output_is_not_taken(tmp_path, capsys):
    other = trainer_in(tmp_path / "input" / "it", name="another")
    other.fit(steps=2)
    capsys.readouterr()
    mine = trainer_in(tmp_path / "run", inputs=(tmp_path / "input",))
    assert not mine.resume() and mine.step == 0
    assert "another" in capsys.readouterr().out


def test_a_path_that_is_given_is_gone_on_from_whatever_its_name(tmp_path, whole):
    first = trainer_in(tmp_path / "one", name="another")
    first.fit(steps=4)
    second = trainer_in(tmp_path / "two", seed=1, resume_from=tmp_path / "one")
    assert second.fit() == "finished"
    assert_same_run(whole, second)


def test_a_path_that_holds_nothing_is_no_new_run(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected"):
        trainer_in(tmp_path / "run", resume_from=tmp_path / "empty")
    with pytest.raises(ValueError, match="resume_from= as a folder that exists"):
        build_session("run", folder=tmp_path, resume_from=tmp_path / "none")


def test_a_control_that_was_under_way_goes_on_as_well(tmp_path, monkeypatch):
    mirror = str(tmp_path / "mirror")
    first = trainer_in(tmp_path / "one", mirror=mirror)
    first.fit()
    with monkeypatch.context() as patch:
        patch.setattr("kd_kit.trainer.Trainer._time_is_over", lambda self: self.step == 3)
        with pytest.raises(RuntimeError, match="stopped at step 3"):
            first.train_control()
    shutil.rmtree(tmp_path / "one")
    second = trainer_in(tmp_path / "two", seed=1, mirror=mirror)
    second.resume()
    trained = second.train_control()
    assert [e["what"] for e in second.control_history.events].count("resumed") == 1
    whole = trainer_in(tmp_path / "whole")
    whole.fit()
    for name, value in whole.train_control().state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_a_mirror_that_fails_is_an_alarm_and_stops_nothing(tmp_path, monkeypatch):
    from kd_kit.mirror_places import FsspecPlace

    def fails(self, local, alive):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(FsspecPlace, "_upload", fails)
    monkeypatch.setattr("kd_kit.steering.COPY_PATIENCE", 0.5)
    trainer = trainer_in(tmp_path / "run", mirror=str(tmp_path / "mirror"))
    assert trainer.fit() == "finished"
    assert any("the network is unreachable" in text for text in events(trainer, "alarm"))


def test_a_mirror_that_cannot_be_asked_is_no_reason_to_begin_anew(tmp_path, monkeypatch, capsys):
    from kd_kit.mirror_places import FsspecPlace

    mirror = str(tmp_path / "mirror")
    first = trainer_in(tmp_path / "one", mirror=mirror)
    first.fit(steps=4)

    def fails(self):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(FsspecPlace, "_list", fails)
    with pytest.raises(CheckpointError, match="a new run would begin from nothing"):
        trainer_in(tmp_path / "two", mirror=mirror)
    again = trainer_in(tmp_path / "one", seed=1, mirror=mirror)
    assert again.resume() and again.step == 4, "what is here needs no mirror"
    assert "the network is unreachable" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["another seed", "all damaged"])
def test_a_mirror_full_of_what_cannot_be_used_is_no_reason_to_begin_anew(tmp_path, damage, capsys):
    mirror = str(tmp_path / "mirror")
    trainer_in(tmp_path / "one", mirror=mirror).fit(steps=4)
    before = (tmp_path / "mirror" / "run" / "RUN.json").read_bytes()
    if damage == "all damaged":
        for path in (tmp_path / "mirror").rglob("model.safetensors"):
            path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    session = Session(tmp_path / "two", device="cpu", precision="no", name="run", mirror=mirror)
    seed = {"seed": 5} if damage == "another seed" else {}
    with pytest.raises(CheckpointError, match="checkpoints there that this run cannot go on from"):
        make_trainer(
            tmp_path / "two", student=tiny_student(attention_dropout=0.2), terms=terms(), session=session, **seed
        )
    assert (tmp_path / "mirror" / "run" / "RUN.json").read_bytes() == before
    named = trainer_in(tmp_path / "three", name="other", mirror=mirror)
    assert named.fit(steps=1) == "paused", "under another name nothing is in the way"


def test_a_folder_with_several_runs_is_gone_on_from_by_name(tmp_path):
    for name, steps in (("a", 2), ("b", 4)):
        trainer_in(tmp_path / "all" / name, name=name).fit(steps=steps)
    mine = trainer_in(tmp_path / "run", name="a", seed=1, resume_from=tmp_path / "all")
    assert mine.resume() and mine.step == 2
    with pytest.raises(CheckpointError, match=r"expected one run in .*'a', 'b'; give the folder of one of them"):
        trainer_in(tmp_path / "third", name="c", resume_from=tmp_path / "all")


def test_a_mirror_that_makes_no_sense_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="expected"):
        build_session("run", folder=tmp_path, mirror="nonsense://x/y")
