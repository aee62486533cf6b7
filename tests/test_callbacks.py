"""kd_kit/callbacks.py: the order of the hooks, and a log that stays readable."""

from __future__ import annotations

import itertools

import pytest
from helpers import make_trainer

from kd_kit import Callback, LearningRate, LossTerm, progressive
from kd_kit.alarms import Watch
from kd_kit.callbacks import PrintLines
from kd_kit.history import History

HOOKS = ("on_start", "on_log", "on_evaluate", "on_save", "on_stop")


class Order(Callback):
    """Writes down which hook was called at which step."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name in HOOKS:
            return lambda trainer: self.seen.append((name, trainer.step))
        return super().__getattribute__(name)


def test_the_hooks_come_in_order(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=12, eval_every=5)
    worse = itertools.count(1)
    trainer._score = lambda model, side="student": float(next(worse))  # none is the best, which would be saved
    order = Order()
    trainer.callbacks = [order]
    trainer.fit(steps=12)
    assert order.seen == [
        ("on_evaluate", 0),
        ("on_start", 0),
        ("on_log", 1),
        ("on_log", 5),
        ("on_evaluate", 5),
        ("on_log", 10),
        ("on_evaluate", 10),
        ("on_log", 11),
        ("on_log", 12),
        ("on_evaluate", 12),
        ("on_save", 12),
        ("on_stop", 12),
    ]


def test_any_object_with_some_of_the_hooks_will_do(tmp_path):
    class Half:
        saved = 0

        def on_save(self, trainer):
            self.saved += 1

    trainer = make_trainer(tmp_path / "run", steps=2)
    half = Half()
    trainer.callbacks.append(half)
    trainer.fit()
    assert half.saved == 1


def test_the_base_class_does_nothing(tmp_path):
    for hook in HOOKS:
        assert getattr(Callback(), hook)(None) is None


@pytest.mark.parametrize("hook", ["on_start", "on_log", "on_evaluate", "on_save"])
def test_a_callback_stops_the_run_after_the_step_and_it_is_saved(tmp_path, hook):
    class Stop(Callback):
        pass

    def stop(trainer):
        if trainer.step >= 2 or hook == "on_start":
            trainer.stop_reason = "enough"

    callback = Stop()
    setattr(callback, hook, stop)
    trainer = make_trainer(tmp_path / "run", steps=20, eval_every=2, save_minutes=0)
    trainer.callbacks = [callback]
    assert trainer.fit() == "enough"
    assert trainer.stop_reason == "enough"
    assert trainer.step == (0 if hook == "on_start" else 2)
    assert list((tmp_path / "run" / "ckpt").glob(f"step-{trainer.step:08d}*"))
    assert trainer.history.events[-2]["text"] == "enough"
    trainer.callbacks = []
    assert trainer.fit(steps=2) == "paused"
    assert trainer.step == (2 if hook == "on_start" else 4)


NINE = ("lm", "kd", "span", "feature", "layerwise", "relation", "attention", "contrastive", "router")


class Fake:
    """What PrintLines sees of a trainer."""

    def __init__(self, total: int, *, stages=(), watch=None):
        self.step, self.total_steps, self.stop_reason = 0, total, None
        self.history = History()
        self.stages = dict(stages)
        self.watch = watch and watch(self.history)

    def how_to_go_on(self) -> str | None:
        return None

    def terms(self, step: int) -> dict:
        term = {"value": 2.0, "weight": 0.5, "contribution": 1.0, "count": 100}
        return {"lm": term, "kd": term, "span": term | {"value": None}}

    def run(self, printer, *, eval_every: int, save_every: int, record_every: int = 10):
        printer.on_start(self)
        for step in range(1, self.total_steps + 1):
            self.step = step
            self.history.append(
                {
                    "kind": "train",
                    "step": step,
                    "total": 2.0,
                    "terms": self.terms(step),
                    "lr": {"student": 1e-4},
                    "tokens_per_second": 1234.5,
                }
            )
            if self.watch:
                self.watch.look([self.history.last("train")])
            if step in self.stages:
                self.history.append({"kind": "event", "step": step, "what": "stage", "text": self.stages[step]})
            if step % record_every == 0:
                printer.on_log(self)
            if step % eval_every == 0:
                self.history.append({"kind": "eval", "step": step, "bits_per_byte": 2.5})
                printer.on_evaluate(self)
            if step % save_every == 0:
                self.history.append({"kind": "event", "step": step, "what": "saved", "text": "x"})
                printer.on_save(self)
        self.stop_reason = "finished"
        printer.on_stop(self)


def test_a_long_run_prints_few_lines():
    """An earlier run printed 36 lines per step, 450,000 in 12,500 steps."""
    lines = []
    fake = Fake(12_500)
    fake.run(PrintLines(print=lines.append), eval_every=500, save_every=250)
    assert len("\n".join(lines).splitlines()) < 400
    assert 125 <= len(lines) < 160
    assert lines[0].endswith("12,500: 12,500 to go")
    assert "stopped at step 12,500: finished" in lines[-1]
    assert max(map(len, lines)) < 140
    steps = [line for line in lines if "total" in line]
    assert len(steps) == 125
    assert all("lm 2.000 (x0.50)" in line and "lr 1.0e-04" in line for line in steps)
    assert not any("span" in line for line in steps), "a term without a value has nothing to show"


class Sick(Fake):
    """Nine terms, of which every one leaves its range, comes back and leaves it again, all through the run."""

    def terms(self, step: int) -> dict:
        value = 150.0 if step // 60 % 2 else 0.3
        term = {"value": value, "weight": 1 / 9, "contribution": value / 9, "count": 100}
        return dict.fromkeys(NINE, term)


def test_a_long_run_in_which_everything_goes_wrong_prints_few_lines_too():
    lines = []
    terms = [LossTerm(name=n, weight=1, unit="", healthy=(0.1, 5), value=lambda *_: None) for n in NINE]
    schedule, rate = progressive(("layerwise",), ("feature", "relation"), ("attention", "router")), LearningRate()
    stages = schedule.changes(dict.fromkeys(NINE, 1.0), 12_500) + rate.changes(12_500)
    fake = Sick(12_500, stages=stages, watch=lambda history: Watch(history, terms))
    fake.run(PrintLines(print=lines.append), eval_every=500, save_every=250)
    assert len(stages) >= 5
    assert sum("stage: " in line for line in lines) == len(stages)
    assert sum("alarm: " in line for line in lines) >= 9
    assert len("\n".join(lines).splitlines()) < 400
    steps = [line for line in lines if " total " in line]
    assert len(steps) == 125
    assert max(map(len, steps)) < 240
    assert all(f"{name} " in steps[0] for name in NINE)


def test_events_are_told_once():
    lines = []
    fake = Fake(5)
    fake.history.append({"kind": "event", "step": 0, "what": "alarm", "text": "of an earlier session"})
    printer = PrintLines(print=lines.append)
    printer.on_start(fake)
    fake.history.append({"kind": "event", "step": 1, "what": "alarm", "text": "kd is impossible"})
    fake.history.append({"kind": "event", "step": 1, "what": "saved", "text": "step-1"})
    printer.on_save(fake)
    printer.on_log(fake)
    printer.on_stop(fake)
    told = [line for line in lines if "alarm" in line]
    assert len(told) == 1
    assert "kd is impossible" in told[0]
    assert not any("saved" in line or "earlier" in line for line in lines)


def test_a_real_run_prints_each_thing_once(tmp_path, capsys):
    make_trainer(tmp_path / "run", steps=4, eval_every=2).fit()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert sum("stage: the learning rate decays from here on" in line for line in lines) == 1
    assert sum("finished" in line for line in lines) == 1
    make_trainer(tmp_path / "run", steps=6, eval_every=2).fit()
    lines = capsys.readouterr().out.splitlines()
    assert sum("resumed" in line for line in lines) == 1
