"""The live picture of a run: one display handle whose image is replaced while training goes on, and its buttons.

One handle, one PNG with the loss table as its text twin: live in every notebook front end, and still in the
file after the run. What is drawn, and whether it looks right, is decided in ``plots.py``; widgets, in ``panel.py``,
are for clicks only.
"""

from __future__ import annotations

import base64
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_kit.callbacks import PrintLines
from kd_kit.drawing import figure_png
from kd_kit.history import History
from kd_kit.panel import Panel, widgets_wanted
from kd_kit.plots import loss_figure, loss_table
from kd_kit.processes import is_first
from kd_kit.run_table import alarm_lines, clock
from kd_kit.schedule_plot import Plan, plan_of

MIN_INTERVAL = 1.0  # seconds between two redraws, at least
COST_FACTOR = 60  # and at least this many times what the last redraw took: under 2 % of the time
ALLOWANCE = 1.0  # seconds of drawing beyond these 2 % that evaluations and saves may take at once


class Dashboard:
    """Shows a history and keeps the picture up to date; a callback of the trainer.

    Left as the last expression of a cell it lives in that cell, and training updates it there; never shown,
    it appears in the cell that trains. Shown again, it starts a new picture, which is also the cure after
    the cell's output was cleared. A redraw that fails is said once and does not end the run. Outside a
    notebook nothing is drawn; ``save`` works anywhere.

    Above the picture are the run's buttons, below it the lines that a run in the background prints, which would
    otherwise land in whatever cell ran last. In Kaggle's batch runs and without ipywidgets there is the picture
    alone.

    Example:
        >>> Dashboard(History()).save("loss.png")  # doctest: +SKIP
    """

    def __init__(
        self,
        history: History,
        *,
        control: History | None = None,
        title: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.history = history
        self.control = control
        self.title = title
        self.updates = 0  # pictures sent, the first included
        self._clock = clock
        self._trainer: Any = None
        self._handle: Any = None
        self._shown_by_run = False  # the picture stands in the cell that trains, and goes when it runs again
        self._trains = False
        self._rested = False  # at the last report
        self._has_steps = False  # the picture shows some
        self._said: set[str] = set()
        self._panel: Panel | None = None
        self._prints: list[tuple[PrintLines, Any]] = []  # whose lines are shown here, and how they were printed
        self._lock = threading.RLock()  # the loop may draw in one thread while a cell draws in another
        self._born = clock()
        self._spent = 0.0  # seconds of drawing that a run has waited for, since then
        self._last_cost = 0.0
        self._last_end: float | None = None

    def show(self) -> None:
        """Start a new picture in the cell that runs; the updates go there from now on."""
        if not in_notebook():
            self._say("the dashboard needs a notebook; here the log lines of the trainer are the view")
            return
        from IPython.display import display

        self._shown_by_run = False
        self._with_panel(Panel.show)
        self._handle = self._timed(lambda bundle: display(bundle, raw=True, display_id=True))
        self._with_panel(Panel.show_log)

    def update(self, force: bool = False) -> bool:
        """Redraw if it is due, or with ``force`` in any case; True if the picture was replaced.

        Due is max(1 s, 60 x the cost of the last redraw) after the last one ended.
        """
        if self._handle is None or not (force or self._is_due()):
            return False
        self._timed(lambda bundle: self._handle.update(bundle, raw=True))
        return True

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG, now, and return where it is; of several processes the first one does."""
        path = Path(path)
        if not is_first():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._png())
        return path

    def cost_share(self) -> float:
        """Share of the time since training started that it has waited for pictures."""
        passed = self._clock() - self._born
        return self._spent / passed if passed > 0 else 0.0

    # What the trainer calls

    def on_start(self, trainer: Any) -> None:
        self._trainer, self._trains = trainer, True
        self._born, self._spent = self._clock(), 0.0
        if self._handle is None or self._shown_by_run:
            self._safely(self.show)
            self._shown_by_run = True
        else:
            self._safely(self.update, force=True)
        if self._panel is not None:
            self._safely(self._panel.started, background=_in_background())

    def on_log(self, trainer: Any) -> None:
        """Redraws when it is due; at once with the first step, and when a rest begins or ends."""
        self._trainer = trainer
        rests = _rests(trainer)
        news = rests != self._rested or (not self._has_steps and trainer.history.last("train") is not None)
        self._rested = rests
        self._safely(self.update, force=news)
        if self._panel is not None:
            self._safely(self._panel.refresh, force=news)

    def on_evaluate(self, trainer: Any) -> None:
        bits = trainer.history.evaluations()[1]
        self._moment(trainer, "evaluate", f"Held-out bits per byte: {bits[-1]:.4f}" if bits else "")

    def on_save(self, trainer: Any) -> None:
        saved = [event for event in trainer.history.events if event["what"] == "saved"]
        self._moment(trainer, "save", f"Saved: {saved[-1]['text']}" if saved else "")

    def _moment(self, trainer: Any, what: str, text: str) -> None:
        """Redraw at once where somebody asked or no run waits for it, and as long as this costs little."""
        self._trainer = trainer
        asked = self._panel is not None and self._panel.answered(what, text)
        cheap = self._spent <= (self._clock() - self._born) / COST_FACTOR + ALLOWANCE
        self._safely(self.update, force=asked or cheap or not self._trains or _rests(trainer))
        if self._panel is not None:
            self._safely(self._panel.refresh)

    def on_stop(self, trainer: Any) -> None:
        self._trainer, self._trains = trainer, False
        self._safely(self.update, force=True)
        if self._panel is not None:
            self._safely(self._panel.stopped)

    # What a notebook calls

    def _ipython_display_(self) -> None:
        self.show()

    def __repr__(self) -> str:
        where = "live" if self._handle is not None else "not shown"
        cost = f"{self.updates} updates, {self.cost_share():.1%} of the time"
        return f"Dashboard({where}, {cost}; {self.history!r})"

    # Inside

    def follow(self, trainer: Any) -> None:
        """Become a callback of the trainer, in the place of every other dashboard of it."""
        self._trainer = trainer
        for callback in list(trainer.callbacks):
            if isinstance(callback, Dashboard) and callback is not self:
                callback.give_way()
        others = [callback for callback in trainer.callbacks if not isinstance(callback, Dashboard)]
        for callback in others:
            if isinstance(callback, PrintLines):
                self._prints.append((callback, callback.print))
                callback.print = functools.partial(self._line, callback.print)
        trainer.callbacks[:] = [*others, self]

    def give_way(self) -> None:
        """Leave the run to another dashboard: the picture stays as it is, the buttons say so and do nothing."""
        for callback, before in self._prints:
            callback.print = before
        self._prints.clear()
        self._handle = None
        if self._panel is not None:
            self._panel.replaced()

    def _line(self, before: Callable[[str], Any], line: str) -> None:
        """A line of the log: shown here while the run is in the background, and printed as before if not."""
        if self._handle is not None and self._panel is not None and _in_background():
            self._panel.add_line(line)
        else:
            before(line)

    def _with_panel(self, show: Callable[[Panel], None]) -> None:
        """Do something with the panel, if there can be one; the picture needs none."""
        if not hasattr(self._trainer, "controls") or not widgets_wanted():
            return
        try:
            self._panel = self._panel or Panel(self._trainer)
            show(self._panel)
        except Exception as problem:
            self._panel = None
            self._say(
                f"there are no buttons ({type(problem).__name__}: {problem}); trainer.stop(), pause(), go_on(), "
                "save(), evaluate_now() and decay_now() do the same"
            )

    def _png(self) -> bytes:
        trainer = self._trainer
        if trainer is not None:  # it may have loaded another history, or have its control only now
            self.history = trainer.history
            self.control = trainer.control_history
        figure = loss_figure(
            self.history,
            control=self.control,
            title=self.title,
            plan=self._plan(),
            settings=getattr(trainer, "settings", None),
            failure=self._failure(),
            footer=self._cost(),
        )
        self._has_steps = self.history.last("train") is not None
        return figure_png(figure)

    def _twin(self) -> str:
        """The same in words, for whoever reads without pictures."""
        said = self._failure() or clock(self.history, getattr(self._trainer, "settings", None))[0]
        lines = [] if self._panel is None else self._panel.lines
        parts = [self.title, str(loss_table(self.history)), said, *alarm_lines(self.history), *lines, self._cost()]
        return "\n".join(part for part in parts if part)

    def _plan(self) -> Plan | None:
        return plan_of(self._trainer) if hasattr(self._trainer, "shares_at") else None

    def _failure(self) -> str | None:
        reason = getattr(self._trainer, "stop_reason", None)
        return reason if reason and reason.startswith("failed") else None

    def _cost(self) -> str:
        """What the pictures so far have cost, as a line."""
        if not self._spent:
            return ""
        count = f"{self.updates:,} picture" + ("s" if self.updates > 1 else "")
        return f"{count} took {self._spent:.1f} s, {100 * self.cost_share():.1f} % of the run's time"

    def _timed(self, send: Callable[[dict[str, str]], Any]) -> Any:
        """Render, send, and note what it cost; importing matplotlib is spent time, but sets no pace."""
        with self._lock:
            start = self._clock()
            import matplotlib.backends.backend_agg
            import matplotlib.figure  # noqa: F401

            imported = self._clock()
            try:
                image = base64.b64encode(self._png()).decode("ascii")
                answer = send({"image/png": image, "text/plain": self._twin()})
                self.updates += 1
            finally:
                self._last_end = self._clock()
                self._last_cost = self._last_end - imported
                if self._trains and not _rests(self._trainer):  # or else no run has waited for it
                    self._spent += self._last_end - start
            return answer

    def _is_due(self) -> bool:
        if self._last_end is None:
            return True
        return self._clock() - self._last_end >= max(MIN_INTERVAL, COST_FACTOR * self._last_cost)

    def _safely(self, draw: Callable[..., Any], **how: Any) -> None:
        try:
            draw(**how)
        except Exception as problem:  # a picture is never worth a run
            self._say(f"drawing failed ({type(problem).__name__}: {problem}); the run goes on")

    def _say(self, line: str) -> None:
        if line in self._said:
            return
        self._said.add(line)
        if self._panel is not None and _in_background():
            self._panel.say(line, warn=True)
        elif is_first():
            print(f"kd_kit: {line}")


def build_dashboard(trainer: Any, *, title: str | None = None) -> Dashboard:
    """A dashboard that follows ``trainer``: make it the last expression of a cell, then ``trainer.fit()``.

    With ``trainer.fit(background=True)`` its buttons act while the run goes on.

    Uses ``trainer.history``, ``trainer.control_history`` (or None) and ``trainer.callbacks``, to which it
    adds itself. Run twice, the new dashboard takes the place of the former one. Without a ``title`` it bears
    the run's name.

    Raises:
        ValueError: the trainer lacks one of the three.
    """
    needed = ("history", "control_history", "callbacks")
    missing = [name for name in needed if not hasattr(trainer, name)]
    if missing:
        raise ValueError(
            f"build_dashboard: expected a trainer with history, control_history and callbacks, got "
            f"{type(trainer).__name__} without {', '.join(missing)}; for a history alone use Dashboard(history)"
        )
    if title is None and hasattr(trainer, "session"):
        title = f"Run {trainer.session.folder.name}"
    dashboard = Dashboard(trainer.history, control=trainer.control_history, title=title)
    dashboard.follow(trainer)
    return dashboard


def _rests(trainer: Any) -> bool:
    """Whether somebody has asked the run to pause."""
    return hasattr(trainer, "controls") and trainer.controls.paused


def _in_background() -> bool:
    """Whether this is another thread than the one in which cells run."""
    return threading.current_thread() is not threading.main_thread()


def in_notebook() -> bool:
    """True where a kernel listens; false in a script, a test, and IPython in a terminal."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
