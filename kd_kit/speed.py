"""How fast this machine reads text with a model, in an evaluation's forward pass."""

from __future__ import annotations

import itertools
import time

import torch

from kd_kit.data import WindowSet
from kd_kit.likelihood import evaluating, over_targets, row_nll

_BATCHES, _ROUNDS, _SECONDS = 2, 3, 5.0


def tokens_per_second(model, windows: WindowSet, *, side: str = "student", batch_size: int = 8) -> float:
    """Tokens of its own that a model reads per second: body and head, without a gradient, padding not counted.

    The best of up to three rounds over a few windows, after one that is not counted; where rounds are long, of fewer.

    Args:
        side: "student" or "teacher", whose tokens it reads.
    """
    device = next(model.parameters()).device
    few = {"side": side, "batch_size": batch_size, "limit": _BATCHES * batch_size, "whole": False}
    which = 0 if side == "student" else 1

    def read() -> tuple[int, float]:
        tokens, began = 0, time.perf_counter()
        for batch, _ in itertools.islice(over_targets(model, windows, {"nll": row_nll}, **few), _BATCHES):
            tokens += int(windows.lengths[batch.sample.numpy(), which].sum())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return tokens, time.perf_counter() - began

    began, best = time.perf_counter(), 0.0
    with evaluating(model):
        read()
        for _ in range(_ROUNDS):
            tokens, seconds = read()
            best = max(best, tokens / seconds)
            if time.perf_counter() - began > _SECONDS:
                break
    return best


def machine_words(device: torch.device) -> str:
    """What a speed was measured on: the card's name, or how many threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
