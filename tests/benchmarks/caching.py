"""What a step costs with the teacher beside the student, from its cache, and without any teacher, taking turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/caching.py

The embedded pair, the terms of the notebook for Kaggle, windows of 256, batches of 8; seconds of training per step, the
median over rounds of a few steps each.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from measure import ratio, save

import kd_kit as kd
from kd_kit.offline import corpus

BESIDE, CACHED, ALONE = "teacher beside", "from the cache", "lm alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of every round")
    given = parser.parse_args()
    tokenizers = kd.build_tokenizers()
    data = kd.build_data(corpus("student"), tokenizers, held_out=corpus("held_out")[:2], window=256, batch_size=8)
    teacher = kd.build_teacher()
    folder = Path(tempfile.mkdtemp())
    taught = lambda: [kd.lm_term(0.3), kd.kd_term(0.7), kd.span_term(), kd.feature_term(), kd.router_term()]  # noqa: E731

    def trainer(name: str, terms, model):
        session = kd.build_session(name, folder=folder)
        made = kd.build_trainer(
            kd.build_student(),
            model,
            data,
            terms,
            session=session,
            steps=1000,
            learning_rate=3e-3,
            eval_every=1000,
            measure_every=1000,
            eval_windows=1,
            save_minutes=60,
        )
        made.callbacks = []
        return made

    runs = {
        BESIDE: trainer("live", taught(), teacher),
        CACHED: trainer("cached", taught(), teacher),
        ALONE: trainer("lm", [kd.lm_term(1.0)], None),
    }
    started = time.monotonic()
    cache = kd.build_cache(runs[CACHED])
    built = time.monotonic() - started
    print(cache)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.rounds + 1):
        for name, run in runs.items():
            before = run.seconds
            run.fit(steps=given.steps)
            if number:  # the first one warms up
                times[name].append((run.seconds - before) / given.steps)
    rows = [
        {
            "step": name,
            "seconds": statistics.median(each),
            "x lm alone": ratio(times, name, ALONE),
            "fastest": min(each),
            "slowest": max(each),
        }
        for name, each in times.items()
    ]
    notes = (
        f"Medians of {given.rounds} rounds of {given.steps} steps; the cache of {len(data.train):,} windows was built "
        f"in {built:.0f} s. A student this small is soon done: with the mission's models see overhead."
    )
    save("caching", rows, notes=notes)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
