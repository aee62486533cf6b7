"""How strongly each term pulls at the student, and whether two of them pull the same way.

A loss value says nothing about that: a term of 5 nats may hardly move the student, one of 0.05 may drown all others.
What moves it is the gradient. It is taken at one place of the student that everything a term looks at has passed (its
*meeting point*), so that the gradients of all terms can be compared, and never enters a parameter's accumulation.

Source: gradient norms at the last layer that all tasks share, Chen et al. 2018, "GradNorm", section 3,
https://arxiv.org/abs/1711.02257; cosines between tasks, Yu et al. 2020, section 2, https://arxiv.org/abs/2001.06782
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kit.readings import Needs
from kd_kit.types import LossValue


def meeting_layer(needs: Needs) -> int | None:
    """The layer of the student after whose output every term still has its whole gradient to come.

    Returns:
        0 for the embeddings, ``l`` for the state after layer ``l``; None for the final hidden state, where no term
        looks at anything below it.
    """
    # queries, keys and values of layer l are made from the state before it
    below = [*needs.student_states, *(layer - 1 for layer in needs.student_attention)]
    return min(below, default=None)


def place_name(layer: int | None) -> str:
    """The meeting point in words."""
    return "final hidden state" if layer is None else "embeddings" if layer == 0 else f"state after layer {layer}"


def gradient_products(values: Mapping[str, LossValue], names: Sequence[str], point: Tensor) -> Tensor:
    """Inner products of the gradients of the terms' sums at ``point``; the graph is kept for the backward pass.

    A term that does not depend on the point, or that is not finite, has what it has: 0, or NaN.

    Shapes:
        point: any, with gradient
        returns: [terms, terms] float32, in the order of ``names``
    """
    found = [gradient_at(values[name], point).flatten() for name in names]
    stacked = torch.stack(found)
    return stacked @ stacked.T


def gradient_at(value: LossValue, point: Tensor) -> Tensor:
    """Gradient of one term's sum at ``point``, float32, in the shape of the point."""
    if not value.sum.requires_grad:
        return torch.zeros_like(point, dtype=torch.float32)
    (found,) = torch.autograd.grad(value.sum, point, retain_graph=True, allow_unused=True)
    return torch.zeros_like(point, dtype=torch.float32) if found is None else found.float()


@dataclass(frozen=True)
class Pulls:
    """What the gradients of one step say. Lists are in the order of the terms.

    Attributes:
        norms: of each term's mean, before its weight. shares: of the weighted norms, they sum to 1; 0 without any.
        cosines: of every pair; None where one of the two has no gradient.
    """

    norms: list[float]
    shares: list[float]
    cosines: list[list[float | None]]


def pulls(products: Sequence[Sequence[float]], counts: Sequence[int], weights: Sequence[float]) -> Pulls:
    """Norms, shares and cosines out of :func:`gradient_products` of sums over ``counts`` positions."""
    sizes = [math.sqrt(max(row[i], 0.0)) if row[i] == row[i] else math.nan for i, row in enumerate(products)]
    norms = [size / count if count else 0.0 for size, count in zip(sizes, counts, strict=True)]
    pulled = [weight * norm for weight, norm in zip(weights, norms, strict=True)]
    whole = sum(pulled)
    known = math.isfinite(whole)
    shares = [(one / whole if whole > 0 else 0.0) if known else math.nan for one in pulled]

    def cosine(i: int, j: int) -> float | None:
        size = sizes[i] * sizes[j]
        return max(-1.0, min(1.0, products[i][j] / size)) if size > 0 else None

    return Pulls(norms, shares, [[cosine(i, j) for j in range(len(sizes))] for i in range(len(sizes))])
