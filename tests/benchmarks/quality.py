"""How good a student becomes: every kind of knowledge, method and schedule against the language model alone.

    OMP_NUM_THREADS=1 python tests/benchmarks/quality.py [--processes 2] [--only PATTERN] [--plan] [--report] [--smoke]

Held-out bits per byte in four scenes (see quality_scenes.py), each arm (quality_arms.py) at its own best learning rate
and, where the arms differ in how the teacher's predictions arrive, KD weight; three seeds; paired bootstrap over
documents and seeds. Every finished run is a line in results/quality/runs.jsonl, and is not made again: stop it at any
time and call it again. SmolLM2-135M comes from a package that is fetched once (tests/real/assets.py); GOLD needs TRL,
without which it is left out.

FLOPs: 6 N per token and step for the student (2 forward, 4 backward) and 2 N_active per token of a window, once, for
the teacher, whose word is kept in a cache. N counts weights of matrices, heads included, embeddings not; of a
mixture the experts that a token is sent to.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import quality_arms
import quality_gold
import quality_report
import torch
from measure import as_table
from quality_plan import plan
from quality_runs import BUILD, Bench, work
from quality_scenes import SCENES, Scene, unreachable

SMOKE = BUILD.parent / "quality-smoke"


def smoke() -> Bench:
    """A few steps of a few arms in two scenes, one setting each, two seeds; in a folder of its own."""
    names = {quality_arms.LM, quality_arms.LM_FLOPS, quality_arms.KD, quality_arms.GOLD, quality_arms.EIGHT}
    names |= {"+ attention", "+ more_experts=4", "earlier recipe", "all but attention, gradient_share"}
    scenes = {}
    for name, arms in (("embedded, little text", quality_arms.EMBEDDED), ("SmolLM2, little text", quality_arms.REAL)):
        few = [replace(arm, ladders=(), full=()) for arm in arms if arm.name in names or arm.name == quality_arms.SEVEN]
        scenes[name] = replace(SCENES[name], documents=1, steps=6, arms=few)
    return Bench(reachable(scenes), SMOKE / "runs.jsonl", SMOKE, seeds=(0, 1))


def reachable(scenes: dict[str, Scene]) -> dict[str, Scene]:
    """The scenes whose models are there; without SmolLM2's where its package cannot be had, which is then said."""
    if why := unreachable():
        print(f"without the scenes of SmolLM2: {why}", flush=True)
        return {name: scene for name, scene in scenes.items() if scene.pair == "embedded"}
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help='of runs, as "embedded/KD*"')
    parser.add_argument("--plan", action="store_true", help="say what would be run, and end")
    parser.add_argument("--report", action="store_true", help="make tables and figure of what is there, and end")
    parser.add_argument("--smoke", action="store_true", help="two minutes, to see that all of it works")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    bench = smoke() if given.smoke else Bench(reachable(SCENES))
    if given.plan:
        return say_plan(bench)
    if given.report:
        return print(f"tables of {len(quality_report.write(bench))} scenes written")
    if given.worker:
        torch.set_num_threads(1)
        return work(bench, lambda name: not given.only or any(fnmatch.fnmatch(name, f"{p}*") for p in given.only))
    if given.smoke:
        shutil.rmtree(SMOKE, ignore_errors=True)
    if not quality_gold.available():
        print(f"TRL is not installed: without {quality_arms.GOLD} ({quality_gold.INSTALL})")
    began = time.monotonic()
    workers(given.processes)
    print(f"all runs made in {(time.monotonic() - began) / 60:.1f} minutes")
    if given.smoke:
        for name, scene in bench.scenes.items():
            done = quality_report.finished(name, bench.arms(scene), bench.found(), bench.seeds)
            print(as_table(quality_report.rows_of(scene, bench.arms(scene), done)))
    else:
        quality_report.write(bench)


def workers(count: int) -> None:
    """As many processes that make runs; raises where one of them failed."""
    command = [sys.executable, *sys.argv, "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = [subprocess.Popen(command, env=environment) for _ in range(count)]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        raise SystemExit(f"quality: a worker ended with {codes}; what is finished is kept, call it again")


def say_plan(bench: Bench) -> None:
    """The runs by arm, if every search ends where it begins, and what is left of the work now."""
    rows = []
    for name, scene in bench.scenes.items():
        rows += plan(name, bench.arms(scene), lm_seconds=scene.lm_seconds, flops=scene.more_steps / scene.steps)
    print(as_table(rows))
    seconds = sum(row["seconds"] for row in rows)
    print(f"{sum(row['runs'] for row in rows)} runs, about {seconds / 60:.0f} minutes of a processor")
    print(f"{len(bench.found())} runs are there, {len(bench.to_do())} can be begun now")


if __name__ == "__main__":
    main()
