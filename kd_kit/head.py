"""The student's head, in chunks: final hidden states in, per-position losses out, never all logits in memory.

Every loss that looks at the student's distribution is served by the same pass over the head. Losses that ask for a few
log-probabilities a row get them from one softmax (:mod:`kd_kit.one_softmax`); those that look at whole rows of logits
run inside the chunk. Either way chunks are recomputed in the backward pass with the gradient that arrives there, so
fp16 loss scaling meets float32 inside.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_kit.losses import cross_entropy, student_cells
from kd_kit.losses.support import OUT
from kd_kit.one_softmax import Read, log_probs
from kd_kit.reduce import chunks
from kd_kit.types import OnDevice

CHUNK_BYTES = 64 * 2**20
"""Of one chunk of float32 logits on a processor, see :func:`chunk_bytes`."""


@dataclass(frozen=True)
class Head:
    """The linear map from final hidden states to logits, with what some families do after it.

    Attributes:
        weight: [V, D]. bias: [V] or None.
        scale: logits are multiplied by it (Granite divides, Cohere multiplies).
        softcap: c * tanh(logits / c) where a model has one (Gemma).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] float32. The product runs in the weight's dtype, or in autocast's where that is on."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def cut(self, rows: int) -> Head:
        """The same head without the padded rows behind the tokenizer's last entry."""
        bias = None if self.bias is None else self.bias[:rows]
        return Head(self.weight[:rows], bias, self.scale, self.softcap)

    def of(self, ids: Tensor) -> Head:
        """The head of some tokens only, [n] int64; a copy."""
        bias = None if self.bias is None else self.bias[ids]
        return Head(self.weight[ids], bias, self.scale, self.softcap)

    def chunk_rows(self) -> int:
        """How many rows of float32 logits fit in the memory for a chunk."""
        return max(16, chunk_bytes(self.weight.device) // (4 * self.weight.shape[0]))


def chunk_bytes(device: torch.device) -> int:
    """Memory for one chunk of float32 logits. Whole rows of logits take about four times that, one softmax about twice.

    On a card a 64th of its memory, 256 MiB of 16 GiB: a product with few rows is slow there.
    """
    if device.type == "cuda":
        return card_chunk_bytes(torch.cuda.get_device_properties(device).total_memory)
    return CHUNK_BYTES


def card_chunk_bytes(memory: int) -> int:
    """:func:`chunk_bytes` on a card with so many bytes."""
    return max(CHUNK_BYTES, memory // 64)


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model of transformers.

    Raises:
        ValueError: the model has no output embedding, as an encoder or a bare body has none.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"head_of: expected a causal language model with an output embedding, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * getattr(config, "logit_scale", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head: ids to final hidden states.

    Raises:
        ValueError: nothing of that kind is found.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # transformers 4 has families that know only the second, Llama 4's text model only the third
    for body in (decoder, getattr(model, "base_model", None), getattr(model, "model", None)):
        if body is not None and body is not model:
            return body
    raise ValueError(
        f"body_of: expected a causal language model with a body below its head, got {type(model).__name__}; "
        "load it with AutoModelForCausalLM"
    )


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def alone_with(model: nn.Module) -> threading.RLock:
    """``with alone_with(model):`` no other thread of the kit runs this model meanwhile.

    Hooks and the number of experts belong to the model and not to a thread: a probe that reads a teacher while a run in
    the background does would hear the run's passes, and the run the probe's.
    """
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())


@dataclass(frozen=True)
class Given(OnDevice):
    """What a teacher says about rows, one entry per row.

    Attributes:
        there: [n] bool, rows that it says something about. The others hold anything, and no loss may look at it.
        ids: [n, K] int64 or None. cells: [n, K + 1] float32 log-probabilities, tail last, -inf unused; or None.
        states: [n, E] float32 hidden states; or None.
        plain: the cells of a row are different tokens, so that what is outside them is one more cell.
        among: [V] bool, tokens over which both sides are normalised; None for all.
    """

    there: Tensor
    ids: Tensor | None = None
    cells: Tensor | None = None
    states: Tensor | None = None
    plain: bool = True
    among: Tensor | None = None

    def __getitem__(self, rows) -> Given:
        some = (None if t is None else t[rows] for t in (self.there, self.ids, self.cells, self.states))
        return Given(*some, plain=self.plain, among=self.among)

    @property
    def read(self) -> Read:
        """What of the student's distribution goes with its cells."""
        return Read(self.ids, self.cells[:, :-1] != -torch.inf if self.plain else None, self.plain, self.among)


class Rows(ABC):
    """Rows of text as a loss sees them. What several losses look at is computed once.

    Attributes:
        targets: [n] int64. given: {key of a reading: :class:`Given`}.
    """

    targets: Tensor
    given: Mapping[str, Given]

    @property
    @abstractmethod
    def nll(self) -> Tensor:
        """[n] float32, negative log-likelihood of the targets, in nats."""

    @abstractmethod
    def student(self, key: str) -> Tensor:
        """[n, K + 1] float32, the student's log-probabilities on the cells of a reading, tail last."""

    @abstractmethod
    def drawn(self, key: str) -> Tensor:
        """[n, K] float32, the student's log-probabilities of tokens that may come twice, without a tail."""

    def teacher(self, key: str) -> Tensor:
        """[n, K + 1] float32, the teacher's on the same cells; the student's own where it says nothing.

        A row without a teacher then costs nothing, and nothing can go wrong with what stands in its place.
        """
        given = self.given[key]
        return torch.where(given.there.unsqueeze(-1), given.cells, self.student(key).detach())


class FewRows(Rows):
    """All rows of a batch, with a few log-probabilities of each, see :func:`kd_kit.one_softmax.log_probs`."""

    def __init__(self, target: Tensor, read: Mapping[str, Tensor], targets: Tensor, given: Mapping[str, Given]):
        self.targets, self.given = targets, given
        self._target, self._read = target, read

    @property
    def nll(self) -> Tensor:
        return -self._target

    def student(self, key: str) -> Tensor:
        return self._read[key]

    drawn = student


class LogitRows(Rows):
    """One chunk of rows with all their logits.

    Attributes:
        logits: [n, V] float32. head: the student's, for losses that put something else through it.
    """

    def __init__(self, logits: Tensor, targets: Tensor, given: Mapping[str, Given], head: Head):
        self.logits = logits
        self.targets = targets
        self.given = given
        self.head = head
        self._cells: dict[str, Tensor] = {}
        self._log_z: Tensor | None = None

    @property
    def log_z(self) -> Tensor:
        """[n] float32, logsumexp of the logits; for free where a loss has asked for cells, or will."""
        if self._log_z is None:
            given = self.given.items()
            keys = [key for key, g in given if g.cells is not None and g.plain and g.among is None]
            if keys:
                self.student(keys[0])
            else:
                self._log_z = self.logits.logsumexp(-1)
        return self._log_z

    @property
    def nll(self) -> Tensor:
        return cross_entropy(self.logits, self.targets, self.log_z)

    def student(self, key: str) -> Tensor:
        if key not in self._cells:
            given = self.given[key]
            logits = self.logits if given.among is None else self.logits.masked_fill(~given.among, OUT)
            self._cells[key], log_z = student_cells(logits, given.ids, given.cells[:, :-1] != -torch.inf)
            if given.among is None and self._log_z is None:
                self._log_z = log_z
        return self._cells[key]

    def drawn(self, key: str) -> Tensor:
        return self.logits.gather(-1, self.given[key].ids) - self.log_z.unsqueeze(-1)


RowLoss = Callable[[Rows], Tensor]
"""A loss of one value per row, [n] float32. May be an ``nn.Module``. One that looks at whole rows of logits is given
:class:`LogitRows`."""

_FEW = 256
"""Cells of a row that are few, also where the vocabulary is small; see :func:`_is_few`."""


def head_losses(
    hidden: Tensor,
    head: Head,
    losses: Mapping[str, RowLoss],
    *,
    targets: Tensor,
    given: Mapping[str, Given] | None = None,
    chunk: int | None = None,
    whole: bool = True,
) -> dict[str, Tensor]:
    """Every row loss over every row, one pass over the head.

    Args:
        whole: a loss looks at whole rows of logits. Without that the pass is faster and keeps less.

    Shapes:
        hidden: [N, D] final hidden states (after the last norm) of the rows
        targets: [N] int64
        given: {key: :class:`Given` of N rows}
        returns: {name: [N] float32}, with gradient to ``hidden`` and the head
    """
    given, size = given or {}, head.chunk_rows() if chunk is None else chunk
    if size < 1:
        raise ValueError(f"head_losses: expected a chunk of at least 1 row, got {size}")
    if not len(hidden):
        return {name: hidden.new_zeros(0, dtype=torch.float32) for name in losses}
    if whole or not all(_is_few(g, len(head.weight)) for g in given.values()):
        return _whole_rows(hidden, head, losses, targets, given, size)
    reads = {key: g.read for key, g in given.items()}
    target, found = log_probs(
        hidden,
        head.weight,
        head.bias,
        targets,
        list(reads.values()),
        chunk=size,
        scale=head.scale,
        softcap=head.softcap,
    )
    rows = FewRows(target, dict(zip(reads, found, strict=True)), targets, given)
    return {name: loss(rows) for name, loss in losses.items()}


def _is_few(given: Given, size: int) -> bool:
    """Whether it is about a few tokens a row, which take far less memory than the rows' logits."""
    return given.ids is not None and given.cells is not None and given.ids.shape[1] <= max(_FEW, size // 8)


def _whole_rows(hidden, head, losses, targets, given, size) -> dict[str, Tensor]:
    names = list(losses)

    def one_chunk(hidden, weight, bias, targets, given):
        part = Head(weight, bias, head.scale, head.softcap)
        rows = LogitRows(part.logits(hidden), targets, given, part)
        return torch.stack([losses[name](rows) for name in names])

    parts = []
    for rows in chunks(len(hidden), size):
        some = {key: g[rows] for key, g in given.items()}
        arguments = (hidden[rows], head.weight, head.bias, targets[rows], some)
        if torch.is_grad_enabled():
            parts.append(checkpoint(one_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(one_chunk(*arguments))
    return dict(zip(names, torch.cat(parts, dim=1), strict=True))
