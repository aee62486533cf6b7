"""The router term: against a plain loop over windows that were never padded, value and gradient."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch
from conftest import build_tiny, collate_by_hand, random_items
from helpers import make_trainer
from moe_families import build_tiny_moe, installed
from test_state_terms import Scene, assert_same_gradients, many, scored, states_of, without

from kd_kit import lm_term
from kd_kit.expert_terms import RoutingHead, router_term
from kd_kit.module import settle_parts
from kd_kit.ranges import RANGES
from kd_kit.routing import RoutingTap, count_chosen, find_routing
from kd_kit.terms import Setup


@functools.cache
def teacher_of(family: str = "qwen3_moe", **changes):
    """Three layers, the second of them dense; four experts, two of them active."""
    return build_tiny_moe(family, seed=2, **changes).requires_grad_(False)


@functools.cache
def student_of(layers: int = 3, family: str = "llama"):
    depth = {"num_hidden_layers": layers} if family == "llama" else {"n_layer": layers, "n_embd": 12, "n_head": 3}
    return build_tiny(family, seed=1, **depth)


def scene(term=None, student=None, teacher=None, **settings) -> Scene:
    teacher = teacher_of() if teacher is None else teacher
    student = student_of() if student is None else student
    return Scene(router_term() if term is None else term, None, student=student, teacher=teacher, **settings)


def pairs(term, student, teacher):
    return term.bound(Setup(student, teacher, None)).part.pairs


def naive(one, items, skipped=None):
    """Sum over spans of the mean over pairs, the sums per pair, and how often the teacher chose each expert."""
    each, chosen = [[] for _ in one.part.pairs], [[0.0] * head.map.out_features for head in one.part.heads]
    for item, skip in zip(items, skipped or [0] * len(items), strict=True):
        states = states_of(one.student, item[0])
        with RoutingTap(one.teacher) as tap:
            one.teacher(input_ids=torch.tensor([item[2]]), use_cache=False)
        for _, i, j in scored(item, skip):
            for k, ((a, b), head) in enumerate(zip(one.part.pairs, one.part.heads, strict=True)):
                p = tap.probabilities[b][0, j]
                x = (states[a][i] - head.student.mean) / head.student.deviation
                q = (head.map.weight @ x + head.map.bias).softmax(-1)
                each[k].append(sum(p[e] * (p[e] / q[e]).log() for e in range(len(p))) / math.log(len(p)))
                for expert in sorted(range(len(p)), key=lambda e, p=p: -float(p[e]))[: one.part.active[k]]:
                    chosen[k][expert] += 1 / one.part.active[k]
    sums = torch.stack([torch.stack(values).sum() for values in each])
    return sums.mean(), sums.detach(), chosen


CASES = {
    "3 from 3": (3, "llama", {}, ((1, 1), (3, 3))),
    "2 from 4": (2, "gpt2", {"num_hidden_layers": 4}, ((1, 1), (2, 4))),
    "6 from 3": (6, "llama", {}, ((3, 1), (6, 3))),
    "3 from 2": (3, "llama", {"num_hidden_layers": 2, "mlp_only_layers": []}, ((1, 1), (3, 2))),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_naive_loop_value_and_gradient(case):
    layers, family, changes, expected_pairs = CASES[case]
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    if "mlp_only_layers" in changes:
        teacher = build_tiny_moe("qwen3_moe", seed=2, num_hidden_layers=2, mlp_only_layers=[]).requires_grad_(False)
    else:
        teacher = teacher_of(**changes)
    one = scene(student=student_of(layers, family), teacher=teacher)
    assert one.part.pairs == expected_pairs
    items, skipped = many(), (0, 4, 0)
    batch = without(collate_by_hand(items), skipped)
    ours, gradients = one.differentiated(lambda: one.value(batch))
    total, by_layer, chosen = naive(one, items, skipped)
    _, expected = one.differentiated(lambda: total)
    torch.testing.assert_close(ours.sum, total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.extras["by_layer"].detach(), by_layer, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.extras["teacher_load"], torch.tensor(chosen))
    assert int(ours.count) == len(batch.span_rows) == one.term.count(batch)
    torch.testing.assert_close(ours.extras["teacher_load"].sum(-1), ours.count.expand(len(expected_pairs)))
    assert_same_gradients(gradients, expected)


def test_the_load_is_the_teachers_own_choice():
    one, items = scene(), many(rows=1)
    batch = collate_by_hand(items)
    load = one.value(batch).extras["teacher_load"]
    with RoutingTap(one.teacher) as tap:
        one.teacher(input_ids=batch.teacher_ids, use_cache=False)
    ends = torch.zeros_like(batch.teacher_ids, dtype=torch.bool)
    ends[0, [j for *_, j in scored(items[0])]] = True
    for row, layer in zip(load, (1, 3), strict=True):
        torch.testing.assert_close(row * 2, count_chosen(tap.probabilities[layer], 2, ends).float())


# ---- which layers


def test_pairs_move_to_the_nearest_router():
    def without_routers(layers, *dense):
        return build_tiny_moe("qwen3_moe", num_hidden_layers=layers, mlp_only_layers=[n - 1 for n in dense])

    six = student_of(6)
    assert pairs(router_term(), six, without_routers(6)) == ((3, 3), (6, 6))
    assert pairs(router_term(), six, without_routers(6, 3)) == ((3, 2), (6, 6))
    assert pairs(router_term(), six, without_routers(6, 3, 2, 6)) == ((3, 4), (6, 5))
    assert pairs(router_term(taps=3), six, without_routers(6, 1, 2)) == ((2, 3), (4, 4), (6, 6))
    # two pairs that come to one router: the later student layer keeps it
    assert pairs(router_term(), six, without_routers(6, 1, 2, 3, 4)) == ((3, 5), (6, 6))
    assert pairs(router_term(taps=4), six, without_routers(6, 2, 3, 4, 5, 6)) == ((6, 1),)
    assert pairs(router_term(taps=1), student_of(3), without_routers(6, 6)) == ((3, 5),)
    # by hand they stay where they were put
    assert pairs(router_term(layers={2: 1, 5: 4}), six, without_routers(6, 3)) == ((2, 1), (5, 4))


def test_layers_without_a_router_are_refused():
    setup = Setup(student_of(), teacher_of(), None)
    message = r"router_term: expected teacher layers with a router, got 2; pass layers={student layer: one of 1, 3}"
    with pytest.raises(ValueError, match=message):
        router_term(layers={1: 1, 2: 2, 3: 3}).bound(setup)
    with pytest.raises(ValueError, match="check_layer_map: teacher: expected a layer, an integer from 1 to 3, got 4"):
        router_term(layers={3: 4}).bound(setup)
    with pytest.raises(ValueError, match="check_layer_map: expected layers that rise on both sides"):
        router_term(layers={1: 3, 3: 1}).bound(setup)


def test_a_dense_teacher_is_refused_before_training(tmp_path):
    dense = build_tiny("llama", vocab=4096, max_position_embeddings=1024)
    with pytest.raises(ValueError, match="find_routing: expected a mixture of experts, got LlamaForCausalLM, which is"):
        make_trainer(tmp_path, model=dense, terms=[lm_term(), router_term()])
    assert not any(tmp_path.iterdir())


def test_layers_of_different_numbers_of_experts():
    """Where the layers differ, every head has its own width, and there is no table of loads."""
    teacher = teacher_of()
    other = build_tiny_moe("qwen3_moe", seed=3, num_experts=6, num_experts_per_tok=1)
    uneven = copy.deepcopy(teacher)
    uneven.model.layers[2].mlp = other.model.layers[2].mlp
    routing = find_routing(uneven)
    assert (routing.experts, routing.active) == ((4, 6), (2, 1))
    one = scene(teacher=uneven)
    assert [head.map.out_features for head in one.part.heads] == [4, 6]
    assert one.part.active == [2, 1]
    items = many()
    batch = collate_by_hand(items)
    ours, gradients = one.differentiated(lambda: one.value(batch))
    total, by_layer, _ = naive(one, items)
    _, expected = one.differentiated(lambda: total)
    torch.testing.assert_close(ours.sum, total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ours.extras["by_layer"].detach(), by_layer, atol=1e-3, rtol=1e-4)
    assert ours.extras.keys() == {"by_layer"}
    assert_same_gradients(gradients, expected)
    # the later layer alone has its own numbers too
    last = scene(router_term(layers={3: 3}), teacher=uneven)
    assert last.part.active == [1]
    assert last.value(batch).extras["teacher_load"].shape == (1, 6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_families(family):
    if family not in installed():
        pytest.skip(f"this transformers has no {family}")
    teacher = teacher_of(family)
    one = scene(teacher=teacher)
    items = many(rows=2)
    ours, (total, *_) = one.value(collate_by_hand(items)), naive(one, items)
    torch.testing.assert_close(ours.sum, total, atol=1e-3, rtol=1e-3)
    assert {theirs for _, theirs in one.part.pairs} <= set(find_routing(teacher).layers)


def test_scores_of_a_family_that_is_not_listed():
    teacher = copy.deepcopy(teacher_of())
    teacher.config.model_type = "qwen99_moe"
    with pytest.raises(ValueError, match="find_routing: expected a family whose scores are known, got 'qwen99_moe'"):
        router_term().bound(Setup(student_of(), teacher, None))
    said, known = scene(router_term(scores="softmax"), teacher=teacher), scene()
    batch = collate_by_hand(many())
    torch.testing.assert_close(said.value(batch).sum, known.value(batch).sum)
    other = scene(router_term(scores="sigmoid"), teacher=teacher)
    assert abs(float((other.value(batch).sum - known.value(batch).sum).detach())) > 1e-2


# ---- the head


def test_it_starts_from_the_mean_distribution():
    items = many(8, rows=4)
    one = scene(settle=collate_by_hand(items), shake=0)
    found = {layer: [] for _, layer in one.part.pairs}
    for item in items:
        with RoutingTap(one.teacher) as tap:
            one.teacher(input_ids=torch.tensor([item[2]]), use_cache=False)
        for layer, rows in found.items():
            rows.append(tap.probabilities[layer][0, [j for *_, j in scored(item)]])
    for (ours, layer), head in zip(one.part.pairs, one.part.heads, strict=True):
        mean = torch.cat(found[layer]).mean(0)
        torch.testing.assert_close(head(torch.randn(3, 16)).softmax(-1), mean.expand(3, -1), atol=1e-5, rtol=1e-4)
        states = torch.cat([states_of(one.student, item[0])[ours][[i for _, i, _ in scored(item)]] for item in items])
        torch.testing.assert_close(head.student.mean, states.mean(0), atol=1e-4, rtol=1e-4)
    # at the start it costs the teacher's mean entropy below that of the mean: no more than 1
    value = one.value(collate_by_hand(items))
    entropy = [torch.special.entr(torch.cat(rows)).sum(-1).mean() for rows in found.values()]
    of_mean = [torch.special.entr(torch.cat(rows).mean(0)).sum() for rows in found.values()]
    gap = sum(m - e for m, e in zip(of_mean, entropy, strict=True)) / 2 / math.log(4)
    assert float(value.mean.detach()) == pytest.approx(float(gap), abs=1e-4)


def test_the_mean_is_over_all_batches_and_an_expert_that_is_never_used_stays_finite():
    head, states = RoutingHead(3, 4), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([[0.75, 0.25, 0.0, 0.0]]), torch.tensor([[0.25, 0.75, 0.0, 0.0]])
    head.observe(states[:15], first.expand(15, -1).half())
    head.observe(states[15:], second.expand(5, -1))
    head.settle()
    mean = (3 * first + second) / 4
    torch.testing.assert_close(head(states[:2]).softmax(-1), mean.expand(2, -1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(head.map.bias.exp().sum(), torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(head.student.mean, states.mean(0))
    assert head.map.bias.isfinite().all()
    head.forget()
    head.observe(states[:10], first.flip(-1).expand(10, -1))
    head.settle()
    torch.testing.assert_close(head(states[:2]).softmax(-1), first.flip(-1).expand(2, -1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(head.student.mean, states[:10].mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_is_float32_under_autocast_and_of_half_outside(dtype):
    head = RoutingHead(5, 4)
    states = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    head.observe(states, torch.rand(20, 4))
    head.settle()
    with torch.no_grad():
        head.map.weight.normal_(generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(head(states), head.map(head.student(states)).float()), "autocast is on"
        within = head(states)
    assert within.dtype == head(states.to(dtype)).dtype == torch.float32
    assert torch.equal(within, head(states))
    assert torch.equal(head(states.to(dtype)), head(states.to(dtype).float()))


def test_a_head_that_can_tell_learns():
    """A teacher whose routing follows from the student's state: the value falls towards 0."""
    teacher = teacher_of()
    student = copy.deepcopy(teacher).requires_grad_(True)
    batch = collate_by_hand([(a, b, a, b) for a, b, *_ in many(8, rows=4)])
    one = scene(router_term(layers={1: 1, 3: 3}), student=student, teacher=teacher, settle=batch, shake=0)
    signal, values = one.live.signal(batch), []
    optimizer = torch.optim.Adam(one.part.parameters(), lr=0.05)
    with torch.no_grad():
        output = one.module.output(batch)
    for _ in range(40):
        optimizer.zero_grad()
        mean = one.term.value(output, signal, batch).mean
        mean.backward()
        optimizer.step()
        values.append(float(mean.detach()))
    assert values[-1] < 0.5 * values[0]


# ---- what every term has to do


@functools.cache
def shared():
    return scene()


@functools.cache
def batches():
    usual = collate_by_hand(many())
    return {
        "usual": usual,
        "padded": collate_by_hand(many(), pad=13, more_student=4, more_teacher=7),
        "no spans": without(usual, (99, 99, 99)),
        "one window without": without(usual, (0, 99, 3)),
        "one span": collate_by_hand([([0, 5], [0, 4], [0, 6], [0, 4])]),
        "one document": dataclasses.replace(usual, document=torch.zeros(3, dtype=torch.long)),
    }


@pytest.mark.parametrize("where", batches())
def test_counts_are_known_beforehand_and_all_is_finite(where):
    one, batch = shared(), batches()[where]
    value, gradients = one.differentiated(lambda: one.value(batch))
    assert int(value.count) == one.term.count(batch) == len(batch.span_rows)
    assert value.sum.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(x.isfinite().all() for x in value.extras.values())
    if where == "no spans":
        assert float(value.sum.detach()) == 0
        assert not any(g.any() for g in gradients.values())
    else:
        assert one.term.impossible_below <= float(value.mean.detach()) <= one.term.impossible_above
        assert any(g.any() for g in gradients.values())


def test_windows_one_by_one_add_up_and_padding_changes_nothing():
    one = shared()
    items = [*many(), *random_items(2, 1)]
    whole, single = collate_by_hand(items), [collate_by_hand([item]) for item in items]
    padded = collate_by_hand(items, pad=13, more_student=6, more_teacher=3)
    value, gradients = one.differentiated(lambda: one.value(whole))
    each = [one.value(b) for b in single]
    total, added = one.differentiated(lambda: torch.stack([v.sum for v in each]).sum())
    torch.testing.assert_close(value.sum, total, atol=1e-3, rtol=1e-4)
    assert sum(one.term.count(b) for b in single) == one.term.count(whole)
    for what in ("by_layer", "teacher_load"):
        torch.testing.assert_close(value.extras[what], sum(v.extras[what] for v in each), atol=1e-3, rtol=1e-4)
    assert_same_gradients(gradients, added)
    other, others = one.differentiated(lambda: one.value(padded))
    torch.testing.assert_close(value.sum, other.sum, atol=1e-3, rtol=1e-4)
    assert_same_gradients(gradients, others)


def test_the_gradient_reaches_student_and_heads_and_never_the_teacher():
    one, batch = shared(), batches()["usual"]
    signal = one.live.signal(batch).mapped(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    _, gradients = one.differentiated(lambda: one.value(batch, signal))
    assert all(p.grad is None for p in signal.routing.values())
    assert any(g.any() for n, g in gradients.items() if n.startswith("student."))
    for name, parameter in one.module.parts.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(p.dtype == torch.float32 for p in one.part.parameters())
    assert one.part.group == "routers"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_teacher_and_autocast(dtype):
    half = scene(teacher=copy.deepcopy(teacher_of()).to(dtype))
    half.part.load_state_dict(shared().part.state_dict())
    batch = batches()["usual"]
    exact = float(shared().value(batch).mean.detach())
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            value = half.value(batch)
        assert value.sum.dtype == torch.float32
        _, gradients = half.differentiated(lambda value=value: value)
        assert all(g.isfinite().all() for g in gradients.values())
        assert float(value.mean.detach()) == pytest.approx(exact, rel=0.25, abs=0.05)


def test_settling_twice_is_settling_once():
    one = scene(shake=0)
    before = copy.deepcopy(one.part.state_dict())
    assert "ready" in before
    one.part.settle()
    settle_parts(one.module, one.live, [collate_by_hand(random_items(1, 2))])
    for name, value in one.part.state_dict().items():
        assert torch.equal(value, before[name]), name
    one.part.ready.fill_(False)
    settle_parts(one.module, one.live, [collate_by_hand(many(8))])
    for name, value in one.part.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_name_unit_ranges_and_settings():
    term = router_term(0.25)
    assert (term.name, term.weight, term.over, term.batchwise) == ("router", 0.25, "spans", False)
    for field, expected in RANGES["router"].items():
        assert getattr(term, field) == expected, field
    assert term.taught
    assert json.loads(json.dumps(term.settings)) == {"layers": None, "taps": 2, "scores": None}
    assert router_term(layers={3: 1}, scores="softmax", taps=1).settings == {
        "layers": {"3": 1},
        "taps": 1,
        "scores": "softmax",
    }
    needs = shared().term.needs
    assert (needs.student_states, needs.routing, needs.teacher_states) == ({1, 3}, {1, 3}, frozenset())
