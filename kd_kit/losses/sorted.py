"""The distance between two sorted distributions: it needs no map between the vocabularies, and ignores which token is
which. A baseline to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sorted_distance(student: Tensor, teacher: Tensor, *, k: int | None = None) -> Tensor:
    """L1 distance between the two probability vectors, each in descending order; in [0, 2], one per position.

    The shorter vector is filled up with zeros. With ``k`` only the k largest probabilities of each side are compared
    one by one and all the rest is one more cell, which is never more than the whole distance.

    Shapes:
        student: [..., a] log-probabilities
        teacher: [..., b] log-probabilities, over as many other tokens as it likes; receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the leading shapes differ, or ``k`` is below 1.

    Source: Boizard et al. 2024, "Towards cross-tokenizer distillation: the universal logit distillation loss",
        equation 5, https://arxiv.org/abs/2402.12030
    """
    _same_rows("sorted_distance", student, teacher)
    if k is not None and k < 1:
        raise ValueError(f"sorted_distance: expected k of at least 1, got {k}; None compares all of them")
    k = max(student.shape[-1], teacher.shape[-1]) if k is None else k
    return (_largest(student.float().exp(), k) - _largest(teacher.detach().float().exp(), k)).abs().sum(-1)


def sorted_distance_cells(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`sorted_distance` with a teacher that comes already cut to its k largest cells and a tail.

    This is how it is stored, and what the pass over the student's head has at hand. The order of the kept cells does
    not matter; -inf marks one without mass.

    Shapes:
        student: [..., V] log-probabilities, all of them
        teacher: [..., k + 1] log-probabilities of cells, the tail last; receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the leading shapes differ, or the teacher has no cell beside the tail.

    Source: as :func:`sorted_distance`
    """
    _same_rows("sorted_distance_cells", student, teacher)
    k = teacher.shape[-1] - 1
    if k < 1:
        raise ValueError(
            f"sorted_distance_cells: expected at least one cell and the tail, got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}; the tail is the last column"
        )
    cells = teacher.detach().float().exp()
    cells = torch.cat([cells[..., :-1].sort(-1, descending=True).values, cells[..., -1:]], dim=-1)
    return (_largest(student.float().exp(), k) - cells).abs().sum(-1)


def _same_rows(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{where}: expected the same positions on both sides, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}; only the last axis may differ, take both from the same rows of the batch"
        )


def _largest(probs: Tensor, k: int) -> Tensor:
    """[..., k + 1]: the k largest in descending order, filled up with zeros, then the sum of the rest."""
    size = probs.shape[-1]
    kept = probs.topk(min(k, size), dim=-1).values
    if k >= size:
        return functional.pad(kept, (0, k - size + 1))
    return torch.cat([kept, probs.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)], dim=-1)
