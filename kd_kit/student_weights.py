"""Weights of a student beside its checkpoints: the start that a run keeps, the best so far, and who trains it now."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

_STEPPED, _OWNER = "_kd_kit_stepped", "_kd_kit_owner"  # marks on a student: trained already, and by which trainer


def mark_stepped(student: nn.Module, stepped: bool) -> None:
    """Note whether the student has been trained since it was built or loaded."""
    setattr(student, _STEPPED, stepped)


def was_stepped(student: nn.Module) -> bool:
    return getattr(student, _STEPPED, False)


def own(student: nn.Module, owner: object) -> None:
    """From now on this trainer's, and no earlier one's."""
    setattr(student, _OWNER, owner)


def is_owned(student: nn.Module, owner: object) -> bool:
    return getattr(student, _OWNER, None) is owner


def start_fingerprint(student: nn.Module) -> str | None:
    """Hash of some of every weight of a student that was not trained yet; None for one that was."""
    if was_stepped(student):
        return None
    some = [p.detach().flatten()[:64].float().cpu() for p in student.parameters()]
    return hashlib.sha256(torch.cat(some).numpy().tobytes()).hexdigest()[:16]


def save_weights(student: nn.Module, path: Path, **about) -> None:
    """Write a student's weights, whole or not at all, with a few words about them.

    Raises:
        OSError, SafetensorError: the disk refuses it; what stood there before still does.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_untied(student), beside, metadata={key: str(value) for key, value in about.items()})
        beside.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read it
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_weights(student: nn.Module, path: str | os.PathLike) -> dict[str, str]:
    """Give a student the weights in a file of a run: best.safetensors, last.safetensors or initial.safetensors.

    Returns:
        what was written about them, such as the step they are of.

    Raises:
        ValueError: the file does not exist, is damaged, or holds the weights of another model.
    """
    try:
        found = load_file(path)
        about = weights_about(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load_weights: expected weights in {str(path)!r}, got {error}") from error
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    wrong = [name for name, tensor in found.items() if shapes.get(name) != tensor.shape]
    wrong += [name for name in _untied(student) if name not in found]
    if wrong:
        raise ValueError(
            f"load_weights: expected the weights of this student in {str(path)!r}, got others: {', '.join(wrong[:3])} "
            "differ; build the student that the run trains"
        )
    student.load_state_dict(found, strict=False)
    student.tie_weights()
    return about


def weights_about(path: Path) -> dict[str, str]:
    """What :func:`save_weights` wrote about the weights in a file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """State of a model without the second name of a tied tensor, as safetensors wants it."""
    seen, out = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            out[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    return out
