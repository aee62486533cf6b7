"""What a step of distillation costs over the least possible: the teacher's body, and the student's step on text.

    OMP_NUM_THREADS=1 python tests/benchmarks/overhead.py [--tokens 96] [--rounds 5] [--profile]
    python tests/benchmarks/overhead.py --device cuda [--profile]

On the CPU the models of the mission at full depth read one window of few tokens in float32: heads and bodies cost in
the proportion of the full shape. On a card the batch is the mission's, 8 windows of 512, in float16 as a P100 or T4 has
it: autocast with loss scaling, the teacher stored in float16, no bfloat16, no flash attention.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mission
import torch
import torch.nn.functional as F
from measure import Target, alternate, ratio, save

import kd_kit as kd
from kd_kit.head import body_of
from kd_kit.module import DistillModule, settle_parts
from kd_kit.optimizer import build_optimizer
from kd_kit.session import Session
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import Setup
from kd_kit.train_step import apply_gradients, take_gradients

FLOOR, LM = "floor: teacher's body + student on text", "student on text alone"
ONLINE, CACHED, ALL = "lm + kd, online", "lm + kd, from the cache", "all terms, online"
SHARED = "lm + kd, online, shared teacher rows"
RATE = 1e-6  # so small that no model moves while it is timed


def lm_and_kd(**settings) -> list[kd.LossTerm]:
    return [kd.lm_term(0.3), kd.kd_term(0.7, **settings)]


def every_term() -> list[kd.LossTerm]:
    return [
        *lm_and_kd(),
        kd.span_term(),
        kd.feature_term(),
        kd.layerwise_term(),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]


class Plain:
    """The student's step on the text alone, as one would write it without kd_kit; the teacher's body before it."""

    def __init__(self, student, batch, device: torch.device, *, teacher=None):
        self.student, self.batch, self.device, self.teacher = student, batch, device, teacher
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95))
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def __call__(self) -> None:
        batch = self.batch.to(self.device, non_blocking=True)
        if self.teacher is not None:
            with torch.inference_mode():
                body_of(self.teacher)(input_ids=batch.teacher_ids, use_cache=False)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            logits = self.student(input_ids=batch.student_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class Ours:
    """A step as a run takes it, with its terms and its teacher."""

    def __init__(self, terms, session: Session, data, batch, student, teacher, *, cached=None):
        setup = Setup(student, teacher, data.pair)
        self.module = DistillModule(student, [term.bound(setup) for term in terms]).to(session.device)
        live = LiveTeacher(teacher, data.pair.bridge, self.module.needs)
        self.teacher, self.batch = cached or live, batch
        settle_parts(self.module, live, [batch.to(session.device)])
        self.accelerator = session.engine()
        optimizer = build_optimizer(self.module, learning_rate=RATE, weight_decay=0.1)
        self.prepared, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        whole = sum(term.weight for term in self.module.terms)
        self.shares = {term.name: term.weight / whole for term in self.module.terms}

    def __call__(self) -> None:
        measured = take_gradients(
            self.accelerator,
            self.prepared,
            self.optimizer,
            [self.batch],
            module=self.module,
            teacher=self.teacher,
            shares=self.shares,
            measure=False,
        )
        apply_gradients(self.accelerator, self.optimizer, measured, module=self.module, rate=RATE, max_grad_norm=1.0)


def cached_teacher(session: Session, data, student, teacher):
    """A teacher whose knowledge of the training text is on the disk; the model itself stays where it is."""
    device = session.device
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = kd.build_trainer(
            student, teacher, data, lm_and_kd(), session=session.within("cached"), steps=10, early_stopping=None
        )
        kd.build_cache(trainer)
    teacher.to(device)
    return trainer.teacher


def works(given, session: Session, batch, data, student, teacher) -> dict[str, Callable[[], None]]:
    parts = session, data, batch, student, teacher
    cached = cached_teacher(session, data, student, teacher)
    plain = Plain(student, batch, session.device)
    floor = Plain(student, batch, session.device, teacher=teacher)
    floor.optimizer, floor.scaler = plain.optimizer, plain.scaler
    found = {
        FLOOR: floor,
        LM: plain,
        ONLINE: Ours(lm_and_kd(), *parts),
        SHARED: Ours(lm_and_kd(teacher_rows="shared"), *parts),
        CACHED: Ours(lm_and_kd(), *parts, cached=cached),
        ALL: Ours(every_term(), *parts),
    }
    return found


def arithmetic(given, batch) -> dict[str, float]:
    """GFLOP of a step, as far as it is matrix products; what the terms add beside the heads is left out."""
    part = mission.gigaflops(*given.layers, batch.student_ids.numel(), window=given.tokens)
    student = part["student's body"] + part["student's head"]
    floor = student + part["teacher's body"]
    shared = part["teacher's head"] * mission.SHARED / mission.TEACHER_HEAD
    return {
        FLOOR: floor,
        LM: student,
        ONLINE: floor + part["teacher's head"],
        CACHED: student,
        ALL: floor + part["teacher's head"],
        SHARED: floor + shared,
    }


def profiled(name: str, work: Callable[[], None], device: torch.device) -> list[dict]:
    """The operations that one kind of step spends its time in, those above 1% of it."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as found:
        work()
        if cuda:
            torch.cuda.synchronize()
    taken = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found.key_averages()}
    whole = sum(taken.values())
    return [
        {"step": name, "operation": key, "share of the step": f"{time / whole:.1%}", "ms": time / 1000}
        for key, time in sorted(taken.items(), key=lambda item: -item[1])
        if time > 0.01 * whole
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, help="of a window; 96, on a card 512")
    parser.add_argument("--windows", type=int, help="of a batch; 1, on a card 8")
    parser.add_argument("--rounds", type=int, help="5, on a card 20")
    parser.add_argument("--layers", type=int, nargs=2, default=(mission.TEACHER_LAYERS, mission.STUDENT_LAYERS))
    parser.add_argument("--profile", action="store_true", help="where the time of every kind of step goes, instead")
    given = parser.parse_args()
    device = torch.device(given.device)
    cuda = device.type == "cuda"
    given.tokens, given.windows = given.tokens or (512 if cuda else 96), given.windows or (8 if cuda else 1)
    given.rounds = given.rounds or (20 if cuda else 5)
    if cuda:
        torch.backends.cuda.enable_flash_sdp(False)
    else:
        torch.set_num_threads(1)
    data = mission.made_data(given.tokens, windows=2 * given.windows, batch_size=given.windows)
    batch = mission.full_batch(data, given.windows)
    teacher = mission.build_teacher(
        num_hidden_layers=given.layers[0], device=device, dtype=torch.float16 if cuda else torch.float32
    )
    student = mission.build_student(num_hidden_layers=given.layers[1], device=device)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), device=given.device, precision="fp16" if cuda else "no")
        every = works(given, session, batch, data, student, teacher)
        if given.profile:
            rows = []
            for name, work in every.items():
                work()
                rows += profiled(name, work, device)
            kind = "of the card" if cuda else "of one thread"
            save(
                f"overhead-profile{'-cuda' if cuda else ''}", rows, notes=f"Operations above 1% of a step, time {kind}."
            )
            return
        times = alternate(every, rounds=given.rounds, clock=time.perf_counter if cuda else time.process_time)
    wanted = arithmetic(given, batch)
    rows = [
        {
            "step": name,
            "seconds": statistics.median(times[name]),
            "x of the floor": ratio(times, name, FLOOR),
            "x of it by arithmetic": wanted[name] / wanted[FLOOR],
            "x of the student on text": ratio(times, name, LM),
        }
        for name in every
    ]
    targets = [
        Target("online step over its floor, all teacher rows", ratio(times, ONLINE, FLOOR), 1.22),
        Target("online step over its floor, shared teacher rows", ratio(times, SHARED, FLOOR), 1.10),
        Target("cached step over the student's step on text", ratio(times, CACHED, LM), 1.03),
        Target("all terms over the floor", ratio(times, ALL, FLOOR), 1.25),
    ]
    save("overhead-cuda" if cuda else "overhead", rows, targets, notes(given, batch))


def notes(given, batch) -> str:
    part = mission.gigaflops(*given.layers, 1, window=given.tokens)
    heads = (part["teacher's head"] + part["student's head"]) / sum(part.values())
    kind = "float32, processor time of one thread" if given.device == "cpu" else "float16 autocast, no flash attention"
    return (
        f"Teacher of {given.layers[0]} layers, student of {given.layers[1]}, random weights, {given.windows} window(s) "
        f"of {given.tokens} tokens, {len(batch.aligned_rows) / len(batch.rows):.0%} of them aligned; {kind}. The heads "
        f"are {heads:.0%} of the arithmetic of an online step (24% at the full shape). A step is everything from the "
        "batch on the host to the updated weights, kd_kit's with clipping; the floor is plain PyTorch with all logits "
        "in memory. An exact online step multiplies all 151,936 rows of the teacher's head: it cannot come below its "
        "arithmetic."
    )


if __name__ == "__main__":
    main()
