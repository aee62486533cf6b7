"""kd_kit/gradients.py: norms, shares and cosines of the terms' gradients, where all of them meet."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import pair, part_term, small_data, teacher, tiny_student
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_kit import attention_term, feature_term, kd_term, layerwise_term, lm_term
from kd_kit.gradients import gradient_at, gradient_products, meeting_layer, place_name, pulls
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.readings import Needs
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, Setup
from kd_kit.types import LossValue


def bound(terms, student):
    setup = Setup(student, teacher(), pair())
    return [t.bound(setup) for t in terms]


@pytest.mark.parametrize(
    ("needs", "layer"),
    [
        (Needs(), None),
        (Needs(student_states=frozenset([4, 7])), 4),
        (Needs(student_attention=frozenset([1])), 0),
        (Needs(student_states=frozenset([3]), student_attention=frozenset([3])), 2),
        (Needs(student_states=frozenset([1]), student_attention=frozenset([9])), 1),
    ],
)
def test_the_meeting_layer_lies_below_everything_that_a_term_looks_at(needs, layer):
    assert meeting_layer(needs) == layer


def test_places_have_names():
    assert [place_name(n) for n in (None, 0, 3)] == ["final hidden state", "embeddings", "state after layer 3"]


CASES = {
    "final": lambda: [lm_term(), kd_term(top_k=8)],
    "last layer": lambda: [lm_term(), kd_term(top_k=8), feature_term()],
    "first layer": lambda: [lm_term(), layerwise_term(layers={1: 2}), feature_term()],
    "embeddings": lambda: [lm_term(), attention_term(layers={1: 1}), kd_term(top_k=8)],
}


@pytest.mark.parametrize("case", CASES)
def test_the_products_are_those_of_the_gradients_taken_one_by_one(case):
    """Against a second forward pass in which the state of the meeting point is replaced by a leaf."""
    student = tiny_student().eval()
    terms = bound(CASES[case](), student)
    module = DistillModule(student, terms).eval()
    batch = next(small_data(batch_size=3).batches(0, [0]))
    live = LiveTeacher(teacher(), pair().bridge, all_needs(terms))
    settle_parts(module, live, [batch])
    signal = live.signal(batch)
    _, sums, extras = module(batch, signal, [1.0] * len(terms), True)
    found = extras["gradients"]

    leaf = []
    layer = module.meeting_layer

    def replace(mod, args, output):
        first = output[0] if isinstance(output, tuple) else output
        leaf.append(first.detach().clone().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    where = (
        student.model.norm
        if layer in (None, 2)
        else student.get_input_embeddings()
        if layer == 0
        else student.model.layers[layer - 1]
    )
    assert {"final": None, "last layer": 2, "first layer": 1, "embeddings": 0}[case] == layer
    handle = where.register_forward_hook(replace)
    values = module.values(module.output(batch), signal, batch)
    handle.remove()
    gradients = [
        torch.autograd.grad(values[t.name].sum, leaf[0], retain_graph=True)[0].flatten().double() for t in terms
    ]
    expected = torch.stack([torch.stack([a @ b for b in gradients]) for a in gradients])
    assert all(expected.diagonal() > 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    for name, total in zip([t.name for t in terms], sums.tolist(), strict=True):
        assert total == pytest.approx(float(values[name].sum.detach()), rel=1e-5)


def test_measuring_changes_no_gradient_and_enters_none():
    student = tiny_student().eval()
    terms = [lm_term(), part_term()]
    module = DistillModule(student, terms)
    batch = next(small_data().batches(0, [0]))
    grads = []
    for measure in (False, True):
        module.zero_grad(set_to_none=True)
        total, *_ = module(batch, None, [0.01, 0.02], measure)
        assert all(p.grad is None for p in module.parameters()), "before the backward pass nothing has a gradient"
        total.backward()
        grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


def test_a_term_that_does_not_reach_the_point_has_no_gradient():
    point = torch.randn(2, 3, 4, requires_grad=True)
    own = nn.Parameter(torch.ones(()))
    reached = LossValue((point**2).sum(), torch.tensor(1.0))
    apart, constant = (LossValue(v, torch.tensor(1.0)) for v in (own * 2, torch.tensor(3.0)))
    assert gradient_at(apart, point).eq(0).all()
    assert gradient_at(constant, point).eq(0).all()
    found = gradient_products({"a": reached, "b": apart, "c": constant}, ["c", "a", "b"], point)
    assert found.shape == (3, 3)
    assert float(found[1, 1]) == pytest.approx(float((2 * point.detach()).norm() ** 2), rel=1e-5)
    assert found[0].eq(0).all()
    assert found[2].eq(0).all()


def test_norms_are_of_means_and_shares_of_weighted_norms():
    found = pulls([[36.0, 0.0, -12.0], [0.0, 0.0, 0.0], [-12.0, 0.0, 16.0]], counts=[3, 5, 2], weights=[0.5, 1.0, 2.0])
    assert found.norms == [2.0, 0.0, 2.0]
    assert found.shares == pytest.approx([0.2, 0.0, 0.8])
    assert found.cosines[0] == [1.0, None, -0.5]
    assert found.cosines[1] == [None, None, None]
    assert found.cosines[2][0] == -0.5


def test_nothing_to_look_at_is_no_division_by_zero():
    found = pulls([[0.0, 0.0], [0.0, 0.0]], counts=[0, 0], weights=[1.0, 1.0])
    assert found.norms == [0.0, 0.0]
    assert found.shares == [0.0, 0.0]


def test_a_gradient_that_is_not_finite_is_not_hidden():
    found = pulls([[math.nan, math.nan], [math.nan, 4.0]], counts=[1, 1], weights=[1.0, 1.0])
    assert math.isnan(found.norms[0])
    assert found.norms[1] == 2.0
    assert found.cosines[0][1] is None


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_shares_sum_to_one_and_cosines_are_symmetric(seed, terms):
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(terms, 12, generator=draw) * torch.logspace(-4, 4, terms)[:, None]
    counts = torch.randint(1, 50, (terms,), generator=draw).tolist()
    weights = torch.rand(terms, generator=draw).add(0.01).tolist()
    found = pulls((gradients @ gradients.T).tolist(), counts, weights)
    assert sum(found.shares) == pytest.approx(1.0)
    norms = [float(g.norm()) / c for g, c in zip(gradients, counts, strict=True)]
    assert found.norms == pytest.approx(norms, rel=1e-4)
    for i in range(terms):
        for j in range(terms):
            expected = float(torch.cosine_similarity(gradients[i], gradients[j], dim=0))
            assert found.cosines[i][j] == pytest.approx(expected, abs=1e-3)


def test_a_user_written_term_is_measured_like_any_other():
    def value(output, signal, batch):
        rows = output.hidden.flatten(0, 1)[batch.rows]
        return LossValue((rows**2).sum(), torch.tensor(float(len(rows))))

    own = LossTerm(name="own", weight=1.0, unit="", healthy=(0, 1), value=value)
    module = DistillModule(tiny_student().eval(), [lm_term(), own])
    batch = next(small_data().batches(0, [0]))
    output = module.output(batch, meet=True)
    _, _, extras = module(batch, None, [1.0, 1.0], True)
    rows = output.hidden.detach().flatten(0, 1)[batch.rows]
    assert float(extras["gradients"][1, 1]) == pytest.approx(float((2 * rows).norm() ** 2), rel=1e-4)
