"""What a step costs with the teacher beside the student, from its cache, and without any teacher, taking turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/caching.py

The embedded pair, the terms of the notebook for Kaggle, windows of 256, batches of 8; seconds of training per step, the
median over rounds of ten steps each.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import kd_kit as kd
from kd_kit.offline import corpus

ROUNDS, STEPS = 6, 10


def main() -> None:
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
        "teacher beside": trainer("live", taught(), teacher),
        "from the cache": trainer("cached", taught(), teacher),
        "lm alone": trainer("lm", [kd.lm_term(1.0)], None),
    }
    started = time.monotonic()
    cache = kd.build_cache(runs["from the cache"])
    print(f"built in {time.monotonic() - started:.0f} s")
    print(cache)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            before = run.seconds
            run.fit(steps=STEPS)
            if number:  # the first one warms up
                times[name].append((run.seconds - before) / STEPS)
    alone = statistics.median(times["lm alone"])
    for name, each in times.items():
        middle = statistics.median(each)
        print(
            f"{name:15} {middle:.3f} s per step, {middle / alone:.2f} x lm alone ({min(each):.3f} to {max(each):.3f})"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
