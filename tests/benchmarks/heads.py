"""The loss part of a step: final hidden states of both models in, gradients of the student's states and head out.

    OMP_NUM_THREADS=1 python tests/benchmarks/heads.py [--tokens 128 512 2048] [--rounds 5] [--device cuda]

Vocabularies and widths of the mission, random weights. Every way computes a loss on the text and one from the teacher,
and the head products on both sides that it needs for them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Target, added_memory, alone, alternate, ratio, save
from mission import STUDENT_HEAD, STUDENT_WIDTH, TEACHER_HEAD, TEACHER_WIDTH, Read, full_batch, made_data
from torch import Tensor, nn

from kd_kit.kd_terms import kd_term
from kd_kit.module import DistillModule
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import Setup, lm_term

WINDOW = 512  # positions of a window, or all tokens where they are fewer
LM, KD = 0.3, 0.7
OURS, SHARED = "kd_kit, live teacher", "kd_kit, shared teacher rows"
CACHED, STRICT = "kd_kit, from a cache", 'kd_kit, method="strict"'
NAIVE, EARLIER, GOLD = "naive", "earlier design", "TRL GOLD"
INSTALL = "python -m pip install -e '.[bench]'"


class Scene:
    """Hidden states of both models about one batch, and every way from there to the gradients."""

    def __init__(self, tokens: int, device: str, *, only: str | None = None, stored: Path | None = None):
        window = min(tokens, WINDOW)
        data = made_data(window, windows=max(1, tokens // window))
        host = full_batch(data, max(1, tokens // window))
        self.pair, self.batch = data.pair, host.to(device)
        self.lm_count, self.kd_count = len(host.rows), len(host.taught_rows)
        places = [(x.shape[0], x.shape[1]) for x in (host.student_ids, host.teacher_ids)]
        self.student = Read(*places[0], STUDENT_WIDTH, STUDENT_HEAD, seed=0, device=device)
        self.teacher = Read(*places[1], TEACHER_WIDTH, TEACHER_HEAD, seed=1, device=device).requires_grad_(False)
        self.stored = None if stored is None else torch.load(stored, weights_only=False)
        makers = {
            OURS: self._ours,
            SHARED: lambda: self._ours(teacher_rows="shared"),
            CACHED: lambda: self._ours(cached=True),
            STRICT: lambda: self._ours(method="strict"),
            NAIVE: lambda: self.naive,
            EARLIER: self._earlier,
            GOLD: self._gold,
        }
        made = {name: make() for name, make in makers.items() if only in (None, name)}
        self.ways = {name: way for name, way in made.items() if way is not None}

    def run(self, name: str) -> Callable[[], float]:
        """One way as a piece of work: its loss with all gradients, which then are forgotten."""

        def work() -> float:
            loss = self.ways[name]()
            loss.backward()
            assert self.student.hidden.grad is not None and self.student.head.weight.grad is not None, name
            self.student.hidden.grad = self.student.head.weight.grad = None
            return float(loss.detach())

        return work

    def _ours(self, *, cached: bool = False, **settings) -> Callable[[], Tensor]:
        """The way of a run: teacher's head, reading over the bridge, one pass over the student's head.

        Args:
            settings: of the KD term.
        """
        setup = Setup(self.student, self.teacher, self.pair)
        terms = [term.bound(setup) for term in (lm_term(LM), kd_term(KD, **settings))]
        module = DistillModule(self.student, terms)
        teacher = LiveTeacher(self.teacher, self.pair.bridge, module.needs)
        scales = [term.weight / term.count(self.batch) for term in terms]

        def work() -> Tensor:
            if cached and self.stored is None:
                self.stored = teacher.signal(self.batch)
            return module(self.batch, self.stored if cached else teacher.signal(self.batch), scales)[0]

        return work

    def _logits(self) -> tuple[Tensor, Tensor]:
        """[rows, V] and [rows, U] at the positions that both can be compared at; all of the student's first."""
        batch = self.batch
        student = self.student.head(self.student.hidden.flatten(0, 1)[batch.rows])
        with torch.no_grad():
            window = batch.aligned_rows // batch.student_ids.shape[1]
            place = window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[batch.aligned_rows]
            teacher = self.teacher.head(self.teacher.hidden.flatten(0, 1)[place])[:, : self.pair.bridge.teacher_size]
        return student, teacher

    def _both(self, student: Tensor, kd: Tensor) -> Tensor:
        text = F.cross_entropy(student, self.batch.targets.flatten()[self.batch.rows])
        return LM * text + KD * kd / len(self.batch.aligned_rows)

    def _aligned(self, student: Tensor) -> Tensor:
        return student[torch.searchsorted(self.batch.rows, self.batch.aligned_rows)]

    def naive(self) -> Tensor:
        """All logits of both sides, both softmaxes whole, the same bridge as a dense ``index_add``, plain autograd."""
        student, teacher = self._logits()
        carried = torch.zeros(len(teacher), STUDENT_HEAD + 1, device=student.device)
        carried.index_add_(1, self.pair.bridge.table.to(student.device), teacher.softmax(-1))
        log_q = self._aligned(student).log_softmax(-1)
        return self._both(student, F.kl_div(log_q, carried[:, :-1], reduction="sum"))

    def _earlier(self) -> Callable[[], Tensor]:
        """Teacher's softmax x its embeddings x a trained projector x the student's embeddings, softmax again."""
        device = self.student.hidden.device
        projector = nn.Linear(TEACHER_WIDTH, STUDENT_WIDTH, bias=False, device=device)

        def work() -> Tensor:
            student, teacher = self._logits()
            expected = teacher.softmax(-1) @ self.teacher.head.weight[: teacher.shape[-1]]
            target = (projector(expected) @ self.student.head.weight.T).softmax(-1)
            log_q = self._aligned(student).log_softmax(-1)
            loss = self._both(student, F.kl_div(log_q, target, reduction="sum"))
            projector.weight.grad = None
            return loss

        return work

    def _gold(self) -> Callable[[], Tensor] | None:
        """``ULDLoss`` of TRL with GOLD's defaults, and the loss on the text switched on; None without TRL."""
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        try:
            from trl.experimental.gold.gold_config import GOLDConfig
            from trl.experimental.gold.gold_trainer import ULDLoss
        except ModuleNotFoundError:
            return None
        cpu = self.student.hidden.device.type == "cpu"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a setting of TRL's own
            config = GOLDConfig(
                output_dir="unused",
                use_uld_loss=True,
                uld_crossentropy_weight=LM,
                uld_distillation_weight=KD,
                use_cpu=cpu,
                bf16=False,
                report_to="none",
            )
        loss, batch, pair = ULDLoss(config, device=self.student.hidden.device), self.batch, self.pair
        sides = [
            _as_gold(batch.student_ids, pair.student_vocab.lengths, batch.target_bytes.ne(0)),
            _as_gold(batch.teacher_ids, pair.teacher_vocab.lengths, batch.teacher_targets.ge(0)),
        ]
        labels, offsets = zip(*sides, strict=True)

        def work() -> Tensor:
            student = self.student.head(self.student.hidden)
            with torch.no_grad():
                teacher = self.teacher.head(self.teacher.hidden)
            return loss(student, teacher, *labels, batch.student_ids, batch.teacher_ids, *offsets)

        return work


def _as_gold(ids: Tensor, lengths, predicts: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and byte offsets as GOLD's trainer gives them: everything behind the start token is the answer."""
    there = torch.zeros_like(predicts)
    there[:, 1:] = predicts[:, :-1]
    length = torch.where(there, torch.as_tensor(lengths, device=ids.device)[ids], 0)
    ends = length.cumsum(-1)
    return torch.where(there, ids, -100), torch.stack([ends - length, ends], dim=-1)


def clock_of(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" else time.perf_counter


def peak(name: str, tokens: int, device: str, stored: Path | None) -> dict:
    """Bytes that one way adds at its peak, its gradients among them, and its seconds; in a process of its own.

    Args:
        stored: a file with the teacher's signal, for the way from a cache: memory that making it here had freed would
            be used again, and would not be counted.
    """
    scene = Scene(tokens, device, only=name, stored=stored)
    took = []

    def work() -> None:
        clock = clock_of(device)
        began = clock()
        scene.run(name)()
        took.append(clock() - began)

    return {"bytes": added_memory(work), "seconds": took[0]}


def measure(tokens: int, given) -> tuple[list[dict], list[Target]]:
    """Rows and targets for one number of tokens."""
    scene = Scene(tokens, given.device)
    shared = ("--tokens", str(tokens), "--device", given.device)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "signal.pt"
        scene.ways[CACHED]()
        torch.save(scene.stored, stored)
        extra = {CACHED: ("--stored", str(stored))}
        peaks = {name: alone(__file__, "--peak", name, *shared, *extra.get(name, ())) for name in scene.ways}
    few = [name for name in scene.ways if peaks[name]["seconds"] > given.slow]
    work = {name: scene.run(name) for name in scene.ways if name not in few}
    times = alternate(work, rounds=given.rounds, clock=clock_of(given.device))
    for name in few:
        times |= alternate({name: scene.run(name)}, rounds=1, warm=0, clock=clock_of(given.device))
    usual = {name: statistics.median(each) for name, each in times.items()}
    rows = [
        {
            "tokens": tokens,
            "way": name,
            "seconds": usual[name],
            "x of ours": usual[name] / usual[OURS] if {name, OURS} & {*few} else ratio(times, name, OURS),
            "added MiB": peaks[name]["bytes"] / 2**20,
            "memory x of ours": peaks[name]["bytes"] / peaks[OURS]["bytes"],
            "rounds": 1 if name in few else given.rounds,
        }
        for name in scene.ways
    ]
    if GOLD not in scene.ways:
        rows.append({"tokens": tokens, "way": f"{GOLD}: not installed, {INSTALL}"})
    by_way = {row["way"]: row for row in rows}
    targets = []
    for way, faster, smaller in ((EARLIER, 4, 6), (GOLD, 10, 10)):
        for ours in (OURS, SHARED, CACHED) if way in scene.ways else ():
            what = f"{tokens} tokens, {way} over {ours}"
            time, memory = (by_way[way][column] / by_way[ours][column] for column in ("seconds", "added MiB"))
            targets.append(Target(f"{what}: time", time, faster, "at least"))
            targets.append(Target(f"{what}: memory", memory, smaller, "at least"))
    return rows, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow", type=float, default=10.0, help="seconds from which a way is run once only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--stored", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.peak:
        print(json.dumps(peak(given.peak, given.tokens[0], given.device, given.stored)))
        return
    rows, targets = [], []
    for tokens in given.tokens:
        made, found = measure(tokens, given)
        rows += made
        targets += found
    name = "heads" if given.device == "cpu" else f"heads-{given.device}"
    save(name if max(given.tokens) <= 128 else f"{name}-large", rows, targets, notes())


def notes() -> str:
    try:
        trl = f"TRL {version('trl')}"
    except PackageNotFoundError:
        trl = "TRL is not installed"
    return (
        f"Student head {STUDENT_HEAD:,} x {STUDENT_WIDTH}, teacher head {TEACHER_HEAD:,} x {TEACHER_WIDTH}, float32, "
        "random weights, logits of standard deviation 4. Seconds (of processor time and one thread, but on a card) are "
        "medians of the rounds, in turn in one process; "
        "a way of more than ten seconds runs once. Added memory is the peak above weights and hidden states, with the "
        "gradients (113 MB of the student's head), in a process of its own that gives back what it frees. kd_kit "
        "teaches aligned positions and those inside teacher tokens, naive and the earlier design aligned ones only. "
        f"{trl}: `trl.experimental.gold.gold_trainer.ULDLoss` with the defaults of `GOLDConfig`, but "
        f"`use_uld_loss=True`, `uld_crossentropy_weight={LM}` and `uld_distillation_weight={KD}`; it gets all logits "
        "of both sides, ids, labels and byte offsets, and the head products are timed with it as with the others."
    )


if __name__ == "__main__":
    main()
