"""What can be asked of a run that goes on, from any thread: stop, pause, save, evaluate, other weights, an early end.

A wish is kept in :class:`kd_kit.controls.Controls` and met by the loop between two steps, where the session's clock and
the system's signals are looked at, too.
"""

from __future__ import annotations

import atexit
import math
import signal
import statistics
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from kd_kit.controls import Controls
from kd_kit.forecast import forecast, how_to_go_on, sessions_needed
from kd_kit.session import StopRequests
from kd_kit.table import short, span


def _end_with_the_program(about: weakref.ref[Steering]) -> None:
    """A program that ends while it trains stops it after its step and waits for the save."""
    trainer = about()
    if trainer is not None and trainer.running:
        print("kd_kit: the program ends; the run in the background stops after its step and saves", flush=True)
        trainer.stop("the program ended")
        trainer._background.join()


def _end_on_sigterm() -> None:
    """SIGTERM, which would end the program at once, ends it as a program ends: what is registered for that is done."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


TIME_OVER = "the session's time is over"
NOT_FINITE = "no finite gradient"
"""How the reason begins for which a run stopped that could not get past such steps."""

SLOW_DISK = 100e6
"""Bytes per second that a save is expected to write before one has been measured."""


COPY_PATIENCE = 120.0
"""Seconds that the end of a run waits for its copy off the machine, or longer where copies take longer."""


class Steering:
    """The half of a :class:`kd_kit.trainer.Trainer` that its user steers it by."""

    def __init__(self):
        self.controls = Controls()
        self.stop_reason: str | None = None
        self._loop: threading.Thread | None = None  # the one that trains now
        self._background: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._first_step = 0  # of this session
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._longest_pause = 0.0  # seconds that evaluation and saving took after one step, at most

    def fit(self, steps: int | None = None, *, background: bool = False) -> str:
        """Train to the end, or for ``steps`` more steps, from the newest good checkpoint of the run folder.

        Ends early, having saved, when the session's time is over, on Interrupt or SIGTERM, or when a callback or
        :meth:`stop` asks for it. Calling it again goes on.

        Args:
            background: train in a thread and give the notebook back at once, so that buttons act while it trains;
                :meth:`wait` waits for the end and raises what went wrong. Random numbers that other cells draw
                meanwhile are drawn from the same generators: a run with dropout is then not repeatable.

        Returns:
            why it stopped, also in ``stop_reason``; "running" in the background.

        With several processes every one of them calls it. They take the micro-batches of a step in turn, so the run is
        that of one process up to rounding; not so with dropout, of which every process draws its own.

        Raises:
            ValueError: it is training already, or is to train in the background of several processes.
            ProcessLost: another process of the run is gone.
        """
        if background and self.processes.count > 1:
            raise ValueError(
                f"Trainer.fit: expected background=False in {self.processes.count} processes, got True; there is no "
                "notebook to give back, and all of them have to train"
            )
        if self.running:
            raise ValueError("Trainer.fit: expected a trainer at rest, got one that trains already; trainer.wait()")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
            raise ValueError(
                f"Trainer.fit: expected steps= as the number of further steps, at least 0, got {steps!r}; leave it out "
                "to train to the end"
            )
        self.controls.clear()
        self._failure = None
        if not background:
            return self._fit(steps)
        self.resume()  # what is wrong with the folder shows in this cell
        self.stop_reason = None
        self._background = threading.Thread(target=self._fit_behind, args=(steps,), name="kd_kit fit", daemon=True)
        atexit.register(_end_with_the_program, weakref.ref(self))  # weak: it is registered for good
        if threading.current_thread() is threading.main_thread():
            _end_on_sigterm()
        self._background.start()
        return "running"

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait for a run in the background, at most so many seconds.

        Returns:
            why it stopped; None if it still trains.

        Raises:
            whatever ended the run, if it failed.
        """
        if self._background is not None:
            try:
                self._background.join(timeout)
            except KeyboardInterrupt:
                print("Trainer.wait: it still trains in the background; trainer.stop() ends it after its step")
                raise
            if self._background.is_alive():
                return None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.stop_reason

    @property
    def running(self) -> bool:
        """Whether it trains now, here or in the background."""
        return self._loop is not None or (self._background is not None and self._background.is_alive())

    def _fit_behind(self, steps: int | None) -> None:
        try:
            self._fit(steps)
        except BaseException as error:  # said by wait(), in the thread of the user
            self._failure = error
            if self.stop_reason is None:  # before the loop; the loop tells of its own failures
                self.stop_reason = f"failed: {type(error).__name__}: {error}".removesuffix(": ")
                self._tell("on_stop")

    def stop(self, reason: str = "stopped by request") -> None:
        """End a run that is going on after its step, saved, with this as its ``stop_reason``."""
        self._say_at_rest()
        self.controls.stop(reason)

    def pause(self) -> None:
        """Let a run rest after its step, until :meth:`go_on`; it can be saved, evaluated and stopped meanwhile."""
        self._say_at_rest()
        self.controls.pause()

    def go_on(self) -> None:
        """End a rest."""
        self.controls.go_on()

    def _say_at_rest(self) -> None:
        if not self.running and self.processes.leads:
            print("Trainer: nothing trains now, so there is nothing to stop; fit(background=True) can be stopped")

    def decay_now(self) -> None:
        """Let the learning rate fall from here on, over as many steps as planned for that, and end the run there.

        Source: the stable phase can be left at any step, Hu et al. 2024, section 4, https://arxiv.org/abs/2404.06395

        Raises:
            ValueError: the learning rate has no decay, or falls already.
        """
        start = self.lr_schedule.decay_start(self.planned_steps, self.decay_from)
        if start is None:
            raise ValueError(
                f"Trainer.decay_now: expected a learning rate with a decay, got {self.lr_schedule}; pass "
                "lr_schedule=kd.LearningRate(decay=0.2) to build_trainer"
            )
        if self.step >= start:
            raise ValueError(f"Trainer.decay_now: the learning rate falls already, since step {start:,}")
        if self._elsewhere():
            return self.controls.want("decay")
        self.resume()
        if self._holds_best:
            raise ValueError(
                "Trainer.decay_now: expected the weights of the last step, got the best ones, which load_best() put in "
                "their place; fit(steps=1) goes on from the last ones, then call it again"
            )
        return self._led("Trainer.decay_now", self._begin_decay)

    def _begin_decay(self) -> None:
        """As :meth:`decay_now`, between two steps; nothing where the rate falls already."""
        start = self.lr_schedule.decay_start(self.planned_steps, self.decay_from)
        if start is not None and self.step < start:
            self.decay_from = self.step
            self._event("stage", f"the learning rate falls from here on; the run ends at step {self.total_steps:,}")
            self._record_run()
            self._save_or_warn()  # a session that ends before the next save must not forget it

    def set_weights(self, weights: Mapping[str, float] | None = None, **more: float) -> str:
        """Change the weights of some terms, from the next step on: ``trainer.set_weights(kd=0.5)``.

        Returns:
            what has changed, in words.

        Raises:
            ValueError: a name that no term has, a weight that is none, or nothing left for the LM term.
        """
        if not self._elsewhere():
            self.resume()
        weights = dict(weights or {}) | more
        known = {t.name: t.weight for t in self.terms}
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"Trainer.set_weights: expected weights of at least 0, got {name}={weight!r}")
        unknown = [name for name in weights if name not in known]
        if unknown:
            raise ValueError(
                f"Trainer.set_weights: expected terms out of {', '.join(known)}, got {', '.join(unknown)}; the terms "
                "of a run are given to build_trainer"
            )
        terms = tuple(replace(t, weight=float(weights.get(t.name, t.weight))) for t in self.terms)
        changed = {t.name: t.weight for t in terms}
        if "lm" in changed and not changed["lm"] > 0 and any(t.taught and t.weight > 0 for t in terms):
            raise ValueError(
                "Trainer.set_weights: expected a weight above 0 for lm beside the teacher's terms, got 0; without it "
                "nobody sees whether the student still learns the language"
            )
        self.schedule.check(changed)
        self.balance.check(changed)
        self.terms = self.module.terms = terms
        self._log.use(terms)
        # so that a session whose cell has other weights says so
        self._config = self._config | {f"{name}.weight": weight for name, weight in changed.items()}
        self._write_run()
        text = ", ".join(f"weight of {n} {known[n]:g} -> {v:g}" for n, v in weights.items()) or "nothing"
        self._event("changed", text)
        return text

    def _elsewhere(self) -> bool:
        """Whether the loop runs in another thread than this one."""
        return self.running and threading.current_thread() not in (self._loop, self._background)

    def _heed(self, requests: StopRequests) -> None:
        """Between two steps: what the user, the session's clock and the system want."""
        resting = False
        while True:
            for what in self.controls.take():
                {"save": self._save_or_warn, "evaluate": self.evaluate_now, "decay": self._begin_decay}[what]()
            if self.stop_reason is None and self.step < self.total_steps:  # there is something to stop
                self.stop_reason = requests.reason or self.controls.stop_reason
                if self.stop_reason is None and self._time_is_over():
                    self.stop_reason = TIME_OVER
            if self.stop_reason or not self.controls.paused or self.step >= self.total_steps:
                break
            if not resting:
                resting = True
                self._flush()
                self._event("rests", "by request; trainer.go_on() ends it")
                self._tell("on_log")
            self.controls.rest(0.2)
        if resting:
            self._event("rests", "no longer")
            self._tell("on_log")
        if self.stop_reason is None and self.settings["finish_in_session"] and self._decay_is_due():
            self._begin_decay()

    def _margin(self) -> float:
        """Seconds to keep for a step, its evaluation, the save behind it, a second try, and the copy of that."""
        spare = 30 if self.session.budget is None else min(30, self.session.budget / 20)
        saving = self._save_seconds or self._state_bytes() / SLOW_DISK
        pause = max(self._longest_pause, self._eval_seconds + saving)
        copying = self._mirror.last_seconds if self._mirror is not None else 0.0
        return spare + 2 * self._pace() + 2 * pause + copying

    def _pace(self) -> float:
        """Seconds of a step, of late. A median: a machine that slept for hours in one of them says nothing."""
        return statistics.median(self._step_seconds) if self._step_seconds else 0.0

    def _state_bytes(self) -> int:
        """Of a checkpoint, about: weights, and two numbers of the optimizer for each that is trained."""
        return sum(p.nbytes + 8 * p.numel() * p.requires_grad for p in self.module.parameters())

    def _tell_forecast(self) -> None:
        """How long the rest takes and how many sessions that is, once a step's time is known."""
        if not self.step or self.step >= self.total_steps:
            return
        left = self.total_steps - self.step
        each = self._pace() + self._eval_seconds / self.settings["eval_every"]
        to_go = left * each + self._save_seconds
        if to_go < min(60, self.session.remaining() - self._margin()):
            return  # over in a moment
        text = forecast(self.session, to_go=to_go, reserve=self._margin(), lead=self._lead)
        self._event("plan", f"{short(self._pace())} s per step, {text}")

    @property
    def done(self) -> bool:
        """Whether the run is at its end: all steps, or stopped early. A run that :meth:`resume` finds, too."""
        self.resume()
        return self.how_to_go_on() is None

    def how_to_go_on(self) -> str | None:
        """What to do next for a run that is not at its end; None for one that is."""
        if self.step >= self.total_steps or self.stopped_early:
            return None
        if (self.stop_reason or "").startswith(NOT_FINITE):
            return "to go on: repair the cause first (kd.last_fault(), kd.last_fault().replay(trainer)), then fit()"
        text = how_to_go_on(self.session)
        if self.session.budget is not None and self.step and self.stop_reason == TIME_OVER:
            to_go = (self.total_steps - self.step) * self._pace()
            count = sessions_needed(to_go, 0, self.session.budget - self._lead - self._margin()) - 1
            if math.isfinite(count):
                text += f"; {self.total_steps - self.step:,} steps are left, about {span(to_go)}: {count:.0f} more " + (
                    "session" if count == 1 else "sessions"
                )
        return text

    # --- copies off the machine ---------------------------------------------------------------------------------

    def _tell_of_copies(self) -> None:
        """What happened to copies in the background, into the history."""
        for what, text in self._mirror.news() if self._mirror is not None else ():
            self._event(what, text)

    def _flush_copies(self, requests: StopRequests) -> None:
        """Behind the last save: wait for its copy, as long as session and user allow."""
        hurry = requests.reason == "terminated"  # the program is killed soon
        if self._mirror is None:
            return
        patience = 10.0 if hurry else max(COPY_PATIENCE, 4 * self._mirror.last_seconds)
        patience = max(0.0, min(patience, self.session.remaining() - 5))
        if not self._mirror.arrived:
            print(f"saved; waiting up to {span(patience)} for the copy to {self.session.mirror} (Interrupt ends that)")
        before = requests.reason
        try:
            self._mirror.flush(patience, goes_on=lambda: requests.reason is before)
        except KeyboardInterrupt:  # all is saved here; only the copy is older
            self._event("alarm", f"interrupted: the copy in {self.session.mirror} may be of an older step")
        self._tell_of_copies()

    def _time_is_over(self) -> bool:
        """Whether another step, with evaluation and saves, might not fit into what is left of the session."""
        return self.session.remaining() < self._margin()

    def _decay_is_due(self) -> bool:
        """Whether the session has just the time left that the decay takes, and not that of the whole run."""
        left = self.session.remaining() - self._margin()
        if math.isinf(left) or self.decay_from is not None or not self.step:
            return False
        seconds = 1.1 * self._pace()
        falling = self.lr_schedule.decay_steps(self.planned_steps)
        until = self.planned_steps - falling - self.step
        return until > 0 and left <= (falling + 1) * seconds < (until + falling) * seconds
