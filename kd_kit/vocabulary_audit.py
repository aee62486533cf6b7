"""Do these two tokenizers meet often enough, on your own text, for one model to teach the other?"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field

import torch

from kd_kit.data import DistillData
from kd_kit.head import alone_with, body_of, head_of
from kd_kit.pair import TokenizerPair
from kd_kit.reduce import chunks
from kd_kit.routing import NoExperts, RoutingTap, count_chosen, find_routing, of_layer, routing_balance
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
        whitespace: share of positions left out because the two cut a run of white space differently.
        shared_tokens: teacher tokens that are, byte for byte, student tokens. homeless_tokens: without any home.
        homeless_specials: those of them that are special tokens, which map by meaning and not by bytes.
        kinship: "same", "extends" or "different", see :attr:`kd_kit.pair.TokenizerPair.kinship`.
        padded_rows: rows of the teacher's head behind its tokenizer's last entry, None without a teacher.
        shared_mass: the teacher's probability on tokens that the student has byte for byte, None without a teacher.
        homed_mass: the teacher's probability that has a home in the student's vocabulary, None without a teacher.
        kept_mass: {K: mass in the K largest cells}, None without a teacher.
        experts: of a mixture teacher, {layer: (load entropy over ln X, experts never chosen, largest share)} on this
            text, per layer and never pooled; empty for a dense one.
        experts_note: why they could not be read, or what the count leaves out.
    """

    positions: int
    aligned: float
    same_next: float
    bridged_next: float
    taught: float
    inside_next: float
    whitespace: float
    shared_tokens: int
    homeless_tokens: int
    homeless_specials: int
    kinship: str
    padded_rows: int | None = None
    shared_mass: float | None = None
    homed_mass: float | None = None
    kept_mass: dict[int, float] | None = None
    experts: dict[int, tuple[float, int, float]] = field(default_factory=dict)
    experts_note: str = ""

    @property
    def reach(self) -> float:
        """Share of all positions at which the bridge carries the teacher's own next token to the student's."""
        return self.aligned * self.bridged_next + (self.taught - self.aligned) * self.inside_next

    @property
    def method(self) -> str:
        """The way across the vocabularies that suits them, for ``kd_term(method=...)``."""
        if self.kinship != "different" and self.aligned > 0.999 and self.same_next > 0.999:
            return "same"
        if self.reach < 0.6 and self.aligned >= 0.2:
            return "projector"
        return "bridge"

    @property
    def recommendation(self) -> str:
        """Which way across the vocabularies, and why, in words."""
        strict = self.aligned * self.same_next
        if self.method == "same":
            return (
                'kd_term(method="same"): the ids of both tokenizers mean the same, and they cut '
                f"{self.same_next:.1%} of this text alike, so nothing needs to be carried across."
            )
        heard = (
            f"the teacher can be heard at {self.taught:.0%} of the student's positions ({self.aligned:.0%} where both "
            f"stand at the same byte, the rest inside teacher tokens), and its own next token, carried over the "
            f"byte-prefix bridge, is the student's at {self.reach:.0%} of all positions"
        )
        if self.method == "bridge" and self.reach >= 0.6:
            return f'kd_term(): {heard}; exact token matches alone (method="strict") would be heard at {strict:.0%}.'
        if self.method == "projector":
            return (
                f'kd_term(method="projector"): both stand at the same byte at {self.aligned:.0%} of the positions, but '
                f"the byte-prefix bridge gives the student's next token at only {self.reach:.0%}, so a learned map "
                "from the teacher's states may carry more than its tokens do. Compare it with kd_term() on held-out "
                "text."
            )
        return (
            f"kd_term() with a doubtful outlook: {heard}. "
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
            ("left out: white space cut differently", f"{self.whitespace:.1%}"),
            ("ids of the two tokenizers", self.kinship),
            ("teacher tokens that the student has too", f"{self.shared_tokens:,}"),
            ("teacher tokens without a home", f"{self.homeless_tokens:,}"),
            ("  of these: special tokens", f"{self.homeless_specials:,}"),
        ]
        if self.padded_rows is not None:
            lines.append(("padded rows of the teacher's head, cut off", f"{self.padded_rows:,}"))
        if self.shared_mass is not None:
            lines.append(("teacher's mass on tokens that the student has", f"{self.shared_mass:.1%}"))
        if self.homed_mass is not None:
            lines.append(("teacher's mass with a home", f"{self.homed_mass:.2%}"))
        for k, mass in (self.kept_mass or {}).items():
            lines.append((f"  of it in the {k} largest cells", f"{mass:.1%}"))
        for layer, (entropy, dead, largest) in self.experts.items():
            figures = f"{entropy:.2f} even, {dead} unused, largest {largest:.0%}"
            lines.append((f"load of the teacher's experts, layer {layer}", figures))
        if self.experts_note and not self.experts:
            lines.append(("load of the teacher's experts", "not read"))
        return lines

    @property
    def table(self) -> Table:
        """The figures as a table, with the recommendation below."""
        note = "\n".join(line for line in (self.experts_note, f"-> {self.recommendation}") if line)
        return Table("", ("measured on this text", ""), tuple(self._lines()), note, _WORDS)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict:
        return asdict(self) | {"method": self.method, "recommendation": self.recommendation}


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
    identical = torch.from_numpy(tokenizers.identical) >= 0
    positions = aligned = same = bridged = taught = inside = whitespace = 0
    homed = shared = 0.0
    routers = _Routers(teacher)
    ks = [k for k in (8, 16, 32, 64, 128) if k <= bridge.student_size]
    kept = torch.zeros(len(ks), dtype=torch.float64)
    for batch in data.train.in_order(data.batch_size, _WINDOWS):
        rows = batch.aligned_rows
        positions += len(batch.rows)
        aligned += len(rows)
        whitespace += int(batch.whitespace.sum())
        at = _teacher_places(batch, rows)
        ours = batch.targets.flatten()[rows]
        theirs = batch.teacher_targets.flatten()[at]
        known = theirs != IGNORE
        ours, theirs = ours[known], theirs[known]
        bridged += int((table[theirs] == ours).sum())
        same += len(batch.same_rows)
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
            for home, both, largest in _masses(teacher, batch, at, bridge, identical, ks[-1], routers):
                homed += float(home.sum())
                shared += float(both.sum())
                kept += largest.cumsum(-1)[:, [k - 1 for k in ks]].double().sum(0).cpu()
    return Audit(
        positions=positions,
        aligned=aligned / positions,
        same_next=same / max(aligned, 1),
        bridged_next=bridged / max(aligned, 1),
        taught=taught / positions,
        inside_next=inside / max(taught - aligned, 1),
        whitespace=whitespace / positions,
        shared_tokens=bridge.shared,
        homeless_tokens=int((table == bridge.student_size).sum()),
        homeless_specials=sum(int(table[t]) == bridge.student_size for t in tokenizers.teacher_vocab.special),
        kinship=tokenizers.kinship,
        padded_rows=None if teacher is None else head_of(teacher).weight.shape[0] - bridge.teacher_size,
        shared_mass=None if teacher is None else shared / max(aligned, 1),
        homed_mass=None if teacher is None else homed / max(aligned, 1),
        kept_mass=None if teacher is None else dict(zip(ks, (kept / max(aligned, 1)).tolist(), strict=True)),
        experts=routers.load,
        experts_note=routers.note,
    )


def _teacher_places(batch, rows: torch.Tensor) -> torch.Tensor:
    """Flat teacher positions at or before flat student positions."""
    window = rows // batch.student_ids.shape[1]
    return window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[rows]


class _Routers:
    """Counts which experts a mixture teacher chooses while the audit has it read the text."""

    def __init__(self, teacher):
        self.tap, self.note, self.counts = None, "", {}
        if teacher is None:
            return
        try:
            self.routing = find_routing(teacher)
            self.tap = RoutingTap(teacher)
            if any("correction_bias" in name for name, _ in [*teacher.named_buffers(), *teacher.named_parameters()]):
                self.note = "experts are counted by their scores alone; this family also steers the choice by a bias"
        except NoExperts:
            return
        except ValueError as error:
            self.note = str(error)

    def count(self, mask: torch.Tensor) -> None:
        """After a forward pass; ``mask`` [B, S] says which positions are text."""
        for layer, probs in self.tap.probabilities.items():
            chosen = count_chosen(probs, of_layer(self.routing.active, self.routing, layer), mask).cpu()
            self.counts[layer] = self.counts.get(layer, 0) + chosen

    @property
    def load(self) -> dict[int, tuple[float, int, float]]:
        found = {}
        for layer, counts in self.counts.items():
            load = routing_balance(counts.unsqueeze(0), [layer])
            found[layer] = (float(load.entropy[0]), int(load.dead[0]), float(load.largest[0]))
        return found


@torch.no_grad()
def _masses(teacher, batch, at: torch.Tensor, bridge, identical: torch.Tensor, k: int, routers: _Routers):
    """Of the teacher at flat positions ``at``, chunk by chunk: mass with a home [n], mass on tokens that are
    ``identical`` in both vocabularies [n], and the K largest cells [n, K].
    """
    device = next(teacher.parameters()).device
    with alone_with(teacher), routers.tap or contextlib.nullcontext():
        hidden = body_of(teacher)(input_ids=batch.teacher_ids.to(device), use_cache=False).last_hidden_state
    if routers.tap is not None:
        routers.count(batch.teacher_targets.to(device) != IGNORE)
    rows = hidden.flatten(0, 1)[at.to(device)]
    head = head_of(teacher).cut(bridge.teacher_size)
    for chunk in chunks(len(rows), head.chunk_rows()):
        theirs = torch.softmax(head.logits(rows[chunk]), dim=-1)
        probs = bridge.project(theirs)
        yield 1 - probs[:, -1], theirs[:, identical.to(device)].sum(-1), probs[:, :-1].topk(k, dim=-1).values
