"""How likely a model finds text: bits per byte, in which models with different tokenizers can be compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kd_kit.data import WindowSet
from kd_kit.head import RowLoss, Rows, alone_with, head_losses, head_of
from kd_kit.modes import modes_kept
from kd_kit.packed_body import hidden_states
from kd_kit.types import IGNORE, DistillBatch


@dataclass(frozen=True)
class Score:
    """Likelihood of held-out text under a model.

    Attributes:
        nats: negative log-likelihood, summed. bytes, tokens: what it was summed over.
    """

    nats: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token of the model's own tokenizer: not comparable across tokenizers."""
        return perplexity(self.nats, self.tokens)

    def __repr__(self) -> str:
        return f"Score({self.bits_per_byte:.4f} bits per byte over {self.bytes:,} bytes, {self.tokens:,} tokens)"


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count), for ``count`` tokens or words; infinity where that is no number, or nothing was counted."""
    try:
        return math.exp(nats / count) if count else math.inf
    except OverflowError:  # beyond 709 nats each; never a cap that looks like a measurement
        return math.inf


def row_nll(rows: Rows) -> torch.Tensor:
    """[n] float32, nats; a row loss of :func:`kd_kit.head.head_losses`."""
    return rows.nll


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode without gradients; the mode it was in comes back."""
    # a run in the background trains this model in the mode that it is in
    with alone_with(model), modes_kept(model), torch.no_grad():
        model.eval()
        yield


def score(model, windows: WindowSet, *, side: str = "student", batch_size: int = 8, limit: int | None = None) -> Score:
    """Likelihood of a set of windows under a student or a teacher, over the same bytes for both.

    Args:
        side: "student" or "teacher": whose tokens the model reads.
        limit: only so many windows, spread evenly; all of them if left out.

    Raises:
        ValueError: another side.
    """
    if side not in ("student", "teacher"):
        raise ValueError(f"score: expected side='student' or 'teacher', got {side!r}")
    nats = torch.zeros((), dtype=torch.float64)
    size = tokens = 0
    losses = {"nll": row_nll}
    with evaluating(model):
        for batch, values in over_targets(
            model, windows, losses, side=side, batch_size=batch_size, limit=limit, whole=False
        ):
            size += int(batch.target_bytes.sum())
            nats += values["nll"].double().sum().cpu()
            tokens += len(values["nll"])
    return Score(float(nats), size, tokens)


def over_targets(
    model,
    windows: WindowSet,
    losses: Mapping[str, RowLoss],
    *,
    side: str,
    batch_size: int,
    limit: int | None,
    whole: bool,
) -> Iterator[tuple[DistillBatch, dict[str, torch.Tensor]]]:
    """Every batch of a set of windows, with row losses at its scored positions in a model's own tokens, {name: [n]}.

    To be used within :func:`evaluating`, so that no other thread trains the model between two batches.

    Args:
        side, limit: as of :func:`score`. whole: as of :func:`kd_kit.head.head_losses`.
    """
    device = next(model.parameters()).device
    for batch in windows.in_order(batch_size, limit):
        targets = (batch.targets if side == "student" else batch.teacher_targets).flatten()
        ids = batch.student_ids if side == "student" else batch.teacher_ids
        packed = batch.student_packed if side == "student" else batch.teacher_packed
        rows = (targets != IGNORE).nonzero().squeeze(-1)
        hidden = hidden_states(model, ids.to(device), packed.to(device))
        values = head_losses(
            hidden.flatten(0, 1)[rows.to(device)],
            head_of(model),
            losses,
            targets=targets[rows].to(device),
            whole=whole,
        )
        yield batch, values
