"""Where numbers stop being finite: modules are listened to while they run, forward and backward.

Every call of a module has an order, an inside and an outside. The place is the innermost call that was given finite
numbers and gave back others: forward its inputs and outputs are looked at, backward the gradients at its outputs and
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Numbers:
    """What is not finite in one tensor.

    Attributes:
        dtype: of the tensor, "float16". size: how many numbers it has.
        nan, above, below: how many of them are NaN, +inf and -inf.
    """

    dtype: str
    size: int
    nan: int
    above: int
    below: int

    def __str__(self) -> str:
        kinds = ((self.nan, "NaN"), (self.above, "+inf"), (self.below, "-inf"))
        return ", ".join(f"{count:,} {kind}" for count, kind in kinds if count) + f" of {self.size:,}"


def dtype_name(tensor: Tensor) -> str:
    """The name of its dtype without the library's: "float16"."""
    return str(tensor.dtype).removeprefix("torch.")


def numbers_of(tensor: Tensor) -> Numbers | None:
    """What is not finite in a tensor; None where everything is. A device is waited for."""
    with torch.no_grad():
        tensor = tensor.detach()
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            return None
        counts = (torch.isnan(tensor), torch.isposinf(tensor), torch.isneginf(tensor))
        return Numbers(dtype_name(tensor), tensor.numel(), *(int(c.sum()) for c in counts))


def floats_of(value) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floats_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from floats_of(item)


def first_numbers(value) -> Numbers | None:
    """Of the first tensor in nested containers that has any."""
    return next((found for tensor in floats_of(value) if (found := numbers_of(tensor)) is not None), None)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: qualified, "student.model.layers.0.mlp". start, end: place among all beginnings, and among all ends.
        given, gave: what was not finite in its inputs and outputs.
    """

    name: str
    module: nn.Module
    start: int
    end: int = -1
    given: bool = False
    gave: Numbers | None = None


class Watch:
    """Hears every module below some roots while ``with`` lasts; what is computed stays as it is, bit for bit.

    Args:
        roots: {name: module}; a module within is named "name.its.own.name".

    Attributes:
        calls: of all forward passes inside ``with``, in the order of their beginnings.

    Masks hold -inf by design: arguments with "mask" in their name are not looked at.
    """

    def __init__(self, roots: Mapping[str, nn.Module]):
        self.calls: list[Call] = []
        self._roots = roots
        self._handles: list = []
        self._open: list[Call] = []
        self._ended = 0
        self._listening = False
        self._hearing = False
        self._backward: dict[tuple[int, str], Numbers] = {}  # of the last backward pass, in its order

    def __enter__(self) -> Watch:
        for root, top in self._roots.items():
            for name, module in top.named_modules():
                name = f"{root}.{name}" if name else root
                before = module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True)
                self._handles += [before, module.register_forward_hook(self._end)]
        self._listening = True
        return self

    def __exit__(self, *error) -> None:
        self._listening = False
        while self._handles:
            self._handles.pop().remove()

    # --- forward

    def _begin(self, name: str, module, args, kwargs):
        if not self._listening:  # a recomputation inside a backward pass
            return None
        call = Call(name, module, len(self.calls))
        self.calls.append(call)
        self._open.append(call)
        looked_at = [args, {key: value for key, value in kwargs.items() if "mask" not in key}]
        call.given = first_numbers(looked_at) is not None
        if not torch.is_grad_enabled():
            return None

        def own(tensor: Tensor) -> Tensor:
            # several modules may read one tensor: through a view of its own each shows the gradient that it sends back
            view = tensor.view_as(tensor)
            view.register_hook(partial(self._hear, call.start, "in"))
            return view

        return _mapped(args, own), _mapped(kwargs, own)

    def _end(self, module, args, output) -> None:
        if not self._listening:
            return
        call = self._open.pop()
        call.end, self._ended = self._ended, self._ended + 1
        call.gave = first_numbers(output)
        for tensor in floats_of(output):
            if tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(partial(self._hear, call.start, "out"))

    def forward_place(self) -> tuple[str, Numbers] | None:
        """The innermost module, first in the order of execution, that made such numbers out of finite ones.

        -inf alone is what a gate gives experts that it leaves out: it is named where no NaN or +inf arose.
        """
        made = [call for call in self.calls if call.gave is not None and not call.given]
        if not made:
            return None
        sure = [call for call in made if call.gave.nan or call.gave.above]
        first = min(sure or made, key=lambda call: call.end)
        return first.name, first.gave

    # --- backward

    def _hear(self, start: int, side: str, gradient: Tensor) -> None:
        if self._hearing and (start, side) not in self._backward:
            found = numbers_of(gradient)
            if found is not None:
                self._backward[start, side] = found

    def gradients(self, take: Callable[[], object]):
        """What ``take`` gives back, a function that runs one backward pass and is listened to."""
        self._listening, self._hearing, self._backward = False, True, {}
        try:
            return take()
        finally:
            self._hearing = False

    def hear(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as a reader outside all modules gets it, whose gradient :meth:`heard` tells of by this name."""
        if not tensor.requires_grad:
            return tensor
        view = tensor.view_as(tensor)
        view.register_hook(partial(self._hear, -1, name))
        return view

    def heard(self) -> tuple[str, Numbers] | None:
        """The first reader, by the name it has with :meth:`hear`, that sent back a gradient which is not finite."""
        return next(((side, found) for (start, side), found in self._backward.items() if start < 0), None)

    def backward_place(self, parameters: Mapping[int, Numbers]) -> tuple[str, Numbers] | None:
        """The innermost module, first in the order of the backward pass, that sent back what it was not given.

        Args:
            parameters: {id of a parameter: what is not finite in its gradient}.

        Returns:
            its name, or that of its parameter where only the parameter's gradient is not finite.
        """
        heard = self._backward
        for call in reversed(self.calls):
            if (call.start, "out") in heard:
                continue
            if (found := heard.get((call.start, "in"))) is not None:
                return call.name, self._first_within(call) or found
            for name, parameter in call.module.named_parameters(recurse=False):
                if (found := parameters.get(id(parameter))) is not None:
                    return f"{call.name}.{name}", found
        return None

    def _first_within(self, call: Call) -> Numbers | None:
        """What was heard first, where that was inside this call: a gradient overflows where its dtype is narrowed."""
        start, found = next(((start, found) for (start, _), found in self._backward.items() if start >= 0))
        return found if call.start <= start and self.calls[start].end <= call.end else None


def _mapped(value, function: Callable[[Tensor], Tensor]):
    """Containers with ``function`` applied to the tensors that a gradient goes through."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() and value.requires_grad else value
    if type(value) is dict:
        return {key: _mapped(item, function) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    return value
