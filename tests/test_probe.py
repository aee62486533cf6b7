"""The probe against the trainer's own records, what it computes anew, what it leaves alone, and the scale check."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import make_trainer, pages, pair, part_term, small_data, tiny_student, weights_of

import kd_kit as kd
from kd_kit.kd_terms import kd_term, span_term
from kd_kit.losses import skew_kl
from kd_kit.probe import Probe
from kd_kit.readings import BridgeReading, Needs
from kd_kit.scales import KEEPS, Scale, halves, padded
from kd_kit.tensor_tree import capture_rng
from kd_kit.terms import LossTerm, lm_term
from kd_kit.types import LossValue


def hidden_terms():
    return [
        lm_term(0.3),
        kd_term(0.7, top_k=8),
        span_term(),
        kd.feature_term(),
        kd.layerwise_term(taps=2),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]


def trainer_of(folder, terms=None, **more):
    """Two windows of 64 tokens per batch; gradients are compared at every step."""
    more = {"data": small_data(window=64, size=900), "measure_every": 1, "early_stopping": None} | more
    return make_trainer(folder, terms=terms or hidden_terms(), **more)


def close(value, other) -> bool:
    return value is other or value == pytest.approx(other, rel=1e-4, abs=1e-6)


class Count:
    """How often the bodies of student and teacher ran, whatever called them."""

    def __init__(self, trainer):
        self.student = self.teacher = 0
        trainer.student.model.register_forward_hook(partial(self._add, "student"))
        self._handle = trainer.teacher.model.model.register_forward_hook(partial(self._add, "teacher"))

    def _add(self, who, *_):
        setattr(self, who, getattr(self, who) + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()  # the teacher is shared

    @property
    def both(self):
        return self.student, self.teacher


def seen_terms(monkeypatch) -> list[str]:
    """Names of the terms that are computed, as they are."""
    from kd_kit.passes import Passes

    names, plain = [], Passes.term

    def term(self, one, *rest):
        names.append(one.name)
        return plain(self, one, *rest)

    monkeypatch.setattr(Passes, "term", term)
    return names


@pytest.mark.parametrize("steps", [0, 2])
def test_the_probe_says_what_the_next_step_records(tmp_path, steps):
    """Before the first step, with parts that have not settled, and later on."""
    trainer = trainer_of(tmp_path / "run")
    if steps:
        trainer.fit(steps)
    probe = Probe(trainer, position=steps, windows=trainer.data.batch_size)
    rows, cosines = probe.rows, probe.cosines
    trainer.fit(1)
    record = trainer.history.last("train")
    assert record["step"] == steps + 1
    for row in rows:
        there = record["terms"][row["name"]]
        for key, of_record in (("count", "count"), ("verdict", "verdict")):
            assert row[key] == there[of_record], (row["name"], key)
        for key in ("value", "weight", "contribution", "share", "grad_norm", "grad_share", "cosine"):
            assert close(row[key], there[key]), (row["name"], key, row[key], there[key])
    flat = [c for line in record["gradients"]["cosines"] for c in line]
    for mine, theirs in zip([c for line in cosines for c in line], flat, strict=True):
        assert mine is theirs is None or mine == pytest.approx(theirs, abs=1e-4)


def test_more_experts_and_mixed_precision_are_those_of_the_run(tmp_path):
    from helpers import session_at

    terms = [lm_term(0.3), kd_term(0.7, top_k=8), span_term(spans="all")]
    session = session_at(tmp_path / "run", precision="bf16")
    trainer = trainer_of(tmp_path / "run", terms, session=session, more_experts=4)
    probe = Probe(trainer, windows=2)
    before = {row["name"]: row for row in probe.rows}
    with Count(trainer) as count:
        probe.set(top_k=4)
        probe.set(top_k=8, method="strict")
    assert count.both == (0, 0), "also the pass with more experts is kept"
    trainer.fit(1)
    record = trainer.history.last("train")["terms"]
    for name, row in before.items():
        assert row["value"] == pytest.approx(record[name]["value"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(record[name]["grad_norm"], rel=2e-2)


def test_probing_changes_nothing_of_the_trainer(tmp_path):
    def dropping(trainer):
        return {name: m.training for name, m in trainer.module.named_modules()}

    trainer = trainer_of(tmp_path / "run", student=tiny_student(attention_dropout=0.5))
    trainer.student.model.layers[0].eval()  # modes may be mixed, and stay so
    weights = weights_of(trainer) | {n: b.clone() for n, b in trainer.module.named_buffers()}
    rng, modes = capture_rng()[0], dropping(trainer)
    numpy_state, length = np.random.get_state()[1].copy(), len(trainer.history.records)
    grads = [p.grad for p in trainer.module.parameters()]
    files = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file())
    probe = Probe(trainer)
    first = probe.rows
    probe.set(temperature=2.0, layers="last only", projector="random", batch=1, kd=0.4)
    probe.set(method="projector", temperature=1.0, projector="fitted")
    probe.figure()
    probe.scales()
    now = weights_of(trainer) | {n: b.clone() for n, b in trainer.module.named_buffers()}
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[n], weights[n]) for n in weights)
    assert all(torch.equal(a, b) for a, b in zip(rng.values(), capture_rng()[0].values(), strict=True))
    assert (np.random.get_state()[1] == numpy_state).all()
    assert dropping(trainer) == modes
    assert [p.grad for p in trainer.module.parameters()] == grads
    assert len(trainer.history.records) == length
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file()) == files
    again = Probe(trainer).rows
    assert [r["value"] for r in again] == [r["value"] for r in first], "no dropout, so no chance"


def test_only_what_a_setting_touches_is_computed_anew(tmp_path, monkeypatch):
    names = seen_terms(monkeypatch)
    trainer = trainer_of(tmp_path / "run")
    probe = Probe(trainer)
    everything = [t.name for t in trainer.terms]
    probe.table()
    assert names == everything
    with Count(trainer) as count:

        def asked(**settings) -> list[str]:
            names.clear()
            probe.set(**settings)
            return list(names)

        assert asked(weights={"kd": 0.2}, lm=0.8) == []
        assert asked(temperature=2.0) == ["kd"]
        assert asked(divergence="reverse_kl") == ["kd"]
        assert asked(top_k=4) == ["kd"]
        assert asked(top_k=None) == ["kd"]
        assert asked(top_k=4) == asked(temperature=1.0, divergence="forward_kl", top_k=8) == [], "known already"
        assert asked(method="strict") == ["kd"]
        assert asked(method="bridge", projector="random") == ["feature", "layerwise", "contrastive"]
        assert count.both == (0, 0), "no pass was made again"
        assert asked(layers={"feature": {2: 3}}, projector="trained") == ["feature"]
        assert asked(layers="run") == []
        passes = count.both
        assert asked(layers={"feature": {2: 3}}) == []
        assert count.both == passes
        assert asked(batch=1) == everything
        assert asked(batch=0) == []


def test_a_trained_run_is_looked_at_as_it_is_then(tmp_path):
    trainer = trainer_of(tmp_path / "run", steps=8)
    probe = Probe(trainer)
    before = {r["name"]: r["value"] for r in probe.rows}
    trainer.fit(3)
    after = {r["name"]: r["value"] for r in probe.rows}
    assert after["lm"] < before["lm"]
    assert "3 of 8 steps done" in str(probe.table())
    trainer.set_weights(kd=0.1)
    assert "weight of kd 0.1 -> 0.7" in str(probe), "the probe keeps what it was told"


def test_the_projector_setting_spans_its_scale(tmp_path):
    trainer = trainer_of(tmp_path / "run", data=small_data(window=64, size=3000, count=6))
    probe = Probe(trainer)
    value = {}
    for kind in ("trained", "fitted", "random"):
        probe.set(projector=kind)
        value[kind] = {r["name"]: r["value"] for r in probe.rows}
    for name in ("feature", "layerwise"):
        assert value["random"][name] == pytest.approx(1.0, abs=0.06)
        assert value["fitted"][name] < 0.9
        assert value["trained"][name] < 0.9
    assert value["random"]["lm"] == value["trained"]["lm"]
    starred = [r["name"] for r in probe.rows if r["changed"]]
    assert starred == ["feature", "layerwise", "contrastive"]


def test_use_hands_the_settings_over(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    probe = Probe(trainer, windows=2)
    chosen = {"temperature": 2.0, "top_k": 4, "divergence": "jensen_shannon", "layers": {"feature": {2: 3}}}
    probe.set(**chosen, weights={"kd": 0.5, "router": 0.0})
    rows = {r["name"]: r for r in probe.rows}
    said = probe.use()
    assert said.startswith("From step 1 on:")
    assert "kd.temperature 1 -> 2" in said
    kd_now = next(t for t in trainer.terms if t.name == "kd")
    assert (kd_now.settings["temperature"], kd_now.settings["top_k"], kd_now.weight) == (2.0, 4, 0.5)
    assert "all settings as the run has them" in str(probe.table())
    assert probe.use().startswith("Nothing was changed")
    trainer.fit(1)
    record = trainer.history.last("train")["terms"]
    for name, row in rows.items():
        assert close(row["weight"], record[name]["weight"]), name
        if name != "feature":  # whose map the run fits to more text
            assert close(row["value"], record[name]["value"]), name
            assert close(row["grad_norm"], record[name]["grad_norm"]), name
    assert record["feature"]["value"] != pytest.approx(rows["layerwise"]["value"])
    assert next(t for t in trainer.terms if t.name == "feature").settings["layers"] == {"2": 3}


def test_a_begun_run_refuses_other_layers_and_stays_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    trainer.fit(1)
    probe = Probe(trainer)
    terms = trainer.terms
    probe.set(layers={"feature": {2: 3}}, kd=0.5)
    with pytest.raises(ValueError, match="layers"):
        probe.use()
    assert trainer.terms is terms
    probe.set(layers="run")
    assert "weight" in probe.use()
    trainer.fit(1)
    assert trainer.step == 2


def test_layer_maps_are_handed_to_the_terms_as_their_builders_would(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    probe = Probe(trainer)
    assert probe.layer_maps["proportional"] == {1: 2, 2: 4}
    assert probe.layer_maps["one lower"] == {1: 1, 2: 3}
    assert probe.layer_maps["early teacher"] == {1: 1, 2: 2}
    run = probe.rows
    probe.set(layers="proportional")
    assert [r["value"] for r in probe.rows] == [r["value"] for r in run], "that is what the run has"
    probe.set(layers="early teacher")
    from kd_kit.term_changes import pairs_used

    made = {t.name: pairs_used(t) for t in probe._terms(probe.settings)}
    assert made["feature"] == made["attention"] == made["contrastive"] == made["relation"] == {2: 2}
    assert made["layerwise"] == {1: 1}
    assert made["router"] == {1: 1, 2: 2}
    probe.set(layers={1: 1, 2: 4})
    assert "layers run -> 1: 1, 2: 4" in str(probe)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0}, "a number above 0"),
        ({"temperature": math.inf}, "finite"),
        ({"temperature": True}, "a number above 0"),
        ({"top_k": 0}, "at least 1, or None"),
        ({"top_k": 2.5}, "at least 1, or None"),
        ({"top_k": 10**6}, "top_k"),
        ({"method": "magic"}, "bridge, strict, uld"),
        ({"method": "same"}, "one tokenizer on both sides"),
        ({"divergence": "mse"}, "forward_kl, reverse_kl, jensen_shannon, skew_kl"),
        ({"method": "uld", "temperature": 2.0}, "uld"),
        ({"layers": "diagonal"}, "run, proportional"),
        ({"layers": {}}, "student layer"),
        ({"layers": {9: 1}}, "from 1 to 2"),
        ({"layers": {"lm": {1: 1}}}, "feature, layerwise"),
        ({"projector": "off"}, "trained, fitted, random"),
        ({"batch": 6}, "from 0 to 5"),
        ({"batch": -1}, "from 0 to 5"),
        ({"weights": {"kb": 0.5}}, "weights of lm, kd"),
        ({"kd": -1.0}, "at least 0 for kd"),
        ({"kd": math.nan}, "at least 0 for kd"),
        ({"tempreature": 2.0}, "temperature, top_k"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, settings, sentence):
    trainer = trainer_of(tmp_path / "run")
    probe = Probe(trainer)
    before = probe.settings
    with pytest.raises(ValueError, match=sentence):
        probe.set(lm=0.5, **settings)
    assert probe.settings == before


def test_runs_without_teacher_layers_or_kd(tmp_path):
    trainer = trainer_of(tmp_path / "run", [lm_term(1.0)], model=None)
    probe = Probe(trainer)
    assert [r["name"] for r in probe.rows] == ["lm"]
    assert probe.layer_maps == {}
    for settings, sentence in (({"temperature": 2.0}, "a run with a kd_term"), ({"layers": "run"}, "about layers")):
        with pytest.raises(ValueError, match=sentence):
            probe.set(**settings)
    assert probe.scales().ok
    assert probe.use().startswith("Nothing was changed")


def test_a_run_that_trains_or_is_not_loaded_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8)])
    probe = Probe(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "running", property(lambda self: True))
        with pytest.raises(ValueError, match="at rest"):
            Probe(trainer)
        with pytest.raises(ValueError, match="at rest"):
            probe.table()
    trainer.fit(2)
    later = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8)])
    with pytest.raises(ValueError, match="2 steps that are not loaded"):
        Probe(later)
    later.resume()
    assert "2 of 6 steps done" in str(Probe(later))


def test_a_divergence_of_ones_own_must_be_named_when_it_is_left(tmp_path):
    own = partial(skew_kl, alpha=0.3)
    trainer = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8, divergence=own)])
    probe = Probe(trainer)
    probe.set(kd=0.2)
    with pytest.raises(ValueError, match="one of forward_kl"):
        probe.set(temperature=2.0)
    probe.set(temperature=2.0, divergence="forward_kl")
    assert {r["name"]: r["changed"] for r in probe.rows} == {"lm": False, "kd": True}


def test_terms_of_ones_own_take_part_with_their_weight(tmp_path):
    trainer = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8), part_term()])
    probe = Probe(trainer, windows=2)
    probe.set(part=0.4, temperature=2.0)
    row = probe.rows[2]
    assert row["given_weight"] == 0.4
    assert "part.weight 0.1 -> 0.4" in probe.use()
    trainer.fit(1)
    assert close(row["value"], trainer.history.last("train")["terms"]["part"]["value"])


def test_ranges_of_ones_own_survive_other_settings(tmp_path):
    mine = replace(kd_term(top_k=8), healthy=(0.2, 9.0))
    trainer = trainer_of(tmp_path / "run", [lm_term(), mine])
    probe = Probe(trainer)
    probe.set(temperature=3.0)
    assert probe.rows[1]["healthy"] == [0.2, 9.0]
    probe.use()
    assert trainer.terms[1].healthy == (0.2, 9.0)


def test_figure_and_table(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    probe = Probe(trainer)
    figure = probe.figure()
    shares, matrix = figure.axes
    labels = [t.get_text() for t in shares.get_yticklabels()]
    assert [label.split()[0] for label in labels] == [t.name for t in trainer.terms]
    assert labels[0].endswith("high"), "a new student's"
    assert shares.get_yticklabels()[0].get_weight() == "bold"
    bars = [bar.get_width() for bar in shares.patches]
    assert sum(bars[0::2]) == pytest.approx(100) == sum(bars[1::2])
    assert matrix.images[0].get_array().shape == (9, 9)
    assert figure.get_size_inches()[0] * figure.dpi == 1000
    table = probe.table()
    assert table.columns[-1] == "cosine with lm"
    assert "%" in table.columns[7]
    assert "<table>" in probe._repr_html_()


# --- scales


@pytest.fixture(scope="module")
def long_data():
    return kd.build_data(pages(8, 2500), pair(), held_out=0.25, window=128, batch_size=4)


def test_no_term_of_the_kit_is_blamed(tmp_path, long_data):
    trainer = trainer_of(tmp_path / "run", data=long_data)
    report = Probe(trainer).scales()
    assert report.ok, report
    rows = {row.name: row for row in report.rows}
    assert all(row.length is not None and row.batch is not None and row.padding is not None for row in report.rows)
    assert rows["kd"].gradient is not None
    assert rows["contrastive"].gradient is not None
    assert "depends on the batch" in rows["contrastive"].verdict
    trainer.fit(2)
    assert Probe(trainer).scales().ok


KEY = Needs(teacher_states=frozenset([4]), student_states=frozenset([2]))


def states(output, signal, batch):
    ours = output.states[2].flatten(0, 1)[batch.span_rows[:, 0]].float()
    return ours, signal.states[4][:, : ours.shape[1]]


def summed_mse(output, signal, batch):
    ours, theirs = states(output, signal, batch)
    return LossValue(((ours - theirs) ** 2).sum(), torch.ones(()))


def batchmean(output, signal, batch):
    """What ``kl_div(reduction="batchmean")`` makes of [B, T, V]."""
    logits = output.head.logits(output.hidden.flatten(0, 1)[batch.rows])
    target = torch.full_like(logits, 1 / logits.shape[-1])
    total = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="sum")
    return LossValue(total / len(batch.student_ids), torch.ones(()))


def rows_summed(output, signal, batch):
    """A divergence of attention rows, summed over them and averaged over windows only."""
    ours, theirs = states(output, signal, batch)
    apart = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    return LossValue(apart.sum(), torch.ones(()))


def over_padding(output, signal, batch):
    logits = output.head.logits(output.hidden.flatten(0, 1))
    targets = batch.targets.flatten()
    losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return LossValue(losses.mean(), torch.ones(()))


def mine(value, over, **more):
    return LossTerm(name="mine", weight=0.1, unit="", healthy=(0, 1), value=value, over=over, needs=KEY, **more)


def tempered_term(bridge, temperature: float, power: float) -> LossTerm:
    """A divergence over the teacher's cells at a temperature, times T to a power: 2 is right."""
    reading = BridgeReading("bridge", bridge, 16)

    def rows(given):
        ours, theirs = (torch.log_softmax(x(reading.key) / temperature, -1) for x in (given.student, given.teacher))
        apart = torch.where(theirs == -math.inf, 0.0, theirs - ours)  # unused cells
        return temperature**power * (theirs.exp() * apart).sum(-1)

    return LossTerm(name="mine", weight=0.1, unit="", healthy=(0, 9), rows=rows, over="taught", needs=Needs((reading,)))


@pytest.mark.parametrize(
    ("term", "faults"),
    [
        (mine(summed_mse, lambda batch: 1), {"length", "batch"}),
        (mine(batchmean, lambda batch: 1), {"length"}),
        (mine(rows_summed, lambda batch: len(batch.student_ids)), {"length"}),
        (mine(over_padding, lambda batch: 1), {"padding"}),
        (mine(summed_mse, "spans"), set()),
        (mine(summed_mse, lambda batch: 1, batchwise=True), set()),
    ],
    ids=["sum", "batchmean", "rows", "padding", "right", "by declaration"],
)
def test_wrong_losses_are_named(tmp_path, long_data, term, faults):
    trainer = trainer_of(tmp_path / "run", [lm_term(), term], data=long_data)
    report = Probe(trainer).scales()
    said = " ".join(report.blamed.get("mine", []))
    words = {"length": "scales with length: normalise", "batch": "scales with the batch", "padding": "with padding"}
    assert {name for name, text in words.items() if text in said} == faults, report
    assert "lm" not in report.blamed
    assert report.ok == (not faults)


@pytest.mark.parametrize(("power", "wrong"), [(0, "falls with T^2"), (2, None), (4, "rises with T")])
def test_a_missing_square_of_the_temperature_is_named(tmp_path, long_data, power, wrong):
    make = partial(tempered_term, pair().bridge, power=power)
    trainer = trainer_of(tmp_path / "run", [lm_term(), make(1.0)], data=long_data)
    report = Probe(trainer).scales(temperature={"mine": make})
    assert report.ok == (wrong is None), report
    assert wrong is None or wrong in report.blamed["mine"][0]
    assert {r.name: r.gradient is None for r in report.rows} == {"lm": True, "mine": False}


def test_scales_refuses_what_it_cannot_use(tmp_path):
    trainer = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8)])
    probe = Probe(trainer)
    with pytest.raises(ValueError, match="lm, kd"):
        probe.scales(temperature={"mine": kd_term})
    with pytest.raises(ValueError, match="that makes the term"):
        probe.scales(temperature={"kd": lambda T: T})


def test_one_window_cannot_be_halved_as_a_batch(tmp_path):
    trainer = trainer_of(tmp_path / "run", [lm_term(), kd_term(top_k=8)])
    report = Probe(trainer, windows=1).scales()
    assert report.rows[0].batch is None
    assert "at least two windows" in str(report)


def test_halves_are_the_text_and_padding_moves_nothing():
    windows = small_data(window=64, size=900).train
    first, second = halves(windows, [0, 1, 2])
    assert [first.text(i) + second.text(i) for i in range(3)] == [windows.text(i) for i in range(3)]
    batch = windows.collate([0, 1])
    wide = padded(batch, 90, 95, pads=(1, 2))
    t = batch.student_ids.shape[1]
    assert wide.student_ids.shape == (2, 90)
    assert wide.teacher_ids.shape == (2, 95)
    assert (wide.student_ids[:, t:] == 1).all()
    for rows in ("rows", "aligned_rows", "taught_rows", "same_rows"):
        before, now = getattr(batch, rows), getattr(wide, rows)
        assert torch.equal(batch.student_ids.flatten()[before], wide.student_ids.flatten()[now])
    for side, ids in ((0, "student_ids"), (1, "teacher_ids")):
        before, now = (getattr(b, ids).flatten()[b.span_rows[:, side]] for b in (batch, wide))
        assert torch.equal(before, now)


def test_ratios_have_verdicts():
    assert Scale("x", 1.0, length=1.0, batch=1.0, padding=1.0, gradient=1.0).verdict == "ok"
    assert Scale("x", None).verdict == "nothing to look at in this batch"
    assert KEEPS[0] * KEEPS[1] == pytest.approx(1.0)
    assert Scale("x", math.nan).faults == Scale("x", 1.0, gradient=math.inf).faults
    assert "not finite" in Scale("x", math.nan).verdict
    assert Scale("x", 1.0, length=2.0).faults == ["scales with length: normalise by tokens"]
