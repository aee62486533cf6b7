"""The buttons, without a kernel: a trainer that writes down what it is asked, and small real runs in the background."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from helpers import make_trainer

from kd_kit import LearningRate
from kd_kit import dashboard as dashboard_module
from kd_kit.controls import Controls
from kd_kit.dashboard import build_dashboard
from kd_kit.history import History
from kd_kit.panel import Panel

pytest.importorskip("ipywidgets")

NAMES = ["stop", "save", "evaluate", "pause", "finish"]


class Asked:
    """A trainer that only remembers what it was asked; at rest until told otherwise."""

    def __init__(self, *, step: int = 5, decay: float = 0.2):
        self.asked: list[str] = []
        self.step, self.total_steps, self.planned_steps = step, 100, 100
        self.stop_reason: str | None = None
        self.decay_from: int | None = None
        self.running = False
        self.lr_schedule = LearningRate(decay=decay)
        self.controls = Controls()
        self.callbacks: list = []
        self.control_history = None
        self.history = History()
        self.history.append({"kind": "train", "step": step, "total": 1.0, "terms": {}})

    def stop(self):
        self.asked.append("stop")

    def save(self):
        self.asked.append("save")
        return None if self.running else SimpleNamespace(path=SimpleNamespace(name="step-00000005"))

    def evaluate_now(self):
        self.asked.append("evaluate")
        return None if self.running else 2.34567

    def pause(self):
        self.asked.append("pause")
        self.controls.pause()

    def go_on(self):
        self.asked.append("go on")
        self.controls.go_on()

    def decay_now(self):
        self.asked.append("decay")
        self.decay_from = self.step


def enabled(panel: Panel) -> list[str]:
    return [name for name in NAMES if not panel.buttons[name].disabled]


def in_background(**how) -> tuple[Asked, Panel]:
    trainer = Asked(**how)
    panel = Panel(trainer)
    trainer.running = True
    panel.started(background=True)
    return trainer, panel


def test_every_button_has_a_name_that_stays():
    panel = Panel(Asked())
    assert list(panel.buttons) == NAMES
    tooltips = [button.tooltip for button in panel.buttons.values()]
    assert tooltips == ["stop after this step", "save now", "evaluate now", "pause or go on", "finish early"]


def test_in_the_background_every_button_asks_its_method():
    trainer, panel = in_background()
    assert enabled(panel) == NAMES
    for name in ("save", "evaluate", "pause", "pause", "finish", "stop"):
        panel.buttons[name].click()
    assert trainer.asked == ["save", "evaluate", "pause", "go on", "decay", "stop"]


def test_a_button_that_would_do_nothing_is_off():
    assert enabled(Panel(Asked())) == ["save", "evaluate"]
    assert enabled(Panel(Asked(step=0))) == ["evaluate"]  # before its first step a run has nothing to save
    panel = in_background()[1]
    panel.buttons["finish"].click()
    assert "finish" not in enabled(panel)
    panel.buttons["stop"].click()
    assert enabled(panel) == ["save", "evaluate"]
    assert "finish" not in enabled(in_background(decay=0.0)[1])
    assert "finish" not in enabled(in_background(step=85)[1])  # it falls already
    panel.started(background=False)
    assert enabled(panel) == []
    assert not panel.acts
    assert "Interrupt" in panel.message.value and "fit(background=True)" in panel.message.value


def test_at_rest_save_and_evaluate_act_at_once():
    trainer, panel = in_background()
    trainer.running, trainer.stop_reason = False, "finished"
    panel.stopped()
    assert enabled(panel) == ["save", "evaluate"]
    assert "The run is at rest: finished" in panel.message.value
    panel.buttons["save"].click()
    assert "Saved: step-00000005" in panel.message.value
    panel.buttons["evaluate"].click()
    assert "2.3457" in panel.message.value


def test_pause_becomes_go_on():
    trainer, panel = in_background()
    button = panel.buttons["pause"]
    assert button.description == "Pause"
    button.click()
    assert button.description == "Go on" and trainer.controls.paused
    button.click()
    assert button.description == "Pause" and not trainer.controls.paused


def test_what_goes_wrong_is_said_in_the_panel():
    trainer, panel = in_background()

    def refuse():
        raise ValueError("the disk is <full>")

    trainer.save = refuse
    panel.buttons["save"].click()
    assert "ValueError: the disk is &lt;full&gt;" in panel.message.value
    assert enabled(panel) == NAMES
    trainer.stop_reason = "failed: RuntimeError: out of memory"
    panel.stopped()
    assert "failed: RuntimeError: out of memory" in panel.message.value
    assert "bold" in panel.message.value


def test_what_a_click_asked_for_is_answered_once():
    _, panel = in_background()
    assert not panel.answered("save", "Saved: by the clock")
    panel.buttons["save"].click()
    assert "Saves after this step." in panel.message.value
    assert not panel.answered("evaluate", "by the plan")
    assert panel.answered("save", "Saved: step-7")
    assert "Saved: step-7" in panel.message.value
    assert not panel.answered("save", "Saved: by the clock")


def test_progress_follows_the_history_at_a_measured_pace():
    now = [0.0]
    trainer = Asked(step=25)
    panel = Panel(trainer, clock=lambda: now[0])
    assert (panel.progress.value, panel.progress.max) == (25, 100)
    assert panel.place.value == "step 25 of 100 · 25%"
    trainer.history.append({"kind": "train", "step": 50, "total": 1.0, "terms": {}})
    panel.refresh()
    assert panel.progress.value == 25  # a message for every step would be too many
    now[0] = 1.0
    panel.refresh()
    assert panel.progress.value == 50


def test_the_log_keeps_its_last_lines():
    panel = Panel(Asked())
    for i in range(20):
        panel.add_line(f"line <{i}>")
    assert panel.lines == [f"line <{i}>" for i in range(12, 20)]
    assert "line &lt;19&gt;" in panel.log.value and "&lt;11&gt;" not in panel.log.value


def test_a_panel_that_was_replaced_says_so_and_stays_off():
    panel = in_background()[1]
    panel.replaced()
    for again in (lambda: panel.started(background=True), panel.stopped, lambda: panel.refresh(force=True)):
        again()
        assert enabled(panel) == []
        assert "newer dashboard" in panel.message.value


# With a dashboard, and a run


@pytest.fixture
def screen(monkeypatch):
    """A notebook whose front end takes everything; pictures cost nothing."""
    import IPython
    import IPython.display

    shown: list[dict] = []
    handle = SimpleNamespace(update=lambda bundle, *, raw: shown.append(bundle))

    def display(bundle, *, raw, display_id=False):
        shown.append(bundle)
        return handle if display_id else None

    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(dashboard_module, "loss_figure", lambda *_, **__: None)
    monkeypatch.setattr(dashboard_module, "figure_png", lambda figure: b"")
    return shown


def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def kinds(shown: list[dict]) -> list[str]:
    return ["picture" if "image/png" in bundle else "widget" for bundle in shown]


def test_clicks_act_on_a_run_in_the_background(tmp_path, screen, capsys):
    trainer = make_trainer(tmp_path, steps=100_000, eval_every=100_000, log_every=1)
    dashboard = build_dashboard(trainer)
    dashboard.show()
    assert kinds(screen) == ["widget", "picture", "widget"]
    panel = dashboard._panel
    capsys.readouterr()
    trainer.fit(background=True)
    try:
        until(lambda: trainer.step >= 2 and panel.acts)
        panel.buttons["pause"].click()
        until(lambda: any(event["what"] == "rests" for event in trainer.history.events))
        step = trainer.step
        evaluations, saves = len(trainer.history.evaluations()[0]), trainer.save_number
        panel.buttons["evaluate"].click()
        until(lambda: len(trainer.history.evaluations()[0]) > evaluations)
        until(lambda: "Held-out bits per byte: " in panel.message.value)
        panel.buttons["save"].click()
        until(lambda: trainer.save_number > saves)
        until(lambda: "Saved: step-" in panel.message.value)
        assert trainer.step == step
        panel.buttons["pause"].click()
        until(lambda: trainer.step > step)
        panel.buttons["finish"].click()
        until(lambda: trainer.decay_from is not None)
        panel.buttons["stop"].click()
        assert trainer.wait(120) == "stopped by request"
    finally:
        if trainer.running:
            trainer.stop()
        trainer.wait(120)
    assert any(line.startswith("stopped at step") for line in panel.lines)
    assert capsys.readouterr().out == ""  # the cell that ran last stays clean
    assert enabled(panel) == ["save", "evaluate"]
    saves = trainer.save_number
    panel.buttons["save"].click()
    assert trainer.save_number == saves + 1
    assert "Saved: step-" in panel.message.value


def test_a_run_that_fails_in_the_background_says_so(tmp_path, screen):
    trainer = make_trainer(tmp_path, steps=100)
    dashboard = build_dashboard(trainer)
    dashboard.show()

    def broken(*_):
        raise RuntimeError("no more memory")

    trainer._train_step = broken
    trainer.fit(background=True)
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.wait(120)
    assert "failed: RuntimeError: no more memory" in dashboard._panel.message.value
    assert "failed: RuntimeError: no more memory" in screen[-1]["text/plain"]


def test_in_the_foreground_the_buttons_are_off_and_lines_are_printed(tmp_path, screen, capsys):
    trainer = make_trainer(tmp_path, steps=2)
    seen = []
    dashboard = build_dashboard(trainer)
    dashboard.show()
    trainer.callbacks.append(SimpleNamespace(on_log=lambda _: seen.append(enabled(dashboard._panel))))
    trainer.fit()
    assert seen and not any(seen)
    assert "stopped at step 2: finished" in capsys.readouterr().out
    assert dashboard._panel.lines == []
    assert enabled(dashboard._panel) == ["save", "evaluate"]


def test_a_newer_dashboard_switches_the_older_one_off(tmp_path, screen):
    trainer = make_trainer(tmp_path, steps=2)
    old = build_dashboard(trainer)
    old.show()
    new = build_dashboard(trainer)
    new.show()
    assert "newer dashboard" in old._panel.message.value
    assert enabled(old._panel) == [] and new._panel.acts


def test_a_batch_run_has_no_widgets(tmp_path, screen, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    dashboard = build_dashboard(make_trainer(tmp_path, steps=2))
    dashboard.show()
    assert kinds(screen) == ["picture"]
    assert dashboard._panel is None


def test_without_ipywidgets_there_is_the_picture_and_one_line(tmp_path, screen, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    trainer = make_trainer(tmp_path, steps=2)
    capsys.readouterr()
    dashboard = build_dashboard(trainer)
    dashboard.show()
    dashboard.show()
    assert kinds(screen) == ["picture", "picture"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "there are no buttons" in printed and "trainer.stop()" in printed
    lines = trainer.callbacks[0]
    thread = threading.Thread(target=lambda: lines.print("printed as ever"))
    thread.start()
    thread.join()
    assert capsys.readouterr().out == "printed as ever\n"
