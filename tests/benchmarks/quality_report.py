"""Results of the quality bench as tables with verdicts, targets, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import quality_gold
from measure import Target, save
from quality_arms import GOLD, KD, LM, LM_FLOPS, Arm
from quality_plan import finished, run_of
from quality_runs import Bench
from quality_scenes import Scene
from quality_statistics import HELPS, HURTS, NOTHING, Difference, bits_per_byte, paired_difference

DEFAULT = KD
"""The arm that kd_kit's default is judged by: the text and the KD term over the bridge."""

LEAST = 0.08
"""Bits per byte that the default is to win over the LM alone at equal tokens."""


EXPERTS = ("+ router", "+ feature with 4 experts", "+ more_experts=4")
"""Arms about what a mixture of experts knows beside its predictions."""


def write(bench: Bench) -> dict[str, list[dict]]:
    """Save a table for each scene that has the LM alone, and a figure of all; {scene: rows}."""
    results, tables = bench.found(), {}
    for name, scene in bench.scenes.items():
        arms = bench.arms(scene)
        done = finished(name, arms, results, bench.seeds)
        if len(done) < 2 or LM not in done:
            continue
        tables[name] = rows_of(scene, arms, done)
        said = notes(scene, arms, done, bench.seeds) + ("" if len(tables) > 1 else _FIGURE)
        save(f"quality-{_slug(name)}", tables[name], targets(scene, done), said)
        if weights := weight_rows(name, results):
            save(f"quality-{_slug(name)}-kd-weight", weights, notes=_WEIGHTS)
    if tables:
        figure(bench, results).savefig(Path(__file__).parent / "quality.png", dpi=110)
    return tables


_FIGURE = "\n\n![What each arm gains over the LM alone, with its interval, in all scenes](quality.png)"


def _slug(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "-")


def difference(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> Difference:
    """Between two arms' results, seed by seed."""
    size = ours[0]["bytes"]
    if any(one["bytes"] != size for one in (*ours, *theirs)):
        raise ValueError("quality: expected results on the same held-out text; delete those of another version of it")
    return paired_difference([one["nats"] for one in ours], [one["nats"] for one in theirs], size)


def bits(results: Sequence[Mapping]) -> float:
    return bits_per_byte([one["nats"] for one in results], results[0]["bytes"])


def rows_of(scene: Scene, arms: Sequence[Arm], done: Mapping) -> list[dict]:
    """A row for each arm that is complete."""
    rows = []
    _, alone = done[LM]
    for arm in arms:
        if arm.name not in done:
            continue
        setting, results = done[arm.name]
        each = [bits([one]) for one in results]
        against = done.get(arm.base, (None, None))[1] if arm.base else None
        other = difference(results, against) if against else None
        rows.append(
            {
                "arm": arm.name,
                "bits per byte": f"{bits(results):.3f}",
                "seeds": f"{min(each):.3f} to {max(each):.3f}",
                "minus LM only, 95%": "" if arm.name == LM else str(difference(results, alone)),
                "compared with": arm.base or "",
                "minus that, 95%": "" if other is None else str(other),
                "verdict": "" if other is None else other.verdict,
                "rate": f"{setting.rate:.2g}",
                "KD weight": f"{setting.kd_weight:g}" if arm.taught else "",
                "epochs": f"{results[0]['epochs']:.1f}",
                "tokens": results[0]["tokens"],
                "FLOPs, x": f"{results[0]['flops'] / alone[0]['flops']:.2f}",
            }
        )
    return rows


def weight_rows(scene: str, results: Sequence[Mapping]) -> list[dict]:
    """The best tuning bits per byte of the default by the KD term's weight, over the rates that were run."""
    found: dict[float, list] = {}
    for result in results:
        run = run_of(result)
        if run.scene == scene and run.arm == DEFAULT and run.seed == 0:
            found.setdefault(run.setting.kd_weight, []).append((result["tuning_bits_per_byte"], run.setting.rate))
    return [
        {"KD weight": f"{weight:g}", "bits per byte": f"{min(tried)[0]:.3f}", "best rate": f"{min(tried)[1]:.2g}"}
        | {"rates tried": len(tried)}
        for weight, tried in sorted(found.items())
    ]


_WEIGHTS = f"{DEFAULT}, seed 0, on the held-out text for choosing settings; the LM term has the rest to 1."


def targets(scene: Scene, done: Mapping) -> list[Target]:
    """What the default is to win, as far as the arms are there."""
    out = []
    if DEFAULT in done:
        gap = difference(done[DEFAULT][1], done[LM][1])
        out.append(Target(f"{DEFAULT} below LM only at equal tokens, bits per byte", -gap.mean, LEAST, "at least"))
        out.append(Target("its interval's end that is nearer to 0", -gap.high, 0.0, "at least"))
        if GOLD in done:
            gap = difference(done[DEFAULT][1], done[GOLD][1])
            out.append(Target(f"{DEFAULT} below {GOLD} at equal tokens", -gap.mean, 0.0, "at least"))
        if LM_FLOPS in done and scene.epochs > 1.5:
            gap = difference(done[DEFAULT][1], done[LM_FLOPS][1])
            out.append(Target(f"{DEFAULT} below LM only at equal FLOPs", -gap.mean, 0.0, "at least"))
    return out


def notes(scene: Scene, arms: Sequence[Arm], done: Mapping, seeds: Sequence[int]) -> str:
    """What one must know to read the table, and what it says in words."""
    size = done[LM][1][0]["bytes"]
    said = [
        f"{scene.steps} steps of {scene.batch_size} windows of up to 128 tokens, {scene.epochs:.1f} times over the "
        f"text; {len(seeds)} seeds; {sum(size):,} held-out bytes of {len(size)} documents. Intervals: paired "
        "bootstrap over documents and seeds. Rate and KD weight are each arm's own best on other held-out text. "
        "Negative is better."
    ]
    rows = [row for row in rows_of(scene, arms, done) if row["verdict"]]
    for verdict in (HELPS, NOTHING, HURTS):
        if names := [f"{row['arm']} (over {row['compared with']})" for row in rows if row["verdict"] == verdict]:
            said.append(f"{verdict[0].upper()}{verdict[1:]}: {'; '.join(names)}.")
    if experts := [
        f"{row['arm']}: {row['minus that, 95%']}, {row['verdict']}" for row in rows if row["arm"] in EXPERTS
    ]:
        said.append(f"What the teacher's experts know: {'; '.join(experts)}.")
    if missing := [arm.name for arm in arms if arm.name not in done]:
        said.append(f"Not run yet: {'; '.join(missing)}.")
    if gold := [arm for arm in scene.arms if arm.name == GOLD]:
        searched = bool(gold[0].ladders)
        if quality_gold.available():
            said.append(
                f"TRL {quality_gold.version()}, GOLD on the same windows as completions to a document start, with its "
                "loss on the text switched on; its FLOPs leave out that it asks its teacher in every step. "
                + (f"Merge and loss: {done[GOLD][0].variant}. " if GOLD in done else "")
                + ("" if searched else f"Its rate and weight are those of {KD}: it is too slow for a search here.")
            )
        else:
            said.append(f"Without {GOLD}: TRL is not installed ({quality_gold.INSTALL}).")
    if scene.pair != "embedded" and scene.epochs < 1.5:
        ratio = scene.more_steps / scene.steps
        said.append(f"The LM alone at equal FLOPs would take {ratio:.0f} times the steps, and is left out here.")
    return " ".join(said)


def figure(bench: Bench, results: Sequence[Mapping]):
    """A forest plot: each arm's difference to the LM alone at equal tokens with its interval, a panel per scene."""
    from matplotlib.figure import Figure

    scenes = {}
    for name, scene in bench.scenes.items():
        done = finished(name, bench.arms(scene), results, bench.seeds)
        gaps = {
            arm.name: difference(done[arm.name][1], done[LM][1])
            for arm in bench.arms(scene)
            if arm.name in done and LM in done and arm.name != LM
        }
        if gaps:
            scenes[name] = gaps
    if not scenes:
        raise ValueError("quality: expected at least one arm beside the LM alone, got none; run the bench for longer")
    heights = [len(gaps) + 2 for gaps in scenes.values()]
    made = Figure(figsize=(9, 0.26 * sum(heights) + 0.8 * len(heights)), layout="constrained")
    panels = made.subplots(len(scenes), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    colours = {HELPS: "tab:green", HURTS: "tab:red"}
    for panel, (name, gaps) in zip(panels, scenes.items(), strict=True):
        for place, gap in enumerate(gaps.values()):
            colour = colours.get(gap.verdict, "0.45")
            panel.plot([gap.low, gap.high], [place, place], color=colour, lw=2, solid_capstyle="butt")
            panel.plot([gap.mean], [place], "o", color=colour, ms=5)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_yticks(range(len(gaps)), list(gaps), fontsize=9)
        panel.set_ylim(len(gaps) - 0.4, -0.6)
        panel.grid(axis="x", lw=0.4, alpha=0.6)
        panel.set_title(name, loc="left", fontsize=10)
    panels[-1].set_xlabel("bits per byte of held-out text minus LM only at equal tokens, 95% interval; left is better")
    return made
