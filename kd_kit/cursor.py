"""Where a run stands in its text, and which batches it leaves out: all that a resumed run must know of its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """A place in the endless row of batches 0, 1, 2, ... of :meth:`kd_kit.data.DistillData.batches`.

    Attributes:
        position: of the next batch.
        left_out: ranges (first, behind the last) that are passed over, in order; they gave no finite gradient.
    """

    position: int = 0
    left_out: tuple[tuple[int, int], ...] = ()

    def upcoming(self, count: int) -> Iterator[int]:
        """The next ``count`` positions."""
        position = self.position
        for _ in range(count):
            for first, behind in self.left_out:
                if first <= position < behind:
                    position = behind
            yield position
            position += 1

    def behind(self, position: int) -> Cursor:
        """Moved behind this position."""
        return Cursor(position + 1, self.left_out)

    def without(self, first: int, behind: int) -> Cursor:
        """The same place, with one range more to leave out."""
        ranges: list[tuple[int, int]] = []
        for start, stop in sorted([*self.left_out, (first, behind)]):
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
            else:
                ranges.append((start, stop))
        return Cursor(self.position, tuple(ranges))

    def to_json(self) -> dict:
        return {"position": self.position, "left_out": [list(r) for r in self.left_out]}

    @classmethod
    def from_json(cls, stored: dict) -> Cursor:
        return cls(stored["position"], tuple((first, behind) for first, behind in stored["left_out"]))
