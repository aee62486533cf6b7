"""A teacher that has read the training text already: its knowledge comes from a cache, its weights can rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kd_kit.cache import Cache
from kd_kit.data import WindowSet
from kd_kit.readings import Needs
from kd_kit.signal_pieces import counts_of, join, kinds_of_rows
from kd_kit.teacher import LiveTeacher
from kd_kit.types import DistillBatch, TeacherSignal


class CachedTeacher(LiveTeacher):
    """Hands over what a cache holds for windows of the training text; asks the model about any other text.

    The model stays in the memory of the machine, for evaluation and for pictures of what the cache lacks, and is away
    from the card while the student trains.

    Args:
        live: the teacher that the cache was built with.
        cache: complete. windows: the training windows that it is about.
        home: the device that the model computes on when it is awake.
    """

    def __init__(self, live: LiveTeacher, cache: Cache, windows: WindowSet, *, home: torch.device):
        super().__init__(live.model, live.bridge, live.needs, more_experts=live.more_experts)
        self.cache = cache
        self.windows = windows
        self._home = home

    @property
    def home(self) -> torch.device:
        return self._home

    def rest(self) -> None:
        """Move the model off the card."""
        self.model.to("cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The model back on its card, for as long as the block lasts."""
        self.model.to(self._home)
        try:
            yield
        finally:
            self.rest()

    def asked(self, needs: Needs) -> LiveTeacher:
        """The same teacher, asked for something else; of what the cache lacks the model itself is asked."""
        if self.lacks(needs):
            return LiveTeacher(self.model, self.bridge, needs, more_experts=self.more_experts)
        live = LiveTeacher(self.model, self.bridge, needs, more_experts=self.more_experts)
        return CachedTeacher(live, self.cache, self.windows, home=self._home)

    def lacks(self, needs: Needs) -> list[str]:
        """What of ``needs`` the cache does not hold, in words."""
        held = self.cache.manifest["made_of"]
        out = [f"the reading {r.key!r}" for r in needs.readings if r.key not in held["readings"]]
        out += ["final states"] if needs.row_states and not held["row_states"] else []
        out += ["span likelihoods"] if needs.span_log_probs and not held["span_log_probs"] else []
        out += [f"hidden states of layer {n}" for n in sorted(needs.teacher_states) if n not in held["states"]]
        out += [f"routing of layer {n}" for n in sorted(needs.routing) if n not in held["routing"]]
        if needs.routing and needs.routing_scores != held["routing_scores"]:
            out.append(f"routing scores {needs.routing_scores!r}")
        return out + [f"attention of layer {n}" for n in sorted(needs.teacher_attention)]

    def signal(self, batch: DistillBatch, here: DistillBatch | None = None) -> TeacherSignal:
        """As :meth:`LiveTeacher.signal`."""
        here, target = batch.to("cpu") if here is None else here, batch.student_ids.device
        if not self._is_ours(here):
            return super().signal(batch, here)
        windows, kinds = here.sample.tolist(), kinds_of_rows(self.needs)
        wanted = counts_of(here)
        if any(self.cache.counts(kind, windows) != wanted[kind].tolist() for kind in set(kinds.values())):
            return super().signal(
                batch, here
            )  # held-out text that repeats a window of the training text, scored in part
        signal = join(lambda name: self.cache.fetch(name, kinds[name], windows), here, self.needs)
        if target.type == "cuda":
            signal = signal.pin_memory()
        return signal.to(target, non_blocking=True)

    def _is_ours(self, batch: DistillBatch) -> bool:
        """Whether these are windows of the training text, and not of another with the same numbers."""
        samples = batch.sample.tolist()
        if max(samples) >= len(self.windows):
            return False
        both = [self.windows.ids(sample) for sample in samples]
        return all(
            torch.equal(given[row, : len(ids[side])], torch.from_numpy(ids[side]))
            for side, given in enumerate((batch.student_ids.cpu(), batch.teacher_ids.cpu()))
            for row, ids in enumerate(both)
        )
