"""Taps against what the models themselves say: their hidden states, their weights, what reaches their attention."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_kit.head import body_of
from kd_kit.taps import Taps, attention_widths, check_layer_map, layer_map, layers_of

LAYERS = 3
B, T = 2, 7

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ALIKE = COMMON | {"num_key_value_heads": 4}  # as many keys as queries
WIDE = COMMON | {"head_dim": 6}  # heads that together are wider than the model
EXPERTS = {"num_local_experts": LAYERS, "num_experts_per_tok": 2}  # as many experts as layers, in a list of their own
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "first_k_dense_replace": 1}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DBRX = {"d_model": 16, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": 64, "pad_token_id": None}
NEXT = {
    "head_dim": 6,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}

SEPARATE = {
    "llama": ("LlamaConfig", COMMON | {"attention_bias": True}),
    "phi": ("PhiConfig", COMMON),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        WIDE | {"num_experts": LAYERS, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "gemma2": ("Gemma2Config", WIDE),
    "granite": ("GraniteConfig", COMMON),
    "cohere": ("CohereConfig", COMMON),
    "mixtral": ("MixtralConfig", COMMON | EXPERTS),
    "olmoe": ("OlmoeConfig", COMMON | {"num_experts": LAYERS, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", WIDE | EXPERTS),
    "opt": (
        "OPTConfig",
        {n: ALIKE[n] for n in ALIKE if n not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
}
FUSED = {
    "gpt2": ("GPT2Config", GPT2 | DRY | {"bos_token_id": 0, "eos_token_id": 0}),
    "gpt_bigcode_one_key": ("GPTBigCodeConfig", GPT2 | DRY | {"multi_query": True, "pad_token_id": None}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2 | DRY | {"multi_query": False, "pad_token_id": None}),
    "phi3": ("Phi3Config", COMMON),
    "mpt": ("MptConfig", {"d_model": 16, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": 64}),
    "dbrx": (
        "DbrxConfig",
        DBRX
        | {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16},  # in transformers 5.0 its router reads as much as the model is wide
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", ALIKE),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 16, "n_layer": LAYERS, "n_head": 4}),
    "persimmon": ("PersimmonConfig", ALIKE | {"qk_layernorm": False}),
    "falcon": ("FalconConfig", ALIKE | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon_one_key": ("FalconConfig", ALIKE | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_alibi": (
        "FalconConfig",
        ALIKE | {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True},
    ),
}
OTHER = {
    "deepseek_v3": ("DeepseekV3Config", ALIKE | LATENT | ROUTED | {"q_lora_rank": 12}),
    "deepseek_v3_plain_q": ("DeepseekV3Config", ALIKE | LATENT | ROUTED | {"q_lora_rank": None}),
    "qwen3_next": ("Qwen3NextConfig", COMMON | NEXT),
}
CONFIGS = SEPARATE | FUSED | OTHER
NO_SDPA = ("bloom", "mpt", "gpt_oss", "gemma2")  # not in every transformers
NORMED = ("qwen3_moe", "olmoe", "qwen3_next")  # they normalise queries and keys after the projection
ATTENDED = {"qwen3_next": (2, 3)}  # its first layer has linear attention

# which rows of the one projection are q, k and v; a head of 4 rows each, numbered as they lie
HEADS = {
    "gpt2": ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
    "mpt": ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
    "phi3": ([0, 1, 2, 3], [4, 5], [6, 7]),
    "dbrx": ([0, 1, 2, 3], [4, 5], [6, 7]),
    "gpt_bigcode_one_key": ([0, 1, 2, 3], [4], [5]),
    "falcon_one_key": ([0, 1, 2, 3], [4], [5]),
    "falcon": ([0, 1, 4, 5], [2, 6], [3, 7]),
}
EACH_WITH_ITS_KEY = ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11])


@pytest.fixture(scope="module")
def models():
    """Builds a family once."""
    built = {}

    def get(family):
        if family not in built:
            built[family] = build(family)
        return built[family]

    return get


def build(family):
    """Three layers of width 16 whose every parameter is random, so that no projection is like another."""
    import transformers

    name, arguments = CONFIGS[family]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # GPT-BigCode of transformers 4
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval()


def ids(t=T, seed=0):
    return torch.randint(2, 64, (B, t), generator=torch.Generator().manual_seed(seed))


def run(model, **arguments):
    return body_of(model)(input_ids=ids(), use_cache=False, **arguments)


def attended(family):
    return ATTENDED.get(family, (1, 2, 3))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- which layers


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layers_are_found(models, family):
    model = models(family)
    layers = layers_of(model)
    assert len(layers) == LAYERS
    seconds = [name for name, _ in model.named_modules() if name.endswith(".1")]  # layers, and experts in them
    assert model.get_submodule(min(seconds, key=lambda name: name.count("."))) is layers[1]


def fake(count, **lists):
    body = nn.Module()
    for name, length in lists.items():
        body.add_module(name, nn.ModuleList(nn.Linear(1, 1) for _ in range(length)))
    model = nn.Module()
    model.body, model.get_decoder = body, lambda: body
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(n_layer=count))
    return model


def test_layers_that_are_not_there_are_named():
    assert len(layers_of(fake(3, h=3, norms=2))) == 3
    mixture = fake(3, h=3)
    for layer in mixture.body.h:
        layer.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    assert layers_of(mixture) is mixture.body.h
    with pytest.raises(ValueError, match=r"layers_of: expected one ModuleList of 4 layers .* got Module with h \(3\);"):
        layers_of(fake(4, h=3))
    with pytest.raises(ValueError, match=r"got Module with attentions \(3\), ffns \(3\); tap"):
        layers_of(fake(3, attentions=3, ffns=3))
    with pytest.raises(ValueError, match=r"ModuleList of None layers .* got Module with no ModuleList;"):
        layers_of(fake(None))
    headless = nn.Module()
    headless.config = fake(2).config
    with pytest.raises(ValueError, match="body_of: expected a causal language model"):
        layers_of(headless)


def test_known_maps():
    assert layer_map(30, 24) == ((7, 6), (15, 12), (22, 18), (30, 24))
    assert layer_map(24, 30) == ((6, 7), (12, 15), (18, 22), (24, 30))
    assert layer_map(2, 24) == ((1, 12), (2, 24))
    assert layer_map(24, 2) == ((12, 1), (24, 2))
    assert layer_map(30, 24, taps=1) == ((30, 24),)
    assert layer_map(1, 1) == ((1, 1),)


def test_every_map_rises_and_ends_with_both_last_layers():
    for student in range(1, 34):
        for teacher in range(1, 34):
            for taps in (1, 2, 3, 4, 40):
                pairs = layer_map(student, teacher, taps=taps)
                assert len(pairs) == min(student, teacher, taps)
                assert pairs[-1] == (student, teacher)
                assert check_layer_map(pairs, student, teacher) == pairs
                swapped = layer_map(teacher, student, taps=taps)
                assert swapped == tuple((t, s) for s, t in pairs)


@pytest.mark.parametrize("numbers", [(0, 3, 4), (3, 0, 4), (3, 3, 0), (3, -1, 4)])
def test_a_map_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match=r"layer_map: expected at least 1 layer on each side and 1 tap, got student"):
        layer_map(*numbers[:2], taps=numbers[2])


def test_a_map_by_hand():
    assert check_layer_map([[1, 2], (3, 4)], 3, 4) == ((1, 2), (3, 4))
    assert check_layer_map({3: 4, 1: 2}, 3, 4) == ((1, 2), (3, 4))
    found = check_layer_map(np.array([[1, 2], [3, 4]]).tolist(), 3, 4)
    assert found == check_layer_map([(np.int64(1), np.int64(2)), (3, 4)], 3, 4)
    assert all(type(n) is int for pair in check_layer_map([(np.int64(1), np.int64(2))], 3, 4) for n in pair)


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], "expected at least one pair of layers, got none"),
        ({}, "expected at least one pair of layers, got none"),
        ([(0, 1)], "student: expected a layer, an integer from 1 to 3, got 0"),
        ([(4, 1)], "student: expected a layer, an integer from 1 to 3, got 4"),
        ([(3, 5)], "teacher: expected a layer, an integer from 1 to 4, got 5"),
        ([(1, -1)], "teacher: expected a layer, an integer from 1 to 4, got -1"),
        ([(1.0, 1)], "got 1.0"),
        ([(True, 1)], "got True"),
        ({"1": 1}, "got '1'"),
        ([(1, None)], "got None"),
        ([(1, 2, 3)], r"expected pairs \(student layer, teacher layer\), got \(1, 2, 3\)"),
        ([1, 2], "expected pairs .* got 1;"),
        (["12"], "expected pairs .* got '12';"),
        ([(1, 1), (1, 2)], r"expected layers that rise on both sides, got \(1, 1\) then \(1, 2\)"),
        ([(1, 2), (2, 2)], r"got \(1, 2\) then \(2, 2\)"),
        ([(1, 2), (1, 2)], "rise on both sides"),
        ([(2, 1), (1, 2)], "rise on both sides"),
        ({1: 3, 2: 2}, r"got \(1, 3\) then \(2, 2\)"),
    ],
)
def test_a_wrong_map_is_refused(pairs, message):
    with pytest.raises(ValueError, match=f"check_layer_map.*{message}"):
        check_layer_map(pairs, 3, 4)


# ---- states


@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_the_hidden_states(models, family):
    model = models(family)
    with torch.no_grad():
        theirs = run(model, output_hidden_states=True).hidden_states
        with Taps(model, states=(1, 2, 3)) as taps:
            final = run(model).last_hidden_state
    assert list(taps.states) == [1, 2, 3]
    for layer, state in taps.states.items():
        assert state.shape == (B, T, 16)
        assert torch.equal(state, theirs[layer])
    assert taps.states[3] is final
    assert not torch.allclose(theirs[1], theirs[2], atol=1e-2), "layers that do little would prove little"


def test_the_whole_model_may_run(models):
    model = models("llama")
    with Taps(model, states=(2,), attention=(3,)) as inner:
        run(model)
    with Taps(model, states=(2,), attention=(3,)) as whole:
        model(input_ids=ids(), use_cache=False)
    assert torch.equal(inner.states[2], whole.states[2])
    assert torch.equal(inner.attention[3]["q"], whole.attention[3]["q"])


# ---- queries, keys and values


def projections(family, attention, x):
    """q, k and v of one layer by hand, from the input of its projections."""
    if family in SEPARATE:
        return {n: functional.linear(x, p.weight, p.bias) for n in "qkv" for p in [getattr(attention, f"{n}_proj")]}
    if family in FUSED:
        names = ("c_attn", "qkv_proj", "Wqkv", "query_key_value")
        one = next(getattr(attention, name) for name in names if hasattr(attention, name))
        weight = one.weight.T if family == "gpt2" else one.weight
        bias = torch.zeros(len(weight)) if one.bias is None else one.bias
        heads = HEADS.get(family, EACH_WITH_ITS_KEY)
        assert len(weight) == 4 * sum(map(len, heads))
        rows = {
            n: torch.cat([torch.arange(4 * h, 4 * h + 4) for h in part]) for n, part in zip("qkv", heads, strict=True)
        }
        return {n: x @ weight[rows[n]].T + bias[rows[n]] for n in "qkv"}
    if family == "qwen3_next":
        q = torch.cat([x @ attention.q_proj.weight[12 * h : 12 * h + 6].T for h in range(4)], dim=-1)
        return {"q": q, "k": attention.k_proj(x), "v": attention.v_proj(x)}
    if attention.q_lora_rank is None:
        q = attention.q_proj(x)
    else:
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
    latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[..., :8])
    weight = attention.kv_b_proj.weight  # per head 6 rows of key, 5 of value
    k = torch.cat([latent @ weight[11 * h : 11 * h + 6].T for h in range(4)], dim=-1)
    v = torch.cat([latent @ weight[11 * h + 6 : 11 * h + 11].T for h in range(4)], dim=-1)
    return {"q": q, "k": k, "v": v}


def attention_of(layer):
    """The attention of a layer and the first of its projections."""
    for module in layer.modules():
        for name in ("c_attn", "qkv_proj", "Wqkv", "query_key_value", "q_proj", "q_a_proj"):
            if isinstance(getattr(module, name, None), nn.Module):
                return module, getattr(module, name)


@pytest.mark.parametrize("family", CONFIGS)
def test_q_k_v_are_the_projections_of_the_layers_input(models, family):
    model, layers = models(family), attended(family)
    inputs, handles = {}, []
    for number in layers:
        _, first = attention_of(layers_of(model)[number - 1])
        handles.append(first.register_forward_pre_hook(lambda m, a, n=number: inputs.update({n: a[0]})))
    with torch.no_grad(), Taps(model, attention=layers) as taps:
        run(model)
        for handle in handles:
            handle.remove()
        for number in layers:
            attention, _ = attention_of(layers_of(model)[number - 1])
            by_hand = projections(family, attention, inputs[number])
            ours = taps.attention[number]
            assert list(ours) == ["q", "k", "v"]
            for name in "qkv":
                torch.testing.assert_close(ours[name], by_hand[name], atol=1e-5, rtol=1e-5)


class Seen:
    """What reached the fast attention, call by call."""

    def __init__(self, monkeypatch):
        self.calls = []
        real = functional.scaled_dot_product_attention

        def counted(query, key, value, *args, **kwargs):
            self.calls.append((query, key, value))
            return real(query, key, value, *args, **kwargs)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_fast_attention_stays_and_sees_the_same(models, family, monkeypatch):
    """Position 0 is not rotated: there the model's own queries and keys are the projections."""
    model, layers = models(family), attended(family)
    with torch.no_grad():
        without = run(model)
    seen = Seen(monkeypatch)
    with torch.no_grad(), Taps(model, states=(1, 2, 3), attention=layers) as taps:
        within = run(model)
    fast = model.config._attn_implementation == "sdpa"
    assert fast or family in NO_SDPA
    assert len(seen.calls) == (len(layers) if fast else 0)
    assert torch.equal(within.last_hidden_state, without.last_hidden_state)
    assert getattr(within, "attentions", None) is None
    for number, call in zip(layers, seen.calls, strict=fast):
        for name, theirs in zip("qkv", call, strict=True):
            width = {"deepseek_v3": {"q": 10, "k": 6, "v": 5}}.get(family.removesuffix("_plain_q"), {}).get(name)
            ours = taps.attention[number][name].unflatten(-1, (-1, width or theirs.shape[-1])).transpose(1, 2)
            if theirs.shape[1] != ours.shape[1]:  # one key for several queries
                ours = ours.repeat_interleave(theirs.shape[1] // ours.shape[1], dim=1)
            if family == "dbrx":
                ours = ours.clamp(-2, 2)
            if family == "opt" and name == "q":
                ours = ours / 2  # scaled before
            if name == "v":
                torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]])  # deepseek may pad them
            elif family not in NORMED:
                content = slice(0, 6 if family.startswith("deepseek") else None)
                torch.testing.assert_close(ours[:, :, 0, content], theirs[:, :, 0, content], atol=1e-6, rtol=1e-5)


def test_the_attention_follows_from_q_k_and_v(models):
    """GPT-2 has no rotation: its attention map and what it reads, from the taps alone."""
    model = models("gpt2")
    attention = layers_of(model)[1].attn
    output = {}
    handle = attention.register_forward_hook(lambda m, a, o: output.update(of=o[0]))
    with torch.no_grad(), Taps(model, attention=(2,)) as taps:
        run(model)
        handle.remove()
        q, k, v = (taps.attention[2][n].view(B, T, 4, 4).transpose(1, 2) for n in "qkv")
        scores = (q @ k.mT / 2).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        read = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        torch.testing.assert_close(attention.c_proj(read), output["of"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_widths_are_known_without_running(models, family, monkeypatch):
    model, layers = models(family), attended(family)
    with torch.no_grad(), Taps(model, attention=layers) as taps:
        run(model)
    monkeypatch.setattr(type(body_of(model)), "forward", None)
    for number in layers:
        widths = attention_widths(model, number)
        assert widths == {name: tensor.shape[-1] for name, tensor in taps.attention[number].items()}
        assert all(taps.attention[number][name].shape[:2] == (B, T) for name in "qkv")
    if len(layers) == LAYERS:
        assert attention_widths(model) == widths


def test_widths_of_unlike_layers():
    model = build("llama")
    layers_of(model)[1].self_attn.k_proj = nn.Linear(16, 12)
    with pytest.raises(
        ValueError, match=r"attention_widths: expected layers alike, got .*'k': 8.* layer 1 and .*'k': 12.* in layer 2;"
    ):
        attention_widths(model)
    assert attention_widths(model, 2) == {"q": 16, "k": 12, "v": 8}
    with pytest.raises(ValueError, match="attention_widths: expected a layer, an integer from 1 to 3, got 4"):
        attention_widths(model, 4)


def test_known_widths(models):
    assert attention_widths(models("llama")) == {"q": 16, "k": 8, "v": 8}
    assert attention_widths(models("gemma2")) == {"q": 24, "k": 12, "v": 12}
    assert attention_widths(models("falcon")) == {"q": 16, "k": 8, "v": 8}
    assert attention_widths(models("deepseek_v3")) == {"q": 40, "k": 24, "v": 20}


def test_an_attention_of_another_form_is_refused(models):
    model = build("llama")
    layers_of(model)[1].self_attn.k_proj = None
    with pytest.raises(
        ValueError,
        match=r"attention of layer 2: expected q_proj, k_proj and v_proj, .*gpt_neox.* got a layer of llama with "
        r"self_attn: q_proj, v_proj, o_proj; mlp: .*; tap the attention of another layer",
    ):
        Taps(model, attention=(2,))
    Taps(model, states=(2,), attention=(1, 3))


def test_a_layout_is_known_by_family_not_by_name():
    """CodeGen's qkv_proj is not Phi-3's: four shards of q, v, k."""
    import transformers

    config = transformers.CodeGenConfig(**GPT2, rotary_dim=4)
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"got a layer of codegen with .*attn: .*qkv_proj"):
        Taps(model, attention=(1,))


def test_linear_attention_has_no_taps(models):
    model = models("qwen3_next")
    with pytest.raises(
        ValueError, match=r"attention of layer 1: expected .* got a layer of qwen3_next with linear_attn:"
    ):
        Taps(model, attention=(1,))


# ---- gradients


def weighed(tensors):
    """A sum that depends on every entry in its own way."""
    return sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors)


def tapped(taps):
    return [*taps.states.values(), *(t for part in taps.attention.values() for t in part.values())]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def checkpoint_layers(model, *, reentrant):
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # as of transformers 5
    arguments = {f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    getattr(model, f"{name}_checkpointing_enable")(**arguments)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_gradient_of_a_state_is_the_hidden_states():
    model = build("llama")
    with Taps(model, states=(2,)) as taps:
        run(model)
    weighed([taps.states[2]]).backward()
    ours = gradients(model)
    weighed([run(model, output_hidden_states=True).hidden_states[2]]).backward()
    same(ours, gradients(model))
    assert any("layers.1." in name for name in ours)
    assert not any("layers.2." in name for name in ours)


def test_the_gradient_of_queries_reaches_their_weights():
    model = build("phi3")
    with Taps(model, attention=(2,)) as taps:
        run(model)
    taps.attention[2]["k"].sum().backward()
    rows = layers_of(model)[1].self_attn.qkv_proj.weight.grad.abs().sum(-1)
    assert (rows[16:24] > 0).all()
    assert (rows[:16] == 0).all()
    assert (rows[24:] == 0).all()


def test_a_gradient_with_respect_to_a_tap():
    """Two-phase backward: the heads above a tap alone, then the trunk."""
    model = build("llama")
    with Taps(model, states=(2, 3)) as taps:
        run(model)
    (gradient,) = torch.autograd.grad(weighed([taps.states[3]]), taps.states[2], retain_graph=True)
    assert gradient.shape == (B, T, 16)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "falcon", "deepseek_v3", "qwen3_moe"])
def test_checkpointing_changes_nothing(family, inside):
    model = build(family).train()
    with Taps(model, states=(1, 2, 3), attention=(1, 3)) as taps:
        weighed([run(model).last_hidden_state])
    plain = [t.detach().clone() for t in tapped(taps)]
    weighed(tapped(taps)).backward()
    expected = gradients(model)

    checkpoint_layers(model, reentrant=False)
    calls = []
    projection = attention_of(layers_of(model)[0])[1]
    handle = projection.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with Taps(model, states=(1, 2, 3), attention=(1, 3)) as taps:
        run(model)
        before = tapped(taps)
        if inside:
            weighed(before).backward()
            assert all(a is b for a, b in zip(before, tapped(taps), strict=True)), "a recomputation was taken"
    if not inside:
        weighed(before).backward()
        assert all(a is b for a, b in zip(before, tapped(taps), strict=True))
    handle.remove()
    assert len(calls) == 2, "the layer was recomputed"
    same(gradients(model), expected)
    for ours, theirs in zip(before, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reentrant_checkpointing_is_never_silently_without_gradient():
    model = build("llama").train()
    with Taps(model, states=(1, 2)) as taps:
        run(model)
    weighed(tapped(taps)).backward()
    expected = gradients(model)
    checkpoint_layers(model, reentrant=True)
    message = r"Taps: expected layer \d to run with gradient, got reentrant checkpointing, .*\"use_reentrant\": False"
    with pytest.raises(RuntimeError, match=message), Taps(model, attention=(2,)):
        run(model)
    try:
        with Taps(model, states=(1, 2)) as taps:
            run(model)
    except RuntimeError as error:  # transformers 4 calls a layer's hooks inside its checkpoint
        assert "use_reentrant" in str(error)
    else:
        weighed(tapped(taps)).backward()
        same(gradients(model), expected)
    with torch.no_grad(), Taps(model.eval(), attention=(2,)) as taps:
        run(model)
    assert not taps.attention[2]["q"].requires_grad


# ---- hooks come and go


def test_hooks_are_there_only_inside():
    model = build("llama")
    before = hooks(model)
    with Taps(model, states=(1, 3), attention=(2,)) as taps:
        assert hooks(model) == before + 2 + 1 + 3  # the body's two, a layer's, the projections'
        run(model)
    assert hooks(model) == before
    state = taps.states[1]
    run(model)
    assert taps.states[1] is state


def test_hooks_go_when_something_fails():
    model = build("llama")
    before = hooks(model)
    with pytest.raises(KeyError), Taps(model, states=(1,)):
        raise KeyError
    assert hooks(model) == before

    def fail(*_):
        raise ArithmeticError

    handle = layers_of(model)[1].register_forward_hook(fail)
    taps = Taps(model, states=(1,), attention=(1,))
    with pytest.raises(ArithmeticError), taps:
        run(model)
    handle.remove()
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="expected a finished forward pass of the body"):
        _ = taps.states
    with taps:
        run(model)
        assert taps.states[1].shape == (B, T, 16)
        with pytest.raises(ValueError, match="You must specify exactly one"):
            body_of(model)()
    with pytest.raises(RuntimeError, match="expected a finished forward pass of the body"):
        _ = taps.states


def test_only_the_body_is_heard():
    model = build("llama")
    projection = layers_of(model)[0].self_attn.q_proj
    with Taps(model, attention=(1,)) as taps:
        projection(torch.zeros(1, 1, 16))
        run(model)
        q = taps.attention[1]["q"]
        with torch.no_grad():
            projection(torch.zeros(1, 1, 16))
    assert taps.attention[1]["q"] is q


def test_nothing_ran():
    model = build("llama")
    taps = Taps(model, states=(1,), attention=(1,))
    for name in ("states", "attention"):
        with pytest.raises(RuntimeError, match=r"Taps: .* got none; call body_of\(model\)"):
            getattr(taps, name)
    with taps:
        pass
    with pytest.raises(RuntimeError, match="got none"):
        _ = taps.states
    with taps:
        run(model)
    assert taps.attention[1]["q"].shape == (B, T, 16)


def test_the_last_call_counts_and_leaves_the_first_alone():
    model = build("llama")
    with Taps(model, states=(1,), attention=(1,)) as taps:
        run(model)
        first, kept = tapped(taps), [t.detach().clone() for t in tapped(taps)]
        body_of(model)(input_ids=ids(5, seed=1), use_cache=False)
        second = tapped(taps)
    assert all(t.shape[:2] == (B, 5) for t in second)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    weighed(first).backward()


def test_taps_nest():
    model = build("llama")
    before = hooks(model)
    with Taps(model, states=(1, 2), attention=(1,)) as outer:
        with Taps(model, states=(2, 3), attention=(1, 3)) as inner:
            run(model)
        assert outer.states[2] is inner.states[2]
        assert torch.equal(outer.attention[1]["q"], inner.attention[1]["q"])
        with outer:
            body_of(model)(input_ids=ids(4), use_cache=False)
        assert outer.states[1].shape == (B, 4, 16)
        body_of(model)(input_ids=ids(3), use_cache=False)
    assert outer.states[1].shape == (B, 3, 16)
    assert inner.states[2].shape == (B, T, 16)
    assert hooks(model) == before


def test_two_models_do_not_mix(models):
    student, teacher = models("llama"), models("gpt2")
    with Taps(student, states=(2,)) as ours, Taps(teacher, states=(2,)) as theirs:
        with torch.no_grad():
            run(teacher)
        run(student)
    assert ours.states[2].requires_grad
    assert not theirs.states[2].requires_grad


@pytest.mark.parametrize("arguments", [{"states": (4,)}, {"states": (0,)}, {"attention": (-1,)}, {"states": ("1",)}])
def test_a_layer_that_is_not_there(models, arguments):
    with pytest.raises(ValueError, match=r"Taps: (states|attention): expected a layer, an integer from 1 to 3, got"):
        Taps(models("llama"), **arguments)


def test_a_layer_that_the_pass_skips():
    model = build("llama")
    attention = layers_of(model)[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    message = r"got no call of .*\(2, 'k'\).*; the model skipped it"
    with pytest.raises(RuntimeError, match=message), Taps(model, attention=(2,)):
        run(model)


# ---- precision and modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3"])
def test_half_precision_stays_half(family, dtype):
    model = build(family).to(dtype)
    with Taps(model, states=(1, 3), attention=(2,)) as taps:
        theirs = run(model, output_hidden_states=True).hidden_states
    assert torch.equal(taps.states[1], theirs[1])
    assert all(t.dtype == dtype for t in tapped(taps))
    weighed(tapped(taps)).backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_autocast():
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16), Taps(model, attention=(2,)) as taps:
        run(model)
    assert {t.dtype for t in tapped(taps)} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "falcon", "deepseek_v3"])
def test_inference_mode(models, family):
    model = models(family)
    with torch.no_grad(), Taps(model, states=(1, 3), attention=(2,)) as plain:
        run(model)
    with torch.inference_mode(), Taps(model, states=(1, 3), attention=(2,)) as taps:
        run(model)
    assert all(t.is_inference() for t in tapped(taps))
    assert all(torch.equal(a, b) for a, b in zip(tapped(taps), tapped(plain), strict=True))


def test_a_cache_does_not_disturb(models):
    """transformers turns its cache on by default; latent attention updates it before it expands keys and values."""
    for family in ("llama", "deepseek_v3"):
        with torch.no_grad(), Taps(models(family), attention=(1,)) as with_cache:
            body_of(models(family))(input_ids=ids())
        with torch.no_grad(), Taps(models(family), attention=(1,)) as without:
            run(models(family))
        assert all(torch.equal(a, b) for a, b in zip(tapped(with_cache), tapped(without), strict=True))
