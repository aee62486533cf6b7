"""What the live dashboard costs a run: its pictures, and everything else it does between two steps.

    OMP_NUM_THREADS=1 python tests/benchmarks/dashboard_cost.py [--seconds 60]

The embedded pair trains for a while with a dashboard before a made-up front end that takes every picture; every hook
that the trainer calls is timed from outside. Pictures of longer runs are drawn from made-up histories.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from measure import Target, save

import kd_kit as kd
from kd_kit.dashboard import Dashboard
from kd_kit.demo import Recipe, terms_of
from kd_kit.history import History
from kd_kit.offline import corpus

LENGTHS = (300, 3_000, 12_500)


class Timed:
    """A callback that hands every hook on to a dashboard, and notes when and how long it took."""

    def __init__(self, dashboard: Dashboard, seconds: float):
        self.dashboard, self.seconds = dashboard, seconds
        self.calls: list[tuple[float, float, int]] = []  # when it ended, how long it took, pictures so far

    def __getattr__(self, hook: str):
        if not hook.startswith("on_"):
            raise AttributeError(hook)

        def call(trainer) -> None:
            began = time.perf_counter()
            getattr(self.dashboard, hook)(trainer)
            end = time.perf_counter()
            if self.dashboard.updates:  # from the first picture on
                self.calls.append((end, end - began, self.dashboard.updates))
            if self.calls and end - self.calls[0][0] > self.seconds and trainer.stop_reason is None:
                trainer.stop_reason = "paused"

        return call


def pretend_front_end() -> None:
    """A notebook that takes pictures and shows them to nobody."""
    import IPython
    import IPython.display

    handle = SimpleNamespace(update=lambda bundle, raw: None)
    IPython.display.display = lambda *bundle, raw=False, display_id=False: handle if display_id else None
    IPython.get_ipython = lambda: SimpleNamespace(kernel=object())


def live(seconds: float) -> Timed:
    data = kd.build_data(corpus("student"), kd.build_tokenizers(), held_out=corpus("held_out")[:2], window=256)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kd.build_trainer(
            kd.build_student(),
            kd.build_teacher(),
            data,
            terms_of(Recipe()),
            session=kd.build_session("dashboard", folder=Path(folder)),
            steps=100_000,
            learning_rate=3e-3,
            eval_every=50,
            eval_windows=8,
            measure_every=20,
        )
        timed = Timed(kd.build_dashboard(trainer), seconds)
        trainer.callbacks = [timed]
        trainer.fit()
    return timed


def long_history(steps: int) -> History:
    """A run of nine terms, as a trainer records it."""
    history = History()
    names = ("lm", "kd", "span", "feature", "layerwise", "relation", "attention", "contrastive", "router")
    meta = {"unit": "nats", "healthy": [0.1, 6.0], "impossible_below": 0.0, "impossible_above": 13.0}
    history.append({"kind": "run", "run_id": "made", "total_steps": steps, "terms": dict.fromkeys(names, meta)})
    for step in range(1, steps + 1):
        value = 2.0 + 3.0 / (1 + step / 200)
        term = {"value": value, "weight": 1 / 9, "contribution": value / 9, "count": 4096, "verdict": "healthy"}
        record = {"kind": "train", "step": step, "total": value, "terms": dict.fromkeys(names, term)}
        history.append(record | {"lr": {"student": 5e-4}, "tokens_per_second": 7e3, "times_floor": 1.3})
        if step % 250 == 0:
            history.append({"kind": "eval", "step": step, "bits_per_byte": value / 2})
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    pretend_front_end()
    rows = []
    for steps in LENGTHS:
        history, taken = long_history(steps), []
        for _ in range(6):
            began = time.perf_counter()
            Dashboard(history).show()
            taken.append(time.perf_counter() - began)
        rows.append(
            {"what": f"a picture of {steps:,} steps with nine terms, s", "figure": statistics.median(taken[1:])}
        )
    with contextlib.redirect_stdout(io.StringIO()):
        timed = live(given.seconds)
    first, *between, last = timed.calls
    whole = last[0] - first[0] - last[1]  # from the end of the first picture to the start of the last
    share = sum(seconds for _, seconds, _ in between) / whole
    rows += [
        {"what": "first picture of a run, with the import of what draws it, s", "figure": first[1]},
        {"what": f"pictures in the {whole:.0f} s after it", "figure": between[-1][2] - first[2]},
        {"what": "share of that time, all hooks", "figure": f"{share:.2%}"},
        {"what": "last picture, s", "figure": last[1]},
    ]
    notes = "The first and the last picture come once per session; those between them are paced by what they cost."
    save("dashboard_cost", rows, [Target("share of a run's time", share, 0.02)], notes)


if __name__ == "__main__":
    main()
