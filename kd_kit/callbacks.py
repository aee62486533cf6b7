"""What happens beside the loop. A callback is any object with some of these methods; all get the trainer."""

from __future__ import annotations

import math
import time

from kd_kit.history import usual_times_floor


class Callback:
    """The hooks, doing nothing. To stop a run a callback sets ``trainer.stop_reason``; nothing is thrown."""

    def on_start(self, trainer) -> None:
        """Before the first step of this session, after resuming; also after the run went back to a checkpoint."""

    def on_log(self, trainer) -> None:
        """New training records are in ``trainer.history``."""

    def on_evaluate(self, trainer) -> None:
        """A new held-out figure is in ``trainer.history``."""

    def on_save(self, trainer) -> None:
        """A checkpoint was written and is whole."""

    def on_stop(self, trainer) -> None:
        """The loop has ended; ``trainer.stop_reason`` says why."""


class EarlyStopping(Callback):
    """Stops a run whose held-out bits per byte have not become less for a while; the best weights are kept.

    Holds no state of its own: everything is read from the run's history, so a resumed run stops where the
    uninterrupted one does. A run that it has stopped ends with the best weights in its student.

    Args:
        patience: evaluations in a row without a new best, of those after the grace. With a curriculum and few epochs
            10 are too few: new terms coming in raise the others for a while.
        grace: steps at the start that do not count; the warm-up if that is longer.

    Raises:
        ValueError: patience below 1 or a negative grace.
    """

    def __init__(self, patience: int = 20, *, grace: int = 1000):
        if not (isinstance(patience, int) and patience >= 1 and grace >= 0):
            raise ValueError(
                f"EarlyStopping: expected patience of at least 1 and a grace of at least 0 steps, got {patience!r} and "
                f"{grace!r}"
            )
        self.patience = patience
        self.grace = grace

    def first_stop(self, trainer) -> int:
        """The earliest step at which it could stop the run."""
        return self._grace(trainer) + self.patience * trainer.settings["eval_every"]

    def on_evaluate(self, trainer) -> None:
        steps, bits = trainer.history.evaluations()
        start = self._grace(trainer)
        # NaN is below nothing and above nothing: as the worst of all it is never the best
        counted = [(b if math.isfinite(b) else math.inf, s) for s, b in zip(steps, bits, strict=True) if s >= start]
        if not counted or trainer.step >= trainer.total_steps:
            return
        at = min(counted)[1]  # of equal ones the earliest
        since = sum(1 for _, step in counted if step > at)
        if since >= self.patience and trainer.stop_reason is None:
            trainer.stopped_early = True
            trainer.stop_reason = "stopped early"
            text = f"no new best in {since} evaluations; the student gets the weights of step {trainer.best_step:,}"
            trainer.history.append({"kind": "event", "step": trainer.step, "what": "stage", "text": text})

    def _grace(self, trainer) -> int:
        return max(self.grace, trainer.lr_schedule.warmup_steps(trainer.planned_steps))

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self.patience}, grace={self.grace})"


class PrintLines(Callback):
    """A line at most every ``every`` steps, one per evaluation and one per event, so that a log stays readable.

    12,500 steps with an evaluation every 500 print some 150 lines.
    """

    def __init__(self, every: int = 100, *, prefix: str = "", print=print):
        self.every = every
        self.print = lambda line: print(prefix + line)
        self._next = 0
        self._events = 0

    def on_start(self, trainer) -> None:
        self._next = trainer.step - trainer.step % self.every + self.every
        events = trainer.history.events
        self._events = len(events) - (bool(events) and events[-1]["what"] == "resumed")
        self._tell_events(trainer)
        left = trainer.total_steps - trainer.step
        self.print(f"step {trainer.step:>6,}  of {trainer.total_steps:,}: {left:,} to go")

    def on_log(self, trainer) -> None:
        self._tell_events(trainer)
        if trainer.step < self._next:
            return
        self._next = trainer.step - trainer.step % self.every + self.every
        record = trainer.history.last("train")
        there = {name: term for name, term in record["terms"].items() if term["value"] is not None}
        if len(there) <= 3:
            values = "  ".join(f"{name} {t['value']:.3f} (x{t['weight']:.2f})" for name, t in there.items())
        else:  # one line of a notebook holds no more
            values = "  ".join(f"{name} {t['value']:.3g}" for name, t in there.items())
        rate = next(iter(record["lr"].values()))
        times = usual_times_floor(trainer.history)
        floor = "" if times is None else f" ({times:.1f} x floor)"
        self.print(
            f"step {record['step']:>6,}  total {record['total']:.3f} = {values}  lr {rate:.1e}  "
            f"{record['tokens_per_second']:,.0f} tok/s{floor}  {time.strftime('%H:%M')}"
        )

    def on_evaluate(self, trainer) -> None:
        record = trainer.history.last("eval")
        self.print(f"step {record['step']:>6,}  held-out bits per byte {record['bits_per_byte']:.4f}")

    def on_save(self, trainer) -> None:
        self._tell_events(trainer)

    def on_stop(self, trainer) -> None:
        self._tell_events(trainer)
        self.print(f"stopped at step {trainer.step:,}: {trainer.stop_reason}")
        best = getattr(trainer, "best_step", None)
        evaluated = trainer.history.evaluations()[0]
        if best is not None and evaluated and best < evaluated[-1] and not trainer.stopped_early:
            figure = f"{trainer.best:.4f} bits per byte"
            self.print(f"the best evaluation was at step {best:,} ({figure}); trainer.load_best() takes its weights")
        if (hint := trainer.how_to_go_on()) is not None:
            self.print(hint)

    def _tell_events(self, trainer) -> None:
        events = trainer.history.events
        for event in events[self._events :]:
            if event["what"] not in ("saved", "stopped"):  # the one is no news, the other is said by on_stop
                self.print(f"step {event['step']:>6,}  {event['what']}: {event['text']}")
        self._events = len(events)
