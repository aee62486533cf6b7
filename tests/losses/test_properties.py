"""One suite that every loss passes, whatever its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_kit import losses
from kd_kit.losses import (
    cosine_distance,
    cross_entropy,
    forward_kl,
    gram_distance,
    info_nce,
    jensen_shannon,
    relation_kl,
    relations,
    reverse_kl,
    routing_kl,
    sampled_cells,
    sampled_kl,
    skew_kl,
    sorted_cells,
    sorted_distance,
    sorted_distance_cells,
    span_divergence,
    student_cells,
    tempered,
    top_k_cells,
)

Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of a student's and a teacher's side, one value per row of the first axis (or more per row).

    Attributes:
        loss: (student, teacher) -> values, everything else filled in from the shapes.
        sides: (seed, spread) -> what the loss takes, 5 rows; ``spread`` up to 1e4.
        equal: seed -> two sides that agree, at which the loss is 0 and flat.
        wrong: two shapes that do not fit.
        bound: the largest value that there is; None for none.
        signed: an unbiased estimate may come out negative.
        alone: a row's value does not depend on the other rows.
        flat: no slope where both sides agree; an L1 distance has a corner there, a single estimate a slope.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    sides: Callable[[int, float], Sides]
    equal: Callable[[int], Sides]
    wrong: tuple[tuple[int, ...], tuple[int, ...]] = ((3, 4), (3, 5))
    bound: float | None = None
    signed: bool = False
    alone: bool = True
    flat: bool = True


def normals(seed: int, spread: float, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * spread for shape in shapes]


def log_probs(*sizes: int):
    """5 rows of log-probabilities over so many cells on either side."""

    def sides(seed: int, spread: float) -> Sides:
        return tuple(x.log_softmax(-1) for x in normals(seed, spread, *((5, size) for size in sizes)))

    return sides


def vectors(*shape: int):
    return lambda seed, spread: tuple(normals(seed, spread, shape, shape))


def spans(seed: int, spread: float) -> Sides:
    return tuple(-x.abs() for x in normals(seed, spread, (5, 3), (5, 3)))


def items(seed: int, spread: float) -> Sides:
    return tuple(normals(seed, spread, (5, 6, 4), (5, 6, 7)))


def related(seed: int, spread: float) -> Sides:
    """Relations of 5 windows, 3 rows each, with spans of one token on one side and of two on the other."""
    rows = torch.tensor([1, 3, 5]).expand(5, -1)
    return tuple(
        relations(x, heads=2, rows=rows, boundaries=torch.arange(0, 7 * step, step).expand(5, -1))
        for step, x in enumerate(normals(seed, spread, (5, 7, 8), (5, 13, 12)), start=1)
    )


def routed(seed: int, spread: float) -> Sides:
    student, teacher = normals(seed, spread, (5, 6), (5, 6))
    return student, teacher.softmax(-1)


def twice(sides: Callable[[int, float], Sides]):
    """The student's side on both sides."""
    return lambda seed: (sides(seed, 2.0)[0],) * 2


def related_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return relation_kl(student, teacher, torch.tensor([1, 3, 5]).expand(len(student), -1))


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return gram_distance(student, teacher, torch.ones(student.shape[:2], dtype=torch.bool))


def contrast(student: Tensor, teacher: Tensor) -> Tensor:
    # at a low temperature the floor, log(1 + (n - 1) e^(-1 / temperature)) / log(n), is 0
    return info_nce(student, teacher, torch.arange(len(student)), temperature=0.02)[0]


def tau(student: Tensor, teacher: Tensor) -> Tensor:
    return span_divergence(student, teacher, temperature=2.0)


def cells_and_rest(seed: int) -> Sides:
    """A vocabulary of 9 and its own 4 largest cells with the rest."""
    student, _ = log_probs(9, 9)(seed, 2.0)
    ordered = student.sort(-1, descending=True).values
    return student, torch.cat([ordered[:, :4], ordered[:, 4:].logsumexp(-1, keepdim=True)], dim=-1)


WINDOWS = ((2, 3, 4), (2, 5, 4))
CASES = [
    Case("forward_kl", forward_kl, log_probs(9, 9), twice(log_probs(9, 9))),
    Case("reverse_kl", reverse_kl, log_probs(9, 9), twice(log_probs(9, 9))),
    Case("jensen_shannon", jensen_shannon, log_probs(9, 9), twice(log_probs(9, 9)), bound=math.log(2)),
    Case("skew_kl", skew_kl, log_probs(9, 9), twice(log_probs(9, 9)), bound=-math.log(0.1)),
    Case("sampled_kl", sampled_kl, log_probs(9, 9), twice(log_probs(9, 9)), signed=True, flat=False),
    Case("span_divergence", span_divergence, spans, twice(spans)),
    Case("span_divergence", tau, spans, twice(spans)),
    Case(
        "sorted_distance", sorted_distance, log_probs(9, 12), twice(log_probs(9, 9)), ((3, 4), (2, 5)), 2.0, flat=False
    ),
    Case(
        "sorted_distance_cells",
        sorted_distance_cells,
        log_probs(9, 5),
        cells_and_rest,
        ((3, 4), (2, 5)),
        2.0,
        flat=False,
    ),
    Case("cosine_distance", cosine_distance, vectors(5, 8), twice(vectors(5, 8)), bound=2.0),
    Case("gram_distance", gram_loss, items, twice(items), WINDOWS, 4.0),
    Case("relation_kl", related_loss, related, twice(related), ((2, 4, 3, 7), (2, 4, 3, 8))),
    Case("info_nce", contrast, vectors(5, 8), lambda seed: (torch.eye(5) * 3, torch.eye(5)), alone=False),
    Case("routing_kl", routing_kl, routed, lambda seed: (routed(seed, 2.0)[0], routed(seed, 2.0)[0].softmax(-1))),
]
LOG_PROBS = {"forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "relation_kl"}
ONE_SIDED = {"cross_entropy", "router_z", "switch_balance"}
SUPPORT = {
    "common_heads",
    "relations",
    "sampled_cells",
    "sorted_cells",
    "student_cells",
    "tempered",
    "top_k_cells",
}

each = pytest.mark.parametrize("case", CASES, ids=lambda case: getattr(case.loss, "__name__", case.name))


def test_every_loss_is_in_a_suite():
    assert set(losses.__all__) == {case.name for case in CASES} | ONE_SIDED | SUPPORT
    assert sorted(losses.__all__) == losses.__all__


# ---- what holds for every loss that compares a student with a teacher


@each
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_zero_and_flat_where_both_agree(case, seed):
    student, teacher = case.equal(seed)
    student = student.detach().requires_grad_()
    # log-probabilities are no free numbers: what must be flat is the loss behind the softmax that they came from
    through = student.log_softmax(-1) if case.name in LOG_PROBS else student
    value = case.loss(through, teacher)
    assert value.abs().max() < 2e-6
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    if case.flat:
        assert gradient.abs().max() < 1e-5


@each
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.5, 2.0, 20.0]))
def test_positive_otherwise_and_within_its_bound(case, seed, spread):
    value = case.loss(*case.sides(seed, spread))
    assert value.isfinite().all()
    if not case.signed:
        assert (value > -1e-6).all()
        assert value.sum() > 1e-3
    if case.bound is not None:
        assert (value <= case.bound + 1e-5).all()


@each
@pytest.mark.parametrize("spread", [1e2, 1e4])
@pytest.mark.parametrize("seed", range(5))
def test_finite_at_extreme_inputs(case, seed, spread):
    student, teacher = case.sides(seed, spread)
    student = student.detach().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # nor does a NaN pass on the way, to be masked further on
        value = case.loss(student, teacher)
        (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_float32_out(case, dtype):
    student, teacher = (x.to(dtype) for x in case.sides(3, 2.0))
    value = case.loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, case.loss(student.float(), teacher.float()))
    assert torch.equal(value, case.loss(student, teacher.float())), "the two sides need not have one dtype"


@each
def test_autocast_changes_nothing(case):
    student, teacher = case.sides(3, 2.0)
    expected = case.loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = case.loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@each
def test_the_teacher_receives_no_gradient(case):
    student, teacher = (x.detach().requires_grad_() for x in case.sides(4, 2.0))
    case.loss(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each
def test_one_value_per_row_that_depends_on_that_row(case):
    student, teacher = case.sides(5, 2.0)
    value = case.loss(student, teacher)
    assert len(value) == len(student)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(case.loss(student[order], teacher[order]), value[order])
    if case.alone:
        torch.testing.assert_close(case.loss(student[1:3], teacher[1:3]), value[1:3])


@each
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_not_finite_is_seen(case, side):
    """NaN compares false with everything: a mask written the other way round would make it a loss of 0."""
    student, teacher = (x.detach().clone() for x in case.sides(6, 2.0))
    broken = student if side == "student" else teacher
    broken[0] = torch.nan
    value = case.loss(student, teacher)
    assert value[0].isnan().all()
    if case.alone or side == "student":
        assert value[1:].isfinite().all()


@each
def test_the_error_names_both_shapes(case):
    ours, theirs = case.wrong
    shapes = (
        rf"{case.name}: expected .*student \({', '.join(map(str, ours))}\).* teacher \({', '.join(map(str, theirs))}\)"
    )
    with pytest.raises(ValueError, match=shapes + ".*; "):
        case.loss(torch.zeros(ours), torch.zeros(theirs))


# ---- what holds for divergences over cells

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, skew_kl]
BOUNDS = {jensen_shannon: math.log(2), skew_kl: -math.log(0.1)}

every = pytest.mark.parametrize("divergence", DIVERGENCES)


def both_sides(seed: int, rows: int = 5, vocab: int = 12, k: int = 4, homeless: float = 0.1, spread: float = 2.0):
    """Student logits with gradient, and the teacher's ids and cells (tail last)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).mul(spread).requires_grad_()
    probs = torch.randn(rows, vocab, generator=generator).mul(spread).softmax(-1) * (1 - homeless)
    ids, log_probs, tail = top_k_cells(torch.cat([probs, torch.full((rows, 1), homeless)], dim=-1), k)
    return logits, ids, torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1)


def naive(divergence, student, teacher):
    """The textbook sum, one cell at a time in float64, with gradient to the student."""
    out = []
    for n in range(len(teacher)):
        total = torch.zeros((), dtype=torch.float64)
        for c in range(teacher.shape[1]):
            p, q = teacher[n, c].detach().double().exp(), student[n, c].double().exp()
            if divergence is forward_kl and p > 0:
                total = total + p * (p / q).log()
            if divergence is reverse_kl and q > 0:
                total = total + q * (q / p).log()
            if divergence is jensen_shannon:
                m = (p + q) / 2
                total = total + (p * (p / m).log() / 2 if p > 0 else 0) + (q * (q / m).log() / 2 if q > 0 else 0)
            if divergence is skew_kl and p > 0:
                total = total + p * (p / (0.1 * p + 0.9 * q)).log()
        out.append(total)
    return torch.stack(out)


@every
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11), homeless=st.sampled_from([0.0, 0.3]))
def test_is_the_naive_sum_value_and_gradient(divergence, seed, k, homeless):
    logits, ids, teacher = both_sides(seed, k=k, homeless=homeless, rows=2)
    cells, _ = student_cells(logits, ids)
    value = divergence(cells, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    expected = naive(divergence, cells, teacher)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(value.double(), expected, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(gradient, theirs, atol=2e-6, rtol=1e-4)


@every
@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_zero_when_equal_and_positive_otherwise(divergence, seed, spread):
    logits, ids, teacher = both_sides(seed, spread=spread)
    cells, _ = student_cells(logits, ids)
    (gradient,) = torch.autograd.grad(divergence(cells, cells.detach()).sum(), logits)
    assert divergence(cells, cells).abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5
    other = divergence(cells, teacher)
    assert (other > -1e-6).all()
    apart = (cells.exp() - teacher.exp()).abs().sum(-1) > 0.05
    assert (other[apart] > 1e-4).all()
    if divergence in BOUNDS:
        assert (other <= BOUNDS[divergence] + 1e-5).all()


def test_the_cross_entropy_of_a_certain_student_is_zero():
    logits = torch.full((1, 6), -100.0)
    logits[0, 2] = 0
    assert cross_entropy(logits, torch.tensor([2])) == 0
    assert cross_entropy(logits, torch.tensor([3])) == 100


def test_a_log_z_that_is_given_is_taken():
    logits, targets = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([1])
    torch.testing.assert_close(cross_entropy(logits, targets, torch.tensor([7.0])), torch.tensor([6.0]))


@every
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_finite_at_extreme_logits(divergence, size, temperature, k):
    """Student and teacher as certain as can be, right and wrong; at K = V nothing is left for the tail."""
    signs = torch.tensor([[1.0] + [-1.0] * 11, [-1.0] * 11 + [1.0], [-1.0] * 6 + [1.0] * 6, [1.0] * 12])
    logits = (signs * size).requires_grad_()
    probs = torch.cat([(signs.flip(0) * size).softmax(-1), torch.zeros(4, 1)], dim=-1)
    ids, log_probs, tail = top_k_cells(probs, k)
    teacher = torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1)
    cells, log_z = student_cells(logits, ids, log_probs > -math.inf)
    if temperature != 1.0:
        cells, teacher = tempered(cells, temperature), tempered(teacher, temperature)
    value = divergence(cells, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert (value > -1e-6).all()
    assert (value <= 3 * size / temperature + 60).all()
    assert gradient.isfinite().all()
    assert log_z.isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_cross_entropy_is_finite_at_extreme_logits(size):
    logits = (torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]) * size).requires_grad_()
    value = cross_entropy(logits, torch.tensor([1, 0]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, torch.tensor([2 * size, 2 * size + math.log(2)]))
    assert gradient.isfinite().all()


@every
def test_unused_cells_do_not_exist(divergence):
    """-inf on both sides equals leaving the cell out, in value and gradient."""
    logits, ids, teacher = both_sides(5, homeless=0.0)
    used = torch.ones_like(ids, dtype=torch.bool)
    used[:, 2] = False
    keep = [0, 1, 3, 4]
    shorter = teacher[:, keep].log_softmax(-1)
    teacher = torch.full_like(teacher, -math.inf)
    teacher[:, keep] = shorter
    value = divergence(student_cells(logits, ids, used)[0], teacher)
    expected = divergence(student_cells(logits, ids[:, [0, 1, 3]])[0], shorter)
    torch.testing.assert_close(value, expected)
    with torch.autograd.set_detect_anomaly(True):
        (gradient,) = torch.autograd.grad(divergence(student_cells(logits, ids, used)[0], teacher).sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, theirs)


@every
@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11))
def test_over_cells_at_most_the_one_over_tokens(divergence, seed, k):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 12, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    ids = teacher.topk(k, dim=-1).indices
    bucketed = divergence(student_cells(student, ids)[0], student_cells(teacher, ids)[0])
    assert (bucketed <= divergence(student, teacher) + 1e-5).all()


@every
def test_every_leading_shape_is_kept(divergence):
    logits, ids, teacher = both_sides(6, rows=6)
    cells = student_cells(logits, ids)[0]
    flat = divergence(cells, teacher)
    assert torch.equal(divergence(cells.view(2, 3, 5), teacher.view(2, 3, 5)), flat.view(2, 3))
    assert divergence(cells[:0], teacher[:0]).shape == (0,)


@every
def test_relabelled_cells_change_nothing(divergence):
    logits, ids, teacher = both_sides(7)
    cells = student_cells(logits, ids)[0]
    order = torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(divergence(cells[:, order], teacher[:, order]), divergence(cells, teacher))


# ---- an estimate from draws


@given(st.integers(0, 1000))
def test_an_estimate_is_the_mean_over_all_draws_value_and_gradient(seed):
    """Draws into the tail count as 0, and count."""
    student, teacher = (x.detach() for x in log_probs(9, 9)(seed, 2.0))
    student.requires_grad_()
    there = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    value = sampled_kl(student, torch.where(there, teacher, -math.inf))
    expected = torch.stack(
        [
            sum((teacher[n, k] - student[n, k] for k in range(9) if there[n, k]), student[n, 0] * 0) / 9
            for n in range(len(teacher))
        ]
    )
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, there.float() / -9)


@given(seed=st.integers(0, 1000), k=st.integers(1, 40))
def test_draws_are_equal_steps_through_the_distribution(seed, k):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(3, 7, generator=generator).mul(2).softmax(-1)
    place = torch.randint(0, 2**40, (3,), generator=generator)
    ids, log_p, tail = sampled_cells(probs, k, place)
    torch.testing.assert_close(tail, probs[:, -1].log())
    for n in range(3):
        counts = torch.zeros(7)
        counts[:6] = torch.bincount(ids[n][log_p[n] != -math.inf], minlength=6)[:6].float()
        counts[6] = (log_p[n] == -math.inf).sum()
        assert ((counts - k * probs[n]).abs() < 1).all(), "a token of mass p is drawn K p times, rounded up or down"
        there = log_p[n] != -math.inf
        torch.testing.assert_close(log_p[n][there], probs[n].log()[ids[n][there]])
    assert all(torch.equal(a, b) for a, b in zip(sampled_cells(probs, k, place), (ids, log_p, tail), strict=True))


def test_draws_are_unbiased_over_places():
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).expand(20_000, 4)
    ids, log_p, _ = sampled_cells(probs, 1, torch.arange(20_000))
    drawn = torch.where(log_p[:, 0] == -math.inf, 3, ids[:, 0])
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, probs[0], atol=0.015, rtol=0)


def test_a_token_without_mass_is_never_drawn():
    """Nor one whose interval ends just where a step falls."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(1000, 5)
    ids, _, _ = sampled_cells(probs, 4, torch.arange(1000))
    assert set(ids.flatten().tolist()) == {1, 3}


def test_no_draw_is_refused():
    with pytest.raises(ValueError, match="sampled_cells: expected at least 1 draw, got 0"):
        sampled_cells(torch.ones(1, 3) / 3, 0, torch.zeros(1, dtype=torch.long))


@given(seed=st.integers(0, 1000), k=st.integers(1, 7))
def test_sorted_cells_hold_the_largest_and_the_rest(seed, k):
    probs = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)
    kept, tail = sorted_cells(probs, k)
    ordered = probs.sort(-1, descending=True).values
    torch.testing.assert_close(kept, ordered[:, :k].log())
    torch.testing.assert_close(tail.exp(), ordered[:, k:].sum(-1), atol=1e-6, rtol=1e-5)
    assert tail.isfinite().all(), "where nothing is left too"
