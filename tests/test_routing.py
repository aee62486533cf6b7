"""Routing against what the models say and do: every mixture-of-experts family of the installed transformers."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from moe_families import FAMILIES, build_tiny_moe, installed, shared_tiny_moe
from torch import nn

from kd_kit.head import body_of
from kd_kit.routing import (
    FIXED,
    KNOWN,
    SIGMOID,
    SOFTMAX,
    RoutingTap,
    count_chosen,
    find_routing,
    more_experts,
    routing_balance,
)
from kd_kit.taps import layers_of

B, S = 2, 7
IDS = torch.randint(1, 64, (B, S), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * S, [1] * (S - 2) + [0] * 2])

MUST = (
    "aria_text dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoehybrid "
    "granitemoeshared hunyuan_v1_moe jamba jetmoe lfm2_moe minimax mixtral olmoe phimoe qwen2_moe qwen3_moe qwen3_next"
)

NOT_COVERED = {
    "doge": "product keys: a token looks up two halves of a key, and there is no distribution over experts",
    **dict.fromkeys(
        ("dots3_note", "gemma4", "gemma4_assistant", "llama4", "qwen3_5_moe", "qwen4_exp"),
        "a wrapper around the text model of the same name, which is covered",
    ),
}
"""Families with experts in their config, and why no test builds them."""

PRESENT = [family for family in FAMILIES if family in installed()]
every_family = pytest.mark.parametrize("family", PRESENT)


@torch.no_grad()
def run(model, **arguments):
    return body_of(model)(input_ids=IDS, attention_mask=MASK, use_cache=False, **arguments)


def tapped(model, **arguments):
    with RoutingTap(model) as tap:
        output = run(model, **arguments)
    return tap.probabilities, output


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def block_of(model, layer: int) -> nn.Module:
    """The module with gate and experts, found by another road than the kit's: by the name of what holds it."""
    layer = layers_of(model)[layer - 1]
    names = ("block_sparse_moe", "mlp", "feed_forward", "ffn", "moe", "mixer", "block_sparse", "layer_moe")
    for part in [*(getattr(layer, name, None) for name in names), layer]:
        if part is not None and (hasattr(part, "gate") or hasattr(part, "router")):
            return part
    raise AssertionError(f"no block in {type(layer).__name__}: {[n for n, _ in layer.named_children()]}")


def gate_of(model, layer: int) -> nn.Module:
    block = block_of(model, layer)
    return block.router if hasattr(block, "router") else block.gate


def by_hand(logits: torch.Tensor, scores: str) -> torch.Tensor:
    """Probabilities from logits, spelled out in double precision."""
    logits = logits.double()
    score = {
        "softmax": lambda: (logits - logits.amax(-1, keepdim=True)).exp(),
        "sigmoid": lambda: 1 / (1 + (-logits).exp()),
        "sqrtsoftplus": lambda: (1 + logits.exp()).log().sqrt(),
    }[scores]()
    return (score / score.sum(-1, keepdim=True)).float()


STEERS = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def steer(model) -> None:
    """Gives every bias that only steers the choice a value, so that it would be seen where it does not belong."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith(STEERS):
            with torch.no_grad():
                tensor.copy_(torch.linspace(0.5, -0.5, tensor.numel()).reshape(tensor.shape))


# ---- finding


@every_family
def test_what_is_found(family):
    routing = find_routing(shared_tiny_moe(family))
    _, layers, shared = FAMILIES[family]
    extra = {"zaya": 1, "longcat_flash": 1}.get(family, 0)  # an expert that does nothing competes too
    active = 1 if family == "zaya" else 2
    assert (routing.layers, routing.experts, routing.active, routing.shared) == (layers, 4 + extra, active, shared)
    assert len(repr(routing).splitlines()) == 2
    assert f"{active} of {4 + extra} experts" in repr(routing) and "weight [" in repr(routing)


def test_families_that_must_be_covered_are():
    missing = [name for name in MUST.split() if name in installed() and name not in FAMILIES]
    assert not missing
    assert len(KNOWN) == len(SOFTMAX.split()) + len(SIGMOID.split())


def test_which_families_are_not_covered():
    """Says so and does not fail: a later transformers has more of them."""
    new = []
    for name, config in installed().items():
        try:
            fields = config().to_dict()
        except Exception:  # composed of other configs: no text model of its own
            continue
        nested = [inner for inner in fields.values() if isinstance(inner, dict)]
        if any("expert" in str(key) for part in (fields, *nested) for key in part):
            new += [name] if name not in FAMILIES and name not in NOT_COVERED else []
    if new:
        pytest.skip(f"no test builds these mixtures of experts: {', '.join(new)}")


def test_layers_may_differ():
    """As HunYuan's config could say before it was checked."""
    model, other = build_tiny_moe("hunyuan_v1_moe"), build_tiny_moe("hunyuan_v1_moe", num_experts=6, moe_topk=1)
    layers_of(model)[1].mlp = layers_of(other)[1].mlp
    routing = find_routing(model)
    assert (routing.experts, routing.active) == ((4, 6, 4), (2, 1, 2))
    probabilities, _ = tapped(model)
    assert [p.shape[-1] for p in probabilities.values()] == [4, 6, 4]
    with pytest.raises(ValueError, match="from 1 to 4, got 5 in layer 1"), more_experts(model, 5):
        pass


def test_repr_joins_runs_of_layers():
    assert "2 layers: 1, 3;" in repr(find_routing(shared_tiny_moe("qwen3_moe")))
    assert "2 layers: 2-3;" in repr(find_routing(shared_tiny_moe("deepseek_v3")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model_is_called_dense(tiny_models, family):
    with pytest.raises(
        ValueError, match=r"got \w+LMHeadModel|LlamaForCausalLM, which is dense.*leave the router term out"
    ):
        find_routing(tiny_models[family])
    with pytest.raises(ValueError, match="which is dense"):
        RoutingTap(tiny_models[family])
    with pytest.raises(ValueError, match="which is dense"), more_experts(tiny_models[family], 2):
        pass


def test_an_unknown_router_is_an_error_that_shows_what_is_there():
    model = build_tiny_moe("mixtral")
    for layer in layers_of(model):
        block = next(part for part in layer.modules() if hasattr(part, "gate") and hasattr(part, "experts"))
        block.switchboard = block.gate
        del block.gate
    with pytest.raises(ValueError) as error:
        find_routing(model)
    for words in ("`router` or `gate`", "MixtralForCausalLM", "MixtralSparseMoeBlock", "num_local_experts=4"):
        assert words in str(error.value)
    assert "Attention" not in str(error.value) and "Norm" not in str(error.value)


def test_a_router_without_a_weight_is_no_router():
    model = build_tiny_moe("mixtral")
    for layer in layers_of(model):
        block = next(part for part in layer.modules() if hasattr(part, "gate") and hasattr(part, "experts"))
        block.gate = nn.Identity()
    with pytest.raises(ValueError, match="with a weight"):
        find_routing(model)
    for layer in layers_of(model):  # packed by a quantiser: its rows are no experts
        block = next(part for part in layer.modules() if hasattr(part, "gate") and hasattr(part, "experts"))
        block.gate.weight = torch.zeros(32, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="with a weight"):
        find_routing(model)


def test_a_router_of_which_nobody_says_how_many_it_chooses_is_an_error():
    model = build_tiny_moe("mixtral")
    for layer in layers_of(model):
        block = next(part for part in layer.modules() if hasattr(part, "gate") and hasattr(part, "experts"))
        block.gate = nn.Linear(16, 4)
        block.top_k = None
    with pytest.raises(ValueError, match=r"expected an attribute top_k.* got Linear in layer 1"):
        find_routing(model)


def test_two_routers_in_a_layer_are_an_error():
    model = build_tiny_moe("mixtral")
    layers_of(model)[1].second = copy.deepcopy(block_of(model, 2))
    with pytest.raises(ValueError, match="at most one router in a layer, got 2 in layer 2"):
        find_routing(model)


def test_the_scores_of_an_unknown_family_are_not_guessed():
    model = build_tiny_moe("mixtral")
    expected, _ = tapped(model)
    model.config.model_type = "mixtral_2"
    with pytest.raises(ValueError, match=r"'mixtral_2' with scores=None; .* one of softmax, sigmoid, sqrtsoftplus"):
        find_routing(model)
    with pytest.raises(ValueError, match="scores='relu'"):
        find_routing(model, scores="relu")
    assert find_routing(model, scores="softmax").scores == "softmax"
    with RoutingTap(model, scores="softmax") as tap:
        run(model)
    assert all(torch.equal(tap.probabilities[n], expected[n]) for n in expected)
    with RoutingTap(model, scores="sigmoid") as tap:
        run(model)
    assert not torch.allclose(tap.probabilities[1], expected[1])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_family_may_say_its_scores_in_its_config(scores):
    if "cohere2_moe" not in installed():
        pytest.skip("no Cohere2-MoE here")
    assert find_routing(build_tiny_moe("cohere2_moe", expert_selection_fn=scores)).scores == scores


# ---- reading


@every_family
def test_rows_are_distributions(family):
    probabilities, output = tapped(shared_tiny_moe(family))
    routing = find_routing(shared_tiny_moe(family))
    assert tuple(probabilities) == routing.layers
    for p in probabilities.values():
        assert p.shape == (B, S, routing.experts) and p.dtype == torch.float32 and not p.requires_grad
        assert p.isfinite().all() and (p >= 0).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(B, S))
        assert p.std(-1).mean() > 0.01, "the routers of these tests are not even"
    assert output.last_hidden_state.shape[:2] == (B, S)


def told_by(model, output, routing) -> dict[int, torch.Tensor]:
    """{layer: [B * S, X]}, what the model returned for ``output_router_logits=True``."""
    told = getattr(output, "router_logits", None) or ()
    told = [logits.reshape(B * S, -1) for logits in told if logits is not None and logits.shape[-1] == routing.experts]
    several = max(len(told) // len(routing.layers), 1)  # JetMoE: those of the attention come before the MLP's
    told = told[several - 1 :: several]
    if len(told) < len(routing.layers):  # DeepSeek-V4 does not record its hash layers
        return dict(zip(routing.layers[-len(told) :], told, strict=True)) if told else {}
    return dict(zip(routing.layers, told, strict=True))


def chosen_by(output) -> tuple[torch.Tensor, torch.Tensor] | None:
    """([B * S, k] weights, [B * S, k] experts) of what a router returned, where it does the choosing."""
    parts = output if isinstance(output, tuple) else ()
    experts = [p for p in parts if torch.is_tensor(p) and p.dtype == torch.int64 and p.dim() == 2]
    weights = [
        p for p in parts if torch.is_tensor(p) and experts and p.shape == experts[0].shape and p is not experts[0]
    ]
    return (weights[0], experts[0]) if experts and weights else None


@every_family
def test_it_is_what_the_model_says_and_chooses(family):
    """Against what it returns as router logits, the weights it gives the chosen, and its weight times what it hears."""
    model = build_tiny_moe(family)
    steer(model)
    routing = find_routing(model)
    heard, outputs, handles = {}, {}, []
    for layer in routing.layers:
        keep = partial(lambda n, module, args, output: outputs.update({n: output}), layer)
        handles.append(gate_of(model, layer).register_forward_hook(keep))
        hear = partial(lambda n, module, args: heard.update({n: args[0]}), layer)
        handles += [part.register_forward_pre_hook(hear) for part in (block_of(model, layer), gate_of(model, layer))]
    probabilities, output = tapped(model, output_router_logits=True)
    for handle in handles:
        handle.remove()

    def same(layer, logits):
        logits = logits.reshape(B * S, -1)
        if (logits >= 0).all() and torch.allclose(logits.sum(-1), torch.ones(B * S)):  # DBRX 4.56, Gemma 4
            expected = logits
        else:
            expected = by_hand(logits, routing.scores)
        torch.testing.assert_close(probabilities[layer].flatten(0, 1), expected, atol=2e-6, rtol=1e-4)
        compared.add(layer)

    compared = set()
    told = told_by(model, output, routing)
    if not any((logits == 0).any() for logits in told.values()):  # else the weights of the chosen among zeros
        for layer, logits in told.items():
            same(layer, logits)
    for layer in routing.layers:
        gate, found = gate_of(model, layer), outputs.get(layer)
        if torch.is_tensor(found):  # the block chooses
            same(layer, found)
        elif found is not None and (pair := chosen_by(found)) is not None and family not in ("phimoe", "zaya"):
            weights, experts = pair
            if family == "gemma4_text":
                weights = weights / gate.per_expert_scale[experts]
            mine = probabilities[layer].flatten(0, 1).gather(-1, experts)
            share = weights.float() / weights.float().sum(-1, keepdim=True)
            torch.testing.assert_close(mine / mine.sum(-1, keepdim=True), share, atol=2e-6, rtol=1e-4)
            compared.add(layer)
            if not any(name.endswith((*STEERS, "tid2eid")) for name in block_of(model, layer).state_dict()):
                best = probabilities[layer].flatten(0, 1).topk(experts.shape[-1], dim=-1).indices
                assert torch.equal(best.sort(-1).values, experts.sort(-1).values)
        if layer not in compared:
            linear = next(part for part in gate.modules() if getattr(part, "weight", None) is not None)
            bias = getattr(linear, "bias", None)
            logits = heard[layer].double() @ linear.weight.double().T
            same(layer, logits if bias is None else logits + bias)


@every_family
def test_the_model_computes_what_it_did_and_is_left_alone(family):
    model = shared_tiny_moe(family)
    before, hooks = run(model).last_hidden_state, hooks_of(model)
    with RoutingTap(model):
        assert hooks_of(model) > hooks
        inside = run(model).last_hidden_state
    assert torch.equal(before, inside)
    assert hooks_of(model) == hooks
    with pytest.raises(KeyError, match="stop"), RoutingTap(model):
        raise KeyError("stop")
    assert hooks_of(model) == hooks


@every_family
def test_half_precision(family):
    """In float32 from what the router of a half precision model hears."""
    model = build_tiny_moe(family).to(torch.bfloat16)
    try:
        run(model)
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run in bfloat16 on this CPU: {error}")
    probabilities, _ = tapped(model)
    for p in probabilities.values():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.sum(-1), torch.ones(B, S))
    first = find_routing(model).layers[0]
    close, _ = tapped(shared_tiny_moe(family))
    assert (probabilities[first] - close[first]).abs().mean() < 0.1


def test_logits_are_float32_in_half_precision_and_autocast():
    """Against the weight and the input of one router, in float32."""
    model = build_tiny_moe("qwen3_moe").to(torch.bfloat16)
    heard = []
    handle = gate_of(model, 3).register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        probabilities, _ = tapped(model)
    handle.remove()
    logits = heard[0].reshape(-1, 16).float() @ gate_of(model, 3).weight.float().T
    torch.testing.assert_close(probabilities[3].flatten(0, 1), torch.softmax(logits, -1), atol=1e-6, rtol=1e-5)


def test_a_bias_of_the_router_counts_and_a_bias_of_the_choice_does_not():
    model = build_tiny_moe("gpt_oss")
    nn.init.zeros_(gate_of(model, 1).bias)
    before, _ = tapped(model)
    with torch.no_grad():
        gate_of(model, 1).bias.copy_(torch.tensor([0.0, 0.0, math.log(2.0), 0.0]))
    after, _ = tapped(model)
    doubled = before[1] * torch.tensor([1.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(after[1], doubled / doubled.sum(-1, keepdim=True))

    model = build_tiny_moe("deepseek_v3")
    before, plain = tapped(model)
    steer(model)
    after, steered = tapped(model)
    assert torch.equal(before[2], after[2])
    assert not torch.equal(plain.last_hidden_state, steered.last_hidden_state)


def test_extreme_logits_stay_finite():
    for family in ("mixtral", "deepseek_v3", "deepseek_v4"):
        if family in installed():
            model = build_tiny_moe(family)
            layer = find_routing(model).layers[-1]
            gate = gate_of(model, layer)
            with torch.no_grad():
                gate.weight.copy_(torch.tensor([1e3, -1e3, 0.0, -1e3]).unsqueeze(-1).expand_as(gate.weight))
            probabilities, _ = tapped(model)
            assert probabilities[layer].isfinite().all()
            torch.testing.assert_close(probabilities[layer].sum(-1), torch.ones(B, S))


def test_a_weight_that_is_used_without_calling_the_router():
    """As DeepSeek-V2 of transformers 5.0 does."""

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.gate, self.experts, self.top_k = nn.Linear(16, 4, bias=False), block.experts, 2

        def forward(self, hidden_states):
            return hidden_states * torch.sigmoid(hidden_states @ self.gate.weight.T).amax(-1, keepdim=True)

    model = build_tiny_moe("qwen3_next" if "qwen3_next" in installed() else "qwen3_moe", mlp_only_layers=[])
    layer = layers_of(model)[1]
    layer.mlp = Block(layer.mlp)
    heard = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    with RoutingTap(model, [2]) as tap:
        run(model)
    handle.remove()
    logits = heard[0] @ layer.mlp.gate.weight.T
    torch.testing.assert_close(tap.probabilities[2], torch.softmax(logits, -1).detach())


def test_a_call_replaces_the_one_before_and_stays_readable():
    model = shared_tiny_moe("qwen3_moe")
    tap = RoutingTap(model, [3])
    with tap:
        run(model)
        first = tap.probabilities[3]
        with tap:  # entered again, and the whole model this time, with gradient
            assert model(input_ids=IDS[:1, :4]).logits.requires_grad
        assert tap.probabilities[3].shape == (1, 4, 4)
        assert not tap.probabilities[3].requires_grad
        run(model)
    assert list(tap.probabilities) == [3]
    assert torch.equal(tap.probabilities[3], first)
    run(model)
    with tap:
        pass
    assert torch.equal(tap.probabilities[3], first)
    assert hooks_of(model) == 0


def test_a_call_that_failed_leaves_nothing():
    model = shared_tiny_moe("qwen3_moe")
    with RoutingTap(model) as tap:
        run(model)
        with pytest.raises(IndexError):
            body_of(model)(input_ids=IDS + 1000)
    with pytest.raises(RuntimeError, match="finished forward pass"):
        _ = tap.probabilities


def test_reading_too_early():
    with RoutingTap(shared_tiny_moe("qwen3_moe")) as tap, pytest.raises(RuntimeError, match="finished forward pass"):
        _ = tap.probabilities


@pytest.mark.parametrize("layer", [0, 2, 4, "3", None])
def test_a_layer_without_a_router_is_an_error(layer):
    with pytest.raises(ValueError, match=f"any of 1, 3, got {layer!r}"):
        RoutingTap(shared_tiny_moe("qwen3_moe"), [1, layer])


def test_a_router_that_the_model_skips_is_an_error():
    model = build_tiny_moe("qwen3_moe")
    tap = RoutingTap(model)
    layers_of(model)[2].mlp = nn.Identity()
    with pytest.raises(RuntimeError, match=r"no call in layers \[3\]"), tap:
        run(model)
    assert hooks_of(model) == 0


# ---- more experts


def can_change(family: str) -> bool:
    return family not in FIXED and family != "deepseek_v4"


@every_family
def test_more_experts_take_part(family):
    model = shared_tiny_moe(family)
    routing = find_routing(model)
    before = run(model).last_hidden_state
    if not can_change(family):
        with pytest.raises(ValueError, match=f"another number of experts, got {family}"), more_experts(model, 3):
            pass
        return
    with more_experts(model, routing.active):
        assert torch.equal(run(model).last_hidden_state, before)
    for active in (3, 4) if family == "longcat_flash" else (1, 3, 4):  # transformers' LongCat cannot run one
        with more_experts(model, active):
            assert find_routing(model).active == active
            changed = run(model).last_hidden_state
        assert changed.isfinite().all()
        assert (changed - before).abs().amax() > 1e-4
    assert find_routing(model).active == routing.active
    assert torch.equal(run(model).last_hidden_state, before)
    with pytest.raises(KeyError, match="stop"), more_experts(model, 3):
        raise KeyError("stop")
    assert torch.equal(run(model).last_hidden_state, before)


@every_family
def test_as_many_experts_as_were_asked_for_run(family):
    """Told by the routers that return their choice, and by the number of tokens that reach experts that are modules."""
    model = shared_tiny_moe(family)
    if not can_change(family):
        pytest.skip("its number is fixed")
    layer = find_routing(model).layers[0]
    seen = []
    handles = [gate_of(model, layer).register_forward_hook(lambda module, args, output: seen.append(output))]
    counts = []
    experts = getattr(block_of(model, layer), "experts", None)
    if isinstance(experts, nn.ModuleList):
        count = lambda module, args, output: counts.append(args[0].reshape(-1, 16).shape[0])  # noqa: E731
        handles += [expert.register_forward_hook(count) for expert in experts]
    with more_experts(model, 3):
        run(model)
    for handle in handles:
        handle.remove()
    pair = chosen_by(seen[0]) if seen else None
    if pair is not None:
        assert pair[1].shape == (B * S, 3)
        assert all(len(set(row)) == 3 for row in pair[1].tolist())
    if counts:
        assert sum(counts) == 3 * B * S


@pytest.mark.parametrize("active", [0, -1, 5, 2.0, True, None])
def test_a_number_that_the_model_cannot_choose_is_an_error(active):
    model = shared_tiny_moe("qwen3_moe")
    with (
        pytest.raises(ValueError, match=rf"an integer from 1 to 4, got {active!r} in layer 1"),
        more_experts(model, active),
    ):
        pass
    assert find_routing(model).active == 2


GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_groups_bound_the_number(family):
    limited = {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    model = build_tiny_moe(family, **GROUPS, **limited)
    if not limited or hasattr(gate_of(model, 2), "num_group"):  # transformers 5.0 cannot run DeepSeek-V2's groups
        before = run(model).last_hidden_state
        with more_experts(model, 4):
            assert (run(model).last_hidden_state - before).abs().amax() > 1e-4
    words = r"from 1 to 4 \(what the groups .*, got 5 in layer 2, which has 8"
    with pytest.raises(ValueError, match=words), more_experts(model, 5):
        pass


def test_greedy_deepseek_has_no_groups():
    model = build_tiny_moe("deepseek_v2", **GROUPS, topk_method="greedy")
    with more_experts(model, 8):
        run(model)


def test_tables_of_tokens_cannot_be_changed_but_other_layers_can():
    if "deepseek_v4" not in installed():
        pytest.skip("no DeepSeek-V4 here")
    with pytest.raises(ValueError, match="look experts up by token"), more_experts(shared_tiny_moe("deepseek_v4"), 3):
        pass
    model = build_tiny_moe("deepseek_v4", mlp_layer_types=["moe"] * 3)
    before = run(model).last_hidden_state
    with more_experts(model, 3):
        assert (run(model).last_hidden_state - before).abs().amax() > 1e-4


def test_tap_inside_more_experts():
    """The first router hears the same; what follows does not."""
    model = shared_tiny_moe("qwen3_moe")
    before, _ = tapped(model)
    with more_experts(model, 4):
        after, _ = tapped(model)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[3], after[3])


# ---- the load


def test_balance_is_told_per_layer():
    """Each layer collapsed on an expert of its own: pooled it would look even."""
    collapsed = torch.eye(4, dtype=torch.int64) * 10
    load = routing_balance(collapsed)
    assert load.layers == (1, 2, 3, 4)
    assert load.entropy.tolist() == [0.0] * 4
    assert load.dead.tolist() == [3] * 4
    assert load.largest.tolist() == [1.0] * 4
    even = routing_balance(collapsed.sum(0, keepdim=True))
    assert (even.entropy.item(), even.dead.item(), even.largest.item()) == (pytest.approx(1.0), 0, 0.25)


def test_balance_against_a_naive_loop():
    counts = torch.tensor([[5, 0, 3, 2, 0], [1, 1, 1, 1, 6]])
    load = routing_balance(counts, layers=[12, 24])
    for i, row in enumerate(counts.tolist()):
        share = [n / sum(row) for n in row]
        entropy = -sum(f * math.log(f) for f in share if f > 0) / math.log(len(row))
        assert load.entropy[i].item() == pytest.approx(entropy)
        assert load.dead[i].item() == row.count(0)
        assert load.largest[i].item() == pytest.approx(max(share))
    lines = repr(load).splitlines()
    assert lines[0].split() == ["layer", "entropy", "dead", "largest", "share"]
    assert lines[1].split() == ["12", f"{load.entropy[0]:.3f}", "2", "0.500"]


@pytest.mark.parametrize(
    ("counts", "layers", "words"),
    [
        (torch.ones(4), None, r"\[layers, experts\] of at least two experts, got \(4,\)"),
        (torch.ones(2, 1), None, r"got \(2, 1\)"),
        (torch.ones(2, 4), [1], "for each of 2 layers, got 1"),
        (torch.tensor([[1, 2], [0, 0]]), [5, 6], r"in layers \[6\]"),
        (torch.tensor([[1, -2], [0, 1]]), None, r"in layers \[1\]"),
        (torch.tensor([[1.0, math.nan], [math.inf, 1.0]]), None, r"in layers \[1, 2\]"),
    ],
)
def test_counts_that_are_none(counts, layers, words):
    with pytest.raises(ValueError, match=words):
        routing_balance(counts, layers)


def test_counts_of_the_chosen():
    probabilities, _ = tapped(shared_tiny_moe("qwen3_moe"))
    p, mask = probabilities[3], MASK.bool()
    expected = [0] * 4
    for b, s in itertools.product(range(B), range(S)):
        if mask[b, s]:
            for expert in sorted(range(4), key=lambda e: -p[b, s, e].item())[:2]:
                expected[expert] += 1
    assert count_chosen(p, 2, mask).tolist() == expected
    assert count_chosen(p, 2).sum().item() == 2 * B * S
    assert count_chosen(p, 4).tolist() == [B * S] * 4
    routing_balance(torch.stack([count_chosen(p, 2, mask) for p in probabilities.values()]), layers=probabilities)
