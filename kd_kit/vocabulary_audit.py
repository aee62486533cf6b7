"""Do these two tokenizers meet often enough, on your own text, for one model to teach the other?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from kd_kit.data import DistillData
from kd_kit.head import body_of, head_of
from kd_kit.pair import TokenizerPair
from kd_kit.reduce import chunks
from kd_kit.table import Table
from kd_kit.types import IGNORE

_WORDS = ("measured on this text",)  # the column of the table that is not numbers
_WINDOWS = 64
"""Windows that are looked at, spread evenly over the text: shares are then right to about a percent."""


@dataclass(frozen=True)
class Audit:
    """How the two vocabularies cover each other on the text of a run. Shares are of student positions or of mass.

    Attributes:
        positions: student positions looked at. aligned: share of them where the teacher stands at the same byte.
        same_next: share of the aligned ones whose next token is byte-identical on both sides.
        bridged_next: share of the aligned ones where the bridge sends the teacher's next token to the student's.
        taught: share of positions at which the teacher can be heard at all: aligned, or inside one of its tokens.
        inside_next: share of those inside where the rest of the teacher's token begins with the student's next one.
        shared_tokens: teacher tokens that are, byte for byte, student tokens. homeless_tokens: without any home.
        padded_rows: rows of the teacher's head behind its tokenizer's last entry, None without a teacher.
        homed_mass: the teacher's probability that has a home in the student's vocabulary, None without a teacher.
        kept_mass: {K: mass in the K largest cells}, None without a teacher.
    """

    positions: int
    aligned: float
    same_next: float
    bridged_next: float
    taught: float
    inside_next: float
    shared_tokens: int
    homeless_tokens: int
    padded_rows: int | None = None
    homed_mass: float | None = None
    kept_mass: dict[int, float] | None = None

    @property
    def recommendation(self) -> str:
        """Which way across the vocabularies, and why, in words."""
        reach = self.aligned * self.bridged_next + (self.taught - self.aligned) * self.inside_next
        figures = (
            f"the teacher can be heard at {self.taught:.0%} of the student's positions ({self.aligned:.0%} where both "
            f"stand at the same byte, the rest inside teacher tokens), and its own next token, carried over the "
            f"byte-prefix bridge, is the student's at {reach:.0%} of all positions"
        )
        if self.aligned > 0.999 and self.same_next > 0.999:
            return f"kd_term(): both tokenizers cut this text alike, so the bridge is the identity ({figures})."
        if reach >= 0.6:
            return f"kd_term(): {figures}."
        return (
            f"kd_term() with a doubtful outlook: {figures}. "
            "Look at the text (is it the language of both tokenizers?), or choose a teacher with a closer tokenizer."
        )

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("positions looked at", f"{self.positions:,}"),
            ("aligned: both stand at one byte", f"{self.aligned:.1%}"),
            ("  of these: same next token", f"{self.same_next:.1%}"),
            ("  of these: bridge gives the student's next token", f"{self.bridged_next:.1%}"),
            ("inside a teacher token, and taught", f"{self.taught - self.aligned:.1%}"),
            ("  of these: bridge gives the student's next token", f"{self.inside_next:.1%}"),
            ("teacher tokens that the student has too", f"{self.shared_tokens:,}"),
            ("teacher tokens without a home", f"{self.homeless_tokens:,}"),
        ]
        if self.padded_rows is not None:
            lines.append(("padded rows of the teacher's head, cut off", f"{self.padded_rows:,}"))
        if self.homed_mass is not None:
            lines.append(("teacher's mass with a home", f"{self.homed_mass:.2%}"))
        for k, mass in (self.kept_mass or {}).items():
            lines.append((f"  of it in the {k} largest cells", f"{mass:.1%}"))
        return lines

    @property
    def table(self) -> Table:
        """The figures as a table, with the recommendation below."""
        return Table("", ("measured on this text", ""), tuple(self._lines()), f"-> {self.recommendation}", _WORDS)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict:
        return asdict(self) | {"recommendation": self.recommendation}


def audit(tokenizers: TokenizerPair, data: DistillData, teacher=None) -> Audit:
    """Measure, on the training text, how far the byte-prefix bridge carries.

    Args:
        teacher: the model; with it the audit also weighs the vocabulary by what the teacher really predicts.

    Raises:
        ValueError: the data was made with other tokenizers.
    """
    if data.pair is not tokenizers and data.pair.fingerprint != tokenizers.fingerprint:
        raise ValueError("audit: expected data made with these tokenizers, got data of another pair; build_data again")
    bridge = tokenizers.bridge
    table = bridge.table
    student_bytes, teacher_bytes = tokenizers.student_vocab.tokens, tokenizers.teacher_vocab.tokens
    positions = aligned = same = bridged = taught = inside = 0
    homed = 0.0
    ks = [k for k in (8, 16, 32, 64, 128) if k <= bridge.student_size]
    kept = torch.zeros(len(ks), dtype=torch.float64)
    for batch in data.train.in_order(data.batch_size, _WINDOWS):
        rows = batch.aligned_rows
        positions += len(batch.rows)
        aligned += len(rows)
        at = _teacher_places(batch, rows)
        ours = batch.targets.flatten()[rows]
        theirs = batch.teacher_targets.flatten()[at]
        known = theirs != IGNORE
        ours, theirs = ours[known], theirs[known]
        bridged += int((table[theirs] == ours).sum())
        same += sum(student_bytes[s] == teacher_bytes[t] for s, t in zip(ours.tolist(), theirs.tolist(), strict=True))
        taught += len(batch.taught_rows)
        within = batch.prefix[:, 0] > 0
        at_within = _teacher_places(batch, batch.taught_rows[within])
        ours = batch.targets.flatten()[batch.taught_rows[within]]
        theirs = batch.teacher_ids.flatten()[at_within + 1]
        homes = [
            int(bridge.homes(d)[t]) for d, t in zip(batch.prefix[within, 0].tolist(), theirs.tolist(), strict=True)
        ]
        inside += int((torch.tensor(homes, dtype=torch.int64) == ours).sum())
        if teacher is not None:
            for home, largest in _masses(teacher, batch, at, bridge, ks[-1]):
                homed += float(home.sum())
                kept += largest.cumsum(-1)[:, [k - 1 for k in ks]].double().sum(0).cpu()
    mass = None if teacher is None else homed / max(aligned, 1)
    return Audit(
        positions=positions,
        aligned=aligned / positions,
        same_next=same / max(aligned, 1),
        bridged_next=bridged / max(aligned, 1),
        taught=taught / positions,
        inside_next=inside / max(taught - aligned, 1),
        shared_tokens=bridge.shared,
        homeless_tokens=int((table == bridge.student_size).sum()),
        padded_rows=None if teacher is None else head_of(teacher).weight.shape[0] - bridge.teacher_size,
        homed_mass=mass,
        kept_mass=None if teacher is None else dict(zip(ks, (kept / max(aligned, 1)).tolist(), strict=True)),
    )


def _teacher_places(batch, rows: torch.Tensor) -> torch.Tensor:
    """Flat teacher positions at or before flat student positions."""
    window = rows // batch.student_ids.shape[1]
    return window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[rows]


@torch.no_grad()
def _masses(teacher, batch, at: torch.Tensor, bridge, k: int):
    """Of the teacher at flat positions ``at``, chunk by chunk: mass with a home [n], and the K largest cells [n, K]."""
    device = next(teacher.parameters()).device
    hidden = body_of(teacher)(input_ids=batch.teacher_ids.to(device), use_cache=False).last_hidden_state
    rows = hidden.flatten(0, 1)[at.to(device)]
    head = head_of(teacher).cut(bridge.teacher_size)
    for chunk in chunks(len(rows), head.chunk_rows()):
        probs = bridge.project(torch.softmax(head.logits(rows[chunk]), dim=-1))
        yield 1 - probs[:, -1], probs[:, :-1].topk(k, dim=-1).values
