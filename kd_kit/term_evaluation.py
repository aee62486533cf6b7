"""Every loss term on held-out text, weighted as the step that comes next weighs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kd_kit.history import verdict
from kd_kit.likelihood import evaluating
from kd_kit.table import Table, short


@dataclass(frozen=True)
class TermScores:
    """What :func:`evaluate_terms` found.

    Attributes:
        values: {term: its mean on held-out text}, None where that had no position for it.
        trained: {term: its mean over the last training records}, likewise.
        shares: {term: share of the total}, those of the run's next step.
        ranges: {term: unit and ranges}, as in the history.
        step, windows: optimizer steps done; held-out windows looked at.
    """

    values: Mapping[str, float | None]
    trained: Mapping[str, float | None]
    shares: Mapping[str, float]
    ranges: Mapping[str, Mapping]
    step: int
    windows: int

    @property
    def total(self) -> float:
        """Shares times values, added up: comparable with the total of a training step."""
        return sum(self.shares[name] * value for name, value in self.values.items() if value is not None)

    @property
    def table(self) -> Table:
        rows = []
        for name, value in self.values.items():
            meta = self.ranges[name]
            part = None if value is None else self.shares[name] * value
            band = "{:g} - {:g}".format(*meta["healthy"])
            trained, share = short(self.trained[name]), f"{self.shares[name]:.3f}"
            rows.append((name, short(value), trained, meta["unit"], band, verdict(meta, value), share, short(part)))
        rows.append(("total", "", "", "", "", "", "", short(self.total)))
        columns = ("term", "held out", "trained on", "unit", "healthy", "verdict", "share", "contribution")
        title = f"step {self.step:,}, {self.windows:,} held-out windows, weighted as the next step is"
        return Table(title, columns, tuple(rows), words=("term", "unit", "verdict"))

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def evaluate_terms(trainer, *, limit: int | None = 64) -> TermScores:
    """Every term of a run on held-out text, beside its values in training.

    The weights are those of :meth:`kd_kit.trainer.Trainer.shares_at`, the function that the training step itself asks:
    a total that is worse here than in training is the text's doing, never that of other weights. A term whose value
    depends on which windows share a batch sees held-out batches of the run's own size.

    Args:
        limit: held-out windows, spread evenly; None for all.

    Raises:
        ValueError: a limit below 1, or a run that trains in the background.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate_terms: expected a limit of at least 1 window, got {limit}")
    trainer.resume()
    trainer.settle()
    module, names = trainer.module, [t.name for t in trainer.terms]
    sums, counts, windows = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), 0
    asked = trainer.teacher is not None and module.needs.teacher
    with evaluating(module), trainer.accelerator.autocast():
        for batch in trainer.data.held_out.in_order(trainer.data.batch_size, limit):
            windows += len(batch.student_ids)
            each = {t.name: t.count(batch) for t in trainer.terms}
            batch = batch.to(trainer.session.device)
            found = module.values(module.output(batch), trainer.teacher.signal(batch) if asked else None, batch)
            values = torch.stack([found[name].sum.float() for name in names]).tolist()
            for name, value in zip(names, values, strict=True):
                sums[name] += value
                counts[name] += each[name]
    recent = [r["terms"] for r in trainer.history.records if r["kind"] == "train"][-20:]
    trained = {}
    for name in names:
        known = [r[name] for r in recent if name in r and r[name]["value"] is not None]
        count = sum(r["count"] for r in known)
        trained[name] = sum(r["value"] * r["count"] for r in known) / count if count else None
    return TermScores(
        {name: sums[name] / counts[name] if counts[name] else None for name in names},
        trained,
        trainer.shares_at(trainer.step),
        {t.name: t.meta for t in trainer.terms},
        trainer.step,
        windows,
    )
