"""Every term on the embedded pair at the start, during and after training, beside the range that it must show.

    python tests/benchmarks/ranges.py [--steps 300] [--out ranges.json]

Prints one line per term; the table of the README and the sources in ``kd_kit/ranges.py`` are its figures. Each term is
trained beside the others with the weights of the quickstart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import kd_kit as kd
from kd_kit.demo import Recipe, terms_of
from kd_kit.history import verdict
from kd_kit.offline import corpus
from kd_kit.ranges import RANGES
from kd_kit.table import Table, short


def measure(steps: int, folder: Path, *, seed: int = 0) -> dict:
    """{term: mean values over the first step, the middle and the last tenth of a run}, and the records."""
    data = kd.build_data(corpus("student"), kd.build_tokenizers(), held_out=corpus("held_out"), window=256)
    trainer = kd.build_trainer(
        kd.build_student(seed=seed),
        kd.build_teacher(),
        data,
        terms_of(Recipe()),
        session=kd.build_session("ranges", folder=folder),
        steps=steps,
        learning_rate=3e-3,
        lr_schedule=kd.LearningRate(warmup=0.1),
        seed=seed,
    )
    trainer.fit()
    found = {}
    for term in trainer.terms:
        _, values = trainer.history.series(term.name)
        last = max(1, steps // 10)
        middle = values[steps // 2 : steps // 2 + last]
        at = {"start": values[0], "middle": sum(middle) / len(middle), "end": sum(values[-last:]) / last}
        found[term.name] = at | {"verdict": verdict(term.meta, at["end"]), "unit": term.unit}
    score = trainer.history.evaluations()[1][-1]
    return {"steps": steps, "seed": seed, "terms": found, "bits_per_byte": score}


def table(result: dict) -> Table:
    rows = []
    for name, at in result["terms"].items():
        low, high = RANGES[name]["healthy"]
        figures = (short(at[when]) for when in ("start", "middle", "end"))
        rows.append((name, at["unit"], *figures, f"{low:g} to {high:g}", at["verdict"]))
    columns = ("term", "unit", "step 1", "half way", "end", "healthy", "at the end")
    note = f"{result['steps']} steps, seed {result['seed']}; held-out bits per byte {result['bits_per_byte']:.4f}"
    return Table("", columns, tuple(rows), note, words=("term", "unit", "at the end"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.steps, Path(folder), seed=options.seed)
    print(table(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))
