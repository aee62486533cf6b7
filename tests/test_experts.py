"""Experts one after the other with one question to the card: the same numbers as transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers
from moe_families import FAMILIES, build_tiny_moe
from torch.utils._python_dispatch import TorchDispatchMode

import kd_kit as kd
from kd_kit import models
from kd_kit.cards import profile_for
from kd_kit.experts import NAME, ask_once_per_layer, sorted_experts
from kd_kit.routing import find_routing

FIVE = int(transformers.__version__.split(".")[0]) >= 5
WAITS = {"aten.nonzero.default", "aten._local_scalar_dense.default", "aten.bincount.default", "aten.unique2.default"}
"""Operations of which a host must know the outcome before it can go on."""

needs_five = pytest.mark.skipif(not FIVE, reason="transformers 4 keeps a module per expert, and takes no other forward")


class Waits(TorchDispatchMode):
    """Counts the operations that a host would wait for on a card."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in WAITS
        return func(*args, **(kwargs or {}))


def eager(name: str):
    model = build_tiny_moe(name).eval()
    if not model._can_set_experts_implementation():
        pytest.skip(f"the experts of {name} have one forward only in this transformers")
    model.set_experts_implementation("eager")
    return model


@needs_five
@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n in transformers.models.auto.configuration_auto.CONFIG_MAPPING]
)
def test_every_family_computes_what_it_did(name):
    model = eager(name)
    ids = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        # the eager way of 5.0 reads the wrong weights where a router gives those of all experts (Hunyuan, Phi)
        model.set_experts_implementation("batched_mm")
        before = model(input_ids=ids, use_cache=False).logits
        model.set_experts_implementation("eager")
        changed = ask_once_per_layer(model)
        after = model(input_ids=ids, use_cache=False).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max().clamp(min=1)
    kept = {m.config._experts_implementation for m in model.modules() if hasattr(m, "_apply_gate")}
    assert kept == ({NAME} if changed else {"eager"})


@needs_five
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"])
def test_these_are_changed(name):
    assert ask_once_per_layer(eager(name)) > 0


@needs_five
def test_a_layer_asks_the_card_once_and_not_per_expert():
    model = eager("qwen3_moe")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad(), Waits() as before:
        model.model(input_ids=ids, use_cache=False)
    layers = ask_once_per_layer(model)
    with torch.no_grad(), Waits() as after:
        model.model(input_ids=ids, use_cache=False)
    assert layers == len(find_routing(model).layers) == 2
    assert before.count - after.count >= 3 * layers  # which layer has which tokens: per expert and per layer
    assert after.count < layers  # the counts themselves come over as one tensor


@needs_five
def test_tokens_that_all_go_to_one_expert():
    layer = eager("qwen3_moe").model.layers[0].mlp.experts
    hidden, chosen = torch.randn(5, 16), torch.full((5, 1), 2)
    with torch.no_grad():
        theirs = type(layer).forward(layer, hidden, chosen, torch.ones(5, 1))
        ours = sorted_experts(layer, hidden, chosen, torch.ones(5, 1))
    torch.testing.assert_close(ours, theirs)


@needs_five
def test_gradients_are_those_of_the_eager_way():
    model = eager("qwen3_moe")
    ids = torch.arange(24).view(2, 12)
    found = []
    for way in (lambda m: 0, ask_once_per_layer):
        way(model)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_grouped_products_and_dense_models_stay_as_they_are():
    grouped, dense = build_tiny_moe("qwen3_moe"), kd.build_student()
    if FIVE:
        grouped.set_experts_implementation("grouped_mm")
    assert ask_once_per_layer(grouped) == 0
    assert ask_once_per_layer(dense) == 0


@needs_five
def test_a_teacher_for_an_old_card_is_built_with_it(monkeypatch):
    monkeypatch.setattr(models, "profile_for", lambda capability: profile_for((6, 0)))
    teacher = kd.build_teacher(dtype=torch.float32)
    assert teacher.config._experts_implementation == NAME
    ids = torch.arange(40).view(2, 20)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(input_ids=ids).logits, kd.build_teacher()(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
