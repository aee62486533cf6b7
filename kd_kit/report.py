"""What an evaluation found: one table, one figure, and what they say in words."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from kd_kit.drawing import figure_png
from kd_kit.report_plot import report_figure
from kd_kit.table import Table, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, float | None]
"""The figures of one model, see :class:`Report`."""


@dataclass(frozen=True)
class Report:
    """The result of a run as one table and one figure; a notebook shows both.

    Rows: the student before, the LM-only control, distilled, the teacher. Every figure of a row:

    - ``bits_per_byte``: of the held-out text; comparable across tokenizers, lower is better.
    - ``perplexity_per_word``: the same likelihood per word of the text, counted by white space; comparable likewise.
    - ``perplexity``: per token of the model's own tokenizer, comparable with nothing else; not in the table.
    - ``top1``, ``top5``, ``kl``: agreement with the teacher, see :class:`kd_kit.evaluation.Agreement`.
    - ``ece``: expected calibration error over 15 bins of the first choice's probability, in the model's own tokens.
    - ``parameters``, ``megabytes``: what it holds, as it is in memory; tied weights count once.
    - ``tokens_per_second``: its own tokens, read in evaluation on this machine.

    Attributes:
        rows: {name: {figure: number}}; None where it has no meaning.
        bytes, words: held-out text that every likelihood runs over. step: optimizer steps of the distilled student.
        control_step: of the control, None without one. It may differ where one of the two was stopped early.
        machine: what the speeds were measured on.
        reliability: {name: [[confidence, share right, positions], ...]}, a bin each, see
            :class:`kd_kit.calibration.Calibration`.
    """

    rows: dict[str, Row]
    bytes: int
    step: int
    control_step: int | None = None
    words: int | None = None
    machine: str = ""
    reliability: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def gain(self) -> float | None:
        """Bits per byte that distillation saves against the LM-only control; None without control."""
        if "LM-only control" not in self.rows:
            return None
        return self.rows["LM-only control"]["bits_per_byte"] - self.rows["distilled"]["bits_per_byte"]

    @property
    def retention(self) -> float | None:
        """Share of the gap between the student before and the teacher that is closed, in bits per byte.

        None where the student before is not known.
        """
        if "before" not in self.rows:
            return None
        before, now, best = (self.rows[n]["bits_per_byte"] for n in ("before", "distilled", "teacher"))
        return (before - now) / (before - best) if before != best else float("nan")

    def sentences(self) -> list[str]:
        """What the table says, in words."""
        out = []
        best = self.rows["teacher"]["bits_per_byte"]
        before = self.rows["before"]["bits_per_byte"] if "before" in self.rows else None
        if before is not None and best < before:
            out.append(
                f"After {self.step:,} steps the student closed {self.retention:.0%} of the gap to its teacher "
                f"in bits per byte on {self.bytes:,} held-out bytes."
            )
        if self.bytes < 10_000:
            out.append(f"{self.bytes:,} held-out bytes are few: these figures mean little, hold out more text.")
        if self.gain is not None:
            word = "below" if self.gain > 0 else "above"
            tokens = "on the same tokens"
            if self.control_step != self.step:
                tokens = f"for {self.control_step or 0:,} steps: these are not the same tokens, so finish both first"
            out.append(
                f"It lies {abs(self.gain):.3f} bits per byte {word} the same student trained without a teacher "
                f"{tokens}."
            )
        if before is not None and best >= before:
            out.append("The teacher is no better than the student was on this text: it has nothing to teach here.")
        return out

    _COLUMNS = (
        ("bits_per_byte", "bits per byte", "{:.4f}".format),
        ("perplexity_per_word", "perplexity per word", short),
        ("top1", "same first choice", "{:.1%}".format),
        ("top5", "top-5 overlap", "{:.1%}".format),
        ("kl", "KL from teacher (nats)", "{:.3f}".format),
        ("ece", "ECE", "{:.3f}".format),
        ("parameters", "parameters", "{:,.0f}".format),
        ("megabytes", "MB", "{:,.1f}".format),
        ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    )

    @property
    def table(self) -> Table:
        """The rows as a table, with what they say in words below. A figure that no row holds has no column."""
        kept = [c for c in self._COLUMNS if any(c[0] in row for row in self.rows.values())]
        rows = tuple(
            (name, *("-" if row.get(key) is None else written(row[key]) for key, _, written in kept))
            for name, row in self.rows.items()
        )
        note = "\n".join([*self.sentences(), *self._how()])
        return Table("", ("", *(title for _, title, _ in kept)), rows, note=note, words=("",))

    def _how(self) -> list[str]:
        """How the columns were measured, where a name does not say it."""
        out = []
        if self.words is not None:
            out.append(f"Perplexity per word: over {self.words:,} words of that text, counted by white space.")
        if self.reliability:
            out.append(
                "ECE: how far the first choice's probability is from how often it is right, own tokens, 15 bins."
            )
        if self.machine:
            out.append(f"tokens/s: own tokens read in evaluation on {self.machine}.")
        return out

    def figure(self) -> Figure:
        """The same as a picture: bits per byte, agreement with the teacher, and the reliability diagram."""
        return report_figure(self.rows, self.reliability)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        image = base64.b64encode(figure_png(self.figure())).decode("ascii")
        picture = f'<img alt="bits per byte, agreement, reliability" src="data:image/png;base64,{image}" width="1000">'
        return f"<div>{self.table._repr_html_()}{picture}</div>"

    def to_json(self) -> str:
        """As JSON; a figure that is not finite is spelled as text, for which JSON has no number."""
        plain = {**asdict(self), "gain": self.gain, "retention": self.retention}

        def spelled(value):
            if isinstance(value, dict):
                return {name: spelled(v) for name, v in value.items()}
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps(spelled(plain), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What :meth:`to_json` wrote, as ``report.json`` of a run's folder holds it."""
        stored = json.loads(text)
        rows = {
            name: {key: float(value) if isinstance(value, str) else value for key, value in row.items()}
            for name, row in stored["rows"].items()
        }
        names = [f.name for f in fields(cls) if f.name in stored and f.name != "rows"]
        return cls(rows, **{name: stored[name] for name in names})
