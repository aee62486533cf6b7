"""Self-relations of queries, keys or values, made comparable across tokenizers.

MiniLMv2 compares softmax(x x^T / sqrt(w)) of two models that read the same tokens. Here the tokens differ, but some
boundaries are common: a row stands at the end of a span, where both models have read the same bytes, and what it
gives to the tokens of one span is summed into one cell. Both sides then have the same rows and the same cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kit.losses.divergence import forward_kl


def common_heads(*widths: int, most: int = 8) -> int:
    """The largest number of heads, ``most`` at the most, that divides every one of the widths.

    Raises:
        ValueError: no width, or one below 1, or ``most`` below 1.

    Example:
        >>> common_heads(576, 1024), common_heads(192, 1024), common_heads(7, 1024)
        (8, 8, 1)
    """
    if not widths or min(widths) < 1 or most < 1:
        raise ValueError(
            f"common_heads: expected widths and most of at least 1, got widths {widths} and most={most}; "
            "pass the last axis of what is compared on either side"
        )
    return max(heads for heads in range(1, most + 1) if math.gcd(*widths) % heads == 0)


def relations(states: Tensor, *, heads: int, rows: Tensor, boundaries: Tensor) -> Tensor:
    """What share each span has in the self-relation of a row, per head, as log-probabilities.

    The states are cut anew into ``heads`` heads of width w = W / heads. Row r stands at the last token of span
    ``rows[r]`` and looks back over every token up to there, itself included, by a softmax of x_i . x_j / sqrt(w) over
    tokens; the shares are then summed within spans. Cell 0 holds the tokens up to the first boundary, cell c + 1 those
    of span c. Never more than [B, heads, R, T] is held.

    Tokens behind the last boundary take no part and may be anything. An empty span (a padded boundary) has log 0.

    Shapes:
        states: [B, T, W], all heads of a query, key or value projection side by side
        rows: [B, R] int64, numbers of spans
        boundaries: [B, C + 1] int64, token positions of this side, padded with their last entry
        returns: [B, heads, R, C + 1], float32; -inf in cells beyond the row

    Raises:
        ValueError: W is not a multiple of ``heads``, or the three do not have the same windows.

    Source: Wang et al. 2020, "MiniLMv2", section 3.1, equations 5-8, https://arxiv.org/abs/2012.15828; rows at span
        ends and sums within spans are this kit's
    """
    if states.dim() != 3 or rows.dim() != 2 or boundaries.dim() != 2 or not len(states) == len(rows) == len(boundaries):
        raise ValueError(
            f"relations: expected states [B, T, W], rows [B, R] and boundaries [B, C + 1], got states "
            f"{tuple(states.shape)}, rows {tuple(rows.shape)} and boundaries {tuple(boundaries.shape)}; take all three "
            "from the same windows"
        )
    b, t, width = states.shape
    if heads < 1 or width % heads:
        raise ValueError(
            f"relations: expected a number of heads that divides the width, got {heads} heads and states "
            f"{tuple(states.shape)}; common_heads(student width, teacher width) gives one"
        )
    tokens = torch.arange(t, device=states.device).expand(b, t).contiguous()
    used = tokens <= boundaries[:, -1:]
    x = torch.where(used.unsqueeze(-1), states.float(), 0.0).unflatten(-1, (heads, -1))
    ends = boundaries.gather(1, rows + 1)
    at_ends = x.gather(1, ends[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    with torch.autocast(states.device.type, enabled=False):
        scores = torch.einsum("brhw,bthw->bhrt", at_ends / math.sqrt(width // heads), x)
    seen = tokens.unsqueeze(1) <= ends.unsqueeze(2)
    scores = torch.where(seen.unsqueeze(1), scores, -math.inf)
    # the boundaries before a token are as many as the spans behind it
    cell = torch.searchsorted(boundaries.contiguous(), tokens).clamp(max=boundaries.shape[1] - 1)
    return _sum_within(scores, cell[:, None, None].expand_as(scores), boundaries.shape[1]).log_softmax(-1)


def _sum_within(scores: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Log-sum-exp of the scores of each cell, -inf where there is none, with finite gradients everywhere.

    Every cell is shifted by its own largest score: by that of the row, a far cell would be a sum of zeros.
    """
    size = (*scores.shape[:-1], cells)
    peak = scores.new_full(size, -math.inf).scatter_reduce(-1, cell, scores.detach(), "amax")
    there = peak != -math.inf  # NaN counts as there: it must be seen
    peak = torch.where(there, peak, 0.0)
    sums = scores.new_zeros(size).scatter_add(-1, cell, (scores - peak.gather(-1, cell)).exp())
    return torch.where(there, torch.where(there, sums, 1.0).log() + peak, -math.inf)


def relation_kl(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """KL(teacher || student) of the relations of a row, over the log of its number of cells; mean over heads.

    0 where both agree; at most 1 for a student that looks everywhere alike, whatever the length of the row. How far
    two unrelated models are apart depends on how peaked their relations are: 0.2 for independent scores of standard
    deviation 1, 0.55 at 1.75, but 0.02-0.06 between the small embedded models (made-up scores and real text,
    512 tokens); next to 0 where states are so long that every token sees itself alone.

    Shapes:
        student: [B, heads, R, C + 1] log-probabilities from :func:`relations`
        teacher: likewise, receives no gradient
        rows: [B, R] int64, the same as there: row r has ``rows[r] + 2`` cells
        returns: [B, R], float32

    Raises:
        ValueError: the shapes differ, or ``rows`` does not have one entry per row.

    Source: Wang et al. 2020, "MiniLMv2", equation 5, https://arxiv.org/abs/2012.15828; the normaliser is this kit's
    """
    if student.shape != teacher.shape or student.dim() != 4 or rows.shape != (student.shape[0], student.shape[2]):
        raise ValueError(
            f"relation_kl: expected relations [B, heads, R, cells] of one shape and rows [B, R], got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)} and rows {tuple(rows.shape)}; take both from "
            "relations() with the same heads and rows, each with the boundaries of its own side"
        )
    return forward_kl(student, teacher).mean(1) / (rows + 2).float().log()
