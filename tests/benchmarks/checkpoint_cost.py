"""What saving costs a run with a student of the mission's size, at the interval that the run then chooses.

    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoint_cost.py [--saves 5] [--folder .]

A Llama of SmolLM-135M's shape takes one step, so that its optimizer has a state, and is saved a few times.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import mission
from measure import Target, save

import kd_kit as kd
from kd_kit import checkpoint
from kd_kit.session import Session
from kd_kit.trainer import save_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to be measured")
    given = parser.parse_args()
    data = mission.made_data(32, windows=4)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = kd.build_trainer(
                mission.build_student(),
                None,
                data,
                [kd.lm_term(1.0)],
                session=Session(Path(name), device="cpu", precision="no"),
                steps=10,
                eval_every=10,
                eval_windows=1,
                early_stopping=None,
            )
            trainer.fit(steps=1)
            seconds, best = [], []
            for _ in range(given.saves):
                started = time.perf_counter()
                trainer.save()
                seconds.append(time.perf_counter() - started)
                started = time.perf_counter()
                trainer._keep_best()
                best.append(time.perf_counter() - started)
        info, _ = checkpoint.find_checkpoint(Path(name))
        size = info.size
    save_seconds, best_seconds = statistics.median(seconds), statistics.median(best)
    interval = save_interval(None, save_seconds)
    share = save_seconds / (save_seconds + interval)
    rows = [
        {"what": "checkpoint, GB", "figure": size / 1e9},
        {"what": "a save, s: training waits for all of it", "figure": save_seconds},
        {"what": "to the next one, s", "figure": interval},
        {"what": "share of the run's time", "figure": f"{share:.2%}"},
        {"what": "best weights after an evaluation that beat all others, s", "figure": best_seconds},
    ]
    wanted = Target("share of a run's time that its checkpoints take", share, 0.01)
    save("checkpoint_cost", rows, [wanted], f"Medians of {given.saves}; a save is written, read back and checked.")


if __name__ == "__main__":
    main()
