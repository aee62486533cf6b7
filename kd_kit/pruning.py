"""A model with fewer of its layers: which ones stay, and a configuration that says so.

The shorter model is made anew by its own class from the changed configuration, and takes the weights of the layers that
stay: so each layer knows its number (where its keys and values are cached), its kind of attention, and all else that
its class derives from its place. Whether it still computes what these layers computed is then compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import index

import torch
from torch import nn

from kd_kit.head import alone_with, body_of
from kd_kit.modes import modes_kept
from kd_kit.taps import layers_of

LISTED = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
"""Fields of a configuration that list layers by their number, from 0."""

COUNTED = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Fields that say how many of the first layers are of another kind."""

_KEEP = ("ends", "spaced")


def kept_layers(total: int, layers: int | Sequence[int], keep: str = "ends") -> tuple[int, ...]:
    """Which of ``total`` layers stay, numbered from 1.

    Args:
        layers: how many; or their numbers, rising.
        keep: which ones, where ``layers`` is a number. "ends": the first half and the last half, so that a block in the
            middle goes. "spaced": every k-th, with the first and the last.

    Raises:
        ValueError: more layers than there are, none, numbers that do not rise, or another ``keep``.

    Example:
        >>> kept_layers(30, 5), kept_layers(30, 5, "spaced")
        ((1, 2, 28, 29, 30), (1, 8, 16, 23, 30))
    """
    if keep not in _KEEP:
        raise ValueError(f"pruned: expected keep= 'ends' or 'spaced', got {keep!r}")
    numbers = None if isinstance(layers, (bool, str)) else _integers(layers)
    if numbers is None or not numbers:
        raise ValueError(
            f"pruned: expected layers= as a number from 1 to {total} or rising layer numbers, got {layers!r}; "
            f"layers={max(total // 2, 1)} keeps half of them"
        )
    if not isinstance(layers, Sequence):
        (count,) = numbers
        if not 1 <= count <= total:
            raise ValueError(
                f"pruned: expected layers= from 1 to {total}, which is how many this model has, got {count}; "
                "a student with more layers than its source starts from scratch, in a configuration of its own"
            )
        if keep == "spaced":
            return tuple(round(1 + i * (total - 1) / (count - 1)) for i in range(count)) if count > 1 else (total,)
        first = count // 2
        return (*range(1, first + 1), *range(total - (count - first) + 1, total + 1))
    if not all(1 <= n <= total for n in numbers) or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError(
            f"pruned: expected layer numbers that rise, from 1 to {total}, got {tuple(numbers)}; the last is {total}"
        )
    return tuple(numbers)


def _integers(layers) -> list[int] | None:
    try:
        return [index(n) for n in layers] if isinstance(layers, Sequence) else [index(layers)]
    except TypeError:
        return None


def shorter_config(config, kept: Sequence[int]):
    """A copy of a configuration that has only these layers, numbered from 1 as in the whole model."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in _changed(text, kept).items():
        setattr(text, name, value)
    return config


def _changed(text, kept: Sequence[int]) -> dict[str, object]:
    """The fields of a text configuration that are not the same with fewer layers."""
    numbers = [n - 1 for n in kept]
    counts = [name for name in ("num_layers", "num_hidden_layers", "n_layer", "n_layers") if _has(text, name)]
    total = getattr(text, counts[0])
    out: dict[str, object] = {name: len(kept) for name in counts if getattr(text, name) == total}
    for name, value in text.to_dict().items():
        if name in out or name.endswith(("token_id", "token_ids")) or not _has(text, name):
            continue
        if name in LISTED and isinstance(value, (list, tuple)):
            out[name] = [numbers.index(n) for n in value if n in numbers]
        elif name in COUNTED and isinstance(value, int) and not isinstance(value, bool):
            out[name] = sum(n < value for n in numbers)
        elif isinstance(value, (list, tuple)) and len(value) == total:
            out[name] = type(value)(value[n] for n in numbers)
    step = getattr(text, "decoder_sparse_step", 1)
    if step and step > 1:  # Qwen: layers whose number it divides have experts
        dense = [n for n in range(total) if (n + 1) % step or n in (getattr(text, "mlp_only_layers", None) or [])]
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": [numbers.index(n) for n in dense if n in numbers]}
    return out


def _has(text, name: str) -> bool:
    try:
        return getattr(text, name, None) is not None
    except Exception:  # some configurations refuse a field that differs from layer to layer
        return False


def pruned(model: nn.Module, layers: int | Sequence[int], *, keep: str = "ends") -> nn.Module:
    """A new model with some of the layers of a causal language model of transformers; the given one is left as it is.

    Embeddings, final norm and head stay. Weights are copies, in the dtype, on the device and in the mode of the model.

    Args:
        layers, keep: which layers, see :func:`kept_layers`.

    Raises:
        ValueError: layers that are not there; a model whose layers are not one list (:func:`kd_kit.taps.layers_of`), or
            whose class makes something else of the shorter configuration.
    """
    there = layers_of(model)
    kept = kept_layers(len(there), layers, keep)
    body = body_of(model)
    prefix = next(name for name, part in model.named_modules() if part is there) + "."
    new_numbers = {str(old - 1): str(new) for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if number not in new_numbers:
                continue
            name = f"{prefix}{new_numbers[number]}.{rest}"
        state[name] = tensor
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        try:
            short = type(model)(shorter_config(model.config, kept))
            short.load_state_dict(state)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise _breaks(model, kept, " ".join(str(error).split())[:300]) from error
    weight = next(model.parameters())
    short = short.to(device=weight.device, dtype=weight.dtype).train(model.training)
    if getattr(model, "generation_config", None) is not None:
        short.generation_config = copy.deepcopy(model.generation_config)
    ids = torch.arange(8, device=weight.device).unsqueeze(0)
    with alone_with(model), modes_kept(model), modes_kept(short), torch.no_grad(), _only(model, kept):
        model.eval()
        short.eval()
        theirs = body(input_ids=ids, use_cache=False)[0].float()
        ours = body_of(short)(input_ids=ids, use_cache=False)[0].float()
    gap = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    if not gap < (1e-4 if weight.dtype == torch.float32 else 0.03):
        raise _breaks(
            model, kept, f"hidden states that differ by {float(gap):.2g} of the largest from those of these layers"
        )
    return short


@contextlib.contextmanager
def _only(model: nn.Module, kept: Sequence[int]) -> Iterator[None]:
    """Inside ``with``, the model runs these of its layers only."""
    there, text = layers_of(model), model.config.get_text_config()
    path, _, name = next(n for n, part in model.named_modules() if part is there).rpartition(".")
    changed = _changed(text, kept)
    before = {field: getattr(text, field) for field in changed}
    try:
        for field, value in changed.items():
            setattr(text, field, value)
        setattr(model.get_submodule(path), name, nn.ModuleList([there[n - 1] for n in kept]))
        yield
    finally:
        setattr(model.get_submodule(path), name, there)
        for field, value in before.items():
            setattr(text, field, value)


def _breaks(model: nn.Module, kept: Sequence[int], got: str) -> ValueError:
    return ValueError(
        f"pruned: expected {type(model).__name__} to be the same layers in a shorter configuration, got {got}; the "
        f"places of its layers mean something that is not known here: keep other layers than {spans(kept)}, "
        "layers=(1, 2, ...)"
    )


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers in words: "1-6, 25-30"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
