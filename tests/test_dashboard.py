"""The dashboard against a fake display, and once against a real kernel and the notebook it leaves behind."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd_kit import dashboard as module
from kd_kit.dashboard import Dashboard, build_dashboard, in_notebook
from kd_kit.history import History

pytest.importorskip("IPython")


def a_history(steps: int = 3) -> History:
    history = History()
    kd = {"unit": "nats", "healthy": [0.1, 3.0], "impossible_below": 0.0, "impossible_above": 10.0}
    history.append({"kind": "run", "run_id": "demo", "total_steps": 100, "terms": {"kd": kd}})
    for step in range(1, steps + 1):
        log(history, step)
    return history


def log(history: History, step: int) -> None:
    term = {"value": 1.0 + 1 / step, "weight": 1.0, "contribution": 1.0 + 1 / step, "count": 64}
    record = {"kind": "train", "step": step, "total": term["value"], "terms": {"kd": term}}
    history.append({**record, "lr": {"student": 1e-4}})


def a_trainer(**more: object) -> SimpleNamespace:
    return SimpleNamespace(**{"history": a_history(), "control_history": None, "callbacks": [], **more})


class Clock:
    """Time that passes only when told to; drawing takes ``cost`` seconds."""

    def __init__(self) -> None:
        self.now, self.cost = 100.0, 0.1

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    def figure(*args: object, **how: object) -> tuple:
        clock.now += clock.cost
        return args, how

    monkeypatch.setattr(module, "loss_figure", figure)
    monkeypatch.setattr(module, "figure_png", lambda figure: b"\x89PNG of " + repr(figure[1]["title"]).encode())
    return clock


@pytest.fixture
def screen(monkeypatch):
    """What a front end received: ("show" | "update", handle's number, bundle)."""
    import IPython
    import IPython.display

    sent: list[tuple[str, int, dict]] = []

    class Handle:
        def __init__(self, number: int):
            self.number = number

        def update(self, bundle: dict, *, raw: bool) -> None:
            assert raw
            sent.append(("update", self.number, bundle))

    def display(bundle: dict, *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        number = 1 + sum(what == "show" for what, *_ in sent)
        sent.append(("show", number, bundle))
        return Handle(number)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    return sent


def follow(trainer: SimpleNamespace, clock: Clock) -> Dashboard:
    dashboard = build_dashboard(trainer)
    dashboard._clock = clock
    return dashboard


def kinds(screen: list) -> list[tuple[str, int]]:
    return [(what, number) for what, number, _ in screen]


def test_one_bundle_holds_the_picture_and_its_text_twin(screen):
    Dashboard(a_history()).show()
    [(what, _, bundle)] = screen
    assert what == "show"
    assert set(bundle) == {"image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert "kd" in bundle["text/plain"] and "healthy" in bundle["text/plain"]
    json.dumps(bundle)


def test_it_lives_in_the_cell_that_built_it(screen, clock):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard._ipython_display_()  # what a notebook does with the last expression of a cell
    for hook in ("on_start", "on_evaluate", "on_save", "on_stop"):
        getattr(dashboard, hook)(trainer)
    assert kinds(screen) == [("show", 1)] + [("update", 1)] * 4
    assert dashboard.updates == 5


def test_never_shown_it_appears_where_training_starts(screen, clock):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    assert not dashboard.update(force=True)
    dashboard.on_start(trainer)
    dashboard.on_evaluate(trainer)
    assert kinds(screen) == [("show", 1), ("update", 1)]
    dashboard.on_start(trainer)  # the cell that trains runs again, its output is gone
    dashboard.on_evaluate(trainer)
    assert kinds(screen)[2:] == [("show", 2), ("update", 2)]
    dashboard.show()  # the user takes it to another cell
    dashboard.on_start(trainer)
    assert kinds(screen)[4:] == [("show", 3), ("update", 3)]


def test_redraws_are_paced_by_their_cost(screen, clock):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    clock.cost = 0.1
    dashboard.show()
    for passed, drawn in ((4.9, False), (0.2, True), (1.1, False), (3.8, False), (0.2, True)):
        clock.now += passed
        before = dashboard.updates
        dashboard.on_log(trainer)
        assert (dashboard.updates > before) is drawn, passed
    clock.cost = 0.001  # 50 x 1 ms would be too often: a second is the least
    clock.now += 6
    assert dashboard.update()
    clock.now += 0.9
    assert not dashboard.update()
    clock.now += 0.2
    assert dashboard.update()


def test_drawing_takes_at_most_two_per_cent(screen, clock):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard.on_start(trainer)
    for _ in range(10_000):
        clock.now += 0.05
        dashboard.on_log(trainer)
    assert 0 < dashboard.cost_share() < 0.0205
    assert 90 < dashboard.updates < 110


@pytest.mark.parametrize("hook", ["on_evaluate", "on_save", "on_stop"])
def test_some_moments_are_always_drawn(screen, clock, hook):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard.show()
    for _ in range(3):
        getattr(dashboard, hook)(trainer)
    assert dashboard.updates == 4


def test_the_same_cell_run_twice_leaves_one_dashboard():
    other = object()
    callbacks = [other]
    trainer = a_trainer(callbacks=callbacks)
    build_dashboard(trainer)
    second = build_dashboard(trainer)
    assert callbacks == [other, second]
    assert trainer.callbacks is callbacks
    with pytest.raises(ValueError, match="without control_history, callbacks"):
        build_dashboard(SimpleNamespace(history=History()))


def test_histories_are_read_from_the_trainer_at_every_draw(screen, monkeypatch):
    seen = []

    def figure(history: History, *, control: History | None, title: str | None) -> None:
        seen.append((history, control, title))

    monkeypatch.setattr(module, "loss_figure", figure)
    monkeypatch.setattr(module, "figure_png", lambda figure: b"")
    trainer = a_trainer()
    dashboard = build_dashboard(trainer, title="mine")
    dashboard.show()
    trainer.history, trainer.control_history = a_history(9), a_history(5)
    dashboard.update(force=True)
    assert seen[1] == (trainer.history, trainer.control_history, "mine")
    assert seen[0] != seen[1]
    assert "step 9 " in screen[-1][2]["text/plain"]


def test_outside_a_notebook_it_says_so_once_and_draws_nothing(capsys, clock, tmp_path):
    assert not in_notebook()
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard.show()
    for hook in ("on_start", "on_log", "on_evaluate", "on_save", "on_stop"):
        getattr(dashboard, hook)(trainer)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "log lines of the trainer" in printed
    assert dashboard.updates == 0
    assert "not shown" in repr(dashboard)


def test_save_works_anywhere(tmp_path):
    path = Dashboard(a_history()).save(tmp_path / "figures" / "loss.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_that_fails_does_not_end_the_run(screen, clock, capsys, monkeypatch):
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard.show()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_figure", broken)
        for _ in range(3):
            dashboard.on_evaluate(trainer)
        assert capsys.readouterr().out == "kd_kit: drawing failed (RuntimeError: no font); the run goes on\n"
        with pytest.raises(RuntimeError, match="no font"):
            dashboard.show()
    dashboard.on_evaluate(trainer)
    assert kinds(screen) == [("show", 1), ("update", 1)]


CELLS = (
    """
import warnings; warnings.simplefilter("error")
from types import SimpleNamespace
from kd_kit.dashboard import build_dashboard
from kd_kit.history import History
trainer = SimpleNamespace(history=History(), control_history=None, callbacks=[])
def log(step):
    terms = {"kd": {"value": 1 + 9 / step, "weight": 1.0, "contribution": 1 + 9 / step, "count": 64}}
    record = {"kind": "train", "step": step, "total": 1.0, "terms": terms, "lr": {"student": 1e-4}}
    trainer.history.append(record)
""",
    "build_dashboard(trainer)",
    """
import kd_kit.dashboard as module
dashboard = trainer.callbacks[0]
log(1)
dashboard.on_start(trainer)
real, kept = module.figure_png, module.figure_png(module.loss_figure(trainer.history))
module.figure_png = lambda figure: kept  # the handle is what is tried here, a hundred drawings take 20 s
module.loss_figure, draw = lambda *_, **__: None, module.loss_figure
for step in range(2, 100):
    log(step)
    assert dashboard.update(force=True)
module.figure_png, module.loss_figure = real, draw
dashboard.on_stop(trainer)
print(dashboard.updates)
""",
)


def test_a_real_notebook_keeps_one_small_image(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": start, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(module.__file__).parents[1]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={}).execute()
    path = tmp_path / "run.ipynb"
    nbformat.write(notebook, path)

    saved = json.loads(path.read_text())
    outputs = [cell["outputs"] for cell in saved["cells"]]
    assert outputs[0] == []
    [shown] = outputs[1]
    [printed] = outputs[2]
    assert set(shown["data"]) == {"image/png", "text/plain"}
    assert "step 99" in "".join(shown["data"]["text/plain"])  # the last state, in the cell that built it
    assert "".join(printed["text"]) == "101\n"
    assert path.stat().st_size < 300_000
    assert "widgets" not in saved["metadata"]
