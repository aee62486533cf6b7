"""The kernels as the tests build them: shrunk by their parameters, pushed by Kaggle's client, run, and looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import ROOT

OWNER = "ada"
PAIR = f"{OWNER}/kd-kit-embedded-pair"
PAIR_NEW, PAIR_OLD = f"datasets/{PAIR}", "kd-kit-embedded-pair"  # where Kaggle mounts it, and where it used to
PICTURES = ROOT / "build" / "kaggle-pages"

LITTLE = {
    "DOCUMENTS": 6,
    "HELD_OUT": 0.2,
    "STEPS": 60,
    "TERMS": "lm kd feature router",
    "LEARNING_RATE": 3e-3,
    "WINDOW": 64,
    "BATCH": 4,
    "ACCUMULATION": 1,
    "EVAL_WINDOWS": 16,
}
"""A run of the mission's notebook in less than a minute."""

EMBEDDED = {"TEACHER": "embedded-teacher", "STUDENT": "embedded-student", "TEXT": "embedded"}


@dataclass(frozen=True)
class Case:
    """A kernel, how it is shrunk, and what its page must show.

    Attributes:
        dashboards: pieces of the source of the cells that hold one. trains: of those that train.
        table: of the cell with a table that must be readable, and words in it.
        says: words that some cell's text must hold, by a piece of its source.
        output: what may lie in /kaggle/working, at its top.
        datasets: to attach beside those of the kernel's own metadata. pair_at: where the embedded pair is mounted.
    """

    kernel: str
    parameters: dict[str, Any]
    dashboards: tuple[str, ...]
    trains: tuple[str, ...]
    table: tuple[str, tuple[str, ...]]
    says: dict[str, str]
    output: frozenset[str]
    datasets: tuple[str, ...] = ()
    pair_at: str = PAIR_NEW


DISTILLED = {
    "dashboards": ("kd.build_dashboard(trainer)",),
    "trains": ("trainer.fit()",),
    "table": ("kd.loss_table(trainer.history)", ("gradient %", "router", "held-out bits per byte: student")),
    "output": frozenset({"kd_runs", "student", "losses.png", "summary.txt"}),
    "datasets": (PAIR,),
}

CASES = {
    case.kernel: case
    for case in (
        Case(
            "distill-p100",
            LITTLE | EMBEDDED | {"STEPS": 200},  # so that a session can end in its middle
            says={"kd.doctor(": "P100", "trainer.summary(": "step 200 of 200, finished"},
            **DISTILLED,
        ),
        # the models of the mission and nobody to give them: the pair instead, as the parameter says
        Case(
            "distill-t4x2",
            LITTLE | {"OFFLINE_FALLBACK": True},
            says={
                "kd.doctor(": "T4",
                "find_sources(\n": "INSTEAD of them, as asked for",
                "trainer.summary(": "step 60 of 60, finished",
            },
            **DISTILLED,
        ),
        Case(
            "debug-loss-magnitudes",
            {"CHAPTERS": 6, "HELD_OUT": 1, "WINDOW": 64, "STEPS": 24},
            dashboards=("kd.build_dashboard(sick)", "kd.build_dashboard(well)"),
            trains=("sick.fit(", "well.fit()"),
            table=("kd.run_preflight(healthy)", ("gradient reaches", "teacher below student")),
            says={"kd.doctor(": "CPU", "for event in sick.history.events": "summed is "},
            output=frozenset({"kd_runs"}),
        ),
        Case(
            "quickstart-cpu",
            {"CHAPTERS": 6, "HELD_OUT": 1, "WINDOW": 64, "STEPS": 40},
            dashboards=("kd.build_dashboard(trainer)",),
            trains=("trainer.fit()",),
            table=("kd.loss_table(trainer.history)", ("gradient %", "router", "held-out bits per byte: student")),
            says={"kd.doctor(": "CPU", "report = ": "LM-only control"},
            output=frozenset({"kd_runs"}),
            pair_at=PAIR_OLD,
        ),
    )
}


def output_listing(working: Path) -> dict[str, int]:
    """Every file of a session's output with its size in bytes."""
    return {p.relative_to(working).as_posix(): p.stat().st_size for p in working.rglob("*") if p.is_file()}
