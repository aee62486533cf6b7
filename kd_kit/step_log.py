"""What the steps of a run measured: kept on the device, moved to the host in one transfer, and put into records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_kit.alarms import Watch
from kd_kit.gradients import pulls
from kd_kit.history import History, verdict
from kd_kit.terms import LossTerm
from kd_kit.train_step import StepResult


class StepLog:
    """Collects measurements without waiting for the device, and turns them into records of a history.

    Args:
        history: where records and alarms go. terms: in the order of the sums.
        meeting_point: where gradients are compared, in words. grace: see :class:`kd_kit.alarms.Watch`.
    """

    def __init__(self, history: History, terms: Sequence[LossTerm], *, meeting_point: str = "", grace: int = 0):
        self.history = history
        self.terms = tuple(terms)
        self.meeting_point = meeting_point
        self.watch = Watch(history, self.terms, grace)
        self._waiting: list[tuple[dict, dict, Tensor]] = []

    def use(self, terms: Sequence[LossTerm]) -> None:
        """The same terms with other weights from now on."""
        self.terms = tuple(terms)
        self.watch.use(terms)

    def add(self, record: dict, done: StepResult, shares: Mapping[str, float]) -> None:
        """Take one optimizer step.

        Args:
            record: what the host knows already. done: what the step measured. shares: of the terms.
        """
        known = {
            "shares": shares,
            "counts": dict(zip((t.name for t in self.terms), done.counts, strict=True)),
            "extras": {name: value.shape for name, value in done.extras.items()},
            "tail_rows": done.tail_rows if done.tail is not None else 0,
            "scaled": done.loss_scale is not None,
            "gradient_counts": None if done.gradients is None else done.gradient_counts,
        }
        none = done.sums.new_zeros(())
        few = [done.norm, *(none if t is None else t for t in (done.tail, done.loss_scale))]
        tensors = [done.sums, torch.stack([t.float().to(none.device) for t in few])]
        tensors += [] if done.gradients is None else [done.gradients.flatten()]
        self._waiting.append((record, known, torch.cat([*tensors, *(v.flatten() for v in done.extras.values())])))

    def flush(self) -> list[dict]:
        """Write what has been collected. Returns the new records."""
        if not self._waiting:
            return []
        lengths = [len(values) for *_, values in self._waiting]
        rows = torch.cat([values for *_, values in self._waiting]).cpu().split(lengths)
        records = []
        for (record, known, _), row in zip(self._waiting, rows, strict=True):
            count = len(self.terms)
            sums, few, rest = row[:count].tolist(), row[count : count + 3].tolist(), row[count + 3 :]
            compared = None
            if known["gradient_counts"] is not None:
                compared, rest = rest[: count * count].view(count, count).tolist(), rest[count * count :]
            terms = self._terms(known, sums, rest)
            record["terms"] = terms
            record["total"] = sum(t["contribution"] for t in terms.values() if t["contribution"] is not None)
            record["grad_norm"] = few[0]
            record["tail_mass"] = few[1] / known["tail_rows"] if known["tail_rows"] else None
            record["loss_scale"] = few[2] if known["scaled"] else None
            if compared is not None:
                record["gradients"] = self._gradients(known, compared, terms)
            self.history.append(record)
            records.append(record)
        self._waiting.clear()
        self.watch.look(records)
        return records

    def _terms(self, known: dict, sums: list[float], rest: Tensor) -> dict:
        """The record of every term: mean, verdict, weight, contribution, share, count, and what else it measured."""
        terms = {}
        for term, value in zip(self.terms, sums, strict=True):
            count, weight = known["counts"][term.name], known["shares"][term.name]
            mean = value / count if count else None
            part = None if mean is None else weight * mean
            terms[term.name] = {
                "value": mean,
                "verdict": verdict(term.meta, mean),
                "weight": weight,
                "contribution": part,
                "count": count,
            }
        parts = [t["contribution"] for t in terms.values()]
        whole = sum(abs(part) for part in parts if part is not None and math.isfinite(part))
        for term, part in zip(terms.values(), parts, strict=True):
            known_share = part is not None and math.isfinite(part) and whole > 0
            term["share"] = part / whole if known_share else None
        for name, shape in known["extras"].items():
            term, what = name.rsplit(".", 1)  # a term may be named with dots
            found, rest = rest[: shape.numel()], rest[shape.numel() :]
            mean = found.reshape(shape) / max(terms[term]["count"], 1)
            terms[term].setdefault("extras", {})[what] = mean.tolist()
        return terms

    def _gradients(self, known: dict, products: list[list[float]], terms: dict) -> dict:
        """Put each term's part of the gradient into its record; returns what is about all of them."""
        found = pulls(products, known["gradient_counts"], [known["shares"][t.name] for t in self.terms])
        names = [t.name for t in self.terms]
        for i, name in enumerate(names):
            cosine = found.cosines[names.index("lm")][i] if "lm" in names and name != "lm" else None
            terms[name] |= {"grad_norm": found.norms[i], "grad_share": found.shares[i], "cosine": cosine}
        return {"at": self.meeting_point, "terms": names, "cosines": found.cosines}
