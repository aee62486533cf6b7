"""What a fault may come from and what to try, likeliest first: rules over its place, dtype and numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """Likely causes, and what helps, in the same order of likelihood."""

    causes: tuple[str, ...]
    cures: tuple[str, ...]


_OTHER_PRECISION = 'build_session(precision="bf16") where the card has it, "no" elsewhere'


def advice(fault) -> Advice:
    """For a :class:`kd_kit.fault.Fault`."""
    if fault.kind != "not finite":
        return _OTHERS[fault.kind]
    return _RULES[fault.where](fault)


_OTHERS = {
    "spike": Advice(
        ("unusual text in the batch (tables, code, one character repeated)", "a learning rate at the edge"),
        ("look at the text", "a lower learning_rate, or more warm-up", "fault.replay(trainer) to see which window"),
    ),
    "out of memory": Advice(
        ("longer windows than before in the batch", "something else that grew on the card"),
        ("smaller windows or batch_size in build_data", "a teacher of fewer bits, or on another device"),
    ),
    "loader": Advice(
        ("a worker that was killed for memory or hangs", "a disk that does not answer"),
        ("build_trainer(workers=0)", "look at the rows named above"),
    ),
}


def _of_weights(fault) -> Advice:
    if (fault.layer or "").startswith("teacher."):
        return Advice(
            ("the file of the teacher is damaged, or its weights are too large for the dtype that it was loaded in",),
            ("load it again with build_teacher(dtype=torch.float32)", "another copy of its files"),
        )
    return Advice(
        ("an earlier step or a cell put them there", "a checkpoint that was saved so"),
        ("go back to an older checkpoint: no later step repairs them", "a lower learning_rate"),
    )


def _of_teacher(fault) -> Advice:
    return Advice(
        (*_overflow(fault), *_attention(fault), "a teacher of this family that is known to need more than float16"),
        ("build_teacher(dtype=torch.bfloat16), or torch.float32", "leave the text out, if it is only this one"),
    )


def _of_student(fault) -> Advice:
    cures = (_OTHER_PRECISION,) if fault.dtype == "float16" else ()
    return Advice(
        (*_overflow(fault), *_attention(fault), "activations that have grown: a learning rate too high for this layer"),
        (*cures, "a lower learning_rate, more warm-up", "look at the text: a single odd window can be left out"),
    )


def _of_term(fault) -> Advice:
    part = "its trained part has run away" if (fault.layer or "").startswith("parts.") else None
    causes = ("a division by zero, the log of zero, or a mean over no positions", "an overflow of exp", part)
    return Advice(
        tuple(cause for cause in causes if cause),
        ("clamp what is divided by and what a log is taken of", "compute the term in float32: .float() first"),
    )


def _of_gradient(fault) -> Advice:
    if "loss scale" in fault.note:
        return Advice(
            ("the loss scale is too high for this batch: usual in the first steps of float16, and now and then later",),
            ("nothing, if it is rare", f"{_OTHER_PRECISION}, if it goes on"),
        )
    if "norm" in fault.note:
        return Advice(
            ("gradients explode: they are finite one by one and too large together",),
            ("a lower learning_rate, more warm-up", "a lower weight of the term"),
        )
    if fault.layer is None:
        return Advice(
            (
                "the derivative of a root, norm, division or log at zero",
                "torch.where around such a number: 0 x NaN is NaN in the backward pass",
            ),
            ("put a safe number in before the operation, not behind it", "add an epsilon under the root"),
        )
    return Advice(
        (*_overflow(fault), "a function of its own whose backward pass is wrong", "a root, norm or division at zero"),
        ((_OTHER_PRECISION,) if fault.dtype == "float16" else ()) + ("this layer in float32", "a lower learning_rate"),
    )


def _of_unknown(fault) -> Advice:
    return Advice(
        ("dropout or another random choice that does not come twice", "hardware: a card with memory errors"),
        ("go on, if it is rare", "the same run on another machine, if it comes again with other batches"),
    )


def _overflow(fault) -> tuple[str, ...]:
    if fault.dtype == "float16":
        return ("an overflow of float16, which ends at 65,504",)
    return ("an overflow",) if "inf" in fault.numbers else ()


def _attention(fault) -> tuple[str, ...]:
    inside = any(word in (fault.layer or "").lower() for word in ("attn", "attention"))
    return ("a softmax over a row that is masked as a whole (-inf everywhere)",) if inside else ()


_RULES = {
    "weights": _of_weights,
    "teacher": _of_teacher,
    "student": _of_student,
    "term": _of_term,
    "gradient": _of_gradient,
    "unknown": _of_unknown,
}
