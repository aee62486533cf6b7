"""Students that begin with what another model knows: some of its layers, or a mixture made dense; and how well they do.

How well: bits per byte of held-out text beside the whole model's and those of the same shape with new weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kd_kit.data import DistillData
from kd_kit.densify import dense_from_experts
from kd_kit.likelihood import Score, score
from kd_kit.pruning import kept_layers, pruned, spans
from kd_kit.taps import layers_of

START_WINDOWS = 16
"""Held-out windows that a start is measured on."""


def shortened(
    model: nn.Module, layers: int | Sequence[int], keep: str = "ends", data: DistillData | None = None
) -> nn.Module:
    """A trainable float32 copy of some of a model's layers; with ``data``, how it starts is printed.

    Raises:
        ValueError: what :func:`kd_kit.pruning.pruned` raises.
    """
    whole = None if data is None else score(model, data.held_out, limit=START_WINDOWS)
    total = len(layers_of(model))
    student = pruned(model, layers, keep=keep).float().requires_grad_(True).train()
    student.config.dtype = torch.float32
    if data is not None:
        kept = kept_layers(total, layers, keep)
        print(_starting(f"{len(kept)} of {total} layers ({spans(kept)})", student, whole, data, "student"))
    return student


def dense_student(
    teacher: nn.Module,
    data: DistillData,
    *,
    layers: int | Sequence[int] | None = None,
    keep: str = "ends",
    experts: str = "chosen",
    width: int | None = None,
    tokens: int = 8192,
) -> nn.Module:
    """A trainable dense student made from a mixture of experts: the teacher's attention, its experts as one MLP.

    Reads the teacher's tokens; ``build_tokenizers`` for its run has the teacher's tokenizer on both sides. Prints bits
    per byte of 16 held-out windows: as it starts, the teacher, and the same shape from scratch. On the embedded teacher
    (1.61): 1.94 with "chosen", 2.35 with "chosen" one expert wide, 2.64 with "averaged", 3.7 from scratch.

    Args:
        teacher: a Qwen3-MoE, a Qwen2-MoE or a Mixtral, as ``build_teacher`` gives it.
        data: text in windows; the teacher's side of it is what the routers are heard on.
        layers, keep: as in :func:`kd_kit.build_student`; all layers if left out.
        experts: "chosen", those neurons of all experts that explain best what the mixture gives; or "averaged", all
            experts averaged by the router's mass, which is faster, one expert wide, and good where experts are alike.
        width: neurons of an MLP with "chosen"; if left out, as many as a token passes in the teacher.
        tokens: of the training text that are read; more than ``width``, several times if possible.

    Raises:
        ValueError: a dense teacher or one of another family, layers that are not there, or too little text.

    Example:
        student = kd.dense_student(teacher, data, layers=12)
    """
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"dense_student: expected a model, got {type(teacher).__name__}; build it: kd.build_teacher({teacher!r})"
        )
    total = len(layers_of(teacher))
    kept = tuple(range(1, total + 1)) if layers is None else kept_layers(total, layers, keep)
    student = dense_from_experts(teacher, data.train, layers=kept, experts=experts, width=width, tokens=tokens)
    whole = score(teacher, data.held_out, side="teacher", limit=START_WINDOWS)
    width = student.config.intermediate_size
    what = f"{len(kept)} of {total} layers ({spans(kept)}), experts {experts} into MLPs of {width:,} neurons"
    print(_starting(what, student, whole, data, "teacher"))
    return student


def _starting(what: str, student: nn.Module, whole: Score, data: DistillData, side: str) -> str:
    """How a student starts, in two lines."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fresh = type(student)(student.config).float().to(next(student.parameters()).device)
    now, new = (score(model, data.held_out, side=side, limit=START_WINDOWS).bits_per_byte for model in (student, fresh))
    verdict = "" if now < new else "; this is no better than from scratch: keep more layers, or other ones"
    return (
        f"student: {what}, {sum(p.numel() for p in student.parameters()):,} parameters\n"
        f"bits per byte on {whole.bytes:,} held-out bytes: {now:.3f} as it starts, {whole.bits_per_byte:.3f} whole, "
        f"{new:.3f} the same shape from scratch{verdict}"
    )
