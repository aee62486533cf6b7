"""Terms over hidden states: against plain loops over windows that were never padded, value and gradient."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import _span_rows, build_tiny, collate_by_hand, random_items
from helpers import make_trainer, small_data, tiny_student
from helpers import pair as embedded
from helpers import teacher as embedded_teacher_of

from kd_kit import kd_term, lm_term, span_term, state_terms
from kd_kit.expert_terms import router_term
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.parts import chosen_spans, spread_spans, student_ends
from kd_kit.ranges import RANGES
from kd_kit.state_terms import (
    attention_term,
    contrasted,
    contrastive_term,
    feature_term,
    layerwise_term,
    relation_term,
    standardised_within,
)
from kd_kit.taps import Taps
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import Setup

WIDE = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "3 from 2": (("llama", {"num_hidden_layers": 3}), ("qwen3_moe", WIDE)),
    "2 from 4": (("gpt2", {"n_embd": 12, "n_head": 3}), ("qwen3_moe", {"num_hidden_layers": 4})),
    "6 from 3": (("llama", {"num_hidden_layers": 6, "hidden_size": 20}), ("gemma2", {"num_hidden_layers": 3})),
}
PAIRS = {
    "3 from 2": ((1, 1), (3, 2)),
    "2 from 4": ((1, 2), (2, 4)),
    "6 from 3": ((2, 1), (4, 2), (6, 3)),
}

TERMS = {
    "feature": feature_term,
    "mixture": functools.partial(feature_term, experts=3, balance=0.5, z=0.1),
    "layerwise": layerwise_term,
    "relation": relation_term,
    "attention": attention_term,
    "contrastive": contrastive_term,
}
NAMES = {name: "feature" if name == "mixture" else name for name in TERMS}


@functools.cache
def models(name: str):
    (student, changes), (teacher, more) = MODELS[name]
    return build_tiny(student, seed=1, **changes), build_tiny(teacher, seed=2, **more).requires_grad_(False)


def many(seed: int = 3, rows: int = 3):
    """Texts of some 25 spans."""
    return random_items(seed, rows, low=90, high=111)


def without(batch, skipped):
    """The same batch with the first ``skipped[n]`` spans of window ``n`` as mere context."""
    mask = batch.span_mask.clone()
    for n, count in enumerate(skipped):
        mask[n, :count] = False
    sizes = batch.student_ids.shape[1], batch.teacher_ids.shape[1]
    rows = _span_rows(batch.span_student, batch.span_teacher, mask, *sizes)
    return dataclasses.replace(batch, span_mask=mask, span_rows=rows)


class Scene:
    """A term between two models, settled on a text and then moved away from its start."""

    def __init__(self, term, name: str = "3 from 2", settle=None, shake: float = 0.3, teacher=None, student=None):
        ours, theirs = models(name) if name else (None, None)
        self.student, self.teacher = student or ours, teacher or theirs
        self.term = term.bound(Setup(self.student, self.teacher, None))
        self.module = DistillModule(self.student, [self.term])
        self.live = LiveTeacher(self.teacher, None, self.term.needs)
        settle_parts(self.module, self.live, [collate_by_hand(many(8)) if settle is None else settle])
        if self.part is not None:
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in self.part.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * shake)

    @property
    def part(self):
        return self.term.part

    def value(self, batch, signal=None):
        signal = self.live.signal(batch) if signal is None else signal
        return self.term.value(self.module.output(batch), signal, batch)

    def differentiated(self, function):
        """What ``function`` returns and the gradients of its sum."""
        self.module.zero_grad(set_to_none=True)
        found = function()
        (found.sum if hasattr(found, "sum") and not torch.is_tensor(found) else found).backward()
        return found, {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, atol=1e-4, rtol=1e-3):
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 1e-3, "there is something to compare"
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol * max(1.0, largest), rtol=rtol, msg=name)


# ---- the plain loops, one window at a time and from the tokenizations alone


def common_ends(item):
    """Positions (student's, teacher's) of every byte at which a token ends on both sides, in order."""
    _, s_len, _, t_len = item
    ours, theirs = (dict(zip(np.cumsum(x).tolist(), range(len(x)), strict=False)) for x in (s_len, t_len))
    return [(ours[byte], theirs[byte]) for byte in sorted(ours.keys() & theirs.keys())]


def scored(item, skip: int = 0):
    """(number, student position, teacher position) of every span of a window but the first ``skip``."""
    return [(c, i, j) for c, (i, j) in enumerate(common_ends(item)[1:])][skip:]


def spread(spans, most: int, widest: int):
    n = min(most, widest)
    return spans if len(spans) <= n else [spans[k * len(spans) // n] for k in range(n)]


def widest(items):
    return max(len(common_ends(item)) - 1 for item in items)


def states_of(model, ids):
    """{layer: [T, width]} of one window, as transformers gives them."""
    found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return {layer: state[0] for layer, state in enumerate(found)}


def one_minus_cos(a, b):
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def naive_features(scene, items, skipped=None):
    """Sum over spans of the mean over pairs of layers, and the sums per pair."""
    each = [[] for _ in scene.part.pairs]
    for item, skip in zip(items, skipped or [0] * len(items), strict=True):
        ours, theirs = states_of(scene.student, item[0]), states_of(scene.teacher, item[2])
        for _, i, j in scored(item, skip):
            for k, ((a, b), one) in enumerate(zip(scene.part.pairs, scene.part.maps, strict=True)):
                state = ours[a][i].unsqueeze(0)
                guess = one(state)[0][0] if hasattr(one, "gate") else one(state)[0]
                target = (theirs[b][j] - one.teacher.mean) / one.teacher.deviation
                each[k].append(one_minus_cos(guess, target))
    sums = torch.stack([torch.stack(values).sum() for values in each])
    return sums.mean(), sums.detach()


def naive_relation(scene, items, skipped=None, most=128, least=16):
    total, windows = torch.zeros(()), 0
    (a,), (b,) = scene.term.needs.student_states, scene.term.needs.teacher_states
    for item, skip in zip(items, skipped or [0] * len(items), strict=True):
        spans = scored(item, skip)
        if len(spans) < least:
            continue
        spans = spread(spans, most, widest(items))
        sides = []
        for states, place in ((states_of(scene.student, item[0])[a], 1), (states_of(scene.teacher, item[2])[b], 2)):
            rows = torch.stack([states[span[place]] for span in spans])
            sides.append((rows - rows.mean(0)) / rows.std(0, correction=0))
        distances = []
        for p in range(len(spans)):
            for q in range(len(spans)):
                if p != q:
                    ours, theirs = (1 - one_minus_cos(side[p], side[q]) for side in sides)
                    distances.append((ours - theirs) ** 2)
        total, windows = total + torch.stack(distances).mean(), windows + 1
    return total, windows


def naive_attention(scene, items, heads, skipped=None, most=64):
    """Sum over rows of the mean over kinds, the sums per kind, and how many rows."""
    (a,), (b,) = scene.term.needs.student_attention, scene.term.needs.teacher_attention
    kinds, count = {kind: torch.zeros(()) for kind in heads}, 0
    for item, skip in zip(items, skipped or [0] * len(items), strict=True):
        sides = []
        for model, layer, ids in ((scene.student, a, item[0]), (scene.teacher, b, item[2])):
            taps = Taps(model, attention=(layer,))
            with taps:
                model(input_ids=torch.tensor([ids]), use_cache=False)
            sides.append({kind: x[0] for kind, x in taps.attention[layer].items()})
        ends = common_ends(item)
        for number, *at in spread(scored(item, skip), most, widest(items)):
            count += 1
            for kind, h in heads.items():
                shares = []
                for side, (states, place) in enumerate(zip((s[kind] for s in sides), at, strict=True)):
                    x = states[: place + 1].unflatten(-1, (h, -1))
                    probs = torch.einsum("hw,thw->ht", x[place] / math.sqrt(x.shape[-1]), x).softmax(-1)
                    cuts = [0, *(pair[side] + 1 for pair in ends[: number + 2])]
                    shares.append([probs[:, p:q].sum(-1) for p, q in pairwise(cuts)])
                q, p = (torch.stack(cells, -1) for cells in shares)  # [heads, number + 2]
                kl = (p * (p.log() - q.log())).sum(-1).mean()
                kinds[kind] = kinds[kind] + kl / math.log(number + 2)
    sums = torch.stack(list(kinds.values()))
    return sums.mean(), sums.detach(), count


def naive_contrast(scene, items, documents, most=64, temperature=0.1):
    ours, theirs, groups = [], [], []
    (a, b), one = scene.part.pair, scene.part.map
    for item, document in zip(items, documents, strict=True):
        student, teacher = states_of(scene.student, item[0])[a], states_of(scene.teacher, item[2])[b]
        for _, i, j in spread(scored(item), most, widest(items)):
            ours.append(one(student[i]))
            theirs.append((teacher[j] - one.teacher.mean) / one.teacher.deviation)
            groups.append(document)
    total = torch.zeros(())
    for i, anchor in enumerate(ours):
        among = [j for j in range(len(ours)) if j == i or groups[j] != groups[i]]
        cosines = torch.stack([1 - one_minus_cos(anchor, theirs[j]) for j in among]) / temperature
        total = total + (cosines.logsumexp(0) - cosines[among.index(i)]) / math.log(len(among))
    return total, len(ours)


# ---- the spans of a batch


@pytest.mark.parametrize("most", [1, 3, 7, 200])
@pytest.mark.parametrize("skipped", [(0, 0, 0, 0), (3, 99, 1, 0), (99, 2, 99, 99), (99, 99, 99, 99)])
def test_spread_spans(most, skipped):
    batch = without(collate_by_hand(random_items(4, 4, low=10, high=60)), skipped)
    index, mask = spread_spans(batch, most)
    window, _ = batch.spans_of()
    n = min(most, batch.span_mask.shape[1])
    assert index.shape == mask.shape == (4, n)
    for b in range(4):
        rows = (window == b).nonzero().flatten().tolist()
        got = index[b][mask[b]].tolist()
        assert got == spread(rows, most, n)
        assert len(got) == min(len(rows), n)
        if 1 < len(got) < len(rows):
            gaps = np.diff([rows.index(r) for r in got])
            assert gaps.max() - gaps.min() <= 1, "evenly"
            assert gaps.min() >= 1
    assert not index[~mask].any()
    assert chosen_spans(batch, most) == int(mask.sum())


def test_student_ends_are_the_ends_of_spans():
    items = many()
    batch = without(collate_by_hand(items, more_student=3), (2, 0, 5))
    b, t = batch.student_ids.shape
    output = SimpleNamespace(states={7: torch.arange(b * t * 2).view(b, t, 2)})
    expected = [n * t + i for n, item in enumerate(items) for _, i, _ in scored(item, (2, 0, 5)[n])]
    assert (student_ends(output, 7, batch)[:, 0] // 2).tolist() == expected


def test_at_the_end_of_a_span_both_have_read_the_same_bytes():
    """The embedded pair on its own text, windows with context too: the bytes up to either position are one string."""
    pair, data = embedded(), small_data()
    seen = 0
    for windows in (data.train, data.held_out):
        batch = windows.collate(list(range(4)))
        t, s = batch.student_ids.shape[1], batch.teacher_ids.shape[1]
        output = SimpleNamespace(states={1: torch.arange(4 * t).view(4, t, 1)})
        ours = student_ends(output, 1, batch).flatten().tolist()
        starts = [vocab.start_id is not None for vocab in (pair.student_vocab, pair.teacher_vocab)]
        for mine, (_, other) in zip(ours, batch.span_rows.tolist(), strict=True):
            assert mine // t == other // s
            read = []
            for ids, place, vocab, start in (
                (batch.student_ids[mine // t], mine % t, pair.student_vocab, starts[0]),
                (batch.teacher_ids[other // s], other % s, pair.teacher_vocab, starts[1]),
            ):
                read.append(vocab.bytes_of(ids[int(start) : place + 1].tolist()))
            assert read[0] == read[1]
            assert read[0]
            seen += 1
    assert seen > 100
    assert int((~data.held_out.collate([3]).span_mask).sum()) > 0, "there are windows with context"


# ---- feature and layerwise


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["feature", "layerwise", "both by hand"])
def test_features_are_the_naive_loop_value_and_gradient(name, kind):
    if kind == "both by hand":
        scene = Scene(layerwise_term(layers=dict(PAIRS[name])), name)
        assert scene.part.pairs == PAIRS[name]
    else:
        scene = Scene(TERMS[kind](), name)
        assert scene.part.pairs == (PAIRS[name][-1:] if kind == "feature" else PAIRS[name][:-1])
    items, skipped = many(), (0, 3, 0)
    batch = without(collate_by_hand(items), skipped)
    ours, gradients = scene.differentiated(lambda: scene.value(batch))
    total, by_layer = naive_features(scene, items, skipped)
    _, expected = scene.differentiated(lambda: total)
    torch.testing.assert_close(ours.sum, total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.extras["by_layer"].detach(), by_layer, atol=1e-3, rtol=1e-4)
    assert int(ours.count) == len(batch.span_rows) == scene.term.count(batch)
    assert_same_gradients(gradients, expected)


def test_a_student_of_one_layer_has_no_intermediate_ones():
    student = build_tiny("llama", num_hidden_layers=1)
    setup = Setup(student, models("3 from 2")[1], None)
    assert layerwise_term().bound(setup).part.pairs == ((1, 2),)
    assert feature_term().bound(setup).part.pairs == ((1, 2),)


def test_taps_are_counted_with_the_last():
    student = build_tiny("llama", num_hidden_layers=6)
    setup = Setup(student, build_tiny("llama", num_hidden_layers=8), None)
    assert layerwise_term().bound(setup).part.pairs == ((1, 2), (3, 4), (4, 6))
    assert layerwise_term(taps=2).bound(setup).part.pairs == ((3, 4),)
    assert feature_term().bound(setup).part.pairs == ((6, 8),)


def test_the_observed_spans_make_the_start():
    """Statistics and map are those of the spans' ends, of each pair's own layers, over all batches."""
    name = "3 from 2"
    items = many(8, rows=4)
    scene = Scene(layerwise_term(layers=dict(PAIRS[name])), name, settle=collate_by_hand(items), shake=0)
    pieces = Scene(layerwise_term(layers=dict(PAIRS[name])), name, shake=0)
    pieces.part.ready.fill_(False)
    settle_parts(pieces.module, pieces.live, [collate_by_hand(items[:1]), collate_by_hand(items[1:])])
    for (a, b), one, other in zip(PAIRS[name], scene.part.maps, pieces.part.maps, strict=True):
        with torch.no_grad():
            ours = torch.cat([states_of(scene.student, item[0])[a][[i for _, i, _ in scored(item)]] for item in items])
            theirs = torch.cat([states_of(scene.teacher, item[2])[b][[j for *_, j in scored(item)]] for item in items])
        torch.testing.assert_close(one.student.mean, ours.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.student.deviation, ours.std(0, correction=0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.teacher.mean, theirs.mean(0), atol=1e-4, rtol=1e-4)
        x, y = (((s - s.mean(0)) / s.std(0, correction=0)).double().numpy() for s in (ours, theirs))
        held = x.T @ x / len(x) + 0.1 * x.shape[1] / len(x) * np.eye(x.shape[1])
        start = torch.from_numpy(np.linalg.solve(held, x.T @ y / len(x)).T).float()
        torch.testing.assert_close(one.map.weight.detach(), start, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(other.map.weight, one.map.weight, atol=1e-3, rtol=1e-3)


def test_the_mixture_reports_the_distance_and_steers_the_gate():
    items = many()
    batch = collate_by_hand(items)
    mixture = functools.partial(layerwise_term, layers={1: 1, 3: 2}, experts=3, active=2)
    scene = Scene(mixture(balance=0.5, z=0.1))
    assert scene.part.group == "projectors"
    ours, gradients = scene.differentiated(lambda: scene.value(batch))

    def naive():
        total, _ = naive_features(scene, items)
        measured = []
        for (a, _), one in zip(scene.part.pairs, scene.part.maps, strict=True):
            states = [states_of(scene.student, item[0])[a][[i for _, i, _ in scored(item)]] for item in items]
            measured.append(one(torch.cat(states))[1])
        n = sum(len(scored(item)) for item in items)
        return total + n * sum(0.5 * m["balance"] + 0.1 * m["z"].mean() for m in measured) / 2

    _, expected = scene.differentiated(naive)
    torch.testing.assert_close(ours.sum.detach(), naive_features(scene, items)[0].detach(), atol=1e-3, rtol=1e-4)
    assert_same_gradients(gradients, expected)
    # with and without: the same value, another gradient of the gate, and no other of anything else
    plain = Scene(mixture(balance=0.0, z=0.0))
    plain.part.load_state_dict(scene.part.state_dict())
    without_it, others = plain.differentiated(lambda: plain.value(batch))
    torch.testing.assert_close(without_it.sum, ours.sum, atol=1e-4, rtol=1e-5)
    for key, gradient in others.items():
        if key.endswith(".gate.weight"):
            assert (gradient - gradients[key]).abs().max() > 1e-2
        else:
            torch.testing.assert_close(gradient, gradients[key], atol=1e-5, rtol=1e-4)
    load, balance = ours.extras["load"] / ours.count, ours.extras["balance"] / ours.count
    assert load.shape == (2, 3)
    torch.testing.assert_close(load.sum(-1), torch.ones(2))
    assert balance.shape == (2,)
    assert (balance > 0.5).all()
    assert (balance <= 1.5).all()


def test_each_gate_of_a_mixture_starts_on_its_own():
    part = Scene(layerwise_term(layers={1: 1, 3: 2}, experts=3), shake=0).part
    assert not torch.equal(part.maps[0].gate.weight, part.maps[1].gate.weight)


# ---- relation


@pytest.mark.parametrize(("name", "most"), [("3 from 2", 128), ("2 from 4", 18), ("6 from 3", 18)])
def test_relation_is_the_naive_loop_value_and_gradient(name, most, monkeypatch):
    monkeypatch.setattr(state_terms, "_RELATION_SPANS", most)
    scene = Scene(relation_term(), name)
    assert scene.part is None
    items, skipped = [*many(), *random_items(2, 1)], (0, 4, 99, 0)
    batch = without(collate_by_hand(items), skipped)
    ours, gradients = scene.differentiated(lambda: scene.value(batch))
    assert int(ours.count) == scene.term.count(batch) == 2, "two windows have spans enough"
    total, windows = naive_relation(scene, items, skipped, most)
    _, expected = scene.differentiated(lambda: total)
    assert windows == 2
    torch.testing.assert_close(ours.sum, total, atol=1e-4, rtol=1e-3)
    assert_same_gradients(gradients, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("spans", [15, 16])
def test_a_window_needs_sixteen_spans(spans):
    lengths = [0, *[2] * spans]
    item = (list(range(spans + 1)), lengths, list(range(spans + 1)), lengths)
    scene, batch = Scene(relation_term()), collate_by_hand([item])
    value = scene.value(batch)
    assert int(value.count) == scene.term.count(batch) == (spans == 16)
    assert (float(value.sum.detach()) > 0) == (spans == 16)


def test_standardised_within_is_the_naive_and_masked_is_sliced():
    states = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 900, 3, 0.1, 1, 1])
    states[..., 4] = 5.0
    states = (states + 40).requires_grad_()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    out = standardised_within(torch.where(mask.unsqueeze(-1), states, math.nan), mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    grad, states.grad = states.grad, None
    total = 0
    for b, n in ((0, 20), (1, 12)):
        some = states[b, :n]
        centred = some - some.mean(0)
        variance = (centred**2).mean(0)
        floor = 1e-6 * float(variance.detach().mean())
        expected = centred / (variance + floor).sqrt()
        torch.testing.assert_close(out[b, :n], expected, atol=1e-4, rtol=1e-3)
        total = total + (expected * weights[b, :n]).sum()
    total.backward()
    # each channel's in its own unit: that of the large one is small, and none of it comes through the floor
    size = states.detach().std(1, keepdim=True)
    torch.testing.assert_close(grad * size, states.grad * size, atol=1e-3, rtol=1e-2)
    assert not out[1, 12:].any()
    assert not out[..., 4].any(), "a channel that does not move"
    assert not grad[1, 12:].any()
    mean, variance = out[0].mean(0), out[0].var(0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance[[0, 1, 2, 5]], torch.ones(4), atol=0.2, rtol=0)


def test_standardised_within_of_half_is_float32():
    states = torch.randn(1, 20, 4).half()
    mask = torch.ones(1, 20, dtype=torch.bool)
    assert torch.equal(standardised_within(states, mask), standardised_within(states.float(), mask))


def test_one_massive_channel_does_not_make_all_spans_alike():
    """Two students beside a channel of 1,000: the one that relates spans as the teacher does is told from the other."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 30, 12, generator=generator)
    other = torch.randn(1, 30, 12, generator=generator)
    for states in (teacher, other):
        states[..., 0] = 1000 * states[..., 0].abs() + 500
    turned = torch.cat([teacher[..., :1] * 3, teacher[..., 1:].flip(-1)], dim=-1)
    mask = torch.ones(1, 30, dtype=torch.bool)

    def distance(student):
        return float(
            state_terms.gram_distance(standardised_within(student, mask), standardised_within(teacher, mask), mask)
        )

    assert distance(turned) < 1e-3
    assert distance(other) > 0.05


# ---- attention


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kinds", "most"), [(("q", "k", "v"), 64), (("k",), 6)])
def test_attention_is_the_naive_loop_value_and_gradient(name, kinds, most, monkeypatch):
    monkeypatch.setattr(state_terms, "_ATTENTION_ROWS", most)
    scene = Scene(attention_term(relation=kinds), name)
    # widths of (q, k, v): llama 16, 8, 8 and qwen3 24, 8, 8; gpt2 12, 12, 12 and qwen3 16, 8, 8; llama 20, 10, 10 and
    # gemma2 16, 8, 8
    heads = {"3 from 2": (8, 8, 8), "2 from 4": (4, 4, 4), "6 from 3": (4, 2, 2)}[name]
    heads = {kind: h for kind, h in zip("qkv", heads, strict=True) if kind in kinds}
    items, skipped = [*many(rows=2), *random_items(2, 1)], (0, 5, 99)
    batch = without(collate_by_hand(items), skipped)
    ours, gradients = scene.differentiated(lambda: scene.value(batch))
    total, by_kind, count = naive_attention(scene, items, heads, skipped, most)
    _, expected = scene.differentiated(lambda: total)
    assert int(ours.count) == scene.term.count(batch) == count
    torch.testing.assert_close(ours.sum, total, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.extras["by_kind"].detach(), by_kind, atol=1e-3, rtol=1e-3)
    assert_same_gradients(gradients, expected, atol=1e-3, rtol=1e-2)


def test_widths_without_a_common_divisor_share_one_head():
    student = build_tiny("gpt2", seed=1, n_embd=15, n_head=3)  # q, k and v 15
    scene = Scene(attention_term(), None, student=student, teacher=models("3 from 2")[1])  # q 24, k and v 8
    items = many(rows=1)
    value = scene.value(collate_by_hand(items))
    total, *_ = naive_attention(scene, items, {"q": 3, "k": 1, "v": 1})
    torch.testing.assert_close(value.sum, total, atol=1e-3, rtol=1e-3)


def test_only_the_tapped_layer_has_to_have_the_attention():
    """Layers of one model may differ: what counts is the layer that is compared."""
    student, teacher = (copy.deepcopy(m) for m in models("3 from 2"))
    student.model.layers[0].self_attn.k_proj = torch.nn.Linear(16, 5)
    teacher.model.layers[0].self_attn.q_proj = None
    attention_term().bound(Setup(student, teacher, None))
    with pytest.raises(ValueError, match="attention of layer 1: expected q_proj"):
        attention_term(layers={3: 1}).bound(Setup(student, teacher, None))


@pytest.mark.parametrize("name", MODELS)
def test_attention_leaves_both_models_on_the_fast_path(name, monkeypatch):
    scene = Scene(attention_term(), name)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(k) or real(*a, **k),
    )
    before = [m.config._attn_implementation for m in (scene.student, scene.teacher)]
    scene.value(collate_by_hand(many(rows=1)))
    fast = [m for m, kind in zip((scene.student, scene.teacher), before, strict=True) if kind == "sdpa"]
    assert scene.student in fast
    assert len(calls) == sum(m.config.get_text_config().num_hidden_layers for m in fast)
    assert [m.config._attn_implementation for m in (scene.student, scene.teacher)] == before
    assert not any(m.config.output_attentions for m in (scene.student, scene.teacher))


def test_fewer_heads_can_be_asked_for():
    """Of one head it is another comparison: that one, and not the usual one."""
    items = many(rows=1)
    batch, found = collate_by_hand(items), {}
    for heads in (1, 2):
        scene = Scene(attention_term(heads=heads))
        total, *_ = naive_attention(scene, items, dict.fromkeys("qkv", heads))
        found[heads] = scene.value(batch).sum.detach()
        torch.testing.assert_close(found[heads], total.detach(), atol=1e-3, rtol=1e-3)
    assert abs(float(found[1] - found[2])) > 1e-2


@pytest.mark.parametrize("relation", [(), ("q", "o"), "qx"])
def test_relations_of_nothing_are_refused(relation):
    with pytest.raises(ValueError, match=r"attention_term: expected relation= some of 'q', 'k', 'v', got"):
        attention_term(relation=relation)


# ---- contrast


@pytest.mark.parametrize(("name", "most"), [("3 from 2", 64), ("2 from 4", 11), ("6 from 3", 11)])
def test_contrast_is_the_naive_loop_value_and_gradient(name, most, monkeypatch):
    monkeypatch.setattr(state_terms, "_CONTRAST_SPANS", most)
    scene = Scene(contrastive_term(temperature=0.2), name)
    items, documents = [*many(), *random_items(2, 1)], [4, 9, 4, 7]
    batch = dataclasses.replace(collate_by_hand(items), document=torch.tensor(documents))
    ours, gradients = scene.differentiated(lambda: scene.value(batch))
    total, count = naive_contrast(scene, items, documents, most, 0.2)
    _, expected = scene.differentiated(lambda: total)
    assert int(ours.count) == scene.term.count(batch) == count >= 32
    torch.testing.assert_close(ours.sum, total, atol=1e-2, rtol=1e-3)
    assert_same_gradients(gradients, expected, atol=1e-3, rtol=1e-2)


def test_contrast_needs_spans_and_documents():
    def windows(*spans):
        lengths = [[0, *[2] * n] for n in spans]
        return collate_by_hand([(list(range(len(x))), x, list(range(len(x))), x) for x in lengths])

    assert contrasted(windows(16, 15)) == 0
    assert contrasted(windows(16, 16)) == 32
    assert contrasted(windows(40, 30)) == 70
    assert contrasted(windows(50, 80)) == 50 + 64, "at most 64 of a window"
    assert contrasted(windows(64)) == 0, "one document"
    one = dataclasses.replace(windows(40, 30), document=torch.tensor([5, 5]))
    assert contrasted(one) == 0
    # a second document that has no span is none
    assert contrasted(without(windows(40, 30), (0, 99))) == 0
    assert contrasted(without(windows(40, 30, 9), (0, 99, 0))) == 49
    scene = Scene(contrastive_term())
    for batch in (windows(16, 15), windows(16, 16), one, without(windows(40, 30, 9), (0, 99, 0))):
        assert int(scene.value(batch).count) == contrasted(batch) == scene.term.count(batch)


def test_a_temperature_above_zero():
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="contrastive_term: expected a temperature above 0, got"):
            contrastive_term(temperature=wrong)


# ---- what all of them share


def full(batch):
    return without(batch, [0] * len(batch.span_mask))


@functools.cache
def batches():
    """Batches at the edge of what there is."""
    span = ([0, 5], [0, 4], [0, 6], [0, 4])
    usual = collate_by_hand(many())
    return {
        "usual": usual,
        "padded": collate_by_hand(many(), pad=13, more_student=4, more_teacher=7),
        "context": without(usual, (4, 0, 20)),
        "no spans": without(usual, (99, 99, 99)),
        "one window without": without(usual, (0, 99, 0)),
        "one span": collate_by_hand([span]),
        "one span among windows": without(usual, (99, int(usual.span_mask[1].sum()) - 1, 99)),
        "one document": dataclasses.replace(usual, document=torch.zeros(3, dtype=torch.long)),
        "few spans": collate_by_hand(random_items(2, 3)),
        "one window": collate_by_hand(many(rows=1)),
    }


@functools.cache
def scene_of(kind: str, name: str = "3 from 2"):
    return Scene(TERMS[kind](), name)


@pytest.mark.parametrize("where", batches())
@pytest.mark.parametrize("kind", TERMS)
def test_counts_are_known_beforehand_and_all_is_finite(kind, where):
    scene, batch = scene_of(kind), batches()[where]
    value, gradients = scene.differentiated(lambda: scene.value(batch))
    count = scene.term.count(batch)
    assert isinstance(count, int)
    assert int(value.count) == count
    assert value.sum.dtype == value.count.dtype == torch.float32
    assert not value.count.requires_grad
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(x.isfinite().all() for x in value.extras.values())
    assert gradients, "there is always something to differentiate"
    if count == 0:
        assert float(value.sum.detach()) == 0
        if kind != "mixture":
            assert not any(g.any() for g in gradients.values())
    else:
        low, high = scene.term.impossible_below, scene.term.impossible_above
        assert low <= float(value.mean.detach()) <= high
        if where != "one span":
            assert any(g.any() for g in gradients.values())
    none = {"no spans": set(TERMS), "one span": {"relation", "contrastive"}, "one document": {"contrastive"}}
    none |= {"few spans": {"relation", "contrastive"}, "one window": {"contrastive"}}
    none |= {"one span among windows": {"relation", "contrastive"}}
    assert (count == 0) == (kind in none.get(where, ())), where


@pytest.mark.parametrize("kind", [kind for kind in TERMS if kind != "contrastive"])
@pytest.mark.parametrize("name", MODELS)
def test_windows_one_by_one_add_up(kind, name):
    scene = scene_of(kind, name)
    assert not scene.term.batchwise
    items = [*many(), *random_items(2, 1)]
    whole, single = collate_by_hand(items), [collate_by_hand([item]) for item in items]
    assert sum(scene.term.count(b) for b in single) == scene.term.count(whole)
    value, gradients = scene.differentiated(lambda: scene.value(whole))
    each = []

    def all_of_them():
        each.extend(scene.value(b) for b in single)
        return torch.stack([v.sum for v in each]).sum()

    total, expected = scene.differentiated(all_of_them)
    torch.testing.assert_close(value.sum, total, atol=1e-3, rtol=1e-4)
    assert float(sum(v.count for v in each)) == float(value.count)
    for what in set(value.extras) - {"balance"}:
        torch.testing.assert_close(
            value.extras[what], sum(v.extras[what] for v in each if v.extras), atol=1e-3, rtol=1e-4
        )
    if kind == "mixture":  # a balance is no sum over windows
        gradients, expected = (
            {n: g for n, g in x.items() if not n.endswith(".gate.weight")} for x in (gradients, expected)
        )
    assert_same_gradients(gradients, expected, atol=1e-3)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(kind, name):
    scene = scene_of(kind, name)
    plain = collate_by_hand(many())
    padded = collate_by_hand(many(), pad=13, more_student=6, more_teacher=3)
    wider = dataclasses.replace(  # further columns of spans that are not there
        padded,
        span_student=torch.cat([padded.span_student, padded.span_student[:, -1:].expand(-1, 5)], dim=1),
        span_teacher=torch.cat([padded.span_teacher, padded.span_teacher[:, -1:].expand(-1, 5)], dim=1),
        span_mask=torch.cat([padded.span_mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1),
    )
    value, gradients = scene.differentiated(lambda: scene.value(plain))
    for other in (padded, wider):
        theirs, others = scene.differentiated(lambda batch=other: scene.value(batch))
        torch.testing.assert_close(theirs.sum, value.sum, atol=1e-3, rtol=1e-4)
        assert float(theirs.count) == float(value.count) == scene.term.count(other)
        assert_same_gradients(others, gradients, atol=1e-3)


@pytest.mark.parametrize("kind", TERMS)
def test_the_gradient_reaches_student_and_parts_and_never_the_teacher(kind):
    scene, batch = scene_of(kind), batches()["usual"]
    signal = scene.live.signal(batch).mapped(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    _, gradients = scene.differentiated(lambda: scene.value(batch, signal))
    for held in (*signal.states.values(), *(x for layer in signal.attention.values() for x in layer.values())):
        assert held.grad is None or not held.grad.any()
    assert any(g.any() for n, g in gradients.items() if n.startswith("student."))
    for name, parameter in scene.module.parts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in scene.teacher.parameters())
    assert all(p.dtype == torch.float32 for p in scene.module.parts.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TERMS)
def test_half_precision_teacher_and_autocast(kind, dtype):
    """What crashed an earlier run: a teacher in half precision, projectors in float32, autocast or not."""
    plain = scene_of(kind)
    half = copy.deepcopy(plain.teacher).to(dtype)
    scene = Scene(TERMS[kind](), teacher=half)
    if scene.part is not None:
        scene.part.load_state_dict(plain.part.state_dict())
    batch = batches()["usual"]
    exact = float(plain.value(batch).mean.detach())
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            value = scene.value(batch)
        assert value.sum.dtype == torch.float32
        _, gradients = scene.differentiated(lambda value=value: value)
        assert all(g.isfinite().all() for g in gradients.values())
        assert float(value.mean.detach()) == pytest.approx(exact, rel=0.25, abs=0.05)


@pytest.mark.parametrize("kind", ["feature", "mixture", "layerwise", "contrastive"])
def test_settling_twice_is_settling_once(kind):
    scene = Scene(TERMS[kind](), shake=0)
    assert bool(scene.part.ready)
    before = copy.deepcopy(scene.part.state_dict())
    assert "ready" in before, "a run that goes on does not settle again"
    scene.part.settle()
    settle_parts(scene.module, scene.live, [collate_by_hand(random_items(1, 2))])  # they are ready: nothing happens
    for name, value in scene.part.state_dict().items():
        assert torch.equal(value, before[name]), name
    scene.part.ready.fill_(False)
    settle_parts(scene.module, scene.live, [collate_by_hand(many(8))])  # forgets first
    for name, value in scene.part.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["feature", "mixture", "layerwise", "contrastive"])
def test_text_without_common_spans_is_refused(kind):
    with pytest.raises(ValueError, match="at least two aligned spans in the first batches of the run, got 1"):
        Scene(TERMS[kind](), settle=collate_by_hand([([0, 5], [0, 4], [0, 6], [0, 4])]))


@pytest.mark.parametrize("kind", ["feature", "relation", "attention", "contrastive", "layerwise"])
def test_a_student_that_is_the_teacher_is_at_the_floor(kind):
    """A shift by one position, layer or span on one side only would show here."""
    model = build_tiny("llama", seed=1, num_hidden_layers=3)
    items = [(a, b, a, b) for a, b, *_ in many(rows=8)]
    batch = collate_by_hand(items)
    scene = Scene(TERMS[kind](), None, student=model, teacher=copy.deepcopy(model), settle=batch, shake=0)
    value = scene.value(batch)
    if kind == "contrastive":
        assert float(value.mean.detach()) < 0.7
        return
    assert float(value.mean.detach()) == pytest.approx(scene.term.floor, abs=1e-4)
    signal = scene.live.signal(batch)
    late = signal.mapped(lambda t: t.roll(1, 1 if kind == "attention" else 0))
    assert float(scene.value(batch, late).mean.detach()) > 2e-3


# ---- what a term says of itself


@pytest.mark.parametrize("kind", TERMS)
def test_name_unit_and_ranges_are_those_of_the_table(kind):
    term = TERMS[kind](0.125)
    assert term.name == NAMES[kind]
    assert term.weight == 0.125
    for field, expected in RANGES[term.name].items():
        assert getattr(term, field) == expected, field
    assert term.taught
    assert json.loads(json.dumps(term.settings)) == dict(term.settings)
    assert term.batchwise == (kind == "contrastive")
    bound = scene_of(kind).term
    assert bound.build is None
    assert bound.settings.keys() == term.settings.keys()
    assert bound.taught


def test_settings_say_what_shapes_a_term():
    layers = {np.int64(3): np.int64(2)}
    assert json.loads(json.dumps(feature_term(layers=layers, experts=3).settings)) == {
        "layers": {"3": 2},
        "taps": 4,
        "experts": 3,
        "active": 2,
        "balance": 0.01,
        "z": 1e-3,
    }
    assert layerwise_term(taps=3).settings["taps"] == 3
    assert relation_term(layers=layers).settings == {"layers": {"3": 2}}
    assert attention_term(relation=("v",)).settings == {"layers": None, "relation": ["v"], "heads": 8}
    assert contrastive_term(temperature=0.5).settings == {"layers": None, "temperature": 0.5}
    assert relation_term(layers={3: 2}).bound(Setup(*models("3 from 2"), None)).needs.student_states == {3}


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({4: 2}, "check_layer_map: student: expected a layer, an integer from 1 to 3, got 4"),
        ({0: 1}, "check_layer_map: student: expected a layer, an integer from 1 to 3, got 0"),
        ({3: 3}, "check_layer_map: teacher: expected a layer, an integer from 1 to 2, got 3"),
        ({1: 2, 3: 1}, "check_layer_map: expected layers that rise on both sides"),
        ({1: 2, 3: 2}, "check_layer_map: expected layers that rise on both sides"),
    ],
)
def test_wrong_layer_maps_are_refused(kind, layers, message):
    term = TERMS[kind](layers=layers)
    with pytest.raises(ValueError, match=message):
        term.bound(Setup(*models("3 from 2"), None))


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("layers", [{}, {"a": 1}, {1.5: 1}, [1, 2], 7])
def test_what_is_no_layer_map_is_refused_at_once(kind, layers):
    with pytest.raises(ValueError, match=r"_term: expected layers=\{student layer: teacher layer\}"):
        TERMS[kind](layers=layers)


@pytest.mark.parametrize(
    "settings", [{"experts": 1}, {"experts": 3, "active": 0}, {"experts": 3, "active": 4}, {"balance": -1}, {"z": -1}]
)
def test_mixtures_that_cannot_work_are_refused_at_once(settings):
    for term in (feature_term, layerwise_term):
        with pytest.raises(ValueError, match=r"^(feature|layerwise)_term: expected"):
            term(**settings)


@pytest.mark.parametrize("kind", ["relation", "attention", "contrastive"])
def test_one_pair_where_one_is_wanted(kind):
    term = TERMS[kind](layers={1: 1, 3: 2})
    with pytest.raises(ValueError, match=f"{kind}_term: expected layers= with one pair, got 2; pass"):
        term.bound(Setup(*models("3 from 2"), None))
    by_hand = TERMS[kind](layers={2: 1}).bound(Setup(*models("3 from 2"), None)).needs
    assert by_hand.student_states | by_hand.student_attention == {2}
    assert by_hand.teacher_states | by_hand.teacher_attention == {1}


def test_a_wrong_layer_map_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="check_layer_map: student: expected a layer, an integer from 1 to 2, got 30"):
        make_trainer(tmp_path, terms=[lm_term(), feature_term(layers={30: 4})])


# ---- all of them at once, on the embedded pair


def test_all_terms_at_once():
    """One backward pass; every parameter of every part gets a finite gradient, and the student does."""
    student = tiny_student()
    setup = Setup(student, embedded_teacher_of(), embedded())
    terms = [
        lm_term(0.3),
        kd_term(0.4, top_k=8),
        span_term(),
        feature_term(experts=3),
        layerwise_term(),
        relation_term(),
        attention_term(),
        contrastive_term(),
        router_term(),
    ]
    terms = [term.bound(setup) for term in terms]
    module = DistillModule(student, terms)
    live = LiveTeacher(setup.teacher, setup.pair.bridge, all_needs(terms))
    data = small_data()
    settle_parts(module, live, [data.train.collate([0, 1, 2, 3]), data.train.collate([4, 5])])
    batch = data.train.collate([6, 8, 12, 16])
    counts = [term.count(batch) for term in terms]
    assert all(counts), dict(zip((t.name for t in terms), counts, strict=True))
    total, sums, extras = module(batch, live.signal(batch), [t.weight / c for t, c in zip(terms, counts, strict=True)])
    total.backward()
    assert sums.isfinite().all()
    for term, value, count in zip(terms, sums.tolist(), counts, strict=True):
        if term.impossible_above is not None:
            assert term.impossible_below <= value / count <= term.impossible_above, term
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert module.parts.keys() == {"feature", "layerwise", "contrastive", "router"}
    assert all(parameters[f"parts.{n}"].grad.any() for n, _ in module.parts.named_parameters())
    assert {"feature.load", "layerwise.by_layer", "attention.by_kind", "router.teacher_load"} <= extras.keys()
    assert not any(value.requires_grad for value in extras.values())
