"""The student's head, in chunks: final hidden states in, per-position losses out, never all logits in memory.

Every loss that looks at the student's distribution is served by the same pass over a chunk of rows. A chunk is
recomputed in the backward pass with the gradient that arrives there, so fp16 loss scaling meets float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_kit.losses import student_cells
from kd_kit.reduce import chunks

CHUNK_BYTES = 64 * 2**20
"""Memory for one chunk of float32 logits; a backward pass holds about four times that."""


@dataclass(frozen=True)
class Head:
    """The linear map from final hidden states to logits, with what some families do after it.

    Attributes:
        weight: [V, D]. bias: [V] or None.
        scale: logits are multiplied by it (Granite divides, Cohere multiplies).
        softcap: c * tanh(logits / c) where a model has one (Gemma).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] float32. The product runs in the weight's dtype, or in autocast's where that is on."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def cut(self, rows: int) -> Head:
        """The same head without the padded rows behind the tokenizer's last entry."""
        bias = None if self.bias is None else self.bias[:rows]
        return Head(self.weight[:rows], bias, self.scale, self.softcap)

    def chunk_rows(self) -> int:
        """How many rows of float32 logits fit in ``CHUNK_BYTES``."""
        return max(16, CHUNK_BYTES // (4 * self.weight.shape[0]))


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model of transformers.

    Raises:
        ValueError: the model has no output embedding, as an encoder or a bare body has none.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"head_of: expected a causal language model with an output embedding, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head: ids to final hidden states.

    Raises:
        ValueError: nothing of that kind is found.
    """
    found = (model.get_decoder() if hasattr(model, "get_decoder") else None, getattr(model, "base_model", None))
    for body in found:  # transformers 4 has families that know only the second
        if body is not None and body is not model:
            return body
    raise ValueError(
        f"body_of: expected a causal language model with a body below its head, got {type(model).__name__}; "
        "load it with AutoModelForCausalLM"
    )


@dataclass(frozen=True)
class LogitRows:
    """One chunk of rows, as a loss sees it.

    Attributes:
        logits: [n, V] float32. targets: [n] int64.
        log_z: [n] float32, logsumexp of the logits.
        ids: [n, K] int64, the teacher's cells, largest first; None where no teacher is there.
        student: [n, K + 1] float32, the student's log-probabilities on the teacher's cells, tail last; or None.
        teacher: [n, K + 1] float32, the teacher's on the same cells; meaningless where ``has_teacher`` is False.
        has_teacher: [n] bool.
    """

    logits: Tensor
    targets: Tensor
    log_z: Tensor
    ids: Tensor | None
    student: Tensor | None
    teacher: Tensor | None
    has_teacher: Tensor | None


RowLoss = Callable[[LogitRows], Tensor]
"""A loss of one value per row, [n] float32."""


def head_losses(
    hidden: Tensor,
    head: Head,
    losses: Mapping[str, RowLoss],
    *,
    targets: Tensor,
    cell_ids: Tensor | None = None,
    teacher_cells: Tensor | None = None,
    has_teacher: Tensor | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Every row loss over every row, one pass over the head.

    Shapes:
        hidden: [N, D] final hidden states (after the last norm) of the rows
        targets: [N] int64
        cell_ids: [N, K] int64; teacher_cells: [N, K + 1] float32, tail last, -inf unused; has_teacher: [N] bool;
            all three or none
        returns: {name: [N] float32}, with gradient to ``hidden`` and the head
    """
    names = list(losses)

    def one_chunk(hidden, weight, bias, targets, ids, teacher, there):
        logits = Head(weight, bias, head.scale, head.softcap).logits(hidden)
        student, log_z = None, None
        if ids is not None:
            student, log_z = student_cells(logits, ids, teacher[:, :-1] != -torch.inf)
        else:
            log_z = logits.logsumexp(-1)
        rows = LogitRows(logits, targets, log_z, ids, student, teacher, there)
        return torch.stack([losses[name](rows) for name in names])

    size = chunk or head.chunk_rows()
    parts = []
    for rows in chunks(len(hidden), size):
        arguments = (
            hidden[rows],
            head.weight,
            head.bias,
            targets[rows],
            None if cell_ids is None else cell_ids[rows],
            None if teacher_cells is None else teacher_cells[rows],
            None if has_teacher is None else has_teacher[rows],
        )
        if torch.is_grad_enabled():
            parts.append(checkpoint(one_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(one_chunk(*arguments))
    if not parts:
        return {name: hidden.new_zeros(0, dtype=torch.float32) for name in names}
    return dict(zip(names, torch.cat(parts, dim=1), strict=True))
