"""Statistics, least-squares starts and mixtures of maps, against numpy and plain loops."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from kd_kit.losses import cosine_distance, switch_balance
from kd_kit.projectors import KnowledgeRouter, Moments, Projector


def random(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unlike(n: int, width: int, seed: int = 0):
    """States whose channels differ as those of a residual stream do: two stand far from 0, one is large, one tiny."""
    states = random(n, width, seed=seed)
    states[:, 0] += 3001.37
    states[:, 1] = states[:, 1] * 0.1 - 7123.77
    states[:, 2] *= 500
    states[:, 3] *= 0.05
    return states


def settled(one, student, teacher=None, pieces: int = 1):
    """A module that has observed these rows, in so many pieces of unequal size; its least squares without a ridge."""
    for part in one.modules():
        if isinstance(part, Projector):
            part.ridge = 1e-6
    cuts = [len(student) * k * (k + 1) // (pieces * (pieces + 1)) for k in range(pieces + 1)]
    for a, b in pairwise(cuts):
        one.observe(*(x[a:b] for x in (student, teacher) if x is not None))
    one.settle()
    return one


def standardised(states) -> np.ndarray:
    states = states.double().numpy()
    return (states - states.mean(0)) / states.std(0)


def same(ours, theirs, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(ours, torch.as_tensor(theirs).to(ours.dtype), atol=atol, rtol=rtol)


# ---- moments


@pytest.mark.parametrize("pieces", [1, 4])
def test_moments_are_numpys_over_everything_observed(pieces):
    states = unlike(90, 7)
    moments = settled(Moments(7), states, pieces=pieces)
    assert moments.count == 90
    same(moments.mean, states.double().numpy().mean(0), rtol=1e-7)
    same(moments.deviation, states.double().numpy().std(0), atol=0)
    out = moments(states)
    assert out.dtype == torch.float32
    same(out.mean(0), np.zeros(7), atol=2e-3)  # at 7,124 a float32 tells steps of 5e-4 apart
    same(out.std(0, correction=0), np.ones(7), atol=1e-3)


def test_moments_take_leading_axes():
    states = random(30, 4)
    moments = settled(Moments(4), states)
    assert torch.equal(moments(states.view(5, 6, 4)), moments(states).view(5, 6, 4))


@pytest.mark.parametrize("still", [2, 10], ids=["a few", "most"])
@pytest.mark.parametrize("value", [0.0, 3000.1])
def test_a_channel_that_never_moves_stays_at_0(still, value):
    states = random(64, 12) * 0.01
    states[:, :still] = value
    moments = settled(Moments(12), states, pieces=3)
    typical = float(np.median(states.double().numpy().std(0)[still:]))
    same(moments.deviation[:still], np.full(still, 1e-3 * typical), rtol=0.2, atol=0)
    same(moments.deviation[still:], states.double().numpy().std(0)[still:], atol=0)
    assert not moments(states)[:, :still].any()


def test_no_channel_moves():
    moments = settled(Moments(3), torch.full((5, 3), 7.3))
    assert torch.equal(moments.deviation, torch.ones(3))
    assert not moments(torch.full((2, 3), 7.3)).any()


def test_a_channel_that_hardly_moves_is_held_by_the_others():
    """A thousandth of the typical deviation is the least: what is below is rounding."""
    states = random(64, 9)
    states[:, 4] *= 1e-6
    moments = settled(Moments(9), states)
    typical = float(np.median(states.double().numpy().std(0)))
    same(moments.deviation[4], 1e-3 * typical, rtol=1e-5, atol=0)


def test_moments_are_frozen_and_can_be_forgotten():
    first, second = random(40, 3), random(20, 3, seed=1) * 5 + 2
    moments = settled(Moments(3), first)
    before = moments(second)
    moments.observe(second)
    moments.train()
    assert torch.equal(moments(second), before)
    moments.settle()
    same(moments.mean, torch.cat([first, second]).double().mean(0))
    moments.settle()
    same(moments.deviation, torch.cat([first, second]).double().std(0, correction=0))
    moments.forget()
    assert moments.count == 0
    same(moments.mean, torch.cat([first, second]).double().mean(0))  # what is frozen stays until settled anew
    settled(moments, second)
    same(moments.mean, second.double().mean(0))
    same(moments.deviation, second.double().std(0, correction=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_are_those_of_the_same_numbers(dtype):
    states = (random(50, 6) * 30 + 100).to(dtype)
    half, full = settled(Moments(6), states), settled(Moments(6), states.float())
    assert torch.equal(half.mean, full.mean)
    assert torch.equal(half.deviation, full.deviation)
    assert half(states).dtype == torch.float32
    assert torch.equal(half(states), full(states.float()))


def test_moments_of_large_half_do_not_overflow():
    states = torch.full((40, 2), 60000.0, dtype=torch.float16)
    states[::2] = -60000.0
    same(settled(Moments(2), states).deviation, [59999.0, 59999.0], rtol=1e-3)


def test_observing_holds_no_graph():
    states = random(10, 3).requires_grad_()
    moments = settled(Moments(3), states)
    assert not moments.mean.requires_grad
    assert not moments.shifted_mean.requires_grad


def test_moments_are_saved():
    moments = settled(Moments(7), unlike(30, 7))
    other = Moments(7)
    other.load_state_dict(copy.deepcopy(moments.state_dict()))
    assert torch.equal(other(unlike(5, 7, seed=1)), moments(unlike(5, 7, seed=1)))


def few():
    return [
        (lambda n: settled(Moments(3), random(n, 3))),
        (lambda n: settled(Projector(3, 4), random(n, 3), random(n, 4))),
        (lambda n: settled(KnowledgeRouter(3, 4), random(n, 3), random(n, 4))),
    ]


@pytest.mark.parametrize("make", few(), ids=["moments", "projector", "router"])
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_spans_are_refused(make, n):
    with pytest.raises(ValueError, match=f"at least two aligned spans in the first batches of the run, got {n}; is"):
        make(n)
    make(2)


def test_an_empty_first_batch_changes_nothing():
    states = unlike(20, 5)
    late, plain = Moments(5), settled(Moments(5), states)
    late.observe(states[:0])
    settled(late, states)
    assert torch.equal(late.mean, plain.mean)
    assert torch.equal(late.deviation, plain.deviation)


def test_three_massive_channels_are_not_the_teacher():
    """The measured fact, with made-up numbers: 3 of 1,024 channels at 39 make 82% of a raw cosine, and 0.3% of ours."""
    n, width, massive = 400, 1024, 3
    teacher = random(n, width)
    teacher[:, :massive] = 39 + 4 * teacher[:, :massive]
    student = random(n, width, seed=1)
    student[:, :massive] = teacher[:, :massive]
    assert float(cosine_distance(student, teacher).mean()) == pytest.approx(0.18, abs=0.01)
    ours, theirs = settled(Moments(width), student), settled(Moments(width), teacher)
    assert float(cosine_distance(ours(student), theirs(teacher)).mean()) == pytest.approx(0.997, abs=0.003)


# ---- one map


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("widths", [(6, 9), (9, 6), (7, 7)])
def test_the_start_is_numpys_least_squares(widths, pieces):
    student, teacher = unlike(200, widths[0]), unlike(200, widths[1], seed=1)
    teacher[:, 4:] += (student - student.mean(0))[:, 4:6] @ random(2, widths[1] - 4, seed=2)
    projector = settled(Projector(*widths), student, teacher, pieces=pieces)
    x, y = standardised(student), standardised(teacher)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    same(projector.map.weight.detach(), expected.T)
    assert not projector.map.bias.any()
    same(projector(student).detach(), x @ expected, atol=2e-3)
    same(projector.teacher(teacher), y, atol=2e-3)


def test_the_start_knows_all_that_a_linear_map_can():
    student = unlike(300, 6)
    teacher = student.double() @ random(6, 11, seed=1).double() + 4.0
    projector = settled(Projector(6, 11), student, teacher.float())
    assert cosine_distance(projector(student), projector.teacher(teacher)).abs().max() < 1e-3
    # and of text that it has not seen
    other = unlike(50, 6, seed=5)
    there = other.double() @ random(6, 11, seed=1).double() + 4.0
    assert cosine_distance(projector(other), projector.teacher(there)).abs().max() < 1e-3


def test_fewer_spans_than_channels_give_the_smallest_map():
    student, teacher = random(10, 40), random(10, 7, seed=1)
    projector = settled(Projector(40, 7), student, teacher)
    x, y = standardised(student), standardised(teacher)
    smallest = np.linalg.lstsq(x, y, rcond=1e-9)[0]
    same(projector.map.weight.detach(), smallest.T, atol=1e-3)
    assert cosine_distance(projector(student), projector.teacher(teacher)).abs().max() < 1e-4


def test_with_as_many_spans_as_channels_the_ridge_keeps_the_map_from_learning_noise_by_heart():
    """Measured on new text: without it a map fitted to 256 spans of 256 channels knows next to nothing."""
    mix = random(64, 64, seed=7).double() / 8
    truth = random(64, 32, seed=8).double()

    def states(n: int, seed: int):
        x = random(n, 64, seed=seed).double() @ mix
        return x.float(), (x @ truth + 3.0 * random(n, 32, seed=seed + 1).double()).float()

    seen, new = states(70, 20), states(500, 30)
    apart = {}
    for ridge in (1e-6, None):
        projector = Projector(64, 32)
        projector.ridge = ridge
        projector.observe(*seen)
        projector.settle()
        apart[ridge] = float(cosine_distance(projector(new[0]), projector.teacher(new[1])).detach().mean())
    assert apart[None] < 0.7 * apart[1e-6]


def test_states_that_are_not_finite_are_refused():
    broken = random(20, 5)
    broken[3, 2] = math.inf
    with pytest.raises(ValueError, match="expected finite hidden states"):
        settled(Projector(5, 5), broken, random(20, 5))


def test_two_channels_that_are_one_stay_finite():
    student = random(50, 4)
    student = torch.cat([student, student, torch.full((50, 1), 3000.1)], dim=1)
    projector = settled(Projector(9, 5), student, random(50, 5, seed=1))
    assert projector.map.weight.isfinite().all()
    assert projector.map.weight.abs().max() < 5


def test_settling_twice_is_settling_once():
    student, teacher = unlike(40, 5), unlike(40, 6, seed=1)
    projector = settled(Projector(5, 6), student, teacher)
    before = copy.deepcopy(projector.state_dict())
    with torch.no_grad():
        projector.map.weight.add_(1.0)
        projector.map.bias.add_(1.0)
    projector.settle()
    for name, value in projector.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_projector_forgets_all():
    projector = settled(Projector(5, 6), random(40, 5), random(40, 6, seed=1))
    projector.forget()
    settled(projector, unlike(30, 5), unlike(30, 6, seed=2))
    fresh = settled(Projector(5, 6), unlike(30, 5), unlike(30, 6, seed=2))
    for name, value in projector.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_the_students_statistics_are_the_students():
    """Of equal widths too: neither side is measured with the other's numbers."""
    student, teacher = random(60, 5) * 3 + 1, random(60, 5, seed=1) * 0.2 - 8
    projector = settled(Projector(5, 5), student, teacher)
    same(projector.student.mean, student.double().mean(0))
    same(projector.teacher.mean, teacher.double().mean(0))
    same(projector.student.deviation, student.double().std(0, correction=0))
    same(projector.teacher.deviation, teacher.double().std(0, correction=0))


def test_the_gradient_is_that_of_the_formula():
    student, teacher = unlike(40, 5), unlike(40, 6, seed=1)
    projector = settled(Projector(5, 6), student, teacher)
    states = unlike(8, 5, seed=3).requires_grad_()
    weights = random(8, 6, seed=4)
    (projector(states) * weights).sum().backward()
    same(states.grad, weights @ projector.map.weight.detach() / projector.student.deviation)
    same(projector.map.weight.grad, weights.T @ projector.student(states.detach()), rtol=1e-4, atol=1e-4)
    same(projector.map.bias.grad, weights.sum(0))
    assert {name for name, _ in projector.named_parameters()} == {"map.weight", "map.bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [Projector, KnowledgeRouter])
def test_float32_under_autocast_and_of_half_outside(make, dtype):
    """Matrix products in float32 wherever they run: half precision and float32 projectors once did not meet."""
    student, teacher = random(40, 5), random(40, 6, seed=1)
    plain = settled(make(5, 6), student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = settled(make(5, 6), student, teacher)
        within = plain(student)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, cast.state_dict()[name]), name
    outside, half, same_numbers = plain(student), plain(student.to(dtype)), plain(student.to(dtype).float())
    if make is KnowledgeRouter:
        for name in ("balance", "z", "load"):
            assert within[1][name].dtype == half[1][name].dtype == torch.float32
            assert torch.equal(within[1][name], outside[1][name])
            assert torch.equal(half[1][name], same_numbers[1][name])
        within, outside, half, same_numbers = within[0], outside[0], half[0], same_numbers[0]
    assert within.dtype == half.dtype == torch.float32
    assert torch.equal(within, outside)
    assert torch.equal(half, same_numbers)


@pytest.mark.parametrize("make", [Projector, KnowledgeRouter])
def test_all_of_it_is_saved(make):
    one = settled(make(5, 6), unlike(40, 5), unlike(40, 6, seed=1))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(random(*parameter.shape, seed=2))
    other = make(5, 6)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    states = unlike(7, 5, seed=3)
    ours, theirs = (x(states)[0] if make is KnowledgeRouter else x(states) for x in (one, other))
    assert torch.equal(ours, theirs)
    assert torch.equal(one.teacher(unlike(3, 6)), other.teacher(unlike(3, 6)))


# ---- a mixture of maps


def router(experts=4, active=2, seed=0, moved=True, width=5, to=6):
    """A knowledge router whose maps have come apart."""
    one = settled(
        KnowledgeRouter(width, to, experts=experts, active=active, seed=seed), random(50, width), random(50, to, seed=1)
    )
    if moved:
        with torch.no_grad():
            one.maps.normal_(std=0.5, generator=torch.Generator().manual_seed(9))
            one.gate.weight.mul_(3)
    return one


def naive(one: KnowledgeRouter, states):
    """The mixture's guess, one span at a time; the gate sees the state without pulling at it."""
    rows, load = [], torch.zeros(len(one.maps))
    for state in states:
        x = (state - one.shared.student.mean) / one.shared.student.deviation
        scores = torch.stack([(one.gate.weight[e] * x.detach()).sum() for e in range(len(one.maps))])
        probs = scores.exp() / scores.exp().sum()
        best = probs.detach().argsort(descending=True)[: one.active].tolist()
        total = sum(probs[e] for e in best) if one.active > 1 else 1.0
        row = one.shared.map.weight @ x + one.shared.map.bias
        for expert in best:
            row = row + probs[expert] / total * (one.maps[expert] @ x)
            load[expert] += 1
        rows.append(row)
    return torch.stack(rows), load


@pytest.mark.parametrize(("experts", "active"), [(4, 1), (4, 2), (4, 3), (3, 3), (2, 1)])
def test_the_mixture_is_the_naive_loop_value_and_gradient(experts, active):
    one = router(experts, active)
    weights = random(12, 6, seed=5)
    found = []
    for function in (one, lambda states: naive(one, states)):
        one.zero_grad()
        states = random(12, 5, seed=4).requires_grad_()
        guess, measured = function(states)
        (guess * weights).sum().backward()
        load = measured["load"] if isinstance(measured, dict) else measured
        found.append((guess.detach(), load, states.grad, {n: p.grad.clone() for n, p in one.named_parameters()}))
    ours, theirs = found
    same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert int(ours[1].sum()) == 12 * active
    same(ours[2], theirs[2], atol=1e-4)
    for name in theirs[3]:
        same(ours[3][name], theirs[3][name], atol=1e-4, rtol=1e-4)
    if (experts, active) != (3, 3):
        assert ours[3]["gate.weight"].abs().max() > 1e-3, "also of one alone: its weight is its probability"


def test_it_starts_as_the_least_squares_map():
    student, teacher = random(50, 5), random(50, 6, seed=1)
    one = settled(KnowledgeRouter(5, 6), student, teacher)
    plain = settled(Projector(5, 6), student, teacher)
    assert torch.equal(one(student)[0], plain(student))
    assert torch.equal(one.teacher(teacher), plain.teacher(teacher))


def test_what_the_maps_are_sent_makes_them_differ():
    """From equal maps, one step on states of two kinds: the maps are no longer one."""
    one = router(moved=False)
    states = random(40, 5, seed=4)
    one(states)[0].square().sum().backward()
    grads = one.maps.grad
    assert all(g.abs().max() > 1e-4 for g in grads)
    assert min(float((grads[a] - grads[b]).abs().max()) for a in range(4) for b in range(a)) > 1e-3


def test_the_seed_is_the_gates():
    torch.manual_seed(1)
    first = KnowledgeRouter(5, 6, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.gate.weight, KnowledgeRouter(5, 6, seed=3).gate.weight)
    assert not torch.equal(first.gate.weight, KnowledgeRouter(5, 6, seed=4).gate.weight)


def test_balance_and_z_are_the_naive_ones():
    one = router()
    states = random(30, 5, seed=4)
    _, measured = one(states)
    logits = one.shared.student(states) @ one.gate.weight.T
    probs = logits.softmax(-1)
    share = naive(one, states)[1] / (30 * one.active)
    same(measured["balance"], 4 * sum(share[e] * probs[:, e].mean() for e in range(4)))
    same(measured["z"], torch.stack([row.exp().sum().log() ** 2 for row in logits]))
    assert measured["z"].shape == (30,)


@pytest.mark.parametrize("what", ["balance", "z"])
def test_balance_and_z_steer_the_gate_and_nothing_else(what):
    one = router()
    states = random(30, 5, seed=4).requires_grad_()
    one(states)[1][what].sum().backward()
    assert states.grad is None
    assert one.gate.weight.grad.abs().max() > 1e-4
    assert one.maps.grad is None
    assert one.shared.map.weight.grad is None


def collapsed(expert: int, experts: int = 4, active: int = 1):
    """A router that sends every span to one expert, whatever comes: the states it is shown have a constant channel."""
    one = KnowledgeRouter(5, 6, experts=experts, active=active)
    with torch.no_grad():
        one.gate.weight.mul_(0.1)
        one.gate.weight[expert, 0] = 8.0
    return one


def leaning(n: int, seed: int = 0):
    states = random(n, 5, seed=seed)
    states[:, 0] = 1.0
    return states


def test_balance_is_per_layer_and_never_pooled():
    """Every layer collapsed on an expert of its own: pooled, that looks perfect."""
    layers = [collapsed(expert) for expert in range(4)]
    states = leaning(64)
    each = [layer(states)[1] for layer in layers]
    for expert, measured in enumerate(each):
        assert measured["load"].tolist() == [64.0 if e == expert else 0.0 for e in range(4)]
        assert float(measured["balance"].detach()) == pytest.approx(4.0, abs=0.05)
    probs = torch.cat([layer.gate(states).softmax(-1) for layer in layers]).detach()
    assert float(switch_balance(probs, probs.argmax(-1, keepdim=True))) == pytest.approx(1.0, abs=1e-3)


def test_training_on_the_balance_alone_heals_a_collapsed_gate():
    one = collapsed(2, active=2)
    states = leaning(128)
    before = float(one(states)[1]["balance"].detach())
    assert before > 1.9, "X / k is 2"
    optimizer = torch.optim.Adam([one.gate.weight], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        one(states)[1]["balance"].backward()
        optimizer.step()
    measured = one(leaning(128, seed=1))[1]
    assert float(measured["balance"].detach()) < 1.1
    assert float(measured["load"].max()) / 256 < 0.5


def test_no_span_is_no_balance():
    one = router()
    guess, measured = one(random(0, 5))
    assert guess.shape == (0, 6)
    assert measured["z"].shape == (0,)
    assert float(measured["balance"].detach()) == 0
    assert measured["load"].tolist() == [0, 0, 0, 0]
    (guess.sum() + measured["balance"] + measured["z"].sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in one.parameters())


@pytest.mark.parametrize(("experts", "active"), [(1, 1), (0, 0), (4, 0), (4, 5), (2, -1)])
def test_a_mixture_of_nothing_is_refused(experts, active):
    with pytest.raises(ValueError, match=f"got {experts} experts and {active} active"):
        KnowledgeRouter(5, 6, experts=experts, active=active)


def test_a_router_forgets_and_settles_as_a_projector():
    one = router(moved=False)
    one.forget()
    settled(one, unlike(30, 5), unlike(30, 6, seed=2))
    plain = settled(Projector(5, 6), unlike(30, 5), unlike(30, 6, seed=2))
    assert torch.equal(one.shared.map.weight, plain.map.weight)
    assert torch.equal(one.teacher.mean, plain.teacher.mean)
