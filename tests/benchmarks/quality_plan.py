"""What has to be run, from what has been run: a search of each arm's setting, then more seeds at the best one.

Pure functions of the results, so that a bench that was killed goes on, and several processes agree without talking.
A search climbs: it tries the rungs beside the best setting so far until none of them is better on the tuning text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from quality_arms import GOLD, LM_FLOPS, Arm, Setting

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training run: an arm in a scene with a seed and a setting."""

    scene: str
    arm: str
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        s = self.setting
        return (
            f"{self.scene}/{self.arm}/seed {self.seed}/rate {s.rate:.6g}, kd_weight {s.kd_weight:g}, "
            f"spend {s.spend:g}, {s.variant}"
        )


def record(run: Run, **measured) -> dict:
    """A run and what it gave, as plain JSON; :func:`run_of` reads it back."""
    return {
        "scene": run.scene,
        "arm": run.arm,
        "seed": run.seed,
        "setting": asdict(run.setting),
        **measured,
    }


def run_of(result: Mapping) -> Run:
    return Run(result["scene"], result["arm"], result["seed"], Setting(**result["setting"]))


def tuned(arm: Arm, start: Setting, found: Mapping[Setting, float]) -> tuple[Setting, list[Setting]]:
    """The best setting so far, and those that must be tried before it is settled (none: it is).

    Args:
        found: {setting: bits per byte on the tuning text} of one seed.
    """
    if start not in found:
        return start, [start]
    best = min(found, key=lambda setting: found[setting])
    wanted = [s for ladder in arm.ladders for s in best.beside(ladder)]
    wanted += [s for ladder in arm.full for s in best.along(ladder)]
    missing = [s for s in dict.fromkeys(wanted) if s not in found]
    return best, missing


def settled(arms: Sequence[Arm], arm: Arm, found: Mapping[str, Mapping[Setting, float]]) -> Setting | None:
    """An arm's best setting once its search is over; None before that.

    Args:
        found: {arm: {setting: bits per byte on the tuning text}} of the first seed.
    """
    start = first_setting(arms, arm, found)
    if start is None:
        return None
    best, missing = tuned(arm, start, found.get(arm.name, {}))
    return None if missing else best


def first_setting(arms: Sequence[Arm], arm: Arm, found: Mapping[str, Mapping[Setting, float]]) -> Setting | None:
    """Where an arm's search begins: at the best setting of another arm; None while that one's is not known."""
    if arm.start is None:
        return Setting()
    before = next(a for a in arms if a.name == arm.start)
    return settled(arms, before, found)


def tuning(results: Sequence[Mapping], scene: str) -> dict[str, dict[Setting, float]]:
    """{arm: {setting: bits per byte on the tuning text}} of the first seed's runs in a scene."""
    out: dict[str, dict[Setting, float]] = {}
    for result in results:
        if result["scene"] == scene and result["seed"] == SEEDS[0]:
            out.setdefault(result["arm"], {})[run_of(result).setting] = result["tuning_bits_per_byte"]
    return out


def wanted(scene: str, arms: Sequence[Arm], results: Sequence[Mapping], seeds: Sequence[int] = SEEDS) -> list[Run]:
    """All runs that can be begun now; empty when the scene is complete."""
    found = tuning(results, scene)
    there = {run_of(result).name for result in results}
    out = []
    for arm in arms:
        start = first_setting(arms, arm, found)
        if start is None:
            continue
        best, missing = tuned(arm, start, found.get(arm.name, {}))
        out += [Run(scene, arm.name, seeds[0], setting) for setting in missing]
        if not missing:
            later = [Run(scene, arm.name, seed, best) for seed in seeds[1:]]
            out += [run for run in later if run.name not in there]
    return out


def finished(scene: str, arms: Sequence[Arm], results: Sequence[Mapping], seeds: Sequence[int] = SEEDS) -> dict:
    """{arm: (best setting, its results in the order of the seeds)} of the arms that are complete."""
    found, out = tuning(results, scene), {}
    by_name = {run_of(result).name: result for result in results}
    for arm in arms:
        best = settled(arms, arm, found)
        names = [] if best is None else [Run(scene, arm.name, seed, best).name for seed in seeds]
        if names and all(name in by_name for name in names):
            out[arm.name] = best, [by_name[name] for name in names]
    return out


def plan(scene: str, arms: Sequence[Arm], *, lm_seconds: float, flops: float, seeds: int = len(SEEDS)) -> list[dict]:
    """How many runs each arm takes if its search ends where it begins, and about how many processor seconds.

    Args:
        lm_seconds: of a run on the text alone. flops: times the steps of an arm at equal FLOPs.
    """
    out = []
    for arm in arms:
        settings = tuned(arm, Setting(), {Setting(): 0.0})[1]
        runs = 1 + len(settings) + seeds - 1
        each = lm_seconds * arm.weight * (flops if arm.name == LM_FLOPS else 1)
        out.append({"scene": scene, "arm": arm.name, "runs": runs, "seconds": runs * each})
    return out


def without_trl(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that need no TRL."""
    return [arm for arm in arms if arm.name != GOLD]
