"""A run that is steered while it goes on: background, pause, weights, early decay, early stopping, new settings."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, make_trainer, measured, small_data, tiny_student, weights_of

from kd_kit import (
    Callback,
    EarlyStopping,
    LearningRate,
    attention_term,
    checkpoint,
    curriculum,
    evaluate,
    feature_term,
    fixed,
    gradient_share,
    kd_term,
    lm_term,
    load_weights,
    router_term,
    score,
)
from kd_kit.session import Session
from kd_kit.trainer_builder import change_terms

LONG = 60  # seconds that a step of the background run is waited for; it takes milliseconds


class At(Callback):
    """Does something once a step has been recorded."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_log(self, trainer):
        if trainer.step >= self.step and self.what is not None:
            what, self.what = self.what, None
            what(trainer)


class Gate(Callback):
    """Holds the run at its first record until it is opened, so that a test has it in the middle of a run."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def on_log(self, trainer):
        self.reached.set()
        self.open.wait(LONG)


def behind(folder, **arguments):
    """A trainer in the background, held after its first step."""
    trainer = make_trainer(folder, **({"steps": 40, "eval_every": 40} | arguments))
    gate = Gate()
    trainer.callbacks = [gate]
    assert trainer.fit(background=True) == "running"
    assert gate.reached.wait(LONG)
    return trainer, gate


# --- the background --------------------------------------------------------------------------------------------------


def test_a_run_in_the_background_is_the_same_run(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    trainer = make_trainer(tmp_path / "behind")
    assert trainer.fit(background=True) == "running"
    assert trainer.wait() == "finished"
    assert not trainer.running
    assert_same_run(whole, trainer)


def test_what_would_meet_a_running_run_is_refused_or_queued(tmp_path):
    trainer, gate = behind(tmp_path / "run")
    assert trainer.running
    assert trainer.wait(timeout=0.01) is None
    with pytest.raises(ValueError, match="expected a trainer at rest, got one that trains already"):
        trainer.fit()
    with pytest.raises(ValueError, match=r"trains in the background; trainer\.wait\(\) for its end"):
        evaluate(trainer)
    with pytest.raises(ValueError, match="expected a run at rest, got one that trains in the background"):
        make_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="or with this student"):
        make_trainer(tmp_path / "other", student=trainer.student)
    assert trainer.save() is None
    assert trainer.evaluate_now() is None
    trainer.stop("enough")
    gate.open.set()
    assert trainer.wait(LONG) == "enough"
    assert trainer.step == 1
    assert trainer.history.evaluations()[0] == [0, 1]
    assert [e["what"] for e in trainer.history.events].count("saved") == 2
    make_trainer(tmp_path / "run", steps=40, eval_every=40)


def test_a_pause_holds_the_run_and_wishes_are_met_meanwhile(tmp_path):
    trainer, gate = behind(tmp_path / "run")
    trainer.pause()
    gate.open.set()
    while "rests" not in [e["what"] for e in trainer.history.events]:
        assert trainer.running
    trainer.evaluate_now()
    while trainer.history.evaluations()[0][-1:] != [1]:
        assert trainer.running
    assert trainer.step == 1
    trainer.go_on()
    assert trainer.wait(LONG) == "finished"
    whole = make_trainer(tmp_path / "whole", steps=40, eval_every=40)
    whole.fit()
    assert [r for r in measured(trainer.history) if r["kind"] == "train"] == [
        r for r in measured(whole.history) if r["kind"] == "train"
    ]
    said = [e["text"] for e in trainer.history.events if e["what"] == "rests"]
    assert said == ["by request; trainer.go_on() ends it", "no longer"]


def test_a_paused_run_can_be_stopped(tmp_path):
    trainer, gate = behind(tmp_path / "run")
    trainer.pause()
    trainer.stop()
    gate.open.set()
    assert trainer.wait(LONG) == "stopped by request"
    assert trainer.step == 1


def test_a_wish_of_an_earlier_run_is_forgotten(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run")
    trainer.stop()
    assert "nothing trains now" in capsys.readouterr().out
    trainer.pause()
    assert trainer.fit() == "finished"


@pytest.mark.parametrize("steps", [-1, 2.5, "3", True])
def test_a_number_of_steps_that_is_none_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=r"expected steps= as the number of further steps, at least 0"):
        make_trainer(tmp_path / "run").fit(steps=steps)


def test_the_cell_that_builds_a_trainer_run_again_leaves_a_running_one_alone(tmp_path):
    """It is refused before it reads the models, which the run is using."""
    trainer, gate = behind(tmp_path / "run")
    calls = []
    handles = [
        model.register_forward_pre_hook(lambda *_: calls.append(threading.current_thread().name))
        for model in (trainer.student, trainer.teacher.model)
    ]
    for folder, student in ((tmp_path / "run", tiny_student()), (tmp_path / "other", trainer.student)):
        with pytest.raises(ValueError, match="stop it first"):
            make_trainer(folder, student=student, steps=40, eval_every=40)
    assert calls == []
    for handle in handles:
        handle.remove()
    gate.open.set()
    for number in range(5):  # another run with the same teacher is nobody's business
        make_trainer(tmp_path / f"beside-{number}")
    assert trainer.wait(LONG) == "finished"
    whole = make_trainer(tmp_path / "whole", steps=40, eval_every=40)
    whole.fit()
    assert_same_run(whole, trainer)


@pytest.mark.parametrize(("end", "code"), [("", 0), ("os.kill(os.getpid(), signal.SIGTERM)", 143)])
def test_a_program_that_ends_while_it_trains_stops_and_saves(tmp_path, end, code):
    program = f"""
import os, signal
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from helpers import make_trainer
trainer = make_trainer(Path({str(tmp_path / "run")!r}), steps=100_000, eval_every=100_000)
trainer.fit(background=True)
while trainer.step < 2:
    pass
{end}
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert child.returncode == code, child.stderr
    assert "the run in the background stops after its step and saves" in child.stdout
    assert "stopped at step" in child.stdout
    again = make_trainer(tmp_path / "run", steps=100_000, eval_every=100_000)
    assert again.resume()
    assert again.step >= 2


def test_what_was_lost_is_said(tmp_path, capsys):
    def broken(trainer):
        raise RuntimeError("no more")

    for saved, said in ((0, "the start, since nothing was saved yet"), (2, "the checkpoint of step 2")):
        trainer = make_trainer(tmp_path / f"run-{saved}", steps=20, eval_every=20)
        if saved:
            trainer.fit(steps=saved)
        trainer.callbacks = [At(saved + 1, broken)]
        with pytest.raises(RuntimeError, match="no more"):
            trainer.fit()
        assert f"fit() goes on from {said}" in capsys.readouterr().out


def test_what_goes_wrong_behind_is_raised_by_wait(tmp_path):
    def broken(trainer):
        raise RuntimeError("the disk is on fire")

    trainer = make_trainer(tmp_path / "run")
    stopped = []
    watcher = Callback()
    watcher.on_stop = lambda t: stopped.append(t.stop_reason)
    trainer.callbacks = [At(1, broken), watcher]
    trainer.fit(background=True)
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        trainer.wait(LONG)
    assert stopped == ["failed: RuntimeError: the disk is on fire"]
    assert not trainer.running
    trainer.callbacks = []
    assert trainer.fit() == "finished"
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    assert_same_run(whole, trainer)


def test_a_callback_may_stop_a_run_in_the_foreground(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=40, eval_every=40)
    trainer.callbacks = [At(10, lambda t: t.stop())]
    assert trainer.fit() == "stopped by request"
    assert trainer.step == 10


def test_a_teacher_that_two_threads_read_says_to_each_what_belongs_to_it(tmp_path):
    """Hooks belong to a model: a probe of one run, while another trains in the background with the same teacher."""
    terms = [lm_term(0.2), feature_term(0.3), router_term(0.1), attention_term(0.4)]
    data = small_data(batch_size=4)
    trainer, gate = behind(tmp_path / "run", terms=terms, data=data, measure_every=1)
    other = make_trainer(tmp_path / "other", terms=terms, data=data)
    batch = next(data.batches(0, [3]))
    expected = other.teacher.signal(batch)
    gate.open.set()
    for _ in range(30):
        found = other.teacher.signal(batch)
        for name in ("states", "routing"):
            for layer, tensor in getattr(expected, name).items():
                assert torch.equal(getattr(found, name)[layer], tensor), name
        for layer, kinds in expected.attention.items():
            assert all(torch.equal(found.attention[layer][kind], tensor) for kind, tensor in kinds.items())
    assert trainer.wait(LONG) == "finished"
    whole = make_trainer(tmp_path / "whole", terms=terms, data=data, measure_every=1, steps=40, eval_every=40)
    whole.fit()
    assert_same_run(whole, trainer)


def test_a_trainer_that_trained_in_the_background_can_be_given_up(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=2)
    trainer.fit(background=True)
    trainer.wait(LONG)
    about = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert about() is None, "its models would stay in the memory of the card"


def test_a_stop_behind_the_last_step_is_the_end(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.callbacks = [At(4, lambda t: t.stop())]
    assert trainer.fit() == "finished"


def test_what_other_cells_draw_between_two_calls_changes_nothing(tmp_path):
    def built(folder):
        return make_trainer(folder, student=tiny_student(attention_dropout=0.2), steps=6)

    torch.manual_seed(5)
    whole = built(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(5)
    trainer = built(tmp_path / "parts")
    trainer.fit(steps=3)
    torch.rand(7)
    trainer.save()
    trainer.fit()
    assert_same_run(whole, trainer)


def test_a_save_that_fails_at_the_end_loses_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", steps=4)
    save = checkpoint.save_checkpoint

    def full(*arguments, **more):
        raise checkpoint.CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(checkpoint.CheckpointError):
        trainer.fit()
    assert trainer.step == 4
    alone = tiny_student(5)
    assert load_weights(alone, tmp_path / "run" / "last.safetensors") == {"step": "4"}
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), "at least the weights are there"
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert trainer.save().step == 4
    assert not (tmp_path / "run" / "last.safetensors").exists()
    whole = make_trainer(tmp_path / "whole", steps=4)
    whole.fit()
    assert_same_run(whole, trainer)


def test_scoring_a_student_beside_its_run_leaves_its_dropout_on(tmp_path):
    trainer, gate = behind(tmp_path / "run", student=tiny_student(attention_dropout=0.2))
    modes = []
    trainer.student.model.register_forward_pre_hook(
        lambda *_: modes.append(trainer.student.training) if threading.current_thread().name == "kd_kit fit" else None
    )
    gate.open.set()
    for _ in range(5):
        score(trainer.student, trainer.data.held_out, limit=2)
    trainer.wait(LONG)
    assert modes.count(True) >= 39
    assert modes.count(False) <= 2, "its own last evaluation"


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_can_be_changed_while_it_trains(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=12, eval_every=12)
    said = []
    trainer.callbacks = [At(10, lambda t: said.append(t.set_weights({"kd": 0.1})))]
    trainer.fit()
    assert said == ["weight of kd 0.9 -> 0.1"]
    _, weights = trainer.history.series("kd", "weight")
    assert weights[9] == pytest.approx(0.9)
    assert weights[10] == pytest.approx(0.5)
    (event,) = [e for e in trainer.history.events if e["what"] == "changed"]
    assert event["text"] == "weight of kd 0.9 -> 0.1"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kl": 1.0}, "expected terms out of lm, kd, got kl"),
        ({"kd": -1.0}, "Trainer.set_weights: expected weights of at least 0, got kd=-1.0"),
        ({"kd": "much"}, "Trainer.set_weights: expected weights of at least 0, got kd='much'"),
        ({"lm": 0.0}, "expected a weight above 0 for lm"),
    ],
)
def test_weights_that_cannot_be_are_refused_and_nothing_changes(tmp_path, weights, message):
    trainer = make_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        trainer.set_weights(**weights)
    assert trainer.shares_at(0) == pytest.approx({"lm": 0.1, "kd": 0.9})


def test_gradient_shares_come_out_as_wanted_and_survive_a_resume(tmp_path):
    def built(folder):
        balance = gradient_share(lm=0.7, kd=0.3, smoothing=0.5, most=20)
        return make_trainer(folder, steps=12, measure_every=3, balance=balance, eval_every=12)

    whole = built(tmp_path / "whole")
    whole.fit()
    _, shares = whole.history.series("lm", "grad_share")
    assert whole.history.series("lm", "grad_share")[0] == [1, 4, 7, 10]
    assert abs(shares[-1] - 0.7) < 0.1 < abs(shares[0] - 0.7)
    parts = built(tmp_path / "parts")
    for stop in (2, 1, 5):  # also right after a measurement, and before the next
        parts.fit(steps=stop)
        parts = built(tmp_path / "parts")
    parts.fit()
    assert_same_run(whole, parts)


def test_one_schedule_for_the_step_and_for_everything_else(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", steps=10, schedule=curriculum("kd", start=0.1), balance=fixed(lm_floor=0.3)
    )
    planned = [trainer.shares_at(step) for step in range(10)]
    trainer.fit()
    for name in ("lm", "kd"):
        assert trainer.history.series(name, "weight")[1] == pytest.approx([p[name] for p in planned])
    assert planned[-1]["lm"] == 0.3, "held up by the floor"
    assert trainer.history.column("lr", "student")[1] == pytest.approx([trainer.rate_at(s) for s in range(10)])


# --- the learning rate falls early -----------------------------------------------------------------------------------


def falling(folder, **arguments):
    return make_trainer(folder, **({"steps": 40, "eval_every": 40, "lr_schedule": LearningRate(0.1, 0.25)} | arguments))


def test_the_decay_can_begin_early_and_ends_the_run(tmp_path):
    trainer = falling(tmp_path / "run")
    trainer.callbacks = [At(10, lambda t: t.decay_now())]
    assert trainer.fit() == "finished"
    assert trainer.decay_from == 10
    assert trainer.step == trainer.total_steps == 20
    rates = trainer.history.column("lr", "student")[1]
    assert rates[9] == pytest.approx(1e-2)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    whole = falling(tmp_path / "whole")
    whole.fit()
    assert rates[-1] == pytest.approx(whole.history.column("lr", "student")[1][-1])
    assert "the learning rate falls from here on; the run ends at step 20" in [
        e["text"] for e in trainer.history.events
    ]
    assert trainer.history.total_steps == 20


def test_a_decay_that_began_early_goes_on_after_a_resume(tmp_path):
    whole = falling(tmp_path / "whole")
    whole.callbacks = [At(10, lambda t: t.decay_now())]
    whole.fit()
    trainer = falling(tmp_path / "run")
    trainer.callbacks = [At(10, lambda t: t.decay_now())]
    trainer.fit(steps=14)
    again = falling(tmp_path / "run")
    assert again.fit() == "finished"
    assert again.total_steps == 20
    assert_same_run(whole, again)


def test_the_control_of_a_run_that_ended_early_has_the_same_rates(tmp_path):
    trainer = falling(tmp_path / "run")
    trainer.callbacks = [At(10, lambda t: t.decay_now())]
    trainer.fit()
    trainer.train_control()
    assert trainer.control_history.column("lr", "student")[1] == trainer.history.column("lr", "student")[1]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_session_clock_begins_the_decay_in_time(tmp_path):
    """Every step takes 100 s of a session that has room for 25 of the 40."""
    clock = Clock()
    session = Session(tmp_path / "run", device="cpu", precision="no", budget=2500.0, clock=clock)
    session._started = 0.0
    trainer = falling(tmp_path / "run", session=session, finish_in_session=True)
    step = trainer._train_step

    def slow(*arguments):
        clock.now += 100.0
        return step(*arguments)

    trainer._train_step = slow
    assert trainer.fit() == "finished"
    assert trainer.decay_from is not None
    assert trainer.step == trainer.decay_from + 10
    assert 18 <= trainer.step <= 24
    assert clock.now < 2500


def test_a_decay_that_was_asked_for_at_rest_is_not_forgotten(tmp_path):
    trainer = falling(tmp_path / "run")
    trainer.fit(steps=8)
    trainer.decay_now()
    again = falling(tmp_path / "run")
    assert again.fit() == "finished"
    assert again.step == 18
    said = [e["text"] for e in again.history.events if e["what"] == "stage" and "learning rate" in e["text"]]
    assert len(said) == 1, "and not said again at the time that was planned for it"


def test_a_rate_without_decay_cannot_fall_early(tmp_path):
    trainer = falling(tmp_path / "run", lr_schedule=LearningRate(0.1, 0.0))
    with pytest.raises(ValueError, match="expected a learning rate with a decay"):
        trainer.decay_now()
    with pytest.raises(ValueError, match="beside finish_in_session=True"):
        falling(tmp_path / "other", lr_schedule=LearningRate(0.1, 0.0), finish_in_session=True)


# --- early stopping --------------------------------------------------------------------------------------------------


def scored(folder, scores, **arguments):
    """A run whose evaluations give these scores, one per step from 0 on."""
    early = EarlyStopping(3, grace=2)
    arguments = {"steps": 30, "eval_every": 1, "early_stopping": early} | arguments
    trainer = make_trainer(folder, **arguments)
    trainer._score = lambda model, side="student": scores[trainer.step] if side == "student" else 1.0
    return trainer


WORSE_AFTER_FOUR = [9.0, 1.0, 5.0, 4.0, 3.0, *(3.5 + 0.01 * i for i in range(40))]


def test_a_run_that_gets_no_better_stops_with_its_best_weights(tmp_path):
    plain = scored(tmp_path / "plain", WORSE_AFTER_FOUR, early_stopping=None)
    plain.fit(steps=4)
    trainer = scored(tmp_path / "run", [9.0, 8.0, *WORSE_AFTER_FOUR[2:]])
    assert trainer.fit() == "stopped early"
    assert trainer.step == 7, "three evaluations after the best one at step 4"
    assert trainer.best_step == 4
    for name, weight in trainer.student.state_dict().items():
        assert torch.equal(weight, plain.student.state_dict()[name]), name
    assert any("the student gets the weights of step 4" in e["text"] for e in trainer.history.events)


def test_a_best_value_before_the_grace_does_not_count(tmp_path):
    trainer = scored(tmp_path / "run", WORSE_AFTER_FOUR)
    trainer.fit()
    assert trainer.step == 7


def test_a_resumed_run_stops_early_at_the_same_step_and_stays_stopped(tmp_path):
    scores = [9.0, 8.0, *WORSE_AFTER_FOUR[2:]]
    whole = scored(tmp_path / "whole", scores)
    whole.fit()
    trainer = scored(tmp_path / "run", scores)
    trainer.fit(steps=5)
    trainer = scored(tmp_path / "run", scores)
    assert trainer.fit() == "stopped early"
    assert trainer.step == 7
    again = scored(tmp_path / "run", scores)
    assert again.fit() == "stopped early"
    assert again.step == 7
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, again.student.state_dict()[name]), name
    on = scored(tmp_path / "run", scores, early_stopping=None)
    assert on.fit(steps=2) == "paused"
    assert on.step == 9
    straight = scored(tmp_path / "straight", scores, early_stopping=None)
    straight.fit(steps=9)
    for name, weight in weights_of(straight).items():
        assert torch.equal(weight, weights_of(on)[name]), "it goes on from the last weights, not from the best"


def test_a_run_that_goes_on_getting_better_is_not_stopped(tmp_path):
    trainer = scored(tmp_path / "run", [9 - 0.1 * i for i in range(31)])
    assert trainer.fit() == "finished"


def test_no_early_stop_during_the_grace_or_the_warm_up(tmp_path):
    flat = [5.0] * 40
    for early, rates in (
        (EarlyStopping(3, grace=20), LearningRate(0.1)),
        (EarlyStopping(3, grace=0), LearningRate(0.7)),
    ):
        trainer = scored(tmp_path / f"{early.grace}", flat, early_stopping=early, lr_schedule=rates)
        trainer.fit()
        assert trainer.step == 23 if early.grace else trainer.step == 24


def test_the_default_waits_long(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=100, eval_every=10)
    (early,) = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]
    assert (early.patience, early.grace) == (20, 1000)
    assert early.first_stop(trainer) == 1200


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 2.5}, {"grace": -1}])
def test_early_stopping_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="EarlyStopping: expected patience of at least 1"):
        EarlyStopping(**arguments)


def test_the_best_weights_are_for_looking_at_and_not_for_going_on(tmp_path):
    trainer = scored(tmp_path / "run", WORSE_AFTER_FOUR, early_stopping=None)
    trainer.fit(steps=3)
    last = weights_of(trainer)
    assert trainer.load_best() == (1, 1.0)
    lines = len(trainer.history)
    assert trainer.evaluate_now() == 4.0
    assert len(trainer.history) == lines, "a figure of other weights is no part of the history"
    assert any(not torch.equal(w, last[n]) for n, w in weights_of(trainer).items())
    with pytest.raises(ValueError, match="expected the weights of the last step, got the best ones"):
        trainer.save()
    trainer.fit(steps=1)
    straight = scored(tmp_path / "straight", WORSE_AFTER_FOUR, early_stopping=None)
    straight.fit(steps=4)
    assert_same_run(straight, trainer)


def test_a_best_evaluation_at_rest_is_remembered_and_one_of_forgotten_steps_is_not(tmp_path):
    scores = [9.0, 8.0, 7.0, 0.5, 6.0, *[5.0] * 30]
    trainer = scored(tmp_path / "run", scores, early_stopping=None, eval_every=10)
    trainer.fit(steps=3)
    assert trainer.evaluate_now() == 0.5
    again = scored(tmp_path / "run", scores, early_stopping=None, eval_every=10)
    again.resume()
    assert (again.best, again.best_step) == (0.5, 3)
    again.callbacks = [At(9, lambda t: (_ for _ in ()).throw(RuntimeError("killed")))]
    scores[10] = 0.1
    with pytest.raises(RuntimeError, match="killed"):
        again.fit()
    assert again.load_best() == (3, 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path, bad):
    trainer = scored(tmp_path / "run", [bad, bad, bad, *(9 - 0.1 * i for i in range(40))], steps=20)
    assert trainer.fit() == "finished"
    assert trainer.best_step == 20


def test_without_an_evaluation_there_is_no_best(tmp_path):
    with pytest.raises(ValueError, match=r"expected weights in .*best\.safetensors', got none"):
        make_trainer(tmp_path / "run").load_best()


# --- other settings of the terms -------------------------------------------------------------------------------------


def terms(temperature: float = 1.0, top_k: int = 8, kd: float = 0.5):
    return [lm_term(0.2), kd_term(kd, top_k=top_k, temperature=temperature), feature_term(0.3)]


def test_settings_change_in_the_middle_of_a_run_and_nothing_else_does(tmp_path):
    data = small_data(batch_size=4)
    trainer = make_trainer(tmp_path / "run", terms=terms(), data=data, steps=6)
    trainer.fit(steps=3)
    before = weights_of(trainer), trainer.step, trainer.tokens
    assert change_terms(trainer, terms()) == "nothing"
    said = change_terms(trainer, terms(temperature=2.0, top_k=16, kd=0.9))
    assert said == "kd.weight 0.5 -> 0.9, kd.top_k 8 -> 16, kd.temperature 1 -> 2"
    assert (trainer.step, trainer.tokens) == before[1:]
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[0][name]), name
    trainer.fit()

    straight = make_trainer(tmp_path / "straight", terms=terms(), data=data, steps=6)
    straight.fit(steps=3)
    other = make_trainer(
        tmp_path / "straight",
        student=tiny_student(3),
        terms=terms(temperature=2.0, top_k=16, kd=0.9),
        data=data,
        steps=6,
    )
    other.fit()
    assert_same_run(other, trainer)


def test_a_run_that_has_begun_keeps_its_terms_and_parts(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=terms(), data=small_data(batch_size=4))
    trainer.fit(steps=1)
    before = trainer.terms, trainer.teacher
    for wrong, message in (
        ([lm_term(0.2), kd_term(0.5, top_k=8)], "the loss terms changed"),
        ([*terms()[:2], feature_term(0.3, layers={1: 2})], "the layers, experts or method"),
        ([terms()[1]], "expected an lm_term with a weight above 0"),
        ([lm_term(), lm_term()], "different names"),
        (["lm"], "expected terms such as"),
    ):
        with pytest.raises(ValueError, match=message):
            change_terms(trainer, wrong)
        assert (trainer.terms, trainer.teacher) == before
    trainer.fit()


def test_before_the_first_step_everything_about_the_terms_may_change(tmp_path):
    data = small_data(batch_size=4)
    trainer = make_trainer(tmp_path / "run", terms=[lm_term()], data=data)
    change_terms(trainer, [*terms()[:2], feature_term(0.3, layers={1: 2})])
    trainer.fit()
    straight = make_trainer(tmp_path / "other", terms=[*terms()[:2], feature_term(0.3, layers={1: 2})], data=data)
    straight.fit()
    assert_same_run(straight, trainer)
    assert make_trainer(tmp_path / "run", terms=[*terms()[:2], feature_term(0.3, layers={1: 2})], data=data).resume()


def test_a_save_that_fails_in_mid_run_keeps_the_weights_alone_and_goes_on(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path / "run", steps=4, save_minutes=0)
    save, last = checkpoint.save_checkpoint, tmp_path / "run" / "last.safetensors"

    def full(folder, *, step, **more):
        if step == 2:
            raise checkpoint.CheckpointError("no space left")
        assert last.exists() == (step == 3)
        return save(folder, step=step, **more)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    assert trainer.fit() == "finished"
    (text,) = [e["text"] for e in trainer.history.events if e["what"] == "alarm"]
    assert text.startswith("not saved: no space left; the weights alone are in last.safetensors")
    assert not last.exists(), "the next whole checkpoint makes it superfluous"


def test_weights_of_another_student_or_of_no_file_are_refused(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=2)
    trainer.fit()
    best = tmp_path / "run" / "best.safetensors"
    with pytest.raises(ValueError, match="expected the weights of this student"):
        load_weights(tiny_student(num_hidden_layers=1), best)
    with pytest.raises(ValueError, match="expected weights in"):
        load_weights(trainer.student, tmp_path / "none.safetensors")
    best.write_bytes(best.read_bytes()[:100])
    with pytest.raises(ValueError, match="expected weights in"):
        load_weights(trainer.student, best)


def test_a_run_that_stops_before_its_end_says_how_to_go_on_and_a_finished_one_does_not(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit(steps=2)
    assert "to go on: run the notebook again, with the same build_session(run='run')" in capsys.readouterr().out
    trainer.fit()
    assert "to go on" not in capsys.readouterr().out
    assert trainer.how_to_go_on() is None


def test_the_time_that_the_run_takes_is_said_once_it_is_known(tmp_path):
    """Every step takes 100 s, an evaluation 50 s; a session of 1 h has room for 30 steps or so."""
    clock = Clock()

    class Slow(Callback):
        def on_evaluate(self, trainer):
            clock.now += 50.0

    def session():
        made = Session(tmp_path / "run", device="cpu", precision="no", budget=clock.now + 3600.0, clock=clock)
        made._started = clock.now
        made.budget = 3600.0
        return made

    def build():
        trainer = make_trainer(tmp_path / "run", steps=60, eval_every=20, session=session(), student=tiny_student())
        step = trainer._train_step

        def slow(*arguments):
            clock.now += 100.0
            return step(*arguments)

        trainer._train_step = slow
        trainer.callbacks.append(Slow())
        return trainer

    trainer = build()
    assert trainer.fit() == "the session's time is over"
    assert 28 <= trainer.step <= 33
    plans = [(e["step"], e["text"]) for e in trainer.history.events if e["what"] == "plan"]
    assert len(plans) == 1 and plans[0][0] == 20
    assert plans[0][1].startswith("100 s per step, about 67 min to go, this session has ")
    assert "2 sessions of 60 min, this one included" in plans[0][1]
    assert "steps are left, about" in trainer.how_to_go_on() and "1 more session" in trainer.how_to_go_on()
    again = build()
    assert again.fit() == "finished"
    first = next(e["text"] for e in again.history.events if e["what"] == "plan" and e["step"] == trainer.step)
    assert "this session has" in first and "sessions of" not in first, "it is known at once, from the session before"


def test_a_session_whose_time_is_over_trains_no_step(tmp_path):
    session = Session(tmp_path / "run", device="cpu", precision="no", budget=1.0)
    trainer = make_trainer(tmp_path / "run", session=session)
    assert trainer.fit() == "the session's time is over"
    assert trainer.step == 0


def test_scoring_beside_a_run_that_recomputes_its_layers_disturbs_neither(tmp_path):
    """Layers run again in the backward pass: in training mode, whoever looks at the student meanwhile."""
    student = tiny_student(attention_dropout=0.3)
    # transformers 5 calls it by another name
    name = next(n for n in ("activation", "gradient") if hasattr(student, f"{n}_checkpointing_enable"))
    getattr(student, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    trainer = make_trainer(tmp_path / "run", student=student, steps=20, eval_every=20)
    trainer.fit(background=True)
    scores = 0
    while trainer.running:
        assert score(student, trainer.data.held_out, limit=2).nats > 0
        scores += 1
    assert trainer.wait() == "finished"
    assert scores > 2
