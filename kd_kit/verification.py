"""Does all of it hold for *your* tokenizers and models? Checks of things that must be so, in seconds, before a run.

A perfect student is built where one exists, and every term must be at its floor with no gradient. What may not
matter, must not: how tokens are numbered, where spans are cut, what a batch is padded to and how it is split.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kit.data import DistillData, build_data
from kd_kit.inside import InsideBridge
from kd_kit.models import check_model
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.pair import TokenizerPair
from kd_kit.projectors import Projector
from kd_kit.table import Table, short
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, Setup, StudentOutput
from kd_kit.types import DistillBatch, TeacherSignal
from kd_kit.vocab import Vocabulary

_TEXTS = (
    "The tide had been out since noon, and nobody on the harbour wall expected it back before the evening bell. A boy "
    "counted the boats that lay on their sides in the mud; there were eleven, and one of them was his uncle's. He "
    "wondered, as he did every summer, how a thing so heavy could be asked to float again.",
    "The café's 1,234 words, we'll\tsee:\n\n  if x==1:\r\n    y = 'naïve' # 東京 ☕ end",
    "def mean(values):\n    total = 0.0\n    for x in values:\n        total += x\n    return total / len(values)\n",
    "In 1811 she paid twelve pounds for the cloth, and thought it dear; by 1815 it would have been twenty.",
    "Rain. Then more of it, for three days, until the lane had become a brook and the brook a river.",
)
_CLOSE = 1e-3  # of a term's own size: what float32 sums in another order may differ by
_STILL = 1e-3  # of the gradient that a disturbed student gets


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. ``ok`` says whether all of it holds.

    Attributes:
        rows: (check, term, found, allowed, held); found and allowed as text.
        notes: what could not be checked, and why.
    """

    rows: tuple[tuple[str, str, str, str, bool], ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(held for *_, held in self.rows)

    @property
    def table(self) -> Table:
        """One line per thing that must hold, with its worst term; every failure on a line of its own, first."""
        lines = [("FAILED", *texts) for *texts, held in self.rows if not held]
        held = [row for row in self.rows if row[-1]]
        for check in dict.fromkeys(row[0] for row in held):
            terms = [row[1] for row in held if row[0] == check]
            worst = max((row for row in held if row[0] == check), key=lambda row: _size(row[2]))
            of = worst[1] if len(terms) == 1 else f"{worst[1]}, of {len(terms)}"
            lines.append(("ok", check, of, worst[2], worst[3]))
        failed = len(self.rows) - len(held)
        note = f"-> {failed} of {len(self.rows)} checks failed" if failed else f"-> all {len(self.rows)} checks hold"
        columns = ("", "what must hold", "worst term", "found", "at most")
        words = ("what must hold", "worst term", "")
        return Table("", columns, tuple(lines), "\n".join([*self.notes, note]), words)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def _size(found: str) -> float:
    try:
        return abs(float(found))
    except ValueError:  # in words
        return 0.0


def verify(
    tokenizers: TokenizerPair,
    teacher,
    student,
    terms: Sequence[LossTerm],
    *,
    texts: Sequence[str] | None = None,
    window: int = 64,
) -> Verification:
    """Check terms, tokenizers and models against what must hold for them, on a few short texts.

    - The perfect student (the teacher itself, in float32, with its own tokenizer) puts every term at its floor, and no
      gradient reaches its states; also when every second span boundary is forgotten.
    - Numbering the student's tokens differently changes no value; neither does splitting a batch into single windows,
      which are padded otherwise. A contrastive term compares the spans of a batch, so it is left out of the latter.
    - No gradient reaches the teacher.
    - With a half-precision teacher outside autocast every value is finite and near the one in full precision.

    Nothing is trained, and the models are left as they were; copies of both are made.

    Args:
        terms: as for :func:`kd_kit.build_trainer`.
        texts: to check on; a few lines of prose, code and other scripts if left out.
        window: tokens of a window.

    Raises:
        ValueError: models, tokenizers or terms that do not go together.
    """
    terms = list(terms)
    if not isinstance(tokenizers, TokenizerPair):
        raise ValueError(
            f"verify: expected what build_tokenizers returns, got {type(tokenizers).__name__}; the order is "
            "verify(tokenizers, teacher, student, terms)"
        )
    check_model(student, tokenizers.student_vocab, window, "student")
    check_model(teacher, tokenizers.teacher_vocab, window, "teacher")
    texts = list(_TEXTS if texts is None else texts)
    rows: list[tuple[str, str, str, str, bool]] = []
    student, exact = copy.deepcopy(student).float().eval(), copy.deepcopy(teacher).float().eval()
    device = next(exact.parameters()).device
    student.to(device)

    setup = Setup(student, exact, tokenizers)
    case = _Case(setup, terms, _windows(texts, tokenizers, window))
    values = case.values()
    _perfect(rows, exact, tokenizers, terms, texts, window)
    _relabelled(rows, case, values, student, exact, terms, texts, window)
    _split(rows, case, values)
    _teacher_gradient(rows, case)
    _half(rows, case, values, teacher)
    notes = [
        f"{t.name}: no floor to check, its value depends on the text even for a perfect student"
        for t in case.terms
        if t.floor is None and t.taught
    ]
    notes += [f"{name}: nothing to look at on this text" for name, value in values.items() if value is None]
    return Verification(tuple(rows), tuple(notes))


class _Case:
    """Terms bound to two models, settled, and what they say about one batch of all the windows."""

    def __init__(
        self,
        setup: Setup,
        terms: Sequence[LossTerm],
        data: DistillData,
        *,
        parts: dict | None = None,
        rows: int | None = None,
    ):
        self.setup = setup
        self.terms = [t.bound(setup) for t in terms]
        self.data = data
        self.device = next(setup.teacher.parameters()).device
        self.rows = rows  # of the student's head that stand for tokens; None leaves the padded ones in
        self.module = DistillModule(setup.student, self.terms).to(self.device).eval()
        self.teacher = LiveTeacher(setup.teacher, setup.pair.bridge, all_needs(self.terms))
        self.batch = self.collate(range(len(data.train)))
        for piece in self.module.modules():
            if isinstance(piece, Projector):  # few texts must do: the map that fits them exactly is the perfect one
                piece.ridge = 1e-6
        if parts is None:
            settle_parts(self.module, self.teacher, [self.batch])
        else:
            self.module.parts.load_state_dict(parts)
        self.signal = self.teacher.signal(self.batch)

    def collate(self, windows: Sequence[int]) -> DistillBatch:
        return self.data.train.collate(list(windows)).to(self.device)

    def output(self, batch: DistillBatch) -> StudentOutput:
        found = self.module.output(batch)
        return found if self.rows is None else dataclasses.replace(found, head=found.head.cut(self.rows))

    def sums(self, batch: DistillBatch | None = None, signal: TeacherSignal | None = None) -> dict:
        """{term: (sum, count)} over a batch."""
        batch = self.batch if batch is None else batch
        signal = self.signal if signal is None else signal
        with torch.no_grad():
            found = self.module.values(self.output(batch), signal, batch)
        return {name: (float(v.sum), float(v.count)) for name, v in found.items()}

    def values(self, *given) -> dict[str, float | None]:
        """{term: mean}, None where a term had nothing to look at."""
        return {name: total / count if count else None for name, (total, count) in self.sums(*given).items()}

    def gradients(self, batch: DistillBatch, signal: TeacherSignal, *, noise: float = 0.0) -> dict[str, float]:
        """{term: norm of the gradient at everything of the student that a term can see}, optionally disturbed."""
        with torch.no_grad():
            output = self.output(batch)
        generator = torch.Generator().manual_seed(0)

        def leaf(t: Tensor) -> Tensor:
            t = t.detach().float()
            moved = noise * t.std() * torch.randn(t.shape, generator=generator).to(t.device) if noise else 0.0
            return (t + moved).requires_grad_()

        states = {n: leaf(t) for n, t in output.states.items()}
        attention = {n: {kind: leaf(t) for kind, t in found.items()} for n, found in output.attention.items()}
        seen = StudentOutput(leaf(output.hidden), output.head, states, attention)
        leaves = [seen.hidden, *states.values(), *(t for found in attention.values() for t in found.values())]
        norms = {}
        for name, value in self.module.values(seen, signal, batch).items():
            found = torch.autograd.grad(value.mean, leaves, allow_unused=True, retain_graph=True)
            norms[name] = math.sqrt(sum(float((g.double() ** 2).sum()) for g in found if g is not None))
        return norms


def _windows(texts: Sequence[str], pair: TokenizerPair, window: int) -> DistillData:
    return build_data(texts, pair, held_out=list(texts[:1]), window=window, batch_size=len(texts))


def _perfect(rows, exact, tokenizers: TokenizerPair, terms, texts, window) -> None:
    """The teacher as its own student, without the padded rows of its head, which it does not teach."""
    vocab, tokenizer = tokenizers.teacher_vocab, tokenizers.teacher
    bridge = InsideBridge(vocab, vocab)
    pair = TokenizerPair(tokenizer, tokenizer, vocab, vocab, bridge, f"{vocab.name} itself")
    case = _Case(Setup(exact, exact, pair), terms, _windows(texts, pair, window), rows=vocab.size)
    batches = {"perfect student": case.batch}
    if case.batch.span_mask.shape[1] > 1:
        batches["perfect student, spans merged"] = _merged(case.batch)
    for what, batch in batches.items():
        signal = case.teacher.signal(batch)
        values, still = case.values(batch, signal), case.gradients(batch, signal)
        moved = case.gradients(batch, signal, noise=0.3)
        for term in case.terms:
            value = values[term.name]
            if term.floor is None or value is None:
                continue
            held = abs(value - term.floor) <= _CLOSE
            rows.append((f"{what}: value at its floor", term.name, short(value), f"{term.floor:g} +- {_CLOSE:g}", held))
            if term.settings.get("method") == "uld":  # an absolute value has no gradient that fades towards its floor
                continue
            share = still[term.name] / max(moved[term.name], 1e-30)
            text = f"{_STILL:g} of a disturbed one's"
            rows.append((f"{what}: no gradient", term.name, f"{share:.1e}", text, share <= _STILL))


def _merged(batch: DistillBatch) -> DistillBatch:
    """The same batch with every second span boundary forgotten."""
    keep = torch.arange(0, batch.span_student.shape[1], 2)
    student, teacher = batch.span_student[:, keep], batch.span_teacher[:, keep]
    pairs = batch.span_mask[:, : 2 * (len(keep) - 1)]
    mask = pairs[:, 0::2] & pairs[:, 1::2]
    window, span = mask.nonzero(as_tuple=True)
    ends = (
        window * batch.student_ids.shape[1] + student[window, span + 1],
        window * batch.teacher_ids.shape[1] + teacher[window, span + 1],
    )
    return dataclasses.replace(
        batch, span_student=student, span_teacher=teacher, span_mask=mask, span_rows=torch.stack(ends, dim=-1)
    )


class _Relabelled:
    """A tokenizer whose ids are numbered differently."""

    def __init__(self, tokenizer, order: Tensor):
        self._tokenizer, self._order = tokenizer, order.tolist()

    def __call__(self, texts, **arguments):
        found = self._tokenizer(texts, **arguments)["input_ids"]
        return {"input_ids": [[self._order[i] for i in ids] for ids in found]}

    def convert_tokens_to_ids(self, tokens):
        return [self._order[i] for i in self._tokenizer.convert_tokens_to_ids(tokens)]

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def _relabelled(rows, case: _Case, values, student, exact, terms, texts, window) -> None:
    """The student's tokens numbered differently, in its tokenizer and in its embeddings alike."""
    pair = case.setup.pair
    vocab = pair.student_vocab
    order = torch.randperm(vocab.size, generator=torch.Generator().manual_seed(0))  # the new id of every old one
    renamed = copy.deepcopy(student)
    with torch.no_grad():
        for layer in {id(m): m for m in (renamed.get_input_embeddings(), renamed.get_output_embeddings())}.values():
            for name in ("weight", "bias"):
                table = getattr(layer, name, None)
                if table is not None and not getattr(table, "_renamed", False):
                    table[order] = table[: vocab.size].clone()
                    table._renamed = True  # a tied table is one table
    other = _renumber(vocab, order)
    bridge = InsideBridge(pair.teacher_vocab, other)
    relabelled = TokenizerPair(
        pair.teacher, _Relabelled(pair.student, order), pair.teacher_vocab, other, bridge, pair.fingerprint + " renamed"
    )
    # left out: ways that are about the numbers themselves, and draws, which follow the order of the tokens
    free = [t for t in terms if t.settings.get("method") not in ("same", "direct") and not t.settings.get("sampled")]
    parts = case.module.parts.state_dict()
    kept = {k: v for k, v in parts.items() if k.split(".")[0] in {t.name for t in free}}
    again = _Case(Setup(renamed, exact, relabelled), free, _windows(texts, relabelled, window), parts=kept)
    _compare(rows, "tokens numbered differently", values, again.values())


def _renumber(vocab: Vocabulary, order: Tensor) -> Vocabulary:
    new = order.tolist()
    tokens = [b""] * vocab.size
    for old, token in enumerate(vocab.tokens):
        tokens[new[old]] = token

    def named(i: int | None) -> int | None:
        return None if i is None else new[i]

    return dataclasses.replace(
        vocab,
        tokens=tuple(tokens),
        start_id=named(vocab.start_id),
        end_id=named(vocab.end_id),
        pad_id=named(vocab.pad_id),
        **{kind: frozenset(map(named, getattr(vocab, kind))) for kind in ("special", "unused", "added")},
    )


def _split(rows, case: _Case, values) -> None:
    """Window by window, each padded to its own length."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in values}
    for window in range(len(case.data.train)):
        batch = case.collate([window])
        for name, (total, count) in case.sums(batch, case.teacher.signal(batch)).items():
            sums[name][0] += total
            sums[name][1] += count
    alone = {name: total / count if count else None for name, (total, count) in sums.items()}
    of_batch = {t.name for t in case.terms if t.batchwise}
    kept = {name: value for name, value in values.items() if name not in of_batch}
    _compare(rows, "one window at a time", kept, alone)


def _teacher_gradient(rows, case: _Case) -> None:
    """No term may hand a gradient on to what the teacher says, were it to take one."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    signal = case.signal.mapped(leaf)
    for name, value in case.module.values(case.output(case.batch), signal, case.batch).items():
        found = [None]
        if value.sum.requires_grad and leaves:
            found = torch.autograd.grad(value.sum, leaves, allow_unused=True, retain_graph=True)
        held = not any(g is not None and bool(g.ne(0).any()) for g in found)
        rows.append(("no gradient reaches the teacher", name, "none" if held else "some", "none", held))


def _half(rows, case: _Case, values, teacher) -> None:
    """A teacher in half precision, everything outside autocast."""
    # a family that is kept in bfloat16 may not fit into float16, and need not
    own = next(teacher.parameters()).dtype
    half = copy.deepcopy(teacher).to(torch.bfloat16 if own == torch.bfloat16 else torch.float16).eval()
    signal = LiveTeacher(half, case.setup.pair.bridge, case.teacher.needs).signal(case.batch)
    found = case.values(case.batch, signal)
    for name, value in values.items():
        if value is None:
            continue
        apart = abs(found[name] - value) / max(abs(value), 0.1)
        rows.append(("half-precision teacher", name, f"{apart:.1e}", "0.05 of the value", apart <= 0.05))


def _compare(rows, what: str, values: dict, others: dict) -> None:
    for name, value in values.items():
        other = others.get(name)
        if value is None or other is None:
            continue
        apart = abs(other - value) / max(abs(value), 0.1)
        rows.append((what, name, f"{apart:.1e}", f"{_CLOSE:g} of the value", apart <= _CLOSE))
