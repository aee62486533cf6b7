"""Relations against a loop over heads, rows and tokens, and what makes two tokenizations comparable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_kit.losses import common_heads, relation_kl, relations


def example(seed: int, b: int = 2, t: int = 17, width: int = 12, spans: int = 6, rows: int = 4, scale: float = 1.0):
    """States, rows and boundaries of windows of different lengths; the shorter ones' boundaries are padded."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(b, t, width, generator=generator).mul(scale).requires_grad_()
    boundaries, numbers = [], []
    for i in range(b):
        real = max(spans - 2 * i, 1)
        ends = torch.randperm(t - 2, generator=generator)[: real + 1].sort().values
        boundaries.append(torch.cat([ends, ends[-1:].expand(spans - real)]))
        numbers.append(torch.randint(0, real, (rows,), generator=generator))
    return states, torch.stack(numbers), torch.stack(boundaries)


def naive(states, heads, rows, boundaries):
    """[B, heads, R, C + 1] log-probabilities: softmax over tokens, then sums, in float64."""
    b, _, width = states.shape
    w = width // heads
    out = torch.full((b, heads, rows.shape[1], boundaries.shape[1]), -math.inf, dtype=torch.float64)
    for i in range(b):
        for h in range(heads):
            x = states[i, :, h * w : (h + 1) * w].double()
            for r, span in enumerate(rows[i].tolist()):
                at = int(boundaries[i, span + 1])
                probs = (x[: at + 1] @ x[at] / math.sqrt(w)).softmax(0)
                first = 0
                for c in range(boundaries.shape[1]):
                    last = int(boundaries[i, c])
                    if first <= last <= at:
                        out[i, h, r, c] = probs[first : last + 1].sum().log()
                    first = last + 1
    return out


def weighted(log_probs):
    """A sum over the cells that are there, every one with another weight."""
    there = log_probs != -math.inf
    weights = torch.linspace(0.1, 1, log_probs.numel(), dtype=log_probs.dtype).view(log_probs.shape)
    return torch.where(there, torch.where(there, log_probs, 0.0) * weights, 0.0).sum()


@given(seed=st.integers(0, 300), heads=st.sampled_from([1, 2, 3, 12]), scale=st.sampled_from([0.3, 1.0, 3.0]))
def test_is_the_naive_loop_value_and_gradient(seed, heads, scale):
    states, rows, boundaries = example(seed, scale=scale)
    ours = relations(states, heads=heads, rows=rows, boundaries=boundaries)
    theirs = naive(states, heads, rows, boundaries)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(weighted(ours), states)
    (expected,) = torch.autograd.grad(weighted(theirs), states)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_worked_out_by_hand():
    # one head of width 4, so scores are halved products: the row at token 3 gives tokens 0..3 odds of 1, 2, 3, 2
    own = math.sqrt(2 * math.log(2))
    states = torch.zeros(1, 6, 4)
    states[0, :4, 0] = torch.tensor([1.0, 2.0, 3.0, 2.0]).log() * 2 / own
    log_probs = relations(states, heads=1, rows=torch.tensor([[1]]), boundaries=torch.tensor([[0, 1, 3, 5]]))
    torch.testing.assert_close(log_probs[0, 0, 0].exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8, 0.0]))


def test_a_row_sums_to_one_over_exactly_its_cells():
    states, rows, boundaries = example(0, rows=5)
    log_probs = relations(states, heads=3, rows=rows, boundaries=boundaries)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3, 5))
    used = torch.arange(boundaries.shape[1]) <= rows[:, None, :, None] + 1
    assert torch.equal(log_probs != -math.inf, used.expand_as(log_probs))
    assert (log_probs.dtype, log_probs.shape) == (torch.float32, (2, 3, 5, 7))


def test_one_tokenization_is_plain_minilm():
    """With every token a span, rows are those of softmax(x x^T / sqrt(w))."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 8, generator=generator)
    log_probs = relations(x, heads=2, rows=torch.arange(8)[None], boundaries=torch.arange(9)[None])
    split = x.view(1, 9, 2, 4).transpose(1, 2)
    scores = split @ split.mT / 2
    plain = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).log_softmax(-1)
    torch.testing.assert_close(log_probs, plain[:, :, 1:])


def test_a_span_weighs_the_same_however_it_is_cut():
    """One token, or two with half of its share each."""
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    row = x[0, 3]
    half = x[0, 2] - row * (math.log(2) * math.sqrt(6)) / row.square().sum()  # its score is less by ln 2
    longer = torch.stack([x[0, 0], x[0, 1], half, half, row])[None]
    ours = relations(x, heads=1, rows=torch.tensor([[2]]), boundaries=torch.arange(4)[None])
    theirs = relations(longer, heads=1, rows=torch.tensor([[2]]), boundaries=torch.tensor([[0, 1, 3, 4]]))
    torch.testing.assert_close(ours, theirs)


def test_padding_changes_nothing():
    states, rows, boundaries = example(2)
    ours = relations(states, heads=3, rows=rows, boundaries=boundaries)
    (expected,) = torch.autograd.grad(weighted(ours), states)
    longer = torch.cat([states.detach(), torch.full((2, 5, 12), torch.nan)], dim=1).requires_grad_()
    more = torch.cat([boundaries, boundaries[:, -1:].expand(2, 3)], dim=1)
    padded = relations(longer, heads=3, rows=rows, boundaries=more)
    torch.testing.assert_close(padded[..., :7], ours)
    assert (padded[..., 7:] == -math.inf).all()
    (gradient,) = torch.autograd.grad(weighted(padded[..., :7]), longer)
    torch.testing.assert_close(gradient[:, :17], expected)
    assert gradient[:, 17:].eq(0).all()


def test_tokens_behind_the_last_boundary_may_be_anything():
    states, rows, boundaries = example(3)
    expected = relations(states, heads=2, rows=rows, boundaries=boundaries)
    behind = torch.arange(17) > boundaries[:, -1:]
    assert behind.any()
    broken = torch.where(behind.unsqueeze(-1), torch.nan, states.detach()).requires_grad_()
    ours = relations(broken, heads=2, rows=rows, boundaries=boundaries)
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(weighted(ours), broken)
    (theirs,) = torch.autograd.grad(weighted(expected), states)
    torch.testing.assert_close(gradient, theirs)


def test_nothing_is_seen_ahead_of_a_row():
    states, _, boundaries = example(4, b=1)
    rows = torch.tensor([[2]])
    ours = relations(states, heads=2, rows=rows, boundaries=boundaries)
    (gradient,) = torch.autograd.grad(weighted(ours), states)
    at = int(boundaries[0, 3])
    assert gradient[0, at + 1 :].eq(0).all()
    assert (gradient[0, : at + 1].abs().sum(-1) > 0).all()


def test_rows_and_windows_are_independent():
    states, rows, boundaries = example(5)
    ours = relations(states, heads=2, rows=rows, boundaries=boundaries)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(
        relations(states.flip(0), heads=2, rows=rows[:, order].flip(0), boundaries=boundaries.flip(0)),
        ours[:, :, order].flip(0),
    )


def test_a_cell_far_below_the_others_keeps_its_number():
    """exp(-300) is 0 in float32; the log of it is not minus infinity."""
    states = torch.zeros(1, 4, 1)
    states[0, :, 0] = torch.tensor([-15.0, 1.0, 15.0, 15.0])
    states.requires_grad_()
    log_probs = relations(states, heads=1, rows=torch.tensor([[2]]), boundaries=torch.arange(4)[None])
    expected = torch.tensor([-450 - math.log(2), -210 - math.log(2), -math.log(2), -math.log(2)])
    torch.testing.assert_close(log_probs[0, 0, 0], expected)
    (gradient,) = torch.autograd.grad(log_probs[0, 0, 0, 0], states)
    assert gradient.isfinite().all()
    assert gradient[0, 0, 0] == 15


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_states_stay_finite(size):
    states, rows, boundaries = example(6, scale=size)
    other, _, cuts = example(6, t=20, width=16, scale=size)
    with torch.autograd.set_detect_anomaly(True):  # nor does a NaN pass on the way, to be masked further on
        mine = relations(states, heads=4, rows=rows, boundaries=boundaries)
        value = relation_kl(mine, relations(other, heads=4, rows=rows, boundaries=cuts), rows)
        (gradient,) = torch.autograd.grad(value.sum(), states)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_a_broken_state_is_seen():
    states, rows, boundaries = example(7)
    states = states.detach().clone()
    states[0, 0] = torch.nan
    log_probs = relations(states, heads=2, rows=rows, boundaries=boundaries)
    assert log_probs[0, :, :, 0].isnan().all()
    assert not log_probs[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_float32_out_with_and_without_autocast(dtype):
    states, rows, boundaries = example(8)
    half = states.detach().to(dtype)
    expected = relations(half.float(), heads=2, rows=rows, boundaries=boundaries)
    ours = relations(half, heads=2, rows=rows, boundaries=boundaries)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relations(half, heads=2, rows=rows, boundaries=boundaries), expected)


def test_no_span_and_no_row():
    states = torch.randn(2, 5, 4)
    none = torch.zeros(2, 0, dtype=torch.long)
    assert relations(states, heads=2, rows=none, boundaries=torch.zeros(2, 1, dtype=torch.long)).shape == (2, 2, 0, 1)


def test_a_width_that_does_not_divide_is_refused():
    states, rows, boundaries = example(0)
    for heads in (5, 0, 24):
        with pytest.raises(ValueError, match=rf"relations: .*got {heads} heads and states \(2, 17, 12\); common_heads"):
            relations(states, heads=heads, rows=rows, boundaries=boundaries)


def test_other_windows_are_refused():
    states, rows, boundaries = example(0)
    match = r"relations: .*states \(2, 17, 12\), rows \(1, 4\) and boundaries \(2, 7\)"
    with pytest.raises(ValueError, match=match):
        relations(states, heads=2, rows=rows[:1], boundaries=boundaries)
    with pytest.raises(ValueError, match=r"relations: .*boundaries \(1, 7\)"):
        relations(states, heads=2, rows=rows, boundaries=boundaries[:1])
    with pytest.raises(ValueError, match=r"relations: .*states \(2, 17, 3, 4\)"):
        relations(states.unflatten(-1, (3, 4)), heads=2, rows=rows, boundaries=boundaries)
    for wrong in (rows[0], rows.unsqueeze(-1)):
        with pytest.raises(ValueError, match=r"relations: .*, rows \("):
            relations(states, heads=2, rows=wrong, boundaries=boundaries)
    with pytest.raises(ValueError, match=r"relations: .*boundaries \(2,\)"):
        relations(states, heads=2, rows=rows, boundaries=boundaries[:, 0])


def test_no_tensor_is_larger_than_the_rows_need():
    """Seven of 300 tokens look back; all pairs of tokens would be forty times as many numbers."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    states, rows, boundaries = example(9, t=300, spans=100, rows=7)
    with Watch():
        weighted(relations(states, heads=4, rows=rows, boundaries=boundaries)).backward()
    assert largest == 2 * 4 * 7 * 300  # [B, heads, R, T]


# ---- common_heads


@pytest.mark.parametrize(
    ("widths", "most", "heads"),
    [
        ((576, 1024), 8, 8),
        ((576, 1024), 64, 64),
        ((192, 1024), 8, 8),
        ((7, 1024), 8, 1),
        ((12, 18), 8, 6),
        ((5,), 8, 5),
    ],
)
def test_the_largest_number_of_heads_that_divides(widths, most, heads):
    assert common_heads(*widths, most=most) == heads
    assert heads == max(h for h in range(1, most + 1) if all(w % h == 0 for w in widths))


@pytest.mark.parametrize(("widths", "most"), [((), 8), ((0, 4), 8), ((4, 8), 0)])
def test_no_width_has_no_heads(widths, most):
    with pytest.raises(ValueError, match="common_heads: expected widths and most of at least 1"):
        common_heads(*widths, most=most)


# ---- relation_kl


def two_sides(seed: int, heads: int = 3):
    """The relations of two models that cut the same spans into different numbers of tokens."""
    states, rows, boundaries = example(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    # the teacher has one more token before the first span and twice as many in each
    other = torch.randn(2, 40, 24, generator=generator)
    cuts = boundaries * 2 + 1
    mine = relations(states, heads=heads, rows=rows, boundaries=boundaries)
    return states, mine, relations(other, heads=heads, rows=rows, boundaries=cuts), rows


@given(st.integers(0, 200))
def test_kl_is_the_naive_sum_value_and_gradient(seed):
    states, student, teacher, rows = two_sides(seed)
    theirs = []
    for b in range(2):
        for r in range(rows.shape[1]):
            total = torch.zeros((), dtype=torch.float64)
            cells = int(rows[b, r]) + 2
            for h in range(3):
                for c in range(cells):
                    p, q = teacher[b, h, r, c].detach().double(), student[b, h, r, c].double()
                    total = total + p.exp() * (p - q)
            theirs.append(total / 3 / math.log(cells))
    theirs = torch.stack(theirs).view(2, -1)
    ours = relation_kl(student, teacher, rows)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-4)
    weights = torch.arange(1.0, theirs.numel() + 1).view(theirs.shape)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), states, retain_graph=True)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), states)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_a_student_that_looks_everywhere_alike_costs_at_most_one():
    rows = torch.tensor([[0, 3, 5]])
    used = torch.arange(7) <= rows[..., None] + 1
    even = torch.where(used, 0.0, -math.inf).log_softmax(-1).unsqueeze(1)
    certain = torch.full((1, 1, 3, 7), -math.inf)
    certain[..., 1] = 0
    torch.testing.assert_close(relation_kl(even, certain, rows), torch.ones(1, 3))
    assert relation_kl(even, even, rows).abs().max() < 1e-6


def test_rows_of_other_windows_are_refused():
    _, student, teacher, rows = two_sides(0)
    match = r"relation_kl: .*student \(2, 3, 4, 7\) and teacher \(2, 3, 4, 7\) and rows \(2, 3\)"
    with pytest.raises(ValueError, match=match):
        relation_kl(student, teacher, rows[:, :3])
    with pytest.raises(ValueError, match=r"relation_kl: .*student \(2, 4, 7\)"):
        relation_kl(student[:, 0], teacher[:, 0], rows)
    with pytest.raises(ValueError, match=r"relation_kl: .*student \(2, 3, 4, 1, 7\)"):
        relation_kl(student.unsqueeze(3), teacher.unsqueeze(3), rows)
