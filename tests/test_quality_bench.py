"""The quality bench's statistics, its search and plan, its results file, and the likelihood of single documents."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import pair, tiny_student

import kd_kit as kd

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import quality_arms
import quality_plan
import quality_report
import quality_runs
import quality_scenes
from quality_arms import EMBEDDED, KD, LADDERS, LM, LM_FLOPS, Arm, Setting
from quality_plan import Run, finished, plan, record, run_of, settled, tuned, wanted
from quality_statistics import HELPS, HURTS, NOTHING, bits_per_byte, paired_difference

SIZE = [100, 200, 50, 400, 120]


# --- statistics


def test_the_difference_is_that_of_all_bytes_together_with_the_seeds_averaged():
    ours = [[60, 130, 30, 260, 70], [62, 128, 32, 262, 72]]
    theirs = [[70, 140, 35, 280, 80], [71, 139, 35, 280, 80]]
    found = paired_difference(ours, theirs, SIZE)
    assert found.mean == pytest.approx((61 + 129 + 31 + 261 + 71 - 605) / math.log(2) / sum(SIZE))
    assert found.mean == pytest.approx(bits_per_byte(ours, SIZE) - bits_per_byte(theirs, SIZE))


def test_an_equal_gain_in_every_document_has_an_interval_of_no_width():
    theirs = np.array(SIZE) * 0.7
    found = paired_difference([theirs - 0.1 * np.array(SIZE)], [theirs], SIZE)
    assert found.low == pytest.approx(found.mean)
    assert found.high == pytest.approx(found.mean)
    assert found.mean == pytest.approx(-0.1 / math.log(2))


def test_the_interval_is_paired_and_covers_as_often_as_it_says():
    """Documents differ far more than the two sides do; the truth lies outside in about one of twenty samples."""
    draw = np.random.default_rng(0)
    missed = widest = 0
    for number in range(200):
        size = draw.integers(3000, 5000, 24)
        hard = draw.normal(1.4, 0.3, 24) * size
        gain = draw.normal(0.02, 0.02, 24) * size
        found = paired_difference([hard - gain], [hard], size, draws=500, seed=number)
        missed += not found.low <= -0.02 / math.log(2) <= found.high
        widest = max(widest, found.high - found.low)
    assert 4 <= missed <= 24
    assert widest < 0.05  # unpaired it would be about 0.35


def test_a_gain_that_another_seed_turns_around_is_not_sure():
    even = np.array(SIZE) * 0.7
    seeds = [even - 9, even - 8, even + 2]
    assert paired_difference(seeds, [even] * 3, SIZE).verdict == NOTHING
    assert paired_difference([even - 9, even - 8, even - 2], [even] * 3, SIZE).verdict == HELPS


def test_the_verdict_is_what_the_interval_says():
    even = np.array(SIZE) * 0.7
    assert paired_difference([even - 1], [even], SIZE).verdict == HELPS
    assert paired_difference([even + 1], [even], SIZE).verdict == HURTS
    small = paired_difference([even + 0.003 * np.array(SIZE)], [even], SIZE)
    assert small.low > 0
    assert small.verdict == NOTHING
    assert paired_difference([even + np.array([5, -9, 3, -2, 4])], [even], SIZE).verdict == NOTHING


@pytest.mark.parametrize(
    ("ours", "size", "what"),
    [
        ([[1.0]], SIZE, "same seeds and documents"),
        ([[1.0] * 5] * 2, SIZE, "same seeds"),
        ([[1.0] * 5], [1, 1, 0, 1, 1], "bytes"),
    ],
)
def test_other_documents_and_empty_ones_are_refused(ours, size, what):
    with pytest.raises(ValueError, match=what):
        paired_difference(ours, [[1.0] * 5], size)


# --- search and plan


def bowl(setting: Setting) -> float:
    """Tuning bits per byte that are best at a rate of 0.006 and a KD weight of 0.85."""
    return abs(math.log2(setting.rate / 0.006)) + abs(setting.kd_weight - 0.85)


def searched(arm: Arm) -> tuple[Setting, dict[Setting, float]]:
    found: dict[Setting, float] = {}
    while True:
        best, missing = tuned(arm, Setting(), found)
        if not missing:
            return best, found
        found[missing[0]] = bowl(missing[0])


def test_a_search_ends_at_the_best_rung_of_every_ladder_with_its_neighbours_tried():
    best, found = searched(Arm("x", None, ladders=("rate", "kd_weight")))
    assert best == Setting(rate=0.006, kd_weight=0.85)
    assert {replace(best, rate=0.003), replace(best, rate=0.012)} <= found.keys()
    assert {replace(best, kd_weight=0.7), replace(best, kd_weight=0.95)} <= found.keys()


def test_a_full_ladder_is_run_whole_at_the_best():
    best, found = searched(Arm("x", None, ladders=("rate", "kd_weight"), full=("kd_weight",)))
    assert {replace(best, kd_weight=weight) for weight in LADDERS["kd_weight"]} <= found.keys()


def test_a_search_ends_at_the_end_of_a_ladder():
    arm = Arm("x", None, ladders=("spend",))
    assert tuned(arm, Setting(), {Setting(): 1.0, Setting(spend=0.5): 2.0}) == (Setting(), [])


def results_of(scene: str, arms: list[Arm], seeds=(0, 1, 2)) -> list[dict]:
    """A whole bench of made-up runs, in the order in which they can be made."""
    out: list[dict] = []
    while to_do := wanted(scene, arms, out, seeds):
        for run in to_do:
            out.append(record(run, tuning_bits_per_byte=bowl(run.setting), nats=[1.0, 2.0], bytes=[3, 4]))
    return out


def test_an_arm_begins_where_another_ended_and_then_gets_its_other_seeds():
    arms = [Arm("a", None, base=None, start=None), Arm("b", None, base="a", start="a")]
    assert wanted("s", arms, []) == [Run("s", "a", 0, Setting())]
    results = results_of("s", arms)
    first = next(result for result in results if result["arm"] == "b")
    assert run_of(first).setting == Setting(rate=0.006)
    done = finished("s", arms, results)
    assert {name: len(each) for name, (_, each) in done.items()} == {"a": 3, "b": 3}
    assert settled(arms, arms[1], quality_plan.tuning(results, "s")) == Setting(rate=0.006)


def test_nothing_is_wanted_twice_and_a_lost_run_is_wanted_again():
    arms = [Arm("a", None, base=None, start=None)]
    results = results_of("s", arms)
    names = [run_of(result).name for result in results]
    assert len(set(names)) == len(names)
    lost = results.pop()
    assert wanted("s", arms, results) == [run_of(lost)]
    assert "a" not in finished("s", arms, results)
    assert wanted("another", arms, results) == [Run("another", "a", 0, Setting())]


def test_results_come_back_from_their_file_as_they_were(tmp_path):
    bench = quality_runs.Bench({}, tmp_path / "a" / "runs.jsonl", tmp_path)
    run = Run("s", "a", 1, Setting(rate=LADDERS["rate"][2], kd_weight=0.98))
    bench.keep(record(run, nats=[1.5]))
    assert run_of(bench.found()[0]) == run
    whole = bench.results.read_text()
    bench.results.write_text(whole + whole[:30])  # a kill in the middle of a line
    bench.keep(record(run, nats=[2.5]))
    assert [result["nats"] for result in bench.found()] == [[1.5], [2.5]]


def test_a_run_is_made_by_one_process_at_a_time(tmp_path):
    bench = quality_runs.Bench({}, tmp_path / "runs.jsonl", tmp_path)
    with bench.claim("x") as mine, bench.claim("x") as other, bench.claim("y") as third:
        assert (mine, other, third) == (True, False, True)
    with bench.claim("x") as again:
        assert again


def test_a_run_that_fails_holds_no_other_up_and_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    def make(bench, run):
        if run.arm == "bad":
            raise ValueError("no such thing")
        return record(run, tuning_bits_per_byte=bowl(run.setting))

    monkeypatch.setattr(quality_runs, "make", make)
    arms = [Arm("bad", None, base=None, start=None), Arm("good", None, base=None, start=None)]
    scene = replace(quality_scenes.SCENES["embedded"], name="s", arms=arms)
    bench = quality_runs.Bench({"s": scene}, tmp_path / "runs.jsonl", tmp_path)
    with pytest.raises(RuntimeError, match=r"1 runs failed.*s/bad/seed 0"):
        quality_runs.work(bench)
    assert "no such thing" in capsys.readouterr().err
    assert {run_of(result).arm for result in bench.found()} == {"good"}
    assert bench.to_do() == [Run("s", "bad", 0, Setting())]
    quality_runs.work(bench, lambda name: "good" in name)  # nothing is left of these


def test_all_arms_have_names_of_their_own_and_are_compared_with_arms_of_their_scene():
    for scene in quality_scenes.SCENES.values():
        names = [arm.name for arm in scene.arms]
        assert len(set(names)) == len(names)
        for n, arm in enumerate(scene.arms):
            assert arm.base is None or arm.base in names
            assert arm.start is None or arm.start in names[:n]
            assert set(arm.full) <= set(arm.ladders) <= LADDERS.keys()


def test_every_term_and_every_method_that_suits_two_vocabularies_is_an_arm():
    alone = {term.name for arm in EMBEDDED if arm.terms and arm.name.startswith("+ ") for term in arm.terms(0.7)}
    every = next(arm for arm in EMBEDDED if arm.name == quality_arms.NINE).terms(0.7)
    assert alone == {term.name for term in every}
    methods = {term.settings.get("method") for arm in EMBEDDED if arm.terms for term in arm.terms(0.7)}
    assert {"bridge", "strict", "uld", "projector"} <= methods


def test_the_plan_counts_the_runs_of_a_search_that_ends_where_it_begins():
    arms = [next(arm for arm in EMBEDDED if arm.name == name) for name in (LM, LM_FLOPS, KD)]
    rows = {row["arm"]: row for row in plan("s", arms, lm_seconds=10, flops=3.0)}
    assert rows[LM]["runs"] == 5
    assert rows[LM]["seconds"] == 50
    assert rows[LM_FLOPS]["runs"] == 6  # two rates and one smaller number of steps beside it
    assert rows[LM_FLOPS]["seconds"] == 180
    assert rows[KD]["runs"] == 1 + 2 + 5 + 2


# --- report


def test_rows_say_what_each_arm_gains_and_over_what():
    arms = [Arm(LM, None, base=None, start=None), Arm("+ x", None, base=LM, start=LM)]
    values = {LM: [900.0, 1800.0], "+ x": [800.0, 1650.0]}
    done = {
        name: (Setting(), [record(Run("s", name, seed, Setting()), nats=nats, bytes=[1000, 2000], epochs=1.0, tokens=9)
                           | {"flops": 2.0 if name == "+ x" else 1.0} for seed in (0, 1)])
        for name, nats in values.items()
    }  # fmt: skip
    rows = {row["arm"]: row for row in quality_report.rows_of(None, arms, done)}
    assert rows[LM]["bits per byte"] == "1.298"
    assert rows[LM]["verdict"] == ""
    assert rows["+ x"]["verdict"] == HELPS
    assert rows["+ x"]["minus LM only, 95%"].startswith("-0.120 [-0.144, -0.108]")
    assert rows["+ x"]["FLOPs, x"] == "2.00"


def test_results_on_other_held_out_text_are_refused():
    one = record(Run("s", LM, 0, Setting()), nats=[1.0], bytes=[10])
    with pytest.raises(ValueError, match="same held-out text"):
        quality_report.difference([one], [one | {"bytes": [11]}])


# --- likelihood by document, FLOPs


def test_the_likelihoods_of_documents_add_up_to_that_of_the_text():
    texts = ["She had been forced into prudence in her youth. " * 6, "They had no leisure for it, none at all. " * 9]
    data = kd.build_data(texts, pair(), held_out=texts, window=32, batch_size=2, stride=16)
    model = tiny_student()
    found = quality_scenes.likelihood(model, data.held_out, batch_size=3)
    whole = kd.score(model, data.held_out)
    assert sum(found.nats) == pytest.approx(whole.nats, rel=1e-5)
    assert sum(found.bytes) == whole.bytes
    alone = kd.build_data(texts, pair(), held_out=texts[1:], window=32, batch_size=2, stride=16)
    assert found.nats[1] == pytest.approx(kd.score(model, alone.held_out).nats, rel=1e-4)
    assert found.tuning == pytest.approx(found.nats[0] / math.log(2) / found.bytes[0])
    assert found.table == ([found.nats[1]], [found.bytes[1]])


def test_active_parameters_are_those_that_one_token_meets():
    student = tiny_student()
    embedding = student.get_input_embeddings().weight
    matrices = sum(p.numel() for p in student.parameters() if p.ndim > 1 and p is not embedding)
    assert quality_scenes.active_parameters(student) == matrices + embedding.numel()  # its head is its embedding
    teacher = quality_scenes.pair_of("embedded").teacher()
    of = teacher.config
    experts = of.num_hidden_layers * of.num_experts * 3 * of.hidden_size * of.moe_intermediate_size
    whole = sum(p.numel() for p in teacher.parameters() if p.ndim > 1)
    assert quality_scenes.active_parameters(teacher) == whole - experts * (1 - of.num_experts_per_tok / of.num_experts)


def test_flops_of_a_run_count_the_teacher_once():
    scene = quality_scenes.SCENES["embedded, little text"]
    student = scene.flops(scene.steps, taught=False)
    teacher = scene.flops(scene.steps, taught=True) - student
    assert scene.epochs > 2
    assert scene.flops(2 * scene.steps, taught=True) == pytest.approx(2 * student + teacher)
    assert scene.flops(scene.more_steps, taught=False) == pytest.approx(student + teacher, rel=1 / scene.steps)


def test_windows_of_little_text_are_the_first_of_the_text_that_the_cache_is_made_of():
    scenes = quality_scenes.SCENES
    little, bench = scenes["embedded, little text"], quality_runs.Bench(scenes)
    whole = quality_runs.widest(bench, little)
    assert whole is scenes["embedded"]
    ours, theirs = little.data().train, whole.data().train
    assert len(ours) < len(theirs)
    for window in range(len(ours)):
        assert all(np.array_equal(a, b) for a, b in zip(ours.ids(window), theirs.ids(window), strict=True))


# --- an earlier recipe


def test_the_earlier_recipe_trains_its_maps_and_the_student(tmp_path):
    from kd_kit.session import Session

    texts = ["She had been forced into prudence in her youth, she learned romance as she grew older. " * 6] * 2
    data = kd.build_data(texts, pair(), held_out=texts[:1], window=32, batch_size=2)
    trainer = kd.build_trainer(
        tiny_student(),
        quality_scenes.pair_of("embedded").teacher(),
        data,
        quality_arms.quality_earlier.earlier_terms(),
        schedule=quality_arms.quality_earlier.earlier_schedule(),
        session=Session(tmp_path, device="cpu", precision="no"),
        steps=4,
        eval_windows=1,
        early_stopping=None,
    )
    maps = [term.part.map.weight for term in trainer.terms if term.part is not None]
    before = [weight.detach().clone() for weight in maps]
    trainer.fit()
    assert len(maps) == 2
    assert all(not np.array_equal(was.numpy(), now.detach().numpy()) for was, now in zip(before, maps, strict=True))
    named = next(record["terms"] for record in trainer.history.records if record["kind"] == "train")
    assert named["earlier_kd"]["value"] > 0
    assert named["earlier_feature"]["value"] > 0
