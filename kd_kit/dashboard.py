"""The live picture of a run: one display handle whose image is replaced while training goes on.

One handle, one PNG with the loss table as its text twin: live in every notebook front end, and still in the
file after the run. What is drawn, and whether it looks right, is decided in ``plots.py``.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_kit.history import History
from kd_kit.plots import figure_png, loss_figure, loss_table

MIN_INTERVAL = 1.0  # seconds between two redraws, at least
COST_FACTOR = 50  # and at least this many times what the last redraw took: at most 2 % of the time


class Dashboard:
    """Shows a history and keeps the picture up to date; a callback of the trainer.

    Left as the last expression of a cell it lives in that cell, and training updates it there; never shown,
    it appears in the cell that trains. Shown again, it starts a new picture, which is also the cure after
    the cell's output was cleared. A redraw that fails is said once and does not end the run. Outside a
    notebook nothing is drawn; ``save`` works anywhere.

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
        self._said: set[str] = set()
        self._born = clock()
        self._spent = 0.0  # seconds of drawing, since then
        self._last_cost = 0.0
        self._last_end: float | None = None

    def show(self) -> None:
        """Start a new picture in the cell that runs; the updates go there from now on."""
        if not in_notebook():
            self._say("the dashboard needs a notebook; here the log lines of the trainer are the view")
            return
        from IPython.display import display

        self._shown_by_run = False
        self._handle = self._timed(lambda bundle: display(bundle, raw=True, display_id=True))

    def update(self, force: bool = False) -> bool:
        """Redraw if it is due, or with ``force`` in any case; True if the picture was replaced.

        Due is max(1 s, 50 x the cost of the last redraw) after the last one ended.
        """
        if self._handle is None or not (force or self._is_due()):
            return False
        self._timed(lambda bundle: self._handle.update(bundle, raw=True))
        return True

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG, now, and return where it is."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._png())
        return path

    def cost_share(self) -> float:
        """Share of the time since training started (or, before, since this object was made) spent drawing."""
        passed = self._clock() - self._born
        return self._spent / passed if passed > 0 else 0.0

    # What the trainer calls

    def on_start(self, trainer: Any) -> None:
        self._trainer = trainer
        self._born, self._spent = self._clock(), 0.0
        if self._handle is None or self._shown_by_run:
            self._safely(self.show)
            self._shown_by_run = True
        else:
            self._safely(self.update, force=True)

    def on_log(self, trainer: Any) -> None:
        self._trainer = trainer
        self._safely(self.update)

    def on_evaluate(self, trainer: Any) -> None:
        self._trainer = trainer
        self._safely(self.update, force=True)

    def on_save(self, trainer: Any) -> None:
        self.on_evaluate(trainer)

    def on_stop(self, trainer: Any) -> None:
        self.on_evaluate(trainer)

    # What a notebook calls

    def _ipython_display_(self) -> None:
        self.show()

    def __repr__(self) -> str:
        where = "live" if self._handle is not None else "not shown"
        cost = f"{self.updates} updates, {self.cost_share():.1%} of the time"
        return f"Dashboard({where}, {cost}; {self.history!r})"

    # Inside

    def _png(self) -> bytes:
        if self._trainer is not None:  # it may have loaded another history, or have its control only now
            self.history = self._trainer.history
            self.control = self._trainer.control_history
        return figure_png(loss_figure(self.history, control=self.control, title=self.title))

    def _timed(self, send: Callable[[dict[str, str]], Any]) -> Any:
        """Render, send, and note what it cost; importing matplotlib is spent time, but sets no pace."""
        start = self._clock()
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401

        imported = self._clock()
        try:
            image = base64.b64encode(self._png()).decode("ascii")
            answer = send({"image/png": image, "text/plain": str(loss_table(self.history))})
            self.updates += 1
        finally:
            self._last_end = self._clock()
            self._last_cost = self._last_end - imported
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
        if line not in self._said:
            self._said.add(line)
            print(f"kd_kit: {line}")


def build_dashboard(trainer: Any, *, title: str | None = None) -> Dashboard:
    """A dashboard that follows ``trainer``: make it the last expression of a cell, then ``trainer.fit()``.

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
    dashboard._trainer = trainer
    others = [callback for callback in trainer.callbacks if not isinstance(callback, Dashboard)]
    trainer.callbacks[:] = [*others, dashboard]
    return dashboard


def in_notebook() -> bool:
    """True where a kernel listens; false in a script, a test, and IPython in a terminal."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
