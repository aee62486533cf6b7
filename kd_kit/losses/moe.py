"""Mixtures of experts: learning the teacher's routing, and keeping a router of one's own in order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kit.losses.divergence import forward_kl


def routing_kl(student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """KL(teacher || student) between two distributions over experts, over log X; one per position.

    0 where both agree, at most 1 for a student that knows nothing (uniform), more for one that is sure and wrong. The
    teacher's rows are brought to a sum of exactly 1, which float16 has lost; they must have mass.

    Shapes:
        student_logits: [..., X]
        teacher_probs: [..., X] probabilities, not logits; 0 for experts left out; receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the shapes differ, or there is one expert only: then there is nothing to learn, and log X is 0.

    Source: Hinton, Vinyals, Dean 2015, section 2, https://arxiv.org/abs/1503.02531, over experts in place of classes
    """
    experts = teacher_probs.shape[-1]
    if student_logits.shape != teacher_probs.shape or experts < 2:
        raise ValueError(
            f"routing_kl: expected one number for each of at least two experts, got student "
            f"{tuple(student_logits.shape)} and teacher {tuple(teacher_probs.shape)}; take the head's width from the "
            "teacher's routing, and leave the term out where the teacher does not route"
        )
    log_p = teacher_probs.detach().float().log()
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    return forward_kl(student_logits.float().log_softmax(-1), log_p) / math.log(experts)


def switch_balance(probs: Tensor, chosen: Tensor) -> Tensor:
    """Load balance of one router: X * sum_e f_e P_e / k, a scalar; 1 when balanced, X / k when collapsed.

    f_e is the share of tokens that chose expert e, without gradient; P_e its mean probability, which carries all of
    it. One layer at a time: pooled over layers that each collapsed on another expert, it reads a perfect 1. A product
    of two means is no sum over positions, so it is one number for all the tokens that it is given.

    Shapes:
        probs: [n, X] the router's probabilities, before any of them is dropped
        chosen: [n, k] int64, the experts of each token, none twice
        returns: [], float32

    Raises:
        ValueError: the shapes do not fit, or there is no token.

    Source: Fedus, Zoph, Shazeer 2021, "Switch transformers", equations 4-6, https://arxiv.org/abs/2101.03961; divided
        by k so that 1 is balanced for any top-k
    """
    tokens, experts = probs.shape if probs.dim() == 2 else (0, 0)
    if tokens < 1 or chosen.dim() != 2 or len(chosen) != tokens or not 1 <= chosen.shape[1] <= experts:
        raise ValueError(
            f"switch_balance: expected probs [n, X] and chosen [n, k] of the same n >= 1 tokens with 1 <= k <= X, got "
            f"probs {tuple(probs.shape)} and chosen {tuple(chosen.shape)}; flatten windows and positions first, and "
            "leave the term out where nothing was routed"
        )
    load = torch.zeros(experts, device=probs.device).index_add(
        0, chosen.flatten(), torch.ones(chosen.numel(), device=probs.device)
    )
    return experts * (load / chosen.numel() * probs.float().mean(0)).sum()


def router_z(logits: Tensor) -> Tensor:
    """logsumexp(logits)^2 for every position: keeps a router's logits small, where rounding does no harm.

    0 where the log-sum-exp is 0; (log X)^2 for logits that are all 0.

    Shapes:
        logits: [..., X]
        returns: [...], float32

    Source: Zoph et al. 2022, "ST-MoE", equation 5, https://arxiv.org/abs/2202.08906
    """
    return logits.float().logsumexp(-1).square()
