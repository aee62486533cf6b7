"""The support of a distillation loss: K kept cells of the teacher's distribution and one tail cell.

The tail is part of the distribution. Leaving it out and renormalising teaches the student that nothing outside the
top K ever happens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Lower than any logit, yet finite: where all mass sits in the kept cells the tail's log-sum-exp stays a number.
OUT = -1e30
# What float32 leaves of a tail that holds nothing, on either side: log(0) there would make every divergence infinite.
EMPTY_TAIL = 1e-7


def top_k_cells(probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest cells of a bridged teacher distribution and the log of everything else.

    Shapes:
        probs: [n, V' + 1] float32, as :meth:`kd_kit.vocab.Bridge.project` returns them, last column the tail
        returns: ids [n, K] int64, log_probs [n, K] float32 (-inf where a cell got no mass), tail [n] float32

    Raises:
        ValueError: ``k`` below 1 or above V'.

    Source: top-K distillation with a tail cell ("ghost token"), https://arxiv.org/abs/2503.16870, section 3
    """
    size = probs.shape[-1] - 1
    if not 1 <= k <= size:
        raise ValueError(f"top_k_cells: expected 1 <= k <= {size} (the student's vocabulary), got {k}")
    kept, ids = probs[:, :-1].topk(k, dim=-1)
    # log(0) = -inf marks an unused cell; 1 - sum would lose a small tail to rounding, the sum of the rest would cost
    # another pass: the clamp keeps a tail that is rounded to nothing at the size of that rounding.
    tail = (1 - kept.sum(-1)).clamp(min=EMPTY_TAIL).log()
    return ids, kept.log(), tail


def sampled_cells(probs: Tensor, k: int, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K draws from a bridged teacher distribution instead of its K largest cells.

    Each draw stands for 1/K of the teacher's mass, so that the mean over the draws of any function of a token is an
    unbiased estimate of its expectation, with as few as a dozen draws. The draws are systematic (one uniform number
    per row, K equal steps): unbiased like independent ones, with less variance. The uniform number is a hash of
    ``place``, so that a position gets the same draws in every batch, on every device and after every restart.

    Shapes:
        probs: [n, V' + 1] float32, last column the tail
        place: [n] int64
        returns: ids [n, K] int64, log_probs [n, K] float32 (of the token drawn; -inf where the draw fell into the
            tail), tail [n] float32 (what the whole distribution has there)

    Raises:
        ValueError: ``k`` below 1.

    Source: Anshumann et al. 2025, "Sparse logit sampling", section 4, https://arxiv.org/abs/2503.16870
    """
    if k < 1:
        raise ValueError(f"sampled_cells: expected at least 1 draw, got {k}")
    steps = (torch.arange(k, device=probs.device) + uniform(place).unsqueeze(-1)) / k
    # doubles: in float32 the sum over a large vocabulary is not monotone enough to be searched
    below = probs.double().cumsum(-1)
    drawn = torch.searchsorted(below, steps * below[:, -1:], right=True).clamp(max=probs.shape[-1] - 1)
    size = probs.shape[-1] - 1
    log_probs = probs.gather(-1, drawn).log()
    log_probs = torch.where(drawn < size, log_probs, -math.inf)
    return drawn.clamp(max=size - 1), log_probs, probs[:, -1].clamp(min=EMPTY_TAIL).log()


def uniform(place: Tensor) -> Tensor:
    """A number in [0, 1) for every integer, well mixed: no state, so no order and no device matters.

    Shapes:
        place: [...] int64
        returns: [...] float64

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", the finaliser of SplitMix64
    """

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # logical, where >> of a signed integer keeps the sign

    x = place * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer; products wrap
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return shifted(x ^ shifted(x, 31), 11).double() / 2**53


def sorted_cells(probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest probabilities in descending order and the log of the rest, whatever tokens they belong to.

    Shapes:
        probs: [n, U] float32
        returns: log_probs [n, K], tail [n], both float32
    """
    kept = probs.topk(k, dim=-1).values
    return kept.log(), (1 - kept.sum(-1)).clamp(min=EMPTY_TAIL).log()


def student_cells(logits: Tensor, ids: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities on the teacher's cells and its tail, and its log-sum-exp: one softmax pass.

    The tail is summed from the logits outside the cells, not as 1 minus the cells, so it is right when it is tiny.

    Shapes:
        logits: [n, V] float32
        ids: [n, K] int64, no id twice in a row among the used ones
        used: [n, K] bool, cells that take part; None for all
        returns: log-probabilities [n, K + 1] (tail last, -inf at unused cells), log_z [n]

    Raises:
        ValueError: ids and logits do not have the same number of rows.
    """
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"student_cells: expected one row of cell ids per row of logits {tuple(logits.shape)}, got ids "
            f"{tuple(ids.shape)}; take both from the same rows of the batch"
        )
    cells = logits.gather(-1, ids)
    if used is None:
        outside = logits.scatter(-1, ids, OUT)
    else:
        # an unused cell's logit stays outside, with the tail
        cells = cells.masked_fill(~used, OUT)
        outside = logits.scatter(-1, ids, torch.where(used, OUT, logits.gather(-1, ids)))
    tail = outside.logsumexp(-1, keepdim=True)
    # nothing may be left for the tail: K = V with every cell used, or all other logits masked
    nothing = cells.logsumexp(-1, keepdim=True) + math.log(EMPTY_TAIL)
    tail = torch.where(tail <= OUT / 2, nothing, tail)  # NaN stays NaN
    every = torch.cat([cells, tail], dim=-1)
    log_z = every.logsumexp(-1)
    log_probs = every - log_z.unsqueeze(-1)
    if used is not None:
        log_probs = torch.cat([log_probs[..., :-1].masked_fill(~used, -math.inf), log_probs[..., -1:]], dim=-1)
    return log_probs, log_z


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """The distribution over the cells at another temperature: p ** (1 / T), normalised over the cells.

    The tail counts as one cell, so both sides are flattened alike and stay equal where they were equal.

    Shapes:
        log_probs: [..., cells], normalised, -inf at unused cells
        returns: the same shape

    Raises:
        ValueError: ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"tempered: expected a temperature above 0, got {temperature}")
    return torch.log_softmax(log_probs / temperature, dim=-1)
