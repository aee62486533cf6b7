"""A teacher that has read the training text already: its knowledge comes from a cache, its weights can rest."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kd_kit.cache import Cache
from kd_kit.data import WindowSet
from kd_kit.readings import Needs
from kd_kit.signal_pieces import counts_of, join, kinds_of_rows, widened
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm
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
        self._read_ahead: dict[int, TeacherSignal | Exception | None] = {}  # by the identity of a batch that lives

    @property
    def home(self) -> torch.device:
        return self._home

    def rest(self) -> None:
        """Move the model off the card. One in few bits stays: it is small, and packed for where it is."""
        self._some = None
        if not getattr(self.model, "is_quantized", False):
            self.model.to("cpu")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The model back on its card, for as long as the block lasts."""
        if not getattr(self.model, "is_quantized", False):
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
        return lacks(self.cache.manifest["made_of"], needs)

    def check_terms(self, terms: Sequence[LossTerm], where: str) -> None:
        """As :meth:`LiveTeacher.check_terms`: the cache holds what they want, and is whole."""
        if wants := unserved(self.cache.manifest["made_of"], terms):
            raise ValueError(
                f"{where}: expected terms that the cache in {str(self.cache.folder)!r} can serve, got {wants}; build "
                "student and trainer again with these terms, then kd.build_cache(trainer, another_folder)"
            )
        self.cache.look()
        if missing := self.cache.missing:
            raise ValueError(
                f"{where}: expected all {self.cache.count:,} shards in {str(self.cache.folder)!r}, got "
                f"{len(missing):,} missing, shard {missing[0]} first; kd.build_cache(trainer) makes them again"
            )

    def read_ahead(self, batch: DistillBatch) -> None:
        """Read what :meth:`signal` will be asked about a batch; by the thread that fetches batches ahead.

        What goes wrong is raised where it is asked. What was read is kept for as long as the batch itself.
        """
        try:
            found = self._read(batch)
        except Exception as error:
            found = error.with_traceback(None)  # which holds the batch
        self._read_ahead[id(batch)] = found
        weakref.finalize(batch, self._read_ahead.pop, id(batch), None).atexit = False

    def signal(self, batch: DistillBatch, here: DistillBatch | None = None) -> TeacherSignal:
        """As :meth:`LiveTeacher.signal`.

        Raises:
            ValueError: a shard that is not there, or cannot be read.
        """
        if id(here) in self._read_ahead:
            read = self._read_ahead[id(here)]
        else:
            read = self._read(batch.to("cpu") if here is None else here)
        if isinstance(read, Exception):
            raise read
        if read is None:
            return super().signal(batch, here)
        return widened(read.to(batch.student_ids.device, non_blocking=True))

    def _read(self, here: DistillBatch) -> TeacherSignal | None:
        """What the cache holds about a batch, on the host; None where it is about other text."""
        if not self._is_ours(here):
            return None
        windows, kinds, counts = here.sample.tolist(), kinds_of_rows(self.needs), counts_of(here)
        if any(self.cache.counts(kind, windows) != counts[kind].tolist() for kind in set(kinds.values())):
            return None  # held-out text that repeats a window of the training text, scored in part
        pinned = torch.cuda.is_available()  # as the batches themselves are
        signal = join(lambda name: self.cache.fetch(name, kinds[name], windows, pinned=pinned), here, self.needs)
        # what goes to a card goes there as small as it is stored; what is pinned already stays where it is
        return signal.pin_memory() if pinned else widened(signal)

    def _is_ours(self, batch: DistillBatch) -> bool:
        """On the host: whether these are windows of the training text, and not of another with the same numbers."""
        samples = batch.sample.tolist()
        if max(samples) >= len(self.windows):
            return False
        both = [self.windows.ids(sample) for sample in samples]
        return all(
            torch.equal(given[row, : len(ids[side])], torch.from_numpy(ids[side]))
            for side, given in enumerate((batch.student_ids, batch.teacher_ids))
            for row, ids in enumerate(both)
        )


def lacks(held: Mapping[str, Any], needs: Needs) -> list[str]:
    """What of ``needs`` a cache does not hold, in words.

    Args:
        held: what it was made of, see :func:`kd_kit.caching.content`.
    """
    out = [f"the reading {r.key!r}" for r in needs.readings if r.key not in held["readings"]]
    out += ["final states"] if needs.row_states and not held["row_states"] else []
    out += ["span likelihoods"] if needs.span_log_probs and not held["span_log_probs"] else []
    out += [f"hidden states of layer {n}" for n in sorted(needs.teacher_states) if n not in held["states"]]
    out += [f"routing of layer {n}" for n in sorted(needs.routing) if n not in held["routing"]]
    if needs.routing and needs.routing_scores != held["routing_scores"]:
        out.append(f"routing scores {needs.routing_scores!r}")
    return out + [f"attention of layer {n}" for n in sorted(needs.teacher_attention)]


def unserved(held: Mapping[str, Any], terms: Sequence[LossTerm]) -> str:
    """Which terms want what a cache does not hold, and what; empty if none does."""
    scores = next((t.needs.routing_scores for t in terms if t.needs.routing_scores), None)  # one for all, see Needs
    wants = ((term.name, lacks(held, replace(term.needs, routing_scores=scores))) for term in terms)
    return "; ".join(f"{name}, which wants {', '.join(what)}" for name, what in wants if what)
