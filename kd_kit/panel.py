"""The buttons of a run: stop, save, evaluate, pause, finish early, and how far it is. For notebooks with widgets.

A click asks for what a user can type: every button calls one method of the trainer. Clicks reach a notebook only
while no cell runs, hence the buttons act while ``trainer.fit(background=True)`` trains, and at rest.
"""

from __future__ import annotations

import html
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

LINES = 8  # of the log that are shown
_REFRESH = 0.5  # seconds between two updates of the progress
_FOREGROUND = (
    "The buttons act after trainer.fit(background=True). Here, Interrupt (the stop button of the notebook) finishes "
    "the step, saves and gives the notebook back."
)
_REPLACED = "A newer dashboard of this run has taken the place of this one."
_TWIN = "Buttons of the run: they are there while the notebook is live."


def widgets_wanted() -> bool:
    """False in a batch run of Kaggle, where nobody can click and the saved file cannot show widgets."""
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"


class Panel:
    """Progress, buttons and the last log lines of one trainer, as widgets.

    Thread-safe: the loop that trains reports from its thread, clicks come from the kernel's.

    Attributes:
        buttons: {"stop", "save", "evaluate", "pause", "finish": widget}, each with a ``tooltip`` that names it.
        progress, place, message: widgets for how far it is, the same in words, and what the last click did.
        controls: all of them in one widget. log: the last lines that the run printed.

    Raises:
        ImportError: there is no ipywidgets.
    """

    def __init__(self, trainer: Any, *, clock: Callable[[], float] = time.monotonic):
        import ipywidgets as widgets

        self._trainer = trainer
        self._clock = clock
        self._lock = threading.RLock()
        self._lines: deque[str] = deque(maxlen=LINES)
        self._state = "rest"  # or "background", "foreground", "replaced"
        self._asked_to_stop = False
        self._wanted: set[str] = set()  # "save", "evaluate": asked of a run, not answered yet
        self._drawn = -1e9

        def button(name: str, icon: str, tooltip: str) -> Any:
            made = widgets.Button(
                description=name, icon=icon, tooltip=tooltip, layout=widgets.Layout(width="auto"), disabled=True
            )
            made.on_click(lambda _: self._click(tooltip))
            return made

        self.buttons = {
            "stop": button("Stop after this step", "stop", "stop after this step"),
            "save": button("Save now", "save", "save now"),
            "evaluate": button("Evaluate now", "check", "evaluate now"),
            "pause": button("Pause", "pause", "pause or go on"),
            "finish": button("Finish early", "forward", "finish early"),
        }
        self.buttons["finish"].layout.margin = "2px 2px 2px 24px"
        self._acts = {
            "stop after this step": self._stop,
            "save now": self._save,
            "evaluate now": self._evaluate,
            "pause or go on": self._pause,
            "finish early": self._finish,
        }
        self.progress = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="300px"))
        self.place, self.message, self.log = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.controls = widgets.VBox(
            [
                widgets.HBox([self.progress, self.place]),
                widgets.HBox(list(self.buttons.values()), layout=widgets.Layout(flex_flow="row wrap")),
                self.message,
            ]
        )
        self.say("The buttons act while trainer.fit(background=True) trains.")
        self.refresh(force=True)

    def show(self) -> None:
        """Put the buttons into the cell that runs. What is saved of them is one line of text."""
        show_widget(self.controls, _TWIN)

    def show_log(self) -> None:
        """Put the lines that the run prints in the background into the cell that runs."""
        show_widget(self.log, "Log lines of the run: they are there while the notebook is live.")

    # What the dashboard reports

    def started(self, *, background: bool) -> None:
        """A run has begun, in a thread of its own or in the cell that runs."""
        with self._lock:
            if self._state == "replaced":
                return
            self._state = "background" if background else "foreground"
            self._asked_to_stop = False
            self._wanted.clear()
            self.say("" if background else _FOREGROUND)
            self.refresh(force=True)

    def stopped(self) -> None:
        """The run is over; ``trainer.stop_reason`` says why."""
        with self._lock:
            if self._state == "replaced":
                return
            self._state = "rest"
            reason = self._trainer.stop_reason or "at rest"
            self.say(f"The run is at rest: {reason}", warn=reason.startswith("failed"))
            self.refresh(force=True)

    def answered(self, what: str, text: str) -> bool:
        """The run has done something ("save", "evaluate"); says so if a click asked for it, and returns whether."""
        with self._lock:
            if what not in self._wanted:
                return False
            self._wanted.discard(what)
            self.say(text)
            return True

    def replaced(self) -> None:
        """Another panel stands for this run now."""
        with self._lock:
            self._state = "replaced"
            self.say(_REPLACED)
            self.refresh(force=True)

    def add_line(self, line: str) -> None:
        """One more line of the log; the oldest of them goes."""
        with self._lock:
            self._lines.append(line)
            text = html.escape("\n".join(self._lines))
            self.log.value = f'<pre style="line-height:1.35;white-space:pre-wrap">{text}</pre>'

    @property
    def lines(self) -> list[str]:
        """The last lines of the log."""
        with self._lock:
            return list(self._lines)

    @property
    def acts(self) -> bool:
        """Whether a click on some button does something."""
        return not all(button.disabled for button in self.buttons.values())

    def say(self, text: str, *, warn: bool = False) -> None:
        """One line under the buttons."""
        style = ' style="color:#A33C00;font-weight:bold"' if warn else ""
        self.message.value = f"<span{style}>{html.escape(text)}</span>"

    def refresh(self, *, force: bool = False) -> None:
        """Bring progress and buttons up to date, at most twice a second unless forced."""
        with self._lock:
            now = self._clock()
            if not force and now - self._drawn < _REFRESH:
                return
            self._drawn = now
            trainer = self._trainer
            record = trainer.history.last("train") or {"step": 0}
            whole, step = max(1, trainer.total_steps), record["step"]
            self.progress.max, self.progress.value = whole, min(step, whole)
            self.place.value = html.escape(f"step {step:,} of {whole:,} · {min(1.0, step / whole):.0%}")
            running, rest = self._state == "background", self._state == "rest"
            paused = running and trainer.controls.paused
            on = {
                "stop": running and not self._asked_to_stop,
                "save": running or (rest and trainer.step > 0),
                "evaluate": running or rest,
                "pause": running and not self._asked_to_stop,
                "finish": running and not self._asked_to_stop and self._can_finish_early(),
            }
            for name, button in self.buttons.items():
                button.disabled = not on[name]
            pause = self.buttons["pause"]
            pause.description, pause.icon = ("Go on", "play") if paused else ("Pause", "pause")

    # Clicks

    def _click(self, tooltip: str) -> None:
        """What a button does; whatever goes wrong is said under the buttons and harms nothing else."""
        try:
            self._wait_for_the_end()
            self._acts[tooltip]()
        except Exception as problem:
            self.say(f"{type(problem).__name__}: {problem}", warn=True)
        self.refresh(force=True)

    def _wait_for_the_end(self) -> None:
        """A run that has said its last word needs a moment to be at rest, as what acts directly expects."""
        end = self._clock() + 5
        while self._state == "rest" and self._trainer.running and self._clock() < end:
            time.sleep(0.02)

    def _stop(self) -> None:
        self._trainer.stop()
        self._asked_to_stop = True
        self.say("Stops after this step, saved.")

    def _save(self) -> None:
        if self._state == "background":
            self._wanted.add("save")
            self.say("Saves after this step.")
            self._trainer.save()
            return
        self.say("Saving …")
        self.say(f"Saved: {self._trainer.save().path.name}")

    def _evaluate(self) -> None:
        if self._state == "background":
            self._wanted.add("evaluate")
            self.say("Evaluates after this step.")
            self._trainer.evaluate_now()
            return
        self.say("Evaluating …")
        self.say(f"Held-out bits per byte: {self._trainer.evaluate_now():.4f}")

    def _pause(self) -> None:
        if self._trainer.controls.paused:
            self._trainer.go_on()
            self.say("Goes on.")
        else:
            self._trainer.pause()
            self.say("Rests after this step, until Go on.")

    def _finish(self) -> None:
        self._trainer.decay_now()
        self.say("The learning rate falls after this step, and the run ends where it has fallen.")

    def _can_finish_early(self) -> bool:
        trainer = self._trainer
        falling = trainer.lr_schedule.decay_steps(trainer.planned_steps)
        return trainer.decay_from is None and 0 < falling < trainer.planned_steps - trainer.step


def show_widget(widget: Any, twin: str) -> None:
    """Show a widget with a sentence for readers of the saved file, in place of the widget's parameters."""
    from IPython.display import display

    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": twin}, raw=True)
