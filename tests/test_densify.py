"""kd_kit/densify.py: a mixture's experts as one MLP, exact where that is possible, and better than new weights."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import build_tiny
from helpers import pair, teacher, toy_data, toy_pair
from moe_families import build_tiny_moe

from kd_kit import build_data, build_tokenizers, score
from kd_kit.densify import FAMILIES, dense_from_experts
from kd_kit.offline import corpus
from kd_kit.routing import RoutingTap, expert_blocks
from kd_kit.taps import layers_of

IDS = torch.tensor([[3, 17, 5, 12, 9, 11, 6, 2, 2, 20]])
CHANGES = {
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [1], "sliding_window": None},
    "qwen2_moe": {"norm_topk_prob": True, "mlp_only_layers": [1]},
    "mixtral": {},
}


@functools.cache
def text():
    return toy_data(toy_pair(), count=40).train


def mixture(family, **changes):
    return build_tiny_moe(family, **(CHANGES[family] | changes))


def make_alike(model) -> None:
    """Every expert a copy of the first, and a shared one that always has the same weight."""
    with torch.no_grad():
        for block in expert_blocks(model).values():
            experts = block.experts
            tensors = [list(e.parameters()) for e in experts] if isinstance(experts, torch.nn.ModuleList) else None
            if tensors is None:
                for parameter in experts.parameters():
                    parameter.copy_(parameter[:1].expand_as(parameter))
            else:
                for others in tensors[1:]:
                    for one, first in zip(others, tensors[0], strict=True):
                        one.copy_(first)
            if hasattr(block, "shared_expert_gate"):
                block.shared_expert_gate.weight.zero_()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_alike_experts_averaged_are_the_mixture_itself(family):
    model = mixture(family)
    make_alike(model)
    student = dense_from_experts(model, text(), experts="averaged")
    assert type(student).__name__ == FAMILIES[family][1]
    torch.testing.assert_close(logits_of(student), logits_of(model), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_of_alike_experts_one_of_each_neuron_is_chosen(family):
    """16 places for 16 neurons that are there 5 times; two of the same would leave one out."""
    one = 24 if family == "mixtral" else 16
    model = mixture(family, **({} if family == "mixtral" else {"mlp_only_layers": []}))
    make_alike(model)
    student = dense_from_experts(model, text(), width=one)
    assert student.config.intermediate_size == one
    near = (logits_of(student) - logits_of(model)).abs().max() / logits_of(model).abs().max()
    assert near < 0.1, "without the twins' part it is 0.5"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_saves_loads_and_generates(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = mixture(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = dense_from_experts(model, text(), layers=(1, 2), width=20)
    assert student.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(student))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(again.generate(IDS, use_cache=use, **how) for use in (True, False)))


def test_a_dense_layer_of_the_mixture_stays_as_it_is():
    model = mixture("qwen3_moe", intermediate_size=24)
    student = dense_from_experts(model, text(), experts="averaged")
    dense, there = student.model.layers[1].mlp, layers_of(model)[1].mlp
    assert dense.gate_proj.weight.shape == (24, 16)
    assert torch.equal(dense.down_proj.weight, there.down_proj.weight)
    mixed = student.model.layers[0].mlp
    assert not mixed.down_proj.weight[:, 16:].any(), "places without a neuron say something"
    assert mixed.gate_proj.weight[16:].any(), "places without a neuron can never learn"


def test_the_average_has_the_shares_of_the_routers_mass():
    model = mixture("mixtral")
    student = dense_from_experts(model, text(), experts="averaged", layers=(1,), tokens=400)
    seen, mass = 0, torch.zeros(4)
    windows = text()
    order = torch.linspace(0, len(windows) - 1, len(windows)).round().long()
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))].tolist()
    with torch.no_grad(), RoutingTap(model, (1,)) as tap:
        for number in order:
            ids = torch.from_numpy(windows.ids(number)[1]).unsqueeze(0)
            model.model(input_ids=ids, use_cache=False)
            for row in tap.probabilities[1].flatten(0, 1):
                values, chosen = row.topk(2)
                mass[chosen] += values / values.sum()
            seen += ids.numel()
            if seen >= 400:
                break
    block = expert_blocks(model)[1]
    if isinstance(block.experts, torch.nn.ModuleList):
        gates = torch.stack([expert.w1.weight for expert in block.experts])
    else:
        gates = block.experts.gate_up_proj.chunk(2, dim=1)[0]
    wanted = torch.einsum("x,xmd->md", mass / mass.sum(), gates)
    torch.testing.assert_close(student.model.layers[0].mlp.gate_proj.weight, wanted)


def test_the_trained_teacher_gives_students_far_better_than_new_weights():
    both = build_tokenizers(pair().teacher, pair().teacher)
    pages = corpus("student")[:3]
    data = build_data(pages, both, held_out=[corpus("held_out")[10][:4000]], window=128)
    found = {}
    for experts, width in (("averaged", None), ("chosen", 128)):
        student = dense_from_experts(teacher(), data.train, experts=experts, width=width, tokens=6000)
        assert student.config.intermediate_size == 128
        found[experts] = score(student, data.held_out).bits_per_byte
    assert found["chosen"] < found["averaged"] - 0.1
    assert found["averaged"] < 3.2, "new weights have 3.7"
    assert score(teacher(), data.held_out).bits_per_byte < found["chosen"] < 2.7


def test_what_cannot_be_made_dense_is_refused():
    with pytest.raises(ValueError, match=r"one of the families qwen3_moe, qwen2_moe, mixtral, got llama"):
        dense_from_experts(build_tiny("llama"), text())
    with pytest.raises(ValueError, match="got olmoe"):
        dense_from_experts(build_tiny_moe("olmoe"), text())
    with pytest.raises(ValueError, match="use_sliding_window=True"):
        dense_from_experts(mixture("qwen2_moe", use_sliding_window=True), text())
    with pytest.raises(ValueError, match="qkv_bias=False"):
        dense_from_experts(mixture("qwen2_moe", qkv_bias=False), text())
    model = mixture("mixtral")
    with pytest.raises(ValueError, match=r"experts= 'chosen' or 'averaged', got 'best'"):
        dense_from_experts(model, text(), experts="best")
    for width in (0, 4 * 24 + 25, True, 2.0):
        with pytest.raises(ValueError, match=r"width= from 1 to 120, .*left out it is 48"):
            dense_from_experts(model, text(), width=width)
    with pytest.raises(ValueError, match=r"no width= with experts='averaged', which gives 24 neurons, got 48"):
        dense_from_experts(model, text(), experts="averaged", width=48)
    with pytest.raises(ValueError, match=r"text of at least 48 tokens, one for each neuron of an MLP, got \d+"):
        dense_from_experts(model, text(), tokens=20)
    with pytest.raises(ValueError, match=r"layers= from 1 to 3"):
        dense_from_experts(model, text(), layers=4)
