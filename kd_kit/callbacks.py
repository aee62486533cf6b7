"""What happens beside the loop. A callback is any object with some of these methods; all get the trainer."""

from __future__ import annotations

import time


class Callback:
    """The hooks, doing nothing. To stop a run a callback sets ``trainer.stop_reason``; nothing is thrown."""

    def on_start(self, trainer) -> None:
        """Before the first step of this session, after resuming."""

    def on_log(self, trainer) -> None:
        """New training records are in ``trainer.history``."""

    def on_evaluate(self, trainer) -> None:
        """A new held-out figure is in ``trainer.history``."""

    def on_save(self, trainer) -> None:
        """A checkpoint was written and is whole."""

    def on_stop(self, trainer) -> None:
        """The loop has ended; ``trainer.stop_reason`` says why."""


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
        values = "  ".join(
            f"{name} {term['value']:.3f} (x{term['weight']:.2f})"
            for name, term in record["terms"].items()
            if term["value"] is not None
        )
        rate = next(iter(record["lr"].values()))
        self.print(
            f"step {record['step']:>6,}  total {record['total']:.3f} = {values}  lr {rate:.1e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {time.strftime('%H:%M:%S')}"
        )

    def on_evaluate(self, trainer) -> None:
        record = trainer.history.last("eval")
        self.print(f"step {record['step']:>6,}  held-out bits per byte {record['bits_per_byte']:.4f}")

    def on_save(self, trainer) -> None:
        self._tell_events(trainer)

    def on_stop(self, trainer) -> None:
        self._tell_events(trainer)
        self.print(f"stopped at step {trainer.step:,}: {trainer.stop_reason}")

    def _tell_events(self, trainer) -> None:
        events = trainer.history.events
        for event in events[self._events :]:
            if event["what"] not in ("saved", "stopped"):  # the one is no news, the other is said by on_stop
                self.print(f"step {event['step']:>6,}  {event['what']}: {event['text']}")
        self._events = len(events)
