"""kd_kit/pruning.py: fewer layers that compute what they computed, with a cache, and after saving and loading."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, build_tiny
from moe_families import build_tiny_moe, installed
from torch import nn

from kd_kit.head import body_of
from kd_kit.pruning import kept_layers, pruned, shorter_config, spans
from kd_kit.taps import Taps, layers_of

IDS = torch.tensor([[3, 17, 5, 42, 9, 11, 60, 2, 2, 30]])


def logits_of(model, **arguments):
    with torch.no_grad():
        return model(input_ids=IDS, **arguments).logits


def run_by_hand(model, kept):
    """Logits of a Llama of which only these layers run, one after the other."""
    body = body_of(model)
    with torch.no_grad():
        hidden = body.embed_tokens(IDS)
        turned = body.rotary_emb(hidden, torch.arange(IDS.shape[1]).unsqueeze(0))
        for number in kept:
            out = body.layers[number - 1](hidden, position_embeddings=turned)
            hidden = out[0] if isinstance(out, tuple) else out
        return model.lm_head(body.norm(hidden))


@pytest.mark.parametrize(
    ("total", "layers", "ends", "spaced"),
    [
        (30, 4, (1, 2, 29, 30), (1, 11, 20, 30)),
        (30, 5, (1, 2, 28, 29, 30), (1, 8, 16, 23, 30)),
        (4, 3, (1, 3, 4), (1, 2, 4)),
        (7, 1, (7,), (7,)),
        (3, 3, (1, 2, 3), (1, 2, 3)),
    ],
)
def test_which_layers_stay(total, layers, ends, spaced):
    assert kept_layers(total, layers) == ends
    assert kept_layers(total, layers, "spaced") == spaced


@pytest.mark.parametrize("keep", ["ends", "spaced"])
def test_any_number_of_layers_stays_with_the_last(keep):
    for total in range(1, 40):
        for layers in range(1, total + 1):
            kept = kept_layers(total, layers, keep)
            assert len(set(kept)) == layers
            assert list(kept) == sorted(kept)
            assert kept[-1] == total
            assert layers == 1 or kept[0] == 1


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (5, r"layers= from 1 to 4, which is how many this model has, got 5"),
        (0, r"layers= from 1 to 4, .*got 0"),
        (True, "got True"),
        (2.5, r"got 2\.5"),
        ("12", "got '12'"),
        ((), r"got \(\)"),
        ((2, 1), r"rise, from 1 to 4, got \(2, 1\)"),
        ((1, 1), r"got \(1, 1\)"),
        ((0, 2), r"got \(0, 2\)"),
        ([2, 5], r"got \(2, 5\)"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, said):
    with pytest.raises(ValueError, match=r"^pruned: expected .*" + said):
        kept_layers(4, layers)


def test_another_way_of_choosing_is_refused():
    with pytest.raises(ValueError, match="keep= 'ends' or 'spaced', got 'middle'"):
        kept_layers(4, 2, "middle")


@pytest.mark.parametrize("kept", [(1, 5), (2, 3, 5), (5,), (1, 2, 3, 4, 5)])
def test_the_layers_that_stay_compute_what_they_computed(kept):
    model = build_tiny("llama", num_hidden_layers=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    short = pruned(model, kept)
    torch.testing.assert_close(logits_of(short), run_by_hand(model, kept))
    assert short.config.num_hidden_layers == len(layers_of(short)) == len(kept)
    assert [layer.self_attn.layer_idx for layer in short.model.layers] == list(range(len(kept)))
    assert model.config.num_hidden_layers == len(layers_of(model)) == 5, "the whole model was changed"
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with torch.no_grad():
        next(short.model.layers[0].parameters()).zero_()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "the weights are shared"


def test_the_callers_random_state_device_dtype_and_mode_are_kept():
    model = build_tiny("llama", num_hidden_layers=3).half().train()
    state = torch.get_rng_state()
    short = pruned(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in short.parameters()} == {torch.float16}
    assert short.training
    assert model.training
    assert not pruned(model.eval(), 2).training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saves_loads_and_generates_with_a_cache(family, tmp_path):
    from transformers import AutoModelForCausalLM

    layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    short = pruned(build_tiny(family, **layers), (1, 2, 4))
    short.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(short))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (again.generate(IDS, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain)
    full = logits_of(again)
    past = again(input_ids=IDS[:, :6], use_cache=True).past_key_values
    rest = again(input_ids=IDS[:, 6:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, full[:, 6:])


def test_lists_that_say_something_of_each_layer_go_with_it():
    """Gemma 2 looks far and near in turns; of its four layers the two that look far stay."""
    model = build_tiny("gemma2", num_hidden_layers=4, sliding_window=3)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    short = pruned(model, (2, 4))
    assert short.config.layer_types == ["full_attention"] * 2
    near = pruned(model, (1, 3))
    assert near.config.layer_types == ["sliding_attention"] * 2
    far_token = IDS.clone()
    far_token[0, 0] = 50
    with torch.no_grad():
        assert not torch.equal(short(far_token).logits[0, -1], logits_of(short)[0, -1])
        assert torch.equal(near(far_token).logits[0, -1], logits_of(near)[0, -1])


def test_layers_that_a_list_names_are_numbered_anew():
    model = build_tiny_moe("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1, 3])
    short = pruned(model, (1, 2, 4, 5))
    assert short.config.mlp_only_layers == [1, 2]
    assert [hasattr(layer.mlp, "experts") for layer in short.model.layers] == [True, False, False, True]


def test_experts_in_every_second_layer_stay_where_they_are():
    model = build_tiny_moe("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[], decoder_sparse_step=2)
    short = pruned(model, (2, 3, 4))
    assert [hasattr(layer.mlp, "experts") for layer in short.model.layers] == [True, False, True]


def test_first_layers_of_another_kind_are_counted_anew():
    model = build_tiny_moe("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=2)
    assert pruned(model, (1, 3, 4)).config.first_k_dense_replace == 1
    assert pruned(model, (3, 4)).config.first_k_dense_replace == 0


@pytest.mark.skipif("jamba" not in installed(), reason="no such family in this version of transformers")
def test_a_pattern_that_breaks_is_refused():
    """Jamba has experts in every second layer, whatever stands in any list."""
    with pytest.raises(ValueError, match=r"expected JambaForCausalLM to be the same layers in a shorter config"):
        pruned(build_tiny_moe("jamba"), (1, 3))


def test_layers_that_compute_something_else_in_their_new_place_are_refused():
    """GPT-2 can scale attention by the number of the layer."""
    model = build_tiny("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"got hidden states that differ by 0\."):
        pruned(model, (3, 4))
    assert len(layers_of(model)) == 4, "what was tried is left behind"


def test_a_model_without_one_list_of_layers_is_refused():
    class Odd(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.config = build_tiny("llama").config
            self.model = nn.Linear(2, 2)

        def get_decoder(self):
            return self.model

    with pytest.raises(ValueError, match="expected one ModuleList of 2 layers"):
        pruned(Odd(), 1)


def test_taps_read_the_shorter_model():
    short = pruned(build_tiny("llama", num_hidden_layers=5), 3)
    with Taps(short, states=(1, 3), attention=(2,)) as taps:
        logits_of(short)
    assert taps.states[3].shape == (1, IDS.shape[1], 16)


def test_a_configuration_alone_gets_shorter():
    config = build_tiny("gemma2", num_hidden_layers=4).config
    short = shorter_config(config, (1, 2, 4))
    assert short.num_hidden_layers == 3
    assert len(short.layer_types) == 3
    assert config.num_hidden_layers == 4


def test_numbers_in_words():
    assert spans((1, 2, 3, 7, 9, 10)) == "1-3, 7, 9-10"
