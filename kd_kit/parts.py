"""What the terms about the models' insides share: trainable parts, the spans of a batch, pairs of layers.

A part looks at the first batches of a run, settles, and then gives values. It is float32, saved with the run, and left
out of the exported student.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kd_kit.readings import Needs
from kd_kit.reduce import masked_sum
from kd_kit.taps import check_layer_map, layer_map, layers_of
from kd_kit.terms import Setup, StudentOutput
from kd_kit.types import DistillBatch, LossValue, TeacherSignal

LayerMap = Mapping[int, int]
"""Student layer -> teacher layer, both counted from 1."""


class Part(nn.Module):
    """The trainable half of a term: looks at the first batches of a run, settles, and then gives values.

    Attributes:
        group: "projectors" or "routers", which rate its parameters learn at.
        ready: buffer, whether it has settled; saved with the run.
    """

    group = "projectors"

    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def observe(self, output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> None:
        """Take a batch into account for :meth:`settle`."""

    def _pieces(self) -> list[nn.Module]:
        """What this part is made of: the projectors, statistics and heads that observe and settle."""
        return [
            one for module in self.children() for one in (module if isinstance(module, nn.ModuleList) else [module])
        ]

    def forget(self) -> None:
        """Start observing anew."""
        for piece in self._pieces():
            piece.forget()

    def settle(self) -> None:
        """Freeze what was observed, before the first step."""
        for piece in self._pieces():
            piece.settle()
        self.ready.fill_(True)


# --- the spans of a batch


def student_ends(output: StudentOutput, layer: int, batch: DistillBatch) -> Tensor:
    """[P, D], the student's hidden state at the end of every scored span."""
    return output.states[layer].flatten(0, 1)[batch.span_rows[:, 0]]


def spread_spans(batch: DistillBatch, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` scored spans of every window, evenly spaced.

    Shapes:
        returns: [B, n] int64, rows of ``span_rows`` (any where the mask is False); [B, n] bool
    """
    counts = batch.span_mask.sum(1, keepdim=True)
    n = min(most, batch.span_mask.shape[1])
    places = torch.arange(n, device=counts.device).unsqueeze(0)
    mask = places < counts
    index = torch.where(counts > n, places * counts // n, places)
    index = index + counts.cumsum(0) - counts
    return torch.where(mask, index, 0), mask


def nothing(output: StudentOutput) -> LossValue:
    """The value of a batch without a position for a term: 0 over 0, and still something to differentiate."""
    return masked_sum(output.hidden[:0])


def chosen_spans(batch: DistillBatch, most: int) -> int:
    """How many spans :func:`spread_spans` takes."""
    return int(batch.span_mask.sum(1).clamp(max=most).sum())


# --- pairs of layers


def pairs_of(setup: Setup, layers: LayerMap | None, taps: int) -> tuple[tuple[int, int], ...]:
    """Pairs of (student layer, teacher layer): proportional ones, or those given by hand once they are checked.

    A model that is its own student has every teacher layer of the map beside itself.
    """
    if layers is not None and setup.student is setup.teacher:
        depth = len(layers_of(setup.teacher))
        return check_layer_map({theirs: theirs for theirs in layers.values()}, depth, depth)
    depths = len(layers_of(setup.student)), len(layers_of(setup.teacher))
    if layers is None:
        return layer_map(*depths, taps=taps)
    return check_layer_map(layers, *depths)


def one_pair(pairs: tuple[tuple[int, int], ...], where: str) -> tuple[int, int]:
    if len(pairs) != 1:
        raise ValueError(f"{where}: expected layers= with one pair, got {len(pairs)}; pass {{student: teacher}}")
    return pairs[0]


def widths_of(setup: Setup) -> tuple[int, int]:
    return tuple(m.config.get_text_config().hidden_size for m in (setup.student, setup.teacher))


def states_needed(pairs) -> Needs:
    return Needs(
        student_states=frozenset(ours for ours, _ in pairs), teacher_states=frozenset(theirs for _, theirs in pairs)
    )


def given_layers(where: str, layers: LayerMap | Iterable[tuple[int, int]] | None) -> LayerMap | None:
    """A layer map given by hand as a dict, before the models are known.

    Raises:
        ValueError: none, or something else than pairs of whole numbers.
    """
    if layers is None:
        return None
    try:
        pairs = {operator.index(ours): operator.index(theirs) for ours, theirs in dict(layers).items()}
    except (TypeError, ValueError):
        pairs = {}
    if not pairs:
        raise ValueError(
            f"{where}: expected layers={{student layer: teacher layer}} with layers counted from 1, got {layers!r}"
        )
    return pairs


def plain_layers(layers: LayerMap | None) -> dict | None:
    """A layer map as the record of a run keeps it."""
    return None if layers is None else {str(ours): theirs for ours, theirs in layers.items()}
