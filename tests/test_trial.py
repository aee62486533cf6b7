import copy
import gc
import json
import os
import random

import numpy as np
import pytest
import torch
from helpers import assert_same_run, assert_same_tensors, make_trainer, part_term, session_at, teacher, weights_of

import kd_kit as kd
from kd_kit.run_lock import _process, lock_run
from kd_kit.tensor_tree import capture_rng, flatten_optimizer
from kd_kit.trainer import Trainer
from kd_kit.trial import Trial, _in_half
from kd_kit.types import LossValue


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """A trial collects garbage; what other tests have loaded need not be looked through every time."""
    gc.freeze()
    yield
    gc.unfreeze()


def terms():
    return [kd.lm_term(), kd.kd_term(), kd.feature_term(), kd.router_term()]


def state_of(trainer) -> dict:
    """Everything that a trial might touch, copied."""
    rng, described = capture_rng()
    optimizer, rest = flatten_optimizer(trainer.optimizer.state_dict())
    return {
        "tensors": {
            **{f"module.{n}": t.clone() for n, t in trainer.module.state_dict().items()},
            **{f"teacher.{n}": t.clone() for n, t in trainer.teacher.model.state_dict().items()},
            **{f"optimizer.{n}": t.clone() for n, t in optimizer.items()},
            **{f"rng.{n}": t.clone() for n, t in rng.items()},
        },
        "plain": (
            repr((rest, described, trainer.history.records, trainer.settings, trainer._norms, trainer.callbacks)),
            [m.training for m in (*trainer.module.modules(), *trainer.teacher.model.modules())],
            [p.grad is None for p in (*trainer.module.parameters(), *trainer.teacher.model.parameters())],
            [(trainer.step, trainer.tokens, trainer.seconds, trainer.save_number, trainer.best, trainer.stop_reason)],
        ),
        "files": {p: p.read_bytes() for p in sorted(trainer.session.folder.rglob("*")) if p.is_file()},
        "folders": sorted(p for p in trainer.session.folder.rglob("*") if p.is_dir()),
    }


def assert_same_state(one, other):
    assert_same_tensors(one["tensors"], other["tensors"])
    for key in ("plain", "files", "folders"):
        assert one[key] == other[key]


@pytest.mark.parametrize("steps_before", [0, 3])
def test_nothing_is_changed_by_it(tmp_path, steps_before):
    trainer = make_trainer(tmp_path / "run", terms=terms())
    if steps_before:
        trainer.fit(steps_before)
    trainer.student.eval()  # any mode comes back
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = state_of(trainer)
    trial = Trial(trainer).run()
    assert not trial.errors
    assert_same_state(before, state_of(trainer))
    assert trial.rates[0][0] == steps_before
    assert len(trial.records) == 2


def test_the_run_behind_it_is_the_run_without_it(tmp_path):
    trainers = [make_trainer(tmp_path / name, terms=terms()) for name in ("with", "without")]
    Trial(trainers[0]).run()
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.fit(4)
    assert_same_run(*trainers)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_its_steps_are_those_of_the_run(tmp_path, steps_before):
    trainer = make_trainer(tmp_path / "run", terms=terms(), accumulation=2)
    if steps_before:
        trainer.fit(steps_before)
    trial = Trial(trainer).run()
    trainer.fit(2)
    records = [r for r in trainer.history.records if r["kind"] == "train"][-2:]
    for found, real in zip(trial.records, records, strict=True):
        assert found["step"] == real["step"]
        assert found["lr"] == real["lr"]
        assert {n: t["value"] for n, t in found["terms"].items()} == {n: t["value"] for n, t in real["terms"].items()}
        assert found["grad_norm"] == real["grad_norm"]
    assert trial.apart == 0


def test_what_it_measures(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=terms())
    trial = Trial(trainer).run()
    assert trial.values.keys() == trial.halved.keys() == {"lm", "kd", "feature", "router"}
    for name, value in trial.values.items():
        assert trial.halved[name] == pytest.approx(value, rel=0.05, abs=0.02)
        assert trial.values[name] == pytest.approx(trial.records[0]["terms"][name]["value"], rel=1e-4)
    ((key, (cells, tail)),) = trial.cells.items()
    assert (key, cells) == (trainer.module.needs.readings[0].key, 64)
    assert tail == pytest.approx(trial.records[0]["tail_mass"], rel=1e-4)
    assert set(trial.reached) == {n for n, p in trainer.module.named_parameters() if p.requires_grad}
    assert all(trial.reached.values())
    assert trial.scores["teacher"].bytes == trial.scores["student"].bytes > 0
    assert trial.step_seconds > trial.floor_seconds > 0
    assert trial.saved_bytes > 12 * sum(p.numel() for p in trainer.student.parameters())
    assert trial.peak is None


def test_a_teacher_in_half_is_not_halved_again(tmp_path):
    trial = Trial(make_trainer(tmp_path / "run", model=teacher(torch.float16))).run()
    assert not trial.errors
    assert trial.halved == {}


def test_trained_parts_of_a_term_are_copied(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=[kd.lm_term(), part_term(0.5)])
    before = weights_of(trainer)
    trial = Trial(trainer).run()
    assert not trial.errors
    assert trial.reached["parts.part.guess.weight"]
    assert_same_tensors(before, weights_of(trainer))


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", terms=terms())
    torch.manual_seed(3)
    before = state_of(trainer)

    def interrupted(self, *arguments):
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trial(trainer).run()
    assert_same_state(before, state_of(trainer))


def test_what_a_killed_one_left_goes_and_what_a_living_one_uses_stays(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    dead, alive = (trainer.session.folder / f".preflight-{name}" for name in ("dead", "alive"))
    dead.mkdir()
    alive.mkdir()
    (dead / "RUN.json").write_text("{}")
    with lock_run(alive):  # in the name of the process that started this one, which lives
        text = (alive / "LOCK").read_text()
        (alive / "LOCK").write_text(json.dumps(json.loads(text) | _process(os.getppid())))
        trial = Trial(trainer).run()
        assert not trial.errors
        assert not dead.exists()
        assert alive.exists()
        (alive / "LOCK").write_text(text)


def test_a_stage_that_fails_leaves_those_that_do_not_need_it(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(Trainer, "save", broken)
    trial = Trial(make_trainer(tmp_path / "run")).run()
    assert set(trial.errors) == {"save", "resume"}
    assert trial.floor_seconds > 0
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trial.need("resume")
    trial.need("steps", "clock")


def test_a_folder_that_cannot_be_made_fails_every_stage(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run")

    def full(**where):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    trial = Trial(trainer).run()
    assert {type(error) for error in trial.errors.values()} == {OSError}
    assert trial.values == {}


def test_half_precision_holds_what_does_not_fit_otherwise():
    fits, large = torch.tensor([1.0, -torch.inf, 60_000.0]), torch.tensor([1.0, 1e6])
    assert _in_half(fits).dtype == torch.float16
    assert _in_half(large).dtype == torch.bfloat16
    assert bool(_in_half(large).isfinite().all())
    ids = torch.tensor([1, 2])
    assert _in_half(ids) is ids


def test_the_teacher_is_not_copied(tmp_path, monkeypatch):
    """A term of one's own may hold on to the teacher, which is large."""
    one = copy.deepcopy(teacher())
    copies = []
    monkeypatch.setattr(type(one), "__deepcopy__", lambda self, memo: copies.append(self), raising=False)

    class Holds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = [one]
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, output, signal, batch):
            assert self.teacher[0] is one
            value = (output.hidden.float().mean() * self.scale) ** 2
            return LossValue(value * len(batch.rows), torch.tensor(float(len(batch.rows))))

    term = kd.LossTerm(name="holds", weight=0.1, unit="", healthy=(0, 1), value=Holds())
    trial = Trial(make_trainer(tmp_path / "run", model=one, terms=[kd.lm_term(), kd.kd_term(), term])).run()
    assert not trial.errors
    assert not copies


def test_it_uses_the_session_that_it_is_given(tmp_path):
    session = session_at(tmp_path / "run")
    seen = []
    own = type(session).within
    trainer = make_trainer(tmp_path / "run", session=session)
    session.within = lambda name: seen.append(name) or own(session, name)
    Trial(trainer).run()
    assert len(seen) == 2, "one trainer after the other"
    assert all(name.startswith(".preflight-") for name in seen)
