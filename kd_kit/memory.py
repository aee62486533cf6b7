"""How much memory a run needs on its device, from sizes alone: before anything runs, and for settings not tried yet."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields

import torch

from kd_kit.head import CHUNK_BYTES, card_chunk_bytes, chunk_bytes, head_of

_COPIES = 4  # of a chunk of logits that a backward pass holds at once


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs on its device, by what they are for.

    Attributes:
        weights: of the student and of the parts of the terms. gradients: of what is trained. optimizer: its state.
        teacher: its weights. activations: of the student, kept for the backward pass. logits: one chunk of them.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def largest(self) -> str:
        """What most of it is for."""
        return max((f.name for f in fields(self)), key=lambda name: getattr(self, name))


def estimate_memory(
    *,
    parameters: int,
    trained: int,
    teacher_bytes: int,
    tokens: int,
    layers: int,
    width: int,
    inner: int,
    vocabulary: int,
    half: bool = False,
    chunk: int = CHUNK_BYTES,
) -> Memory:
    """Memory of a run, in bytes; an upper bound of what is alive at once, without the allocator's waste.

    ============  ==========================================================================================
    weights       4 x parameters; under half-precision autocast 2 x parameters more, for the copies it keeps
    gradients     4 x trained
    optimizer     8 x trained: two float32 moments of AdamW
    teacher       as given
    activations   tokens x layers x (38 width + 16 inner); under autocast tokens x layers x (30 width + 9 inner)
    logits        4 x min(tokens x vocabulary x 4, chunk): a chunk of logits, and what its backward pass makes of it
    ============  ==========================================================================================

    The activations are those of a pre-norm transformer with a gated feed-forward block and fused attention, fitted to
    the tensors that three shapes of Llama and Qwen2 keep for the backward pass, within 5%. Attention that is not fused
    (with dropout in it, say) keeps some 4 x heads x window bytes per token and layer and map more. What terms about
    attention and hidden states add is small beside it and left out.

    Args:
        parameters: of the student and the parts of the terms. trained: those of them that have a gradient.
        teacher_bytes: of the teacher's weights on the same device.
        tokens: of one batch on the student's side, padding included.
        layers, width, inner: depth of the student, width of its hidden states and of its feed-forward blocks (of all
            experts that a token uses together).
        vocabulary: rows of its head.
        half: whether it trains under half-precision autocast.
        chunk: bytes of a chunk of logits, see :func:`kd_kit.head.chunk_bytes`.
    """
    per_token = 30 * width + 9 * inner if half else 38 * width + 16 * inner
    return Memory(
        weights=(6 if half else 4) * parameters,
        gradients=4 * trained,
        optimizer=8 * trained,
        teacher=teacher_bytes,
        activations=tokens * layers * per_token,
        logits=_COPIES * min(tokens * vocabulary * 4, chunk),
    )


CARD = 16 * 2**30
"""Bytes of the card that people get for nothing: a P100 or a T4."""


def memory_of(trainer, *, card: int | None = None) -> Memory:
    """:func:`estimate_memory` of a trainer, with batches as long as its windows can get.

    Args:
        card: bytes of a card that the run may move to: what it would need there, beside its teacher in half precision
            and under autocast. None: what it needs where it is.
    """
    student, teacher = trainer.student, trainer.teacher
    config = student.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    every = list(trainer.module.parameters())
    beside = teacher is not None and (card is not None or teacher.device == trainer.session.device)
    weights = list(teacher.model.parameters()) if beside else []
    half = trainer.session.precision != "no" if card is None else True
    return estimate_memory(
        parameters=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in every if p.requires_grad),
        teacher_bytes=size_of(weights) if card is None else sum(p.numel() * min(2, p.element_size()) for p in weights),
        tokens=trainer.data.batch_size * trainer.data.window,
        layers=config.num_hidden_layers,
        width=width,
        inner=inner,
        vocabulary=head_of(student).weight.shape[0],
        half=half,
        chunk=chunk_bytes(trainer.session.device) if card is None else card_chunk_bytes(card),
    )


def size_of(tensors) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def device_memory(device: torch.device) -> int | None:
    """All memory of a device in bytes: of the card, or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def process_peak() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
