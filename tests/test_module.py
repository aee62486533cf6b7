"""The module that is trained: what it returns is a sum over positions, however these are batched."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from conftest import bound, build_tiny, cells_of, collate_by_hand, live, random_items, untaught
from torch import nn

from kd_kit.kd_terms import kd_term
from kd_kit.losses import cross_entropy, forward_kl, jensen_shannon, reverse_kl, skew_kl, tempered
from kd_kit.module import DistillModule, settle_parts
from kd_kit.readings import BridgeReading, Needs
from kd_kit.terms import LossTerm, lm_term
from kd_kit.types import IGNORE, LossValue
from kd_kit.vocab import Bridge

V, U = 30, 40
DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, skew_kl]


def student(seed: int = 1, spread: float = 20.0):
    return build_tiny("llama", seed=seed, spread=spread, vocab=V, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def items():
    return random_items(3, 4, student=V, teacher=U)


@pytest.fixture(scope="module")
def teacher(tiny_models):
    table = torch.randint(0, V + 1, (U,), generator=torch.Generator().manual_seed(2))
    return live(tiny_models["qwen3_moe"], Bridge(table, V, 0), 6)


def scales_of(terms, batches, weights=None):
    """Weight over the count of the whole step."""
    weights = [t.weight for t in terms] if weights is None else weights
    counts = [sum(t.count(b) for b in batches) for t in terms]
    return torch.tensor([w / c if c else 0.0 for w, c in zip(weights, counts, strict=True)])


def kd_for(teacher, *arguments, top_k=6, **settings):
    """A KD term that is bound to the bridge of this teacher."""
    return bound(kd_term(*arguments, top_k=top_k, **settings), teacher.bridge)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step(module, batches, signals, scales):
    """(total, sums, gradients) of one optimizer step over these micro-batches."""
    module.zero_grad()
    total, sums = 0.0, 0.0
    for batch, signal in zip(batches, signals, strict=True):
        part, values, _ = module(batch, signal, scales)
        part.backward()
        total, sums = total + part.detach(), sums + values
    return total, sums, gradients(module)


def assert_same_step(ours, theirs, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(ours[0], theirs[0], atol=atol, rtol=rtol)
    torch.testing.assert_close(ours[1], theirs[1], atol=atol, rtol=rtol)
    assert ours[2].keys() == theirs[2].keys()
    for name in ours[2]:
        torch.testing.assert_close(ours[2][name], theirs[2][name], atol=atol, rtol=rtol)


def naive_sums(model, batch, signal, divergence=forward_kl):
    """Cross-entropy over all targets and the divergence over aligned positions, one position at a time."""
    lm = kd = torch.zeros(())
    cells, row = cells_of(signal), 0
    for n in range(len(batch.student_ids)):
        for t in range(batch.student_ids.shape[1]):
            if batch.targets[n, t] == IGNORE:
                assert not batch.aligned[n, t]
                continue
            logits = model(input_ids=batch.student_ids[n : n + 1, : t + 1]).logits[0, -1]
            log_probs = logits.log_softmax(-1)
            lm = lm - log_probs[batch.targets[n, t]]
            if batch.aligned[n, t]:
                ids, known = cells.ids[row], cells.log_probs[row]
                used = known > -torch.inf
                outside = torch.ones(V, dtype=torch.bool)
                outside[ids[used]] = False
                q = torch.cat([log_probs[ids[used]], log_probs[outside].logsumexp(-1, keepdim=True)])
                p = torch.cat([known[used], cells.tail[row : row + 1]])
                kd = kd + divergence(q, p)
                row += 1
    assert row == len(cells.tail)
    return lm, kd


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sums_and_gradients_are_the_naive_ones(items, teacher, divergence):
    batch = collate_by_hand(items[:2])
    signal = teacher.signal(batch)
    terms = [lm_term(0.3), kd_for(teacher, 0.7, divergence=divergence)]
    module = DistillModule(student(), terms)
    scales = scales_of(terms, [batch])
    ours = step(module, [batch], [signal], scales)
    module.zero_grad()
    lm, kd = naive_sums(module.student, batch, signal, divergence)
    total = lm * 0.3 / len(batch.rows) + kd * 0.7 / len(batch.aligned_rows)
    total.backward()
    assert 0 < len(batch.aligned_rows) < len(batch.rows)
    assert_same_step(ours, (total.detach(), torch.stack([lm, kd]).detach(), gradients(module)))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_one_batch(items, teacher, parts):
    terms = [lm_term(0.3), kd_for(teacher, 0.7)]
    module = DistillModule(student(), terms)
    whole = collate_by_hand(items)
    scales = scales_of(terms, [whole])
    size = len(items) // parts
    micro = [collate_by_hand(items[i : i + size]) for i in range(0, len(items), size)]
    assert torch.equal(scales, scales_of(terms, micro))
    assert len({len(b.rows) for b in micro}) > 1, "means of unequal batches do not average"
    ours = step(module, micro, [teacher.signal(b) for b in micro], scales)
    assert_same_step(ours, step(module, [whole], [teacher.signal(whole)], scales))


def test_padding_changes_nothing(items, teacher):
    terms = [lm_term(0.3), kd_for(teacher, 0.7, temperature=2.0)]
    module = DistillModule(student(), terms)
    plain = collate_by_hand(items)
    padded = collate_by_hand(items, pad=13, more_student=6, more_teacher=4)
    scales = scales_of(terms, [plain])
    ours = step(module, [padded], [teacher.signal(padded)], scales)
    assert_same_step(ours, step(module, [plain], [teacher.signal(plain)], scales))


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_of_rows_change_nothing(items, teacher, monkeypatch, chunk):
    terms = [lm_term(0.3), kd_for(teacher, 0.7)]
    module = DistillModule(student(), terms)
    batch = collate_by_hand(items)
    scales, signal = scales_of(terms, [batch]), teacher.signal(batch)
    whole = step(module, [batch], [signal], scales)
    monkeypatch.setattr("kd_kit.head.Head.chunk_rows", lambda self: chunk)
    assert_same_step(step(module, [batch], [signal], scales), whole)


def test_relabelled_student_ids_change_nothing(items, teacher):
    terms = [lm_term(0.3), kd_for(teacher, 0.7)]
    module = DistillModule(student(), terms)
    renamed = copy.deepcopy(module)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))  # new id of every old one
    with torch.no_grad():
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            getattr(renamed.student, layer)().weight[order] = getattr(module.student, layer)().weight
    batch = collate_by_hand(items)
    scales, signal = scales_of(terms, [batch]), teacher.signal(batch)
    targets = torch.where(batch.targets == IGNORE, IGNORE, order[batch.targets.clamp(min=0)])
    other = dataclasses.replace(batch, student_ids=order[batch.student_ids], targets=targets)
    ((key, cells),) = signal.cells.items()
    moved = dataclasses.replace(signal, cells={key: dataclasses.replace(cells, ids=order[cells.ids])})
    total, sums, grads = step(module, [batch], [signal], scales)
    total_renamed, sums_renamed, grads_renamed = step(renamed, [other], [moved], scales)
    torch.testing.assert_close(sums_renamed, sums, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(total_renamed, total, atol=1e-5, rtol=1e-4)
    head = "student.lm_head.weight"
    torch.testing.assert_close(grads_renamed[head][order], grads[head], atol=1e-5, rtol=1e-4)


# ---- the perfect student


def same_tokenizer(seed: int = 3):
    """Windows whose two tokenizations are one, and the identity bridge."""
    sides = [(item[0], item[1], item[0], item[1]) for item in random_items(seed, 3, student=V)]
    return collate_by_hand(sides), Bridge(torch.arange(V), V, V)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [2, 5, V])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(divergence, k, temperature):
    """Any shift by one, of targets, signal or states, gives a large value here."""
    batch, bridge = same_tokenizer()
    teacher = live(student(), bridge, k)
    terms = [kd_for(teacher, 1.0, top_k=k, divergence=divergence, temperature=temperature)]
    module = DistillModule(student(), terms)
    scales = scales_of(terms, [batch])
    assert torch.equal(batch.aligned_rows, batch.rows), "one tokenizer: every position is aligned"
    signal = teacher.signal(batch)
    total, _, grads = step(module, [batch], [signal], scales)
    assert abs(float(total)) < 1e-5
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-4
    for shift in (1, -1):
        late = signal.mapped(lambda tensor, shift=shift: tensor.roll(shift, 0))
        wrong, _, shifted = step(module, [batch], [late], scales)
        assert float(wrong) > 0.05, "the teacher's rows are far enough apart to tell"
        assert max(float(g.abs().max()) for g in shifted.values()) > 2e-3


def test_the_teachers_own_text_positions_are_what_is_matched():
    """A teacher that sees the same text one token late is not the same teacher."""
    batch, bridge = same_tokenizer()
    teacher = live(student(), bridge, 5)
    terms = [kd_for(teacher, 1.0, top_k=5)]
    module = DistillModule(student(), terms)
    late = dataclasses.replace(batch, teacher_index=(batch.teacher_index - 1).clamp(min=0))
    signal = teacher.signal(late)
    total, *_ = module(batch, signal, scales_of(terms, [batch]))
    assert float(total.detach()) > 0.05


def test_distillation_moves_the_student_to_the_teacher():
    batch, bridge = same_tokenizer()
    teacher = live(student(seed=1), bridge, 8)
    terms = [kd_for(teacher, 1.0, top_k=8)]
    module = DistillModule(student(seed=8), terms)
    signal = teacher.signal(batch)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    values = []
    for _ in range(20):
        total, _, _ = step(module, [batch], [signal], scales_of(terms, [batch]))
        optimizer.step()
        values.append(float(total))
    assert values[-1] < 0.4 * values[0]


# ---- temperature


def test_temperature_reports_one_value_and_trains_another(items, teacher):
    batch = collate_by_hand(items)
    signal = teacher.signal(batch)
    plain, soft = (kd_for(teacher, 1.0, temperature=t) for t in (1.0, 2.0))
    scales = scales_of([plain], [batch])
    model = student()
    cold = step(DistillModule(model, [plain]), [batch], [signal], scales)
    hot = step(DistillModule(model, [soft]), [batch], [signal], scales)
    torch.testing.assert_close(hot[1], cold[1], atol=1e-5, rtol=1e-5)

    def softened(student, teacher):
        return 4 * forward_kl(tempered(student, 2.0), tempered(teacher, 2.0))

    expected = step(DistillModule(model, [kd_for(teacher, 1.0, divergence=softened)]), [batch], [signal], scales)
    for name, gradient in hot[2].items():
        torch.testing.assert_close(gradient, expected[2][name], atol=1e-5, rtol=1e-4)
    assert (hot[2]["student.lm_head.weight"] - cold[2]["student.lm_head.weight"]).norm() > 1e-3


# ---- which terms, and over which positions


def aligned_ce():
    return LossTerm(
        name="aligned_ce",
        weight=1.0,
        unit="nats",
        healthy=(0, 9),
        rows=lambda rows: cross_entropy(rows.logits, rows.targets, rows.log_z),
        over="aligned",
    )


def test_terms_run_over_their_own_positions(items, teacher):
    batch = collate_by_hand(items)
    terms = [lm_term(), aligned_ce(), kd_for(teacher)]
    module = DistillModule(student(), terms)
    scales = scales_of(terms, [batch])
    _, with_teacher, _ = module(batch, teacher.signal(batch), scales)
    module = DistillModule(module.student, terms[:2])
    _, without, _ = module(batch, None, scales[:2])
    torch.testing.assert_close(with_teacher[:2], without)
    logits = module.student(input_ids=batch.student_ids).logits.detach().flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(without, torch.stack([each.sum(), each[batch.aligned_rows].sum()]))


@pytest.mark.parametrize("names", [["lm"], ["kd"], ["lm", "kd"], ["kd", "lm"]])
def test_terms_may_be_absent(items, teacher, names):
    made = {"lm": lm_term(0.3), "kd": kd_for(teacher, 0.7)}
    terms = [made[name] for name in names]
    batch = collate_by_hand(items)
    signal = teacher.signal(batch) if "kd" in names else None
    _, sums, _ = DistillModule(student(), terms)(batch, signal, scales_of(terms, [batch]))
    both = list(made.values())
    _, all_sums, _ = DistillModule(student(), both)(batch, teacher.signal(batch), scales_of(both, [batch]))
    torch.testing.assert_close(sums, torch.stack([all_sums[list(made).index(name)] for name in names]))
    assert not sums.requires_grad


def test_a_batch_with_nothing_aligned_is_a_finite_step(items, teacher):
    batch = collate_by_hand(items)
    none = untaught(batch)
    terms = [lm_term(0.3), kd_for(teacher, 0.7, temperature=2.0)]
    module = DistillModule(student(), terms)
    # the rest of the step may have aligned positions, so the scale of the term need not be 0
    total, sums, grads = step(module, [none], [teacher.signal(none)], scales_of(terms, [none, batch]))
    assert sums[1] == 0
    assert sums[0] > 0
    assert math.isfinite(total)
    assert all(g.isfinite().all() for g in grads.values())
    only_lm = step(DistillModule(module.student, terms[:1]), [none], [None], scales_of(terms, [none, batch])[:1])
    for name in grads:
        torch.testing.assert_close(grads[name], only_lm[2][name])


def test_a_loss_that_never_asks_where_the_teacher_is_stays_finite(items, teacher):
    """Rows without a teacher carry a proper distribution, so that a user's own loss needs no mask."""

    reading = BridgeReading("bridge", teacher.bridge, 6)

    def careless(rows):
        return reverse_kl(tempered(rows.student(reading.key), 2.0), tempered(rows.teacher(reading.key), 2.0))

    batch = collate_by_hand(items)
    none = untaught(batch)
    own = {"name": "own", "weight": 1.0, "unit": "-", "healthy": (0, 9)}
    terms = [LossTerm(**own, rows=careless, over="aligned", needs=Needs((reading,)))]
    module = DistillModule(student(), terms)
    _, sums, grads = step(module, [none], [teacher.signal(none)], scales_of(terms, [batch]))
    assert sums[0] == 0
    assert all(not g.any() for g in grads.values())


def test_rows_without_a_teacher_are_not_taught(items, teacher):
    """Whatever stands in the signal for a neighbour, a row that is not aligned feels nothing of it."""
    batch = collate_by_hand(items)
    terms = [kd_for(teacher, 1.0)]
    module = DistillModule(student(), terms)
    hidden = []
    hook = module.student.model.register_forward_hook(lambda m, a, out: hidden.append(out.last_hidden_state))
    total, *_ = module(batch, teacher.signal(batch), scales_of(terms, [batch]))
    hook.remove()
    (gradient,) = torch.autograd.grad(total, hidden[0])
    felt = (gradient.abs().sum(-1) > 0).flatten()
    assert felt.nonzero().squeeze(-1).tolist() == batch.aligned_rows.tolist()


class OwnHead(nn.Module):
    """A term with parameters."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 1)

    def forward(self, output, signal, batch) -> LossValue:
        values = self.linear(output.hidden).square().mean(-1).flatten()[batch.rows]
        return LossValue(values.sum(), torch.tensor(float(len(values))))


def value_term(name, value, weight=1.0):
    return LossTerm(name=name, weight=weight, unit="-", healthy=(0, 1), value=value)


def test_the_parameters_of_a_term_are_trained(items):
    part = OwnHead()
    terms = [lm_term(0.5), value_term("own", part, 0.5)]
    module = DistillModule(student(), terms)
    assert {id(p) for p in part.parameters()} <= {id(p) for p in module.parameters()}
    batch = collate_by_hand(items)
    total, sums, grads = step(module, [batch], [None], scales_of(terms, [batch]))
    assert sums[1] > 0
    assert part.linear.weight.grad.abs().sum() > 0
    assert "parts.own.linear.weight" in grads
    assert "parts.own.linear.weight" in module.state_dict()
    assert not any("linear" in name for name in module.student.state_dict())
    expected = (sums * scales_of(terms, [batch])).sum()
    torch.testing.assert_close(total, expected)


def test_only_value_terms(items):
    terms = [value_term("size", lambda output, signal, batch: LossValue(output.hidden.square().sum(), torch.ones(())))]
    total, sums, _ = DistillModule(student(), terms)(collate_by_hand(items), None, torch.tensor([0.25]))
    torch.testing.assert_close(total.detach(), sums[0] * 0.25)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", ["value", "rows"])
def test_a_term_without_weight_does_not_poison(items, bad, kind):
    def bad_value(output, signal, batch):
        return LossValue(output.hidden.sum() + bad, torch.ones(()))

    def bad_rows(rows):
        return rows.logits.sum(-1) + bad

    if kind == "value":
        poison = value_term("bad", bad_value, 0.0)
    else:
        poison = LossTerm(name="bad", weight=0.0, unit="-", healthy=(0, 1), rows=bad_rows)
    batch = collate_by_hand(items)
    model = student()
    terms = [lm_term(1.0), poison]
    total, sums, grads = step(DistillModule(model, terms), [batch], [None], scales_of(terms, [batch]))
    assert not math.isfinite(sums[1]), "the value itself is not hidden"
    clean = step(DistillModule(model, terms[:1]), [batch], [None], scales_of(terms, [batch])[:1])
    torch.testing.assert_close(total, clean[0])
    for name in clean[2]:
        torch.testing.assert_close(grads[name], clean[2][name])


def test_a_weight_scales_the_gradient_not_the_value(items):
    batch = collate_by_hand(items)
    module = DistillModule(student(), [lm_term()])
    one, two = (step(module, [batch], [None], torch.tensor([s])) for s in (0.01, 0.02))
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(two[0], one[0] * 2)
    for name in one[2]:
        torch.testing.assert_close(two[2][name], one[2][name] * 2)


# ---- what the terms need, and what else they say


class Careful(nn.Module):
    """A term with parameters that looks at a tapped layer and says more than its value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, output, signal, batch) -> LossValue:
        rows = self.linear(output.states[1]).flatten(0, 1)[batch.rows].square()
        extras = {"by_channel": rows.sum(0), "largest": rows.max(), "rows": torch.ones(2, dtype=torch.float16)}
        return LossValue(rows.mean(-1).sum(), torch.tensor(float(len(rows))), extras)


def test_extras_are_named_after_their_term_and_carry_no_gradient(items):
    needs = Needs(student_states=frozenset([1]))
    own = LossTerm(name="own", weight=0.5, unit="-", healthy=(0, 1), value=Careful(), needs=needs)
    terms = [lm_term(0.5), own]
    module = DistillModule(student(), terms)
    batch = collate_by_hand(items)
    total, sums, extras = module(batch, None, scales_of(terms, [batch]))
    assert list(extras) == ["own.by_channel", "own.largest", "own.rows"]
    assert [tuple(v.shape) for v in extras.values()] == [(3,), (), (2,)]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in extras.values())
    states = module.student(input_ids=batch.student_ids, output_hidden_states=True).hidden_states[1]
    rows = own.value.linear(states).flatten(0, 1)[batch.rows].square().detach()
    torch.testing.assert_close(extras["own.by_channel"], rows.sum(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums[1], rows.mean(-1).sum(), atol=1e-4, rtol=1e-4)
    total.backward()
    assert own.value.linear.weight.grad.any(), "measuring more does not detach the value"
    _, _, nothing = DistillModule(module.student, terms[:1])(batch, None, [0.1])
    assert nothing == {}


def test_the_student_is_tapped_where_a_term_asks(items):
    needs = Needs(student_states=frozenset([2, 1]), student_attention=frozenset([2]))
    look = LossTerm(name="look", weight=1.0, unit="-", healthy=(0, 1), value=Careful(), needs=needs)
    module, batch = DistillModule(student(), [look]), collate_by_hand(items)
    output = module.output(batch)
    expected = module.student(input_ids=batch.student_ids, output_hidden_states=True).hidden_states
    assert list(output.states) == [1, 2]
    torch.testing.assert_close(output.states[1], expected[1])
    torch.testing.assert_close(output.states[2], expected[2])
    torch.testing.assert_close(output.hidden, expected[2])
    assert {kind: t.shape for kind, t in output.attention[2].items()} == {
        "q": (4, batch.student_ids.shape[1], 16),
        "k": (4, batch.student_ids.shape[1], 8),
        "v": (4, batch.student_ids.shape[1], 8),
    }
    nothing = DistillModule(module.student, [lm_term()]).output(batch)
    assert nothing.states == nothing.attention == {}


def test_a_gather_makes_the_sum_of_the_rows_values(items, teacher):
    """It sees every row's value once, with gradient, and the whole signal."""
    batch = collate_by_hand(items)
    signal = teacher.signal(batch)
    seen = []

    def last_of_every_window(values, given, of):
        seen.append((given, of))
        assert values.shape == (len(of.rows),)
        window = of.rows // of.student_ids.shape[1]
        last = torch.tensor([int((window == n).nonzero().max()) for n in range(len(of.sample))])
        return LossValue(values[last].sum(), torch.tensor(float(len(last))))

    own = LossTerm(
        name="own",
        weight=1.0,
        unit="-",
        healthy=(0, 9),
        rows=lambda rows: cross_entropy(rows.logits, rows.targets, rows.log_z),
        gather=last_of_every_window,
        over=lambda batch: len(batch.sample),
    )
    terms = [lm_term(), own, kd_for(teacher)]
    module = DistillModule(student(), terms)
    scales = scales_of(terms, [batch], [0.0, 1.0, 0.0])
    assert scales[1] == 1 / len(items)
    _, sums, grads = step(module, [batch], [signal], scales)
    assert seen == [(signal, batch)]
    module.zero_grad()
    logits = module.student(input_ids=batch.student_ids).logits
    ends = (batch.targets != IGNORE).sum(1) - 1
    each = [nn.functional.cross_entropy(logits[n, t], batch.targets[n, t]) for n, t in enumerate(ends.tolist())]
    torch.testing.assert_close(sums[1], torch.stack(each).sum().detach(), atol=1e-4, rtol=1e-4)
    torch.stack(each).mean().backward()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_signal_without_the_reading_of_a_term_is_refused(items, teacher):
    batch = collate_by_hand(items)
    module = DistillModule(student(), [kd_for(teacher, top_k=5)])
    said = (
        r"^DistillModule: expected a signal with the reading 'bridge taught top 5', got one with 'bridge taught top 6'"
    )
    with pytest.raises(ValueError, match=said):
        module(batch, teacher.signal(batch), [1.0])
    with pytest.raises(ValueError, match=r"'bridge taught top 5', got one with none; ask the teacher"):
        module(batch, dataclasses.replace(teacher.signal(batch), cells={}), [1.0])


@pytest.mark.parametrize("what", ["cells", "row_states"])
def test_the_signal_of_another_batch_is_refused(items, teacher, what):
    batch, other = collate_by_hand(items), collate_by_hand(items[:3])
    term = kd_for(teacher)
    if what == "row_states":
        own = {"name": "own", "weight": 1.0, "unit": "-", "healthy": (0, 9)}
        term = LossTerm(**own, rows=lambda rows: rows.log_z, over="aligned", needs=Needs(row_states=True))
    module = DistillModule(student(), [term])
    signal = teacher.asked(module.needs).signal(other)
    n, m = len(batch.aligned_rows), len(other.aligned_rows)
    assert n != m
    with pytest.raises(ValueError, match=rf"expected a signal of {n} rows, one per (taught|aligned) .* got {m}; pass"):
        module(batch, signal, [1.0])
    module(other, signal, [1.0])


def test_states_of_aligned_rows_are_spread_over_all_rows(items, teacher):
    batch = collate_by_hand(items)
    seen = {}

    def look(rows):
        given = rows.given["row_states"]
        seen.update(there=given.there, states=given.states)
        return rows.log_z

    own = {"name": "own", "weight": 1.0, "unit": "-", "healthy": (0, 9)}
    module = DistillModule(student(), [LossTerm(**own, rows=look, over="aligned", needs=Needs(row_states=True))])
    signal = teacher.asked(module.needs).signal(batch)
    with torch.no_grad():
        module(batch, signal, [1.0])
    aligned = [flat in set(batch.aligned_rows.tolist()) for flat in batch.rows.tolist()]
    assert seen["there"].tolist() == aligned
    assert torch.equal(seen["states"][seen["there"]], signal.row_states)


def test_parts_that_are_not_ready_see_the_first_batches_and_settle_once(items, teacher):
    class Slow(Careful):
        def __init__(self):
            super().__init__()
            self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
            self.seen = []

        def forget(self):
            self.seen.append("forget")

        def observe(self, output, signal, batch):
            assert not output.hidden.requires_grad
            assert 1 in output.states
            self.seen.append((cells_of(signal).tail.shape, len(batch.rows)))

        def settle(self):
            self.seen.append("settle")
            self.ready.fill_(True)

    needs = Needs(student_states=frozenset([1]))
    slow = LossTerm(name="slow", weight=0.5, unit="-", healthy=(0, 1), value=Slow(), needs=needs)
    plain = value_term("plain", OwnHead())
    module = DistillModule(student(), [slow, kd_for(teacher), plain]).train()
    batches = [collate_by_hand(items[:2]), collate_by_hand(items[2:])]
    settle_parts(module, teacher, batches)
    shapes = [((len(b.taught_rows),), len(b.rows)) for b in batches]
    assert slow.value.seen == ["forget", *shapes, "settle"]
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    settle_parts(module, teacher, batches)
    assert len(slow.value.seen) == 4, "what is ready is left alone"
