"""A mixture made of a dense model: the same function at every token, routers that are found, noise if asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny

import kd_kit as kd
from kd_kit.routing import find_routing
from kd_kit.upcycling import FAMILIES, _block, _copies

IDS = torch.arange(40).reshape(2, 20)


def dense(family: str, **changes):
    """A tiny model with weights that matter."""
    import transformers
    from transformers import AutoModelForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None}
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(**(shape | changes))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too, so that a lost one is seen
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 8}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1), (2, 2)])
def test_the_mixture_is_the_dense_model(family, changes, experts, top_k):
    old = dense(family, **changes)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    new = kd.upcycle(old, experts=experts, top_k=top_k)
    assert type(new).__name__ == f"{FAMILIES[family]}ForCausalLM"
    torch.testing.assert_close(logits(new), logits(old), atol=2e-4, rtol=1e-4)
    found = find_routing(new)
    assert (len(found.layers), found.experts, found.active) == (3, experts, top_k)
    assert all(torch.equal(before[name], tensor) for name, tensor in old.state_dict().items())
    assert new.config.tie_word_embeddings == old.config.tie_word_embeddings
    with torch.no_grad():  # whatever the routers say
        for layer in new.model.layers:
            _block(layer).gate.weight.normal_(std=3.0)
    torch.testing.assert_close(logits(new), logits(old), atol=2e-4, rtol=1e-4)


def test_a_stretched_rope_is_carried_over():
    stretched = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
    old = dense("llama", rope_scaling=stretched, rope_theta=500.0)
    plain = dense("llama", rope_theta=500.0)
    assert (logits(old) - logits(plain)).abs().max() > 1e-2, "or else the test sees nothing"
    torch.testing.assert_close(logits(kd.upcycle(old)), logits(old), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_relative_to_each_weight_and_drawn_from_the_seed(family):
    old = dense(family)
    with torch.no_grad():
        old.model.layers[0].mlp.up_proj.weight.mul_(100)
    new, again, other = (kd.upcycle(old, noise=0.1, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        ratios = [float((target - source).std() / source.std()) for target, source in _copies(new, old)]
    assert len(ratios) == 3 * 4 * 3
    assert all(0.07 < ratio < 0.13 for ratio in ratios)
    experts = [target for target, _ in _copies(new, old)][:12:3]
    assert all(not torch.equal(experts[0], expert) for expert in experts[1:])
    assert torch.equal(logits(new), logits(again))
    assert not torch.equal(logits(new), logits(other))
    assert (logits(new) - logits(old)).abs().max() > 1e-3


def test_seed_draws_other_routers():
    gates = [_block(kd.upcycle(dense("llama"), seed=seed).model.layers[0]).gate.weight for seed in (0, 0, 1)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_dtype_mode_freezing_and_random_state_stay():
    old = dense("llama").to(torch.bfloat16).train()
    state = torch.get_rng_state()
    new = kd.upcycle(old)
    assert torch.equal(state, torch.get_rng_state())
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.training
    assert old.training
    assert not kd.upcycle(dense("llama")).training
    assert all(p.requires_grad for p in new.parameters())
    assert not any(p.requires_grad for p in kd.upcycle(dense("llama").requires_grad_(False)).parameters())


def test_on_an_old_card_experts_run_one_after_the_other(monkeypatch):
    import transformers

    from kd_kit import upcycling
    from kd_kit.cards import profile_for
    from kd_kit.experts import NAME

    old = dense("qwen3")
    monkeypatch.setattr(upcycling, "profile_for", lambda capability: profile_for((6, 0)))
    new = kd.upcycle(old)
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert new.config._experts_implementation == NAME
    torch.testing.assert_close(logits(new), logits(old), atol=2e-4, rtol=1e-4)


def test_it_is_saved_and_loaded_by_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    new = kd.upcycle(dense("qwen2"), noise=0.1)
    new.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(new))


def test_a_mixture_that_differs_is_refused():
    """A Llama whose attention does more than its configuration says."""
    old = dense("llama")
    hook = old.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 1.5, *out[1:]))
    with pytest.raises(ValueError, match="expected a mixture with the logits of the dense model, got"):
        kd.upcycle(old)
    hook.remove()
    kd.upcycle(old)


def test_what_cannot_become_a_mixture_is_refused():
    with pytest.raises(ValueError, match=r"expected a dense causal language model of llama, .*got GPT2LMHeadModel"):
        kd.upcycle(build_tiny("gpt2"))
    with pytest.raises(ValueError, match="got Qwen3MoeForCausalLM"):
        kd.upcycle(build_tiny("qwen3_moe"))
    with pytest.raises(ValueError, match="without biases, got attention_bias, mlp_bias"):
        kd.upcycle(dense("llama", attention_bias=True, mlp_bias=True))
    with pytest.raises(ValueError, match="got use_sliding_window=True"):
        kd.upcycle(dense("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1))
    for numbers in ({"experts": 2, "top_k": 3}, {"top_k": 0}, {"experts": 2.0}):
        with pytest.raises(ValueError, match="1 <= top_k <= experts"):
            kd.upcycle(dense("llama"), **numbers)
    for noise in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise of 0 or more"):
            kd.upcycle(dense("llama"), noise=noise)
