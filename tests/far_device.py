"""A second device on a machine that has one: tensors there may not meet tensors here, as between two cards.

PyTorch's CPU has no numbers, and a card cannot be made up. The device "meta", whose tensors have shapes and no numbers,
lends its name: a tensor there keeps its numbers in one here, and every operation that mixes the two is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("meta")
_CROSSES = {"_to_copy", "to", "copy_"}
_TAKES_INDICES_OF_THE_HOST = {"index", "index_put", "index_put_"}


class Far(torch.Tensor):
    """A tensor on the second device; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=FAR,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"Far({self.held!r})"


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    every = tree_flatten((args, kwargs))[0]
    tensors = [t for t in every if isinstance(t, torch.Tensor)]
    devices = [d for d in every if isinstance(d, torch.device)]
    there = any(isinstance(t, Far) for t in tensors)
    if there and name not in _CROSSES | _TAKES_INDICES_OF_THE_HOST:
        here = [t for t in tensors if not isinstance(t, Far) and t.dim()]  # a number may come from anywhere
        if here:
            raise RuntimeError(f"{name}: expected all tensors on one device, got some here and some on {FAR}")
    if devices:
        there = devices[0] == FAR
    elif name == "to":  # like another tensor, or only another dtype
        there = isinstance(tensors[-1], Far)
    given, named = tree_map(_here, (args, kwargs))
    out = function(*given, **named)
    if function._schema.is_mutable and out is not None and tensors:
        return args[0]
    if name in _CROSSES and out is given[0]:
        out = out.clone()
    return tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, out) if there else out


def _here(value):
    """What stands for it on the device that there is."""
    if isinstance(value, Far):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


@contextlib.contextmanager
def second_device(monkeypatch) -> Iterator[torch.device]:
    """Inside ``with``, there is one more device."""

    def of_the_cpu(real):
        """Automatic precision knows only kinds of devices that compute."""

        def known(*args, **kwargs):
            args = ["cpu" if value == FAR.type else value for value in args]
            return real(*args, **{name: "cpu" if value == FAR.type else value for name, value in kwargs.items()})

        return known

    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        monkeypatch.setattr(torch, name, of_the_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which knows no views of tensors that hold another
    with _Watch():
        yield FAR


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its parameters and buffers on the second device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(Far(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Far(buffer)
    return model
