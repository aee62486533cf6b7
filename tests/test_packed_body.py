"""kd_kit/packed_body.py: windows side by side give what they give alone, or are not put side by side."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import FAMILIES, build_tiny
from helpers import teacher as embedded_teacher
from helpers import tiny_student, toy_pair, toy_texts
from torch import nn

from kd_kit import build_data, lm_term
from kd_kit.head import body_of
from kd_kit.likelihood import score
from kd_kit.module import DistillModule
from kd_kit.packed_body import hidden_states, run_body, why_not_packed
from kd_kit.readings import Needs
from kd_kit.routing import find_routing
from kd_kit.teacher import LiveTeacher, default_reading
from kd_kit.types import TeacherSignal


@pytest.fixture(scope="module")
def data():
    """Windows of very different lengths."""
    texts = toy_texts(6, 60) + toy_texts(14, 12, seed=1)
    return build_data(texts, toy_pair(), held_out=0.2, window=48, batch_size=6)


@pytest.fixture(scope="module")
def batch(data):
    order = data.train.table[:, 3] - data.train.table[:, 1]
    ranked = order.argsort().tolist()
    found = data.train.collate([ranked[-1], *ranked[:5]])
    assert found.student_packed.numel()
    assert found.teacher_packed.numel()
    return found


def mamba():
    from transformers import AutoModelForCausalLM, MambaConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "implementation"),
    # soft-capped attention has no other form
    [(f, i) for f in FAMILIES for i in ("sdpa", "eager") if (f, i) != ("gemma2", "sdpa")],
)
def test_families_keep_windows_apart(family, implementation, batch):
    model = build_tiny(family, attn_implementation=implementation)
    assert why_not_packed(model) is None
    with torch.no_grad():
        ids, packed = batch.student_ids, batch.student_packed
        rows, back = run_body(model, ids, packed)
        padded = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert rows.shape[:2] == packed.shape
    there = torch.zeros(ids.shape, dtype=torch.bool)
    there.view(-1)[packed[packed >= 0]] = True
    torch.testing.assert_close(back(rows)[there], padded[there], rtol=1e-4, atol=1e-4)
    assert (back(rows)[~there] == 0).all()


def test_a_recurrent_model_is_run_padded(batch):
    model = mamba()
    assert why_not_packed(model)
    with torch.no_grad():
        rows, back = run_body(model, batch.student_ids, batch.student_packed)
    assert rows.shape[:2] == batch.student_ids.shape
    assert back(rows) is rows


class Leaking(nn.Module):
    """A body that reads what stands before a token, with a share ``amount`` of what stands before its window."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount = amount

    def forward(self, input_ids, position_ids=None, use_cache=False):
        from types import SimpleNamespace

        states = nn.functional.one_hot(input_ids, 64).float()
        before = states.cumsum(1) - states
        if position_ids is not None:
            begin = torch.arange(input_ids.shape[1]) - position_ids
            before = before - (1 - self.amount) * before.gather(1, begin.unsqueeze(-1).expand_as(before))
        return SimpleNamespace(last_hidden_state=states + 0.01 * before)


@pytest.mark.parametrize(("amount", "apart"), [(1.0, False), (0.2, False), (0.0, True)])
def test_a_leak_is_seen(amount, apart, monkeypatch):
    model = build_tiny()
    leaking = Leaking(amount)
    monkeypatch.setattr("kd_kit.packed_body.body_of", lambda _: leaking)
    assert (why_not_packed(model) is None) == apart


def test_attention_in_chunks_counts_from_the_beginning_of_a_row():
    model = build_tiny()
    model.config.attention_chunk_size = 16
    assert why_not_packed(model, 16) is None
    assert "chunks of 16" in why_not_packed(model, 17)


def test_the_measurement_leaves_the_model_as_it_was():
    model = build_tiny().train()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    assert why_not_packed(model) is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mamba"])
def test_values_and_gradients_are_those_of_the_padded_batch(family, batch):
    """With everything that a term may ask for."""
    student = mamba() if family == "mamba" else build_tiny(family, spread=1.0)
    asked = Needs(
        student_states=frozenset({1, 2} if family != "mamba" else {1}),
        student_attention=frozenset({1} if family != "mamba" else ()),
    )
    found = []
    for given in (batch, batch.unpacked()):
        module = DistillModule(student, [lm_term()])
        module.needs, module.meeting_layer = asked, 0
        student.zero_grad()
        output = module.output(given, meet=True)
        ends = given.span_rows[:, 0]
        parts = {"hidden": output.hidden.flatten(0, 1)[given.rows]}
        parts |= {f"state {n}": s.flatten(0, 1)[ends] for n, s in output.states.items()}
        parts |= {
            f"{kind} {n}": t.flatten(0, 1)[given.rows] for n, qkv in output.attention.items() for kind, t in qkv.items()
        }
        total = sum((part.float() * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in parts.values())
        (met,) = torch.autograd.grad(total, output.point, retain_graph=True)
        total.backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        found.append((parts, gradients, met.norm()))
    (ours, our_gradients, our_point), (theirs, their_gradients, their_point) = found
    for name in theirs:
        close(ours[name], theirs[name])
    assert our_gradients.keys() == their_gradients.keys()
    for name in their_gradients:
        close(our_gradients[name], their_gradients[name])
    close(our_point, their_point)


@pytest.mark.parametrize("more", [None, 3])
def test_a_teacher_says_the_same_of_a_packed_batch(batch, data, more):
    model = build_tiny("qwen3_moe")
    needs = Needs(
        (default_reading(data.pair.bridge),),
        row_states=True,
        span_log_probs=True,
        teacher_states=frozenset({1, 2}),
        teacher_attention=frozenset({2}),
        routing=frozenset(find_routing(model).layers),
    )
    source = LiveTeacher(model, data.pair.bridge, needs, more_experts=more)
    one, other = source.signal(batch), source.signal(batch.unpacked())
    there = torch.arange(batch.teacher_ids.shape[1]) < (batch.teacher_targets != -100).sum(1, keepdim=True)
    for field in fields(TeacherSignal):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "attention":
            for kind in "qkv":
                close(ours[2][kind][there], theirs[2][kind][there])
        elif field.name == "cells":
            key = needs.readings[0].key
            close(ours[key].log_probs.exp(), theirs[key].log_probs.exp())
            close(ours[key].tail.exp(), theirs[key].tail.exp())
        elif isinstance(ours, torch.Tensor):
            close(ours, theirs)
        else:
            assert ours.keys() == theirs.keys()
            for layer in ours:
                close(ours[layer], theirs[layer])


def test_a_score_is_the_same(data, monkeypatch):
    model = build_tiny()
    ours = score(model, data.train, batch_size=6)
    monkeypatch.setattr("kd_kit.packed_body.why_not_packed", lambda *_: "not now")
    theirs = score(model, data.train, batch_size=6)
    assert (ours.bytes, ours.tokens) == (theirs.bytes, theirs.tokens)
    assert ours.nats == pytest.approx(theirs.nats, rel=1e-6)


def test_the_embedded_models_keep_windows_apart():
    assert why_not_packed(tiny_student()) is None
    assert why_not_packed(embedded_teacher()) is None
    assert hidden_states(tiny_student(), torch.zeros(1, 3, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)).dim()
