"""One student of the embedded pair with the terms and weights that are named, scored on held-out text.

    python tests/benchmarks/weights.py lm=0.3 kd=0.7 feature=1.5 layerwise=1.5 [--seed 0]
    python tests/benchmarks/weights.py default --schedule curriculum
    python tests/benchmarks/weights.py default --balance lm=.35,kd=.45,feature=.2

Prints bits per byte on 300 of the held-out windows, and the mean of every term over the last 30 steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import kd_kit as kd
from kd_kit.demo import Recipe, terms_of
from kd_kit.offline import corpus
from kd_kit.stages import HIDDEN_TERMS

SCHEDULES = {
    "constant": kd.constant,
    "curriculum": kd.curriculum,
    "two_stage": kd.two_stage,
    "progressive": kd.progressive,
    "fade": lambda: kd.piecewise(**{name: [(0, 1), (0.8, 1), (1, 0)] for name in HIDDEN_TERMS}),
}


def weighted(text: str) -> list[kd.LossTerm]:
    """``kd=0.7`` to ``kd.kd_term(0.7)``; ``default`` to every term of the demonstration."""
    if text == "default":
        return terms_of(Recipe())
    name, _, weight = text.partition("=")
    builder = getattr(kd, f"{name}_term", None)
    if builder is None or not weight:
        raise SystemExit(f"weights: expected name=weight with the name of a term, got {text!r}")
    return [builder(float(weight))]


def balanced(text: str):
    """``usual``, or ``lm=.5,kd=.5``, wanted shares of the gradient."""
    shares = {} if text == "usual" else dict(pair.split("=") for pair in text.split(","))
    return kd.gradient_share(**{name: float(share) for name, share in shares.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("terms", nargs="+", type=weighted, metavar="name=weight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=SCHEDULES, default="constant")
    parser.add_argument("--balance", type=balanced, default=kd.fixed())
    given = parser.parse_args()
    recipe = Recipe()
    data = kd.build_data(
        corpus("student"), kd.build_tokenizers(), held_out=corpus("held_out"), window=recipe.window, batch_size=8
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = kd.build_trainer(
            kd.build_student(seed=given.seed),
            kd.build_teacher(),
            data,
            [term for several in given.terms for term in several],
            session=kd.build_session("weights", folder=Path(folder)),
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            lr_schedule=kd.LearningRate(warmup=recipe.warmup),
            seed=given.seed,
            eval_every=recipe.steps,
            schedule=SCHEDULES[given.schedule](),
            balance=given.balance,
            measure_every=20,
        )
        trainer.fit()
        score = kd.score(trainer.student, data.held_out, limit=300).bits_per_byte
        for term in trainer.terms:
            _, values = trainer.history.series(term.name)
            print(f"{term.name:12} weight {term.weight:<6g} {sum(values[-30:]) / len(values[-30:]):.4f} {term.unit}")
    print(f"seed {given.seed}: {score:.4f} bits per byte on 300 held-out windows")


if __name__ == "__main__":
    main()
