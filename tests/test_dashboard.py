"""The dashboard against a fake display, and once against a real kernel and the notebook it leaves behind."""

from __future__ import annotations

import base64
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd_kit import dashboard as module
from kd_kit.callbacks import PrintLines
from kd_kit.controls import Controls
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

    def display(bundle: dict, *, raw: bool, display_id: bool = False) -> Handle | None:
        assert raw
        if not display_id:
            sent.append(("widget", 0, bundle))
            return None
        number = 1 + sum(what == "show" for what, *_ in sent)
        sent.append(("show", number, bundle))
        return Handle(number)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    return sent


def follow(trainer: SimpleNamespace, clock: Clock) -> Dashboard:
    dashboard = build_dashboard(trainer)
    dashboard._clock, dashboard._born = clock, clock()
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
    dashboard.on_start(trainer)
    clock.cost = 0.1
    dashboard.show()
    for passed, drawn in ((5.9, False), (0.2, True), (1.1, False), (4.8, False), (0.2, True)):
        clock.now += passed
        before = dashboard.updates
        dashboard.on_log(trainer)
        assert (dashboard.updates > before) is drawn, passed
    clock.cost = 0.001  # 60 x 1 ms would be too often: a second is the least
    clock.now += 7
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
    assert 0 < dashboard.cost_share() < 0.02
    assert 75 < dashboard.updates < 95


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

    def figure(history: History, *, control: History | None, title: str | None, **_: object) -> None:
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


def in_a_thread(act) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_evaluations_are_drawn_at_once_only_while_that_is_cheap(screen, clock):
    """An evaluation after every step must not become a picture after every step."""
    trainer = a_trainer()
    dashboard = follow(trainer, clock)
    dashboard.on_start(trainer)
    for _ in range(10_000):
        clock.now += 0.05
        dashboard.on_evaluate(trainer)
    passed = clock.now - dashboard._born
    assert dashboard._spent < 0.02 * passed + module.ALLOWANCE + 3 * clock.cost
    before = dashboard.updates
    trainer.controls = Controls()
    trainer.controls.pause()
    dashboard.on_evaluate(trainer)  # while the run rests, nothing waits for the picture
    assert dashboard.updates == before + 1
    trainer.controls.go_on()
    dashboard.on_evaluate(trainer)
    assert dashboard.updates == before + 1
    dashboard.on_stop(trainer)  # and the end is always drawn
    dashboard.on_evaluate(trainer)  # as is what comes after it
    assert dashboard.updates == before + 3


def test_only_what_a_run_waits_for_counts_as_its_time(screen, clock):
    trainer = a_trainer(controls=Controls())
    dashboard = follow(trainer, clock)
    dashboard.show()
    assert dashboard._spent == 0
    dashboard.on_start(trainer)
    assert dashboard._spent == pytest.approx(clock.cost)
    trainer.controls.pause()
    dashboard.on_log(trainer)
    assert dashboard.updates == 3 and dashboard._spent == pytest.approx(clock.cost)


def test_the_first_step_and_every_rest_are_drawn_at_once(screen, clock):
    trainer = a_trainer(history=a_history(0), controls=Controls())
    dashboard = follow(trainer, clock)
    monitored = []
    dashboard.on_start(trainer)

    def report() -> None:
        before = dashboard.updates
        dashboard.on_log(trainer)
        monitored.append(dashboard.updates > before)

    report()  # nothing yet
    log(trainer.history, 1)
    report()
    log(trainer.history, 2)
    report()
    trainer.controls.pause()
    report()
    report()
    trainer.controls.go_on()
    report()
    assert monitored == [False, True, False, True, False, True]


def test_the_figure_gets_plan_settings_cost_and_failure(screen, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "loss_figure", lambda *_, **how: seen.append(how))
    monkeypatch.setattr(module, "figure_png", lambda figure: b"")
    monkeypatch.setattr(module, "plan_of", lambda trainer: ("plan of", trainer))
    trainer = a_trainer(settings={"eval_windows": 64}, shares_at=None, stop_reason="paused")
    dashboard = build_dashboard(trainer)
    dashboard.show()
    dashboard.on_start(trainer)
    trainer.stop_reason = "failed: ValueError: no"
    dashboard.on_stop(trainer)
    assert [how["plan"] for how in seen] == [("plan of", trainer)] * 3
    assert [how["settings"] for how in seen] == [{"eval_windows": 64}] * 3
    assert [how["failure"] for how in seen] == [None, None, "failed: ValueError: no"]
    assert seen[0]["footer"] == "" and seen[2]["footer"].startswith("2 pictures took")
    assert "failed: ValueError: no" in screen[-1][2]["text/plain"]


def test_a_newer_dashboard_takes_the_place_of_the_older(screen, clock):
    trainer = a_trainer()
    old = follow(trainer, clock)
    old.show()
    new = follow(trainer, clock)
    new.show()
    for callback in list(trainer.callbacks):
        callback.on_evaluate(trainer)
    old.update(force=True)
    assert kinds(screen) == [("show", 1), ("show", 2), ("update", 2)]
    assert "not shown" in repr(old)


def test_lines_are_printed_as_before_where_there_is_no_place_for_them(screen, clock):
    """Without buttons, in the foreground, and once another dashboard has the run."""
    printed: list[str] = []
    lines = PrintLines(print=printed.append)
    before = lines.print
    trainer = a_trainer(callbacks=[lines])
    dashboard = follow(trainer, clock)
    lines.print("not shown")
    dashboard.show()
    lines.print("in the foreground")
    in_a_thread(lambda: lines.print("in the background, without a panel"))
    assert printed == ["not shown", "in the foreground", "in the background, without a panel"]
    newer = follow(trainer, clock)
    assert len(newer._prints) == 1
    newer.give_way()
    assert lines.print is before


def test_ten_thousand_steps_add_one_small_picture_to_a_notebook(screen):
    """What a saved notebook holds of a run is the last bundle, as JSON: at most 300 KB."""
    import random

    draw = random.Random(0)
    names = ("lm", "kd", "span", "feature", "layerwise", "relation", "attention", "contrastive", "router")
    history = History()
    history.append({"kind": "run", "run_id": "demo", "total_steps": 10_000, "terms": {n: {} for n in names}})
    for step in range(1, 10_001):
        terms = {}
        for i, name in enumerate(names):
            value = 10.0 ** (1 - i / 3) * draw.lognormvariate(0, 0.3)
            terms[name] = {"value": value, "weight": 1 / 9, "contribution": value / 9, "count": 64}
            if step % 100 == 1:
                terms[name] |= {"grad_share": 1 / 9, "cosine": draw.uniform(-1, 1), "grad_norm": 1.0}
        more = {"gradients": {"at": "embeddings"}} if step % 100 == 1 else {}
        speed = draw.lognormvariate(9, 0.2)
        record = {
            "kind": "train",
            "step": step,
            "total": sum(t["contribution"] for t in terms.values()),
            "terms": terms,
        }
        history.append({**record, "lr": {"student": 1e-4}, "tokens_per_second": speed, **more})
    Dashboard(history).show()
    [(_, _, bundle)] = screen
    assert 20_000 < len(json.dumps(bundle)) < 300_000


CELLS = (
    """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "'.*' deprecated - use", DeprecationWarning)  # of an old matplotlib, as in setup.cfg
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


def execute(cells: tuple[str, ...], tmp_path: Path, monkeypatch) -> tuple[Path, dict]:
    """Run the cells in a kernel of this Python; the saved notebook's path and content."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": start, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    folders = Path(module.__file__).parents[1], Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={}, store_widget_state=False
    )
    client.execute()
    path = tmp_path / "run.ipynb"
    nbformat.write(notebook, path)
    return path, json.loads(path.read_text())


def test_a_real_notebook_keeps_one_small_image(tmp_path, monkeypatch):
    path, saved = execute(CELLS, tmp_path, monkeypatch)
    outputs = [cell["outputs"] for cell in saved["cells"]]
    assert outputs[0] == []
    [shown] = outputs[1]
    [printed] = outputs[2]
    assert set(shown["data"]) == {"image/png", "text/plain"}
    assert "step 99" in "".join(shown["data"]["text/plain"])  # the last state, in the cell that built it
    assert "".join(printed["text"]) == "101\n"
    assert path.stat().st_size < 300_000
    assert "widgets" not in saved["metadata"]


RUN = (
    """
import pathlib
import kd_kit as kd
from helpers import make_trainer
trainer = make_trainer(pathlib.Path("FOLDER"), steps=12, log_every=2)
""",
    "kd.build_dashboard(trainer)",
    "trainer.fit(background=True)",
    "trainer.wait()",
)
VIEW = "application/vnd.jupyter.widget-view+json"


def test_a_run_in_the_background_of_a_real_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    cells = (RUN[0].replace("FOLDER", str(tmp_path / "run")), *RUN[1:])
    path, saved = execute(cells, tmp_path, monkeypatch)
    outputs = [cell["outputs"] for cell in saved["cells"]]
    buttons, picture, log = outputs[1]
    for widget in (buttons, log):
        assert set(widget["data"]) == {VIEW, "text/plain"}
        assert "while the notebook is live" in "".join(widget["data"]["text/plain"])
    assert set(picture["data"]) == {"image/png", "text/plain"}
    twin = "".join(picture["data"]["text/plain"])
    assert "step 12 of 12 (100%)" in twin and "at rest: finished" in twin
    assert "stopped at step 12: finished" in twin  # the log's last line
    for cell, said in ((2, "'running'"), (3, "'finished'")):
        [answer] = outputs[cell]  # and no line of the log beside it
        assert "".join(answer["data"]["text/plain"]) == said
    assert path.stat().st_size < 300_000
    assert "widgets" not in saved["metadata"]


def test_in_a_batch_run_of_kaggle_there_is_the_picture_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    cells = (RUN[0].replace("FOLDER", str(tmp_path / "run")), RUN[1], "trainer.fit()")
    _, saved = execute(cells, tmp_path, monkeypatch)
    outputs = [cell["outputs"] for cell in saved["cells"]]
    [picture] = outputs[1]
    assert set(picture["data"]) == {"image/png", "text/plain"}
    printed = "".join("".join(o["text"]) for o in outputs[2] if o["output_type"] == "stream")
    assert "stopped at step 12: finished" in printed
