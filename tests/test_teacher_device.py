"""A teacher on another device than the student: what it is given goes there, what it says comes back."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from far_device import FAR, Far, moved, second_device
from helpers import make_trainer, pair, small_data, teacher

import kd_kit as kd
from kd_kit.experts import ask_once_per_layer

TERMS = (
    kd.lm_term,
    kd.kd_term,
    kd.span_term,
    kd.feature_term,
    kd.layerwise_term,
    kd.relation_term,
    kd.attention_term,
    kd.contrastive_term,
    kd.router_term,
)
METHODS = ("bridge", "strict", "projector", "uld")


@functools.cache
def near_teacher():
    """The embedded teacher with the experts of a card without grouped products."""
    model = copy.deepcopy(teacher())
    if hasattr(model, "set_experts_implementation"):  # transformers 5
        model.set_experts_implementation("eager")
    ask_once_per_layer(model)
    return model


@pytest.fixture
def far_teacher(monkeypatch):
    with second_device(monkeypatch):
        yield moved(copy.deepcopy(near_teacher()))


def trainer(folder, model, terms=TERMS, **arguments):
    arguments = {"steps": 3, "measure_every": 2, "learning_rate": 1e-3} | arguments
    return make_trainer(folder, model=model, terms=[make() for make in terms], **arguments)


def assert_same(there, here) -> None:
    """The same losses but for rounding: sums are cut into other blocks on other devices."""
    assert there.step == here.step == 3
    for one, other in zip(steps_of(there), steps_of(here), strict=True):
        assert one == pytest.approx(other, rel=1e-4), (one, other)


def steps_of(run) -> list[dict[str, float]]:
    records = [record for record in run.history.records if record["kind"] == "train"]
    values = [{name: term["value"] for name, term in record["terms"].items()} for record in records]
    return [{name: value for name, value in step.items() if value is not None} for step in values]  # too few spans


def test_two_devices_do_not_mix(far_teacher):
    there = torch.ones(3).to(FAR)
    assert isinstance(there, Far)
    assert type(there.cpu()) is torch.Tensor
    assert float((there + torch.tensor(1.0)).sum()) == 6.0
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="one device"):
        far_teacher(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_a_run_is_the_same_wherever_the_teacher_is(tmp_path, far_teacher):
    there, here = trainer(tmp_path / "there", far_teacher), trainer(tmp_path / "here", near_teacher())
    assert there.teacher.device == FAR
    there.fit()
    here.fit()
    assert_same(there, here)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_kd_term(tmp_path, far_teacher, method):
    terms = (kd.lm_term, lambda: kd.kd_term(method=method))
    there, here = (
        trainer(tmp_path / name, model, terms) for name, model in (("t", far_teacher), ("h", near_teacher()))
    )
    there.fit()
    here.fit()
    assert_same(there, here)


def test_more_experts_and_shared_rows(tmp_path, far_teacher):
    terms = (kd.lm_term, lambda: kd.kd_term(teacher_rows="shared"), lambda: kd.feature_term(experts=2))
    there = trainer(tmp_path / "there", far_teacher, terms, more_experts=4)
    here = trainer(tmp_path / "here", near_teacher(), terms, more_experts=4)
    there.fit()
    here.fit()
    assert_same(there, here)


def test_what_stands_around_a_run(tmp_path, far_teacher):
    """Audit, verify, preflight, a cache and the evaluation with a teacher elsewhere."""
    assert kd.audit(pair(), small_data(), far_teacher).method == "bridge"
    run = trainer(tmp_path / "run", far_teacher)
    ready = kd.run_preflight(run)
    assert all(line.verdict != "FAIL" or line.check == "held-out text" for line in ready.rows), ready
    run.fit()
    report = kd.evaluate(run)
    same = trainer(tmp_path / "same", near_teacher())
    same.fit()
    plain = kd.evaluate(same)
    for row in ("teacher", "distilled"):
        bits = plain.rows[row]["bits_per_byte"]
        assert report.rows[row]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    cacheable = tuple(make for make in TERMS if make is not kd.attention_term)
    cached = trainer(tmp_path / "cached", far_teacher, cacheable)
    assert kd.build_cache(cached).complete
    cached.fit()
    assert cached.step == 3
