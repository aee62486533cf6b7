"""What the live dashboard costs a run: its pictures, and everything else that it does between two steps.

    OMP_NUM_THREADS=1 python tests/benchmarks/dashboard_cost.py [--hours 1]

A run of the mission is played: nine terms, a step a second, an evaluation every 250 steps. Steps take no time here, the
dashboard's clock is moved on instead; every hook that a trainer would call is called, draws before a made-up front end
that takes every picture, and is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

from measure import Target, save

from kd_kit.dashboard import Dashboard
from kd_kit.history import History

LENGTHS = (300, 3_000, 12_500)
STEP_SECONDS = 1.0
EVERY = 250  # steps between two evaluations
TERMS = ("lm", "kd", "span", "feature", "layerwise", "relation", "attention", "contrastive", "router")


def pretend_front_end() -> None:
    """A notebook that takes pictures and shows them to nobody."""
    import IPython
    import IPython.display

    handle = SimpleNamespace(update=lambda bundle, raw: None)
    IPython.display.display = lambda *bundle, raw=False, display_id=False: handle if display_id else None
    IPython.get_ipython = lambda: SimpleNamespace(kernel=object())


def begun(steps: int) -> History:
    history = History()
    meta = {"unit": "nats", "healthy": [0.1, 6.0], "impossible_below": 0.0, "impossible_above": 13.0}
    history.append({"kind": "run", "run_id": "made", "total_steps": steps, "terms": dict.fromkeys(TERMS, meta)})
    return history


def take_step(history: History, step: int) -> bool:
    """Record a step as a trainer does; whether an evaluation came with it."""
    value = 2.0 + 3.0 / (1 + step / 200)
    term = {"value": value, "weight": 1 / 9, "contribution": value / 9, "count": 4096, "verdict": "healthy"}
    record = {"kind": "train", "step": step, "total": value, "terms": dict.fromkeys(TERMS, term)}
    history.append(record | {"lr": {"student": 5e-4}, "tokens_per_second": 7e3, "times_floor": 1.3})
    if step % EVERY == 0:
        history.append({"kind": "eval", "step": step, "bits_per_byte": value / 2})
    return step % EVERY == 0


def played(hours: float) -> tuple[Dashboard, float]:
    """The dashboard of a run of so many hours, and the seconds that its hooks took."""
    steps, asleep, hooks = int(3600 * hours / STEP_SECONDS), 0.0, 0.0
    history = begun(steps)
    dashboard = Dashboard(history, clock=lambda: time.perf_counter() + asleep)
    trainer = SimpleNamespace(history=history, control_history=None, callbacks=[], running=False, step=0, panel=None)

    def call(hook: str) -> float:
        began = time.perf_counter()
        getattr(dashboard, hook)(trainer)
        return time.perf_counter() - began

    hooks += call("on_start")
    for step in range(1, steps + 1):
        asleep += STEP_SECONDS
        evaluated = take_step(history, step)
        hooks += call("on_log")
        if evaluated:
            hooks += call("on_evaluate")
    return dashboard, hooks + call("on_stop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0)
    given = parser.parse_args()
    pretend_front_end()
    rows = []
    for steps in LENGTHS:
        history, taken = begun(steps), []
        for step in range(1, steps + 1):
            take_step(history, step)
        for _ in range(6):
            began = time.perf_counter()
            Dashboard(history).show()
            taken.append(time.perf_counter() - began)
        rows.append(
            {"what": f"a picture of {steps:,} steps with nine terms, s", "figure": statistics.median(taken[1:])}
        )
    dashboard, hooks = played(given.hours)
    share = hooks / (3600 * given.hours + hooks)
    rows += [
        {"what": f"pictures in a run of {given.hours:g} h", "figure": dashboard.updates},
        {"what": "seconds of all hooks", "figure": hooks},
        {"what": "share of the run's time", "figure": f"{share:.2%}"},
    ]
    notes = "Pictures are paced by what they cost: a slower machine draws fewer of them."
    save("dashboard_cost", rows, [Target("share of a run's time", share, 0.02)], notes)


if __name__ == "__main__":
    main()
