"""Hidden states, compared by direction. Where and after which standardisation they are taken is the caller's."""

from __future__ import annotations

import torch
from torch import Tensor

# The smallest number that float16 can hold is 6e-8; a vector all below that has no direction worth dividing by.
_NO_DIRECTION = 6e-8


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 in float32; a vector of zeros stays one, with a finite gradient.

    Scaled by the largest entry before anything is squared, so that neither 1e30 nor 1e-6 is lost on the way. A cosine
    does not change with that scale, so it takes no part in the gradient.

    Shapes:
        vectors: [..., E]
        returns: [..., E], float32
    """
    vectors = vectors.float()
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    short = largest < _NO_DIRECTION
    vectors = vectors / torch.where(short, 1.0, largest)
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * torch.where(short, 1.0, square).rsqrt()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher) for every vector: 0 the same direction, 1 at random, 2 opposite.

    Lengths do not matter. A vector of zeros has no direction and gives 1. One channel that is a hundred times larger
    than the others decides the cosine alone: standardise the teacher's channels first.

    Shapes:
        student: [..., E], already projected to the teacher's width
        teacher: [..., E], receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the shapes differ.

    Source: Sanh et al. 2019, "DistilBERT", section 2 (the cosine term), https://arxiv.org/abs/1910.01108
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"cosine_distance: expected vectors of one shape, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}; project the student to the teacher's width first"
        )
    return 1 - (unit(student) * unit(teacher.detach())).sum(-1)


def gram_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """How differently the two sides relate the items of a window to one another, in [0, 4], one per window.

    The mean, over ordered pairs i != j of items under the mask, of (cos(s_i, s_j) - cos(t_i, t_j))^2. Widths need not
    agree and nothing is projected. 0 in a window with fewer than two items. What is masked out may be anything, NaN
    too.

    Shapes:
        student: [B, n, D]
        teacher: [B, n, E], receives no gradient
        mask: [B, n] bool
        returns: [B], float32

    Raises:
        ValueError: the three do not have the same windows and items.

    Source: Tung, Mori 2019, "Similarity-preserving knowledge distillation", section 3, equations 2-4, with cosines in
        place of rows of normalised products, https://arxiv.org/abs/1907.09682. (Relational KD, 1904.05068, compares
        distances and angles of triplets instead.)
    """
    if student.dim() != 3 or teacher.dim() != 3 or not student.shape[:2] == teacher.shape[:2] == mask.shape:
        raise ValueError(
            f"gram_distance: expected [B, n, width] on both sides and a mask [B, n], got student "
            f"{tuple(student.shape)}, teacher {tuple(teacher.shape)} and mask {tuple(mask.shape)}; take all three "
            "from the same items of the same windows"
        )
    s, t = (unit(torch.where(mask.unsqueeze(-1), x, 0.0)) for x in (student, teacher.detach()))
    with torch.autocast(student.device.type, enabled=False):
        difference = s @ s.mT - t @ t.mT
    pairs = mask.unsqueeze(1) & mask.unsqueeze(2) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    count = pairs.sum((1, 2)).clamp(min=1)
    return torch.where(pairs, difference.square(), 0.0).sum((1, 2)) / count
