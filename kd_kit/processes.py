"""The processes of a run: which of them leads, what it tells the others, and sums over all of them.

The same script runs in every process (``accelerate launch --num_processes 2 script.py``). The first one leads: it
alone has the run's folder and decides what comes next; the others wait for its word and do as it says. Everything that
crosses goes through accelerate, so nothing here knows cards from CPUs. With one process nothing crosses.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object
from accelerate.utils import reduce as add_over_processes
from torch import Tensor

WAIT = timedelta(days=1)
"""How long a process waits for the others: longer than any evaluation, save or pause of the one that leads."""

BUCKET = 16 * 2**20
"""Numbers that cross at once."""

_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}

# whether the first process is inside something that the others wait for the end of
_LEADING: ContextVar[bool] = ContextVar("kd_kit_leading", default=False)

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of this run is gone, or does something else than this one."""


def join(*, cpu: bool) -> Processes:
    """Join the processes that this one was started with; alone where it was started alone.

    Raises:
        ValueError: accelerate is set up to cut a model into pieces, which a run does not do.
    """
    refuse_sharding()
    return Processes(PartialState(cpu=cpu, **waiting().to_kwargs()))


def waiting() -> InitProcessGroupKwargs:
    """What an Accelerator is told about waiting, as one of its ``kwargs_handlers``."""
    return InitProcessGroupKwargs(timeout=WAIT)


def refuse_sharding(kind: DistributedType | None = None) -> None:
    """Raise where accelerate is set up for anything but whole models in every process.

    Args:
        kind: of an Accelerator that there is already.

    Raises:
        ValueError: it is.
    """
    found = [name for key, name in _SHARDED.items() if os.environ.get(key, "false").lower() in ("true", "1")]
    if kind not in (None, DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        found.append(kind.value)
    if found:
        raise ValueError(
            f"build_session: expected accelerate to run a whole student in every process, got {found[0]}; a student "
            "that is distilled into is small and fits, so start with plain `accelerate launch --num_processes N`, and "
            "without a configuration file that says otherwise (accelerate config)"
        )


def own_device() -> torch.device:
    """The card of this process, the first where it is alone; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    here = join(cpu=False)
    return PartialState().device if here.count > 1 else torch.device("cuda")


def is_first() -> bool:
    """Whether this process is the first of its program, as the only one is."""
    return not PartialState._shared_state or PartialState().is_main_process


@dataclass(frozen=True)
class _Said:
    """A word of the leading process.

    Attributes:
        about: what it does. how: "order", "done" or "raised". content: of it.
    """

    about: str
    how: str
    content: Any


class Processes:
    """All processes of the program, seen from one of them.

    Attributes:
        count: how many there are. rank: number of this one. own_error: what this one could not do; the others know, and
            the first one has the last word on it.
    """

    def __init__(self, state: PartialState):
        self.count: int = state.num_processes
        self.rank: int = state.process_index
        self._device: torch.device = state.device
        self._whole = True  # no word, and no sum, was broken off
        self.own_error: BaseException | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that has the run's folder; the only one is."""
        return self.rank == 0

    @property
    def leading(self) -> bool:
        """Whether the others wait for the end of what this one does, and are not to be asked to anything else."""
        return _LEADING.get()

    def say(self, text: object) -> None:
        """Print it once and not once per process."""
        if self.leads:
            print(text)

    def refuse_several(self, where: str) -> None:
        """Raise where there are several processes.

        Raises:
            ValueError: there are.
        """
        if self.count > 1:
            raise ValueError(
                f"{where}: expected one process, got {self.count}; it looks at one batch on one device, so call it in "
                "a program of its own that is started with plain python, before `accelerate launch`"
            )

    # --- one leads, the others follow ----------------------------------------------------------------------------

    def led(self, about: str, work: Callable[[], T], follow: Callable[[Any], None] | None = None) -> T:
        """``work()``, done by the first process alone; what it returns or raises reaches all.

        To be called by all processes. Within ``work`` the first one may call anything that is led itself.

        Args:
            about: what is done, the same in all processes.
            follow: what the others do with an :meth:`order`.

        Raises:
            ProcessLost: a process is gone, or calls something else.
        """
        if self.count == 1 or self.leading:
            return work()
        if not self.leads:
            return self._followed(about, follow)
        before = _LEADING.set(True)
        try:
            result = work()
        except BaseException as error:
            if self._whole:
                self._tell(_Said(about, "raised", portable(error)))
            raise
        finally:
            _LEADING.reset(before)
        self._tell(_Said(about, "done", result))
        return result

    def order(self, about: str, content: object) -> None:
        """Tell the processes that follow what to do next; from within ``work`` of :meth:`led`."""
        self._tell(_Said(about, "order", content))

    def _followed(self, about: str, follow: Callable[[Any], None] | None) -> Any:
        self.own_error = None
        while True:
            said = self._tell(None)
            if said.about != about:
                raise ProcessLost(
                    f"{about}: expected the first process to do the same, got one that is at {said.about}; every "
                    "process has to call what all of them take part in, in the same order"
                )
            if said.how == "done":
                return said.content
            if said.how == "raised":
                raise said.content from self.own_error
            if follow is None:
                raise ProcessLost(f"{about}: expected nothing to do but to wait, got {said.content!r}")
            try:
                follow(said.content)
            except ProcessLost:
                raise
            except BaseException as error:  # the others hear of it where they next meet
                if not self._whole:
                    raise
                self.own_error = error

    def _tell(self, said: _Said | None) -> _Said:
        with self._together():
            return broadcast_object_list([said])[0]

    # --- what crosses --------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """What every process has here, in their order."""
        if self.count == 1:
            return [value]
        with self._together():
            return gather_object([value])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes, taken in float32, into every tensor; they have the same shapes everywhere."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1).float() for t in bucket])
            with self._together():
                flat = add_over_processes(flat, reduction="sum")
            at = 0
            for t in bucket:
                t.detach().copy_(flat[at : at + t.numel()].view_as(t))
                at += t.numel()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Put what the first process has into the tensors of all; the same shapes everywhere."""
        if self.count == 1:
            return
        for bucket in _buckets(list(tensors)):
            flat = torch.cat([_bytes(t).to(self._device) for t in bucket])  # some may be on the host
            with self._together():
                flat = broadcast(flat)
            if self.leads:
                continue
            at = 0
            for t in bucket:
                size = t.numel() * t.element_size()
                t.detach().copy_(flat[at : at + size].clone().view(t.dtype).view(t.shape))
                at += size

    def tensors(self, named: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The named tensors of the first process, in all of them; elsewhere on the CPU."""
        shapes = None if named is None else [(name, tuple(t.shape), t.dtype) for name, t in named.items()]
        with self._together():
            shapes = broadcast_object_list([shapes])[0]
        if not self.leads:
            named = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in shapes}
        self.share(named.values())
        return dict(named)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Something that all processes do at once."""
        self._whole = False
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the library below: the other end of a connection is gone
            raise ProcessLost(
                f"expected all {self.count} processes to go on, got word on process {self.rank} that another one is "
                f"gone ({_in_short(error)}); what ended it stands in its own output, or it was killed, as the system "
                "does when memory runs out"
            ) from error
        self._whole = True


def portable(error: BaseException) -> BaseException:
    """The error itself, or where it cannot cross to another process, one that says the same."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever an error's class does when it is made again
        pass
    return RuntimeError(f"{type(error).__name__}: {error}".removesuffix(": "))


def _in_short(error: BaseException) -> str:
    """What the library below says, without where in it that is and what it supposes."""
    said = re.sub(r"^\[[^]]*:\d+\] ", "", str(error).strip()).splitlines()
    return said[0].split(". ")[0][:160] if said else type(error).__name__


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, so many of them together that each crossing is worth its while."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and size + t.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel()
    if bucket:
        yield bucket


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
