"""What the steps of a run measured: kept on the device, moved to the host in one transfer, and judged in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_kit.history import History
from kd_kit.terms import LossTerm


class StepLog:
    """Collects measurements without waiting for the device, and turns them into records of a history.

    Args:
        history: where records and alarms go. terms: in the order of the sums.
    """

    def __init__(self, history: History, terms: Sequence[LossTerm]):
        self.history = history
        self.terms = tuple(terms)
        self._waiting: list[tuple[dict, dict, Tensor]] = []
        self._said: set[str] = set()

    def add(
        self,
        record: dict,
        *,
        shares: Mapping[str, float],
        counts: Sequence[int],
        sums: Tensor,
        norm: Tensor,
        extras: Mapping[str, Tensor],
        tail: Tensor | None,
        tail_rows: int,
        skipping: bool,
    ) -> None:
        """Take one optimizer step.

        Args:
            record: what the host knows already. shares, counts: of the terms.
            sums: [terms]. norm: of the student's gradient. extras: {"term.name": sums over the term's positions}.
            tail: the teacher's mass without a cell, summed over ``tail_rows`` positions; None without cells.
            skipping: a norm that is not finite means a skipped step (and not that a scaler looks for its scale).
        """
        known = {
            "shares": shares,
            "counts": dict(zip((t.name for t in self.terms), counts, strict=True)),
            "extras": {name: value.shape for name, value in extras.items()},
            "tail_rows": tail_rows if tail is not None else 0,
            "skipping": skipping,
        }
        both = torch.stack([norm.float().to(sums.device), sums.new_zeros(()) if tail is None else tail])
        self._waiting.append((record, known, torch.cat([sums, both, *(v.flatten() for v in extras.values())])))

    def flush(self) -> bool:
        """Write what has been collected. Returns whether there was anything."""
        if not self._waiting:
            return False
        lengths = [len(values) for *_, values in self._waiting]
        rows = torch.cat([values for *_, values in self._waiting]).cpu().split(lengths)
        broken: dict[str, list[int]] = {}
        seen = set()
        for (record, known, _), row in zip(self._waiting, rows, strict=True):
            sums, both, rest = row.split([len(self.terms), 2, len(row) - len(self.terms) - 2])
            norm, tail = both.tolist()
            terms = self._terms(known, sums.tolist(), rest)
            record["terms"] = terms
            record["total"] = sum(t["contribution"] for t in terms.values() if t["contribution"] is not None)
            record["grad_norm"] = norm
            record["tail_mass"] = tail / known["tail_rows"] if known["tail_rows"] else None
            self.history.append(record)
            seen |= {name for name, term in terms.items() if term["count"]}
            names = [n for n, t in terms.items() if t["value"] is not None and not math.isfinite(t["value"])]
            if not names and known["skipping"] and not math.isfinite(norm):
                names = ["the gradient"]
            for name in names:
                broken.setdefault(name, []).append(record["step"])
        self._waiting.clear()
        for term in self.terms:
            if term.name not in seen and term.weight > 0:
                self._say_once(f"{term.name} had nothing to look at: {term.empty}")
        self._watch_experts()
        for name, steps in broken.items():
            self._say(f"{name} was not finite at {len(steps)} steps from {steps[0]:,} on; they were skipped", steps[-1])
        return True

    def _terms(self, known: dict, sums: list[float], rest: Tensor) -> dict:
        """The record of every term: mean, weight, contribution, count, and what else it measured."""
        terms = {}
        for term, value in zip(self.terms, sums, strict=True):
            count, share = known["counts"][term.name], known["shares"][term.name]
            mean = value / count if count else None
            part = None if mean is None else share * mean
            terms[term.name] = {"value": mean, "weight": share, "contribution": part, "count": count}
        for name, shape in known["extras"].items():
            term, what = name.rsplit(".", 1)  # a term may be named with dots
            found, rest = rest[: shape.numel()], rest[shape.numel() :]
            mean = found.reshape(shape) / max(terms[term]["count"], 1)
            terms[term].setdefault("extras", {})[what] = mean.tolist()
        return terms

    def _watch_experts(self) -> None:
        """An alarm for every gate that sends all spans to the same few experts."""
        for name, term in self.history.last("train")["terms"].items():
            loads = term.get("extras", {}).get("load", []) if term["count"] else []
            for layer, load in enumerate(loads, start=1):
                if max(load) > 0.8 or min(load) < 0.2 / len(load):
                    shown = ", ".join(f"{share:.0%}" for share in load)
                    self._say_once(
                        f"{name}: the knowledge router of its pair {layer} has collapsed or lost an expert; raise "
                        "balance= or lower experts=",
                        f" (shares {shown})",
                    )

    def _say_once(self, text: str, figures: str = "") -> None:
        """An alarm that holds from now on, the first time that it is seen."""
        if text not in self._said:
            self._said.add(text)
            self._say(text + figures, self.history.last("train")["step"])

    def _say(self, text: str, step: int) -> None:
        self.history.append({"kind": "event", "step": step, "what": "alarm", "text": text})
