"""State as named tensors plus plain JSON and back, exactly and without pickle: optimizers, random generators.

``optimizer.state_dict()`` nests tensors, tuples and integer keys, and JSON keeps none of them. So the tensors
are taken out under readable names, and the rest is spelled out: every object in the JSON is a note such as
``{"tuple": [...]}`` about what stood there.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[Tensors, Any]:
    """``(tensors, json)`` of any optimizer's state dict, or of a scheduler's or a gradient scaler's.

    Takes tensors, None, bool, int, float, text, and lists, tuples and dicts of these. Tensors are not copied.

    Raises:
        TypeError: something else, named by its place.

    Example:
        >>> tensors, described = flatten_optimizer(optimizer.state_dict())
        >>> sorted(tensors)[:3]
        ['state.0.exp_avg', 'state.0.exp_avg_sq', 'state.0.step']
    """
    tensors: Tensors = {}
    return tensors, _describe(state_dict, "", tensors)


def unflatten_optimizer(tensors: Mapping[str, Tensor], described: Any) -> Any:
    """The state dict that :func:`flatten_optimizer` took apart; the tensors are those given.

    Raises:
        ValueError: a tensor is missing, or the description is not one of :func:`flatten_optimizer`.
    """
    try:
        return _build(described, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"unflatten_optimizer: expected the two parts that flatten_optimizer returned, got {error!r}; "
            "pass the tensors and the JSON of one checkpoint"
        ) from error


def _describe(value: Any, place: str, tensors: Tensors) -> Any:
    if isinstance(value, Tensor):
        name = _new_name(place, tensors)
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, bool):
        return value
    # By isinstance: numpy.float64 is a float, and learning-rate rules like to return it
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_describe(key, f"{place}, key", tensors), _describe(item, _below(place, key), tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_describe(item, _below(place, index), tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    raise TypeError(
        f"flatten_optimizer: expected tensors, numbers, text, lists, tuples and dicts, "
        f"got {type(value).__name__} at {place or 'the top'}; make it one of them before"
    )


def _below(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _new_name(place: str, tensors: Tensors) -> str:
    """The place itself, with # behind it where it is taken: the keys 1 and "1" look the same in it."""
    name = place or "tensor"
    while name in tensors:
        name += "#"
    return name


def _build(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(described, Mapping):
        if isinstance(described, list):
            raise TypeError("a bare list")
        return described
    [(kind, content)] = described.items() if len(described) == 1 else [("object of several keys", None)]
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {_build(key, tensors): _build(item, tensors) for key, item in content}
    if kind == "list":
        return [_build(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(_build(item, tensors) for item in content)
    raise TypeError(f"unknown kind {kind!r}")


def capture_rng() -> tuple[Tensors, dict[str, Any]]:
    """``(tensors, json)`` of the process-wide random states: Python, numpy (legacy), torch on CPU and GPUs.

    A GPU counts only once CUDA is in use: asking earlier would start it, which costs memory on every card.
    """
    version, numbers, gauss = random.getstate()
    tensors = {"python": torch.tensor(numbers, dtype=torch.int64), "torch": torch.get_rng_state()}
    described: dict[str, Any] = {"python": {"version": version, "gauss": gauss}}
    if numpy := sys.modules.get("numpy"):  # never imported, never drawn from
        state = numpy.random.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ValueError(
                f"capture_rng: expected MT19937 as numpy's global generator, got {state['bit_generator']!r}; "
                "use a numpy.random.Generator of your own instead of replacing the global one"
            )
        tensors["numpy"] = torch.tensor(state["state"]["key"].tolist(), dtype=torch.int64)
        described["numpy"] = {
            "position": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return tensors, described


def restore_rng(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> list[str]:
    """Continue every generator of :func:`capture_rng` bit for bit; returns the names it had to leave out.

    Such names are GPUs that this machine lacks: the run goes on, but is not exact. Call it after the data
    loader's iterator exists, since making one draws from torch's generator.
    """
    python = described["python"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    torch.set_rng_state(tensors["torch"])
    left_out = []
    if "numpy" in tensors:
        import numpy  # here, since this file needs it for nothing else

        state = described["numpy"]
        key = numpy.array(tensors["numpy"].tolist(), dtype=numpy.uint32)
        numpy.random.set_state(("MT19937", key, state["position"], state["has_gauss"], state["gauss"]))
    for name in sorted(name for name in tensors if name.startswith("cuda.")):
        index = int(name.removeprefix("cuda."))
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensors[name], index)
        else:
            left_out.append(name)
    return left_out
