"""A dense model made into a mixture of experts that computes the same, until training tells the experts apart.

For a teacher that routes where only dense weights are at hand, and for a mixture that does not start from nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kd_kit.cards import profile_for
from kd_kit.experts import ask_once_per_layer
from kd_kit.modes import modes_kept

FAMILIES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}
"""Dense families by their ``model_type``, and the mixtures of transformers that have their attention."""

# what a dense model and its mixture have in common; a rope is spelled in two ways by two generations of transformers
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("attention_dropout", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("rope_parameters", "rope_theta", "rope_scaling"),
)
_PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of transformers 4


def upcycle(dense, *, experts: int = 4, top_k: int = 2, noise: float = 0.0, seed: int = 0):
    """A mixture of experts that computes what a dense model computes, whatever its routers say.

    Every expert is a copy of the layer's MLP, the routers are drawn at random, and the weights of the chosen experts
    sum to 1. Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE (with a shared expert of one channel that adds
    nothing yet), Qwen3 becomes Qwen3-MoE. What comes back is a new model on the dense one's device, in its dtype and
    mode, frozen where that one is; it was compared with the dense one on a few tokens, before any noise.

    Args:
        dense: a causal language model of transformers; it is left as it was.
        experts: in every layer. top_k: of them that each token uses.
        noise: added to every expert's weights, in standard deviations of the weight that it is added to. Without it
            all experts are one function, and what a router says means nothing; with it (0.05 moves SmolLM2-135M by
            0.06 nats per token) they differ.
        seed: of the routers and of the noise; the caller's random state is left as it was.

    Raises:
        ValueError: a family without a mixture of the same attention, quantised weights, numbers of experts that cannot
            be, or a mixture whose logits are not the dense model's.

    Example:
        >>> teacher = kd.upcycle(kd.build_student("HuggingFaceTB/SmolLM2-135M"), experts=4, top_k=2, noise=0.05)

    Source: Komatsuzaki et al. 2022, "Sparse Upcycling", section 3, https://arxiv.org/abs/2212.05055; weights of the
        chosen experts that sum to 1 as in Mixtral, Jiang et al. 2024, https://arxiv.org/abs/2401.04088
    """
    _check(dense, experts, top_k, noise)
    generator = torch.Generator().manual_seed(seed)
    mixture = _empty(dense, experts, top_k)
    with torch.no_grad():
        _fill(mixture, dense, generator)
        _compare(mixture, dense)
        if noise:
            for target, source in _copies(mixture, dense):
                drawn = torch.randn(source.shape, generator=generator).to(target)
                target.add_(drawn, alpha=noise * float(source.float().std()))
    return mixture.train(dense.training).requires_grad_(any(p.requires_grad for p in dense.parameters()))


def _check(dense, experts: int, top_k: int, noise: float) -> None:
    """Raise a sentence for what cannot become a mixture."""
    kind = getattr(getattr(dense, "config", None), "model_type", None)
    if kind not in FAMILIES or getattr(dense, "lm_head", None) is None:
        raise ValueError(
            f"upcycle: expected a dense causal language model of {', '.join(FAMILIES)}, got {type(dense).__name__}; "
            "other families have no mixture in transformers with the same attention"
        )
    config = dense.config
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased and not (kind == "qwen3" and biased == ["attention_bias"]):
        raise ValueError(
            f"upcycle: expected a {kind} model without biases, got {', '.join(biased)} in its configuration; "
            f"{FAMILIES[kind]} has no place for them"
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"upcycle: expected a {kind} model that attends to all that it has read, got use_sliding_window=True; its "
            "mixture would read other windows"
        )
    packed = [name for name, p in dense.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ValueError(
            f"upcycle: expected weights in floating point, got {packed[0]} packed; load the model without quantize="
        )
    if not (isinstance(experts, int) and isinstance(top_k, int) and 1 <= top_k <= experts):
        raise ValueError(f"upcycle: expected 1 <= top_k <= experts, got top_k={top_k!r} and experts={experts!r}")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"upcycle: expected noise of 0 or more deviations, got {noise!r}; 0.05 tells experts apart")


def _empty(dense, experts: int, top_k: int):
    """The mixture with weights that mean nothing yet."""
    import transformers

    known, name = dense.config, FAMILIES[dense.config.model_type]
    given = {key: getattr(known, key) for key in _SHARED if getattr(known, key, None) is not None}
    given |= {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key not in given}
    given |= {"num_experts_per_tok": top_k, "router_aux_loss_coef": 0.001}
    if name == "Mixtral":
        given |= {"num_local_experts": experts, "sliding_window": getattr(known, "sliding_window", None)}
    else:
        given |= {"num_experts": experts, "moe_intermediate_size": known.intermediate_size, "norm_topk_prob": True}
        given |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if name == "Qwen2Moe":
            given |= {"shared_expert_intermediate_size": 1}
        else:
            given |= {"attention_bias": getattr(known, "attention_bias", False)}
    config = getattr(transformers, f"{name}Config")(**given)
    weight = dense.lm_head.weight
    config.dtype = weight.dtype
    # an old card has no grouped product for the experts
    card = torch.cuda.get_device_capability(weight.device) if weight.device.type == "cuda" else None
    how = profile_for(card).experts_argument(transformers.__version__)
    how |= {"attn_implementation": known._attn_implementation}
    with torch.random.fork_rng(devices=[]):  # what is drawn here is thrown away
        made = transformers.AutoModelForCausalLM.from_config(config, **how)
    ask_once_per_layer(made)
    made.generation_config = copy.deepcopy(dense.generation_config)
    return made.to(device=weight.device, dtype=weight.dtype)


def _fill(mixture, dense, generator: torch.Generator) -> None:
    """Everything but the experts as it is, every expert the MLP, routers at random."""
    kept = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = mixture.load_state_dict(kept, strict=False)
    other = [name for name in missing if ".mlp." not in name and ".block_sparse_moe." not in name]
    if other or unexpected:
        raise ValueError(
            f"upcycle: expected the parts of a {dense.config.model_type}, got {type(dense).__name__} with "
            f"{', '.join([*unexpected, *other][:3])}, for which {type(mixture).__name__} has no place"
        )
    for target, source in _copies(mixture, dense):
        target.copy_(source)
    for block in map(_block, mixture.model.layers):
        drawn = torch.randn(block.gate.weight.shape, generator=generator)
        block.gate.weight.copy_(dense.config.initializer_range * drawn)
        if hasattr(block, "shared_expert"):
            block.shared_expert.down_proj.weight.zero_()


def _block(layer: nn.Module) -> nn.Module:
    """The mixture of a layer, whose name depends on the generation of transformers."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def _copies(mixture, dense) -> Iterator[tuple[Tensor, Tensor]]:
    """Every weight of every expert, as a view, and the weight of the MLP that it is a copy of."""
    for layer, old in zip(mixture.model.layers, dense.model.layers, strict=True):
        found = _block(layer).experts
        weights = {part: getattr(old.mlp, part).weight for part in _PARTS}
        if isinstance(found, nn.ModuleList):  # transformers 4 keeps the experts apart
            for expert in found:
                for part, weight in weights.items():
                    name = part if hasattr(expert, part) else _MIXTRAL_NAMES[part]
                    yield getattr(expert, name).weight, weight
            continue
        for both, down in zip(found.gate_up_proj, found.down_proj, strict=True):
            gate, up = both.chunk(2)
            yield from ((gate, weights["gate_proj"]), (up, weights["up_proj"]), (down, weights["down_proj"]))


def _compare(mixture, dense) -> None:
    """Raise unless both models give a few tokens the same logits."""
    device, rows = dense.lm_head.weight.device, dense.lm_head.weight.shape[0]
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    with modes_kept(dense):
        theirs, ours = (model.eval()(input_ids=ids, use_cache=False).logits.float() for model in (dense, mixture))
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    # sums of two halves in another order: 1e-6 in float32, rounded in every layer in half precision
    if not gap <= (1e-3 if dense.lm_head.weight.dtype == torch.float32 else 0.1):
        raise ValueError(
            f"upcycle: expected a mixture with the logits of the dense model, got {gap:.1%} of the largest logit "
            f"between them; this {type(dense).__name__} computes something that {type(mixture).__name__} does not"
        )
