"""The embedded demonstration as a measurement: distilled against LM-only, several paired seeds.

The quickstart notebook runs the same recipe once, cell by cell.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kd_kit import offline
from kd_kit.data import build_data
from kd_kit.evaluation import evaluate
from kd_kit.expert_terms import router_term
from kd_kit.kd_terms import kd_term, span_term
from kd_kit.learning_rate import LearningRate
from kd_kit.models import build_student, build_teacher, build_tokenizers
from kd_kit.report import Report
from kd_kit.session import build_session
from kd_kit.state_terms import attention_term, contrastive_term, feature_term, layerwise_term, relation_term
from kd_kit.terms import LossTerm, lm_term
from kd_kit.trainer_builder import build_trainer


@dataclass(frozen=True)
class Recipe:
    """What the demonstration trains: the values that stand in the quickstart notebook.

    Attributes:
        window: tokens. batch_size: windows. steps: optimizer steps of one batch. learning_rate: peak.
        warmup: share of the steps. kd_weight: of the KD term; the LM term has the rest to 1.
        terms: which terms, by name. All but these two have their own small default weights.
    """

    window: int = 256
    batch_size: int = 8
    steps: int = 300
    learning_rate: float = 3e-3
    warmup: float = 0.1
    kd_weight: float = 0.7
    terms: tuple[str, ...] = (
        "lm",
        "kd",
        "span",
        "feature",
        "layerwise",
        "relation",
        "attention",
        "contrastive",
        "router",
    )


def terms_of(recipe: Recipe) -> list[LossTerm]:
    """The terms of a recipe, every kind of knowledge if it says nothing else.

    Raises:
        ValueError: a name that no term has.
    """
    every = [
        lm_term(1 - recipe.kd_weight),
        kd_term(recipe.kd_weight),
        span_term(),
        feature_term(),
        layerwise_term(),
        relation_term(),
        attention_term(),
        contrastive_term(),
        router_term(),
    ]
    known = {term.name: term for term in every}
    unknown = [name for name in recipe.terms if name not in known]
    if unknown:
        raise ValueError(f"demo: expected terms out of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in recipe.terms]


def run_seed(seed: int, folder: Path, recipe: Recipe) -> Report:
    """One student and its control: the same start, the same order of the data, with and without a teacher."""
    session = build_session(f"seed-{seed}", folder=folder)
    tokenizers = build_tokenizers()
    data = build_data(
        offline.corpus("student"),
        tokenizers,
        held_out=offline.corpus("held_out"),
        window=recipe.window,
        batch_size=recipe.batch_size,
    )
    trainer = build_trainer(
        build_student(seed=seed),
        build_teacher(),
        data,
        terms_of(recipe),
        session=session,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_schedule=LearningRate(warmup=recipe.warmup),
        seed=seed,
    )
    trainer.fit()
    return evaluate(trainer, control=True)


def run_demo(seeds: int, folder: Path, recipe: Recipe) -> dict:
    """Every seed's report, and the paired difference in held-out bits per byte with its standard error."""
    started = time.perf_counter()
    reports = [run_seed(seed, folder, recipe) for seed in range(seeds)]
    gains = [report.gain for report in reports]
    spread = statistics.stdev(gains) / math.sqrt(seeds) if seeds > 1 else None
    return {
        "recipe": asdict(recipe),
        "bits_per_byte": [{n: row["bits_per_byte"] for n, row in report.rows.items()} for report in reports],
        "gain": gains,
        "mean_gain": statistics.fmean(gains),
        "standard_error": spread,
        "held_out_bytes": reports[0].bytes,
        "seconds": time.perf_counter() - started,
    }


def table(result: dict) -> str:
    """The result as a table of held-out bits per byte, one line per seed."""
    names = list(result["bits_per_byte"][0])
    lines = ["seed  " + "  ".join(f"{n:>15}" for n in [*names, "gain"])]
    for seed, (row, gain) in enumerate(zip(result["bits_per_byte"], result["gain"], strict=True)):
        lines.append(f"{seed:>4}  " + "  ".join(f"{v:>15.4f}" for v in [*row.values(), gain]))
    error = "" if result["standard_error"] is None else f" +- {result['standard_error']:.4f} (standard error)"
    lines.append(
        f"distilled is {result['mean_gain']:.4f}{error} bits per byte below the LM-only control at equal tokens, "
        f"on {result['held_out_bytes']:,} held-out bytes"
    )
    return "\n".join(lines)


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
