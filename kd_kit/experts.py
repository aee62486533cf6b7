"""Experts of a mixture that run one after the other, with one question to the card per layer.

Cards before capability 8.0, and torch before 2.9, have no grouped matrix product. transformers then asks the card
several times per expert which tokens are its own (``nonzero``, twice per expert and once per layer), and each time the
host waits until the card has done all it was given. Here token and expert pairs are sorted on the card, the counts of
all experts come over at once, and each expert's product is over one slice. None at all would mean to run every expert
on every token, or on padded tiles: 1.4 to 4 times the products of a mixture of 3 to 8 experts, where a wait is some
tens of microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAME = "kd_kit_sorted"
"""What it is called among the implementations that transformers knows."""


def sorted_experts(layer: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts of a layer make of its tokens; in place of the forward of an experts module of transformers 5.

    Args:
        layer: holds gate_up_proj and down_proj of all experts, each [X, out, in], or [X, in, out] where transposed.

    Shapes:
        hidden: [N, H]
        chosen: [N, k], experts of every token
        weights: [N, k], or [N, X] of all experts
        returns: [N, H]
    """
    experts, k = len(layer.gate_up_proj), chosen.shape[1]
    if weights.shape != chosen.shape:
        weights = weights.gather(1, chosen)
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat)).tolist()  # the one question
    made = [
        _one(layer, expert, rows)
        for expert, rows in enumerate(hidden[order // k].split(counts))
        if len(rows)  # an expert without tokens costs nothing
    ]
    weighted = torch.cat(made) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _one(layer: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """One expert, [n, H] to [n, H]."""
    inner = layer._apply_gate(_linear(layer, "gate_up_proj", expert, rows))
    return _linear(layer, "down_proj", expert, inner)


def _linear(layer: nn.Module, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(layer, name)[expert]
    bias = getattr(layer, f"{name}_bias")[expert] if layer.has_bias else None
    return nn.functional.linear(rows, weight.T if layer.is_transposed else weight, bias)


def ask_once_per_layer(model: nn.Module) -> int:
    """Give a model whose experts run one after the other the way of this file; how many layers that changes.

    Nothing changes for a model with grouped products, for one without experts, for experts of another build (without a
    gate, with a norm of their own, spread over cards), and before transformers 5.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # transformers 4 has a module per expert
        return 0
    layers = [m for m in model.modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)]
    layers = [m for m in layers if hasattr(m, "_apply_gate") and m.gate_up_proj.dim() == 3]
    if not layers or not all(_fits(m) for m in layers):
        return 0
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)
    for layer in layers:
        layer.config._experts_implementation = NAME
    return len(layers)


def _fits(layer: nn.Module) -> bool:
    """Whether transformers runs these experts eagerly, and they are built as :func:`sorted_experts` takes them."""
    return (
        getattr(layer.config, "_experts_implementation", None) == "eager"
        and getattr(layer, "has_gate", True)
        and not getattr(layer, "has_post_expert_norm", False)
        and not getattr(layer, "_is_expert_parallel", False)
        and hasattr(layer, "has_bias")
        and hasattr(layer, "is_transposed")
        and hasattr(layer, "down_proj")
    )
