"""Runs of the quality bench, one after the other, by as many processes as one likes.

What a run gave is a line of JSON in ``results/quality/runs.jsonl``; a run that has a line is not made again. While a
process makes a run it holds a lock on a file named after it, which its end frees, however it ends: then another one
makes that run from its beginning. The teacher's knowledge is kept in one cache for all arms of a pair.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import quality_gold
import torch
from measure import RESULTS
from quality_arms import GOLD, LM_FLOPS, Arm, Setting
from quality_plan import SEEDS, Run, record, run_of, wanted, without_trl
from quality_scenes import Scene, likelihood

import kd_kit as kd
from kd_kit.cache import MANIFEST, Cache
from kd_kit.cached_teacher import CachedTeacher
from kd_kit.session import Session

BUILD = Path(__file__).resolve().parents[2] / "build" / "quality"
PAUSE = 2.0


@dataclass(frozen=True)
class Bench:
    """What is run, and where its results are kept.

    Attributes:
        scenes: by name. results: a file of lines. work: for caches and locks. seeds: of the final runs.
    """

    scenes: dict[str, Scene]
    results: Path = RESULTS / "quality" / "runs.jsonl"
    work: Path = BUILD
    seeds: Sequence[int] = SEEDS

    def arms(self, scene: Scene) -> Sequence[Arm]:
        return scene.arms if quality_gold.available() else without_trl(scene.arms)

    def found(self) -> list[dict]:
        """All results; a line that was cut off by a kill is none."""
        out = []
        if self.results.exists():
            for line in self.results.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    out.append(json.loads(line))
        return out

    def keep(self, result: dict) -> None:
        """Add a line, behind a line that a kill may have cut off."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, io.SEEK_END)
            cut = file.tell() > 0 and not _ends_in_newline(file)
            file.write((b"\n" if cut else b"") + json.dumps(result).encode() + b"\n")

    def to_do(self) -> list[Run]:
        found = self.found()
        return [run for name, scene in self.scenes.items() for run in wanted(name, self.arms(scene), found, self.seeds)]

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process has a piece of work to itself, for as long as the block lasts."""
        place = self.work / "locks" / hashlib.sha256(name.encode()).hexdigest()[:20]
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _ends_in_newline(file) -> bool:
    file.seek(-1, io.SEEK_END)
    return file.read(1) == b"\n"


def work(bench: Bench, matches: Callable[[str], bool] = lambda name: True) -> None:
    """Make runs until there is none left; waits where all that are left are being made by others.

    Raises:
        RuntimeError: at the end, where runs failed; the others were made.
    """
    failed: list[str] = []
    while to_do := [run for run in bench.to_do() if matches(run.name) and run.name not in failed]:
        tried = False
        for run in to_do:
            with bench.claim(run.name) as mine:
                if not mine or run.name in {run_of(result).name for result in bench.found()}:
                    continue
                tried = True
                try:
                    bench.keep(make(bench, run))
                except Exception:
                    traceback.print_exc()
                    failed.append(run.name)
            break  # what is wanted next may depend on it
        if not tried:
            time.sleep(PAUSE)
    if failed:
        raise RuntimeError(f"quality: {len(failed)} runs failed, see above: {'; '.join(failed)}")


def make(bench: Bench, run: Run) -> dict:
    """Train the student of a run and measure it."""
    scene = bench.scenes[run.scene]
    arm = next(arm for arm in scene.arms if arm.name == run.arm)
    began, clock = time.monotonic(), time.process_time()
    steps = scene.steps
    if arm.name == LM_FLOPS:
        steps += round((scene.more_steps - scene.steps) * run.setting.spend)
    if arm.name == GOLD:
        student = quality_gold.train(scene, run.setting, run.seed, steps)
    else:
        student = train(bench, scene, arm, run, steps)
    trained = time.process_time() - clock
    found = likelihood(student, scene.data().held_out)
    nats, size = found.table
    done = record(
        run,
        tuning_bits_per_byte=found.tuning,
        nats=[round(value, 3) for value in nats],
        bytes=size,
        steps=steps,
        tokens=round(steps * scene.batch_size * scene.tokens()[0]),
        epochs=steps * scene.batch_size / len(scene.data().train),
        flops=scene.flops(steps, taught=arm.taught, passes=2 if arm.more_experts else 1),
        processor_seconds=round(trained, 1),
    )
    print(f"{run.name}: {found.tuning:.4f}, {trained:.0f} s of processor time", flush=True)
    print(f"  in {time.monotonic() - began:.0f} s", flush=True)
    return done


def train(bench: Bench, scene: Scene, arm: Arm, run: Run, steps: int):
    """A student by kd_kit's trainer, with the teacher's knowledge out of the pair's cache where it is there."""
    folder = Path(tempfile.mkdtemp(prefix="quality-"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = build(scene, arm, run, steps, folder)
            if arm.taught and not arm.live:
                cache = cached(bench, scene, arm)
                live = trainer.teacher
                trainer.teacher = CachedTeacher(
                    live, cache, widest(bench, scene).data().train, home=torch.device("cpu")
                )
                trainer.teacher.check_terms(trainer.terms, "quality")
            trainer.fit()
        return trainer.student
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(scene: Scene, arm: Arm, run: Run, steps: int, folder: Path):
    """The trainer of a run: no evaluation, no comparison of gradients but what its balance needs, no checkpoints."""
    balance = arm.balance()
    return kd.build_trainer(
        scene.source.student(run.seed),
        scene.source.teacher() if arm.taught else None,
        scene.data(),
        arm.terms(run.setting.kd_weight),
        session=Session(folder, device="cpu", precision="no"),
        steps=steps,
        learning_rate=run.setting.rate,
        lr_schedule=kd.LearningRate(warmup=0.1),
        schedule=arm.schedule(),
        balance=balance,
        more_experts=arm.more_experts,
        early_stopping=None,
        seed=run.seed,
        eval_every=10**6,
        eval_windows=1,
        measure_every=max(1, steps // 12) if balance.kind == "gradient_share" else 10**6,
        save_minutes=600,
    )


# --- the teacher's knowledge, once for all arms -----------------------------------------------------------------------


def widest(bench: Bench, scene: Scene) -> Scene:
    """The scene that has most of this pair's text: the windows of the others are its first ones."""
    return max((s for s in bench.scenes.values() if s.pair == scene.pair), key=lambda s: s.documents)


def cached(bench: Bench, scene: Scene, arm: Arm) -> Cache:
    """What the teacher says about the pair's text, made by whoever needs it first and all who wait for it."""
    own = arm.more_experts is not None
    place = bench.work / f"cache-{scene.pair}{f'-{arm.more_experts}-experts' if own else ''}"
    if (place / MANIFEST).exists():
        cache = Cache.open(place)
        cache.look()
        if cache.complete:
            return cache
    everything = replace(
        arm,
        terms=arm.terms if own else lambda weight: every_term(bench, scene.pair),
        schedule=kd.constant,
        balance=kd.fixed,
    )
    folder = Path(tempfile.mkdtemp(prefix="quality-cache-"))
    try:
        text = widest(bench, scene)
        return kd.build_cache(build(text, everything, Run(text.name, arm.name, 0, Setting()), 10, folder), place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def every_term(bench: Bench, pair: str) -> list[kd.LossTerm]:
    """Terms that together need all that any arm of a pair reads from the cache, with names of their own."""
    out: dict[str, kd.LossTerm] = {}
    for scene in bench.scenes.values():
        for arm in scene.arms if scene.pair == pair else ():
            if arm.terms is not None and not arm.live and arm.more_experts is None:
                for term in arm.terms(0.7):
                    name = term.name if term.name == "lm" else f"{arm.name}: {term.name}"
                    out.setdefault(name, replace(term, name=name))
    return list(out.values())
