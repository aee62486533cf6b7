"""How fast a cache is read: against a plain memory map of the same bytes, and beside a step of 100 ms.

    OMP_NUM_THREADS=1 python tests/benchmarks/cache_io.py

Made-up content of real sizes: a student's vocabulary of 49,152 (ids of two bytes), K = 64, windows of 512, batches of
4,096 tokens, in random order over several shards; also with hidden states (four layers of width 1,024) and routing (24
layers of 32 experts). The files are in the memory of the machine, as those of a cache that was just written.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measure import Target, alternate, ratio, save

from kd_kit import loading
from kd_kit.cache import FORMAT, Cache
from kd_kit.cached_teacher import CachedTeacher
from kd_kit.readings import Needs
from kd_kit.signal_pieces import kinds_of_rows
from kd_kit.teacher import LiveTeacher
from kd_kit.types import DistillBatch

VOCABULARY, K, WINDOW, WINDOWS, PER_SHARD = 49_152, 64, 512, 256, 64
STEPS = 6
STEP = 0.1
"""Seconds of a step of 4,096 tokens on a card."""

READING = SimpleNamespace(key=f"bridge taught top {K}", over="taught")
CONTENTS = {
    "cells": Needs((READING,)),
    "cells, span likelihoods, routing": Needs((READING,), span_log_probs=True, routing=frozenset(range(24))),
    "cells, span likelihoods, routing, states": Needs(
        (READING,), span_log_probs=True, routing=frozenset(range(24)), teacher_states=frozenset(range(4))
    ),
}
WIDTH, EXPERTS = 1024, 32


class Windows:
    """Windows of made-up ids, the same on both sides: every position is taught, every token is a span."""

    def __init__(self, count: int, batch: int):
        self.all = np.random.default_rng(0).integers(0, VOCABULARY, (count, WINDOW))
        self.batch = batch
        self.train = self

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> int:
        return index

    def ids(self, index: int):
        return self.all[index], self.all[index]

    def indices(self, seed: int, position: int) -> np.ndarray:
        return np.random.default_rng([seed, position]).permutation(len(self))[: self.batch]

    def collate(self, samples) -> DistillBatch:
        ids = torch.from_numpy(self.all[list(samples)])
        b, t = ids.shape
        inside = torch.ones(b, t, dtype=torch.bool)
        inside[:, -1] = False
        rows = inside.flatten().nonzero().squeeze(-1)
        ends = torch.arange(t).expand(b, t).contiguous()
        return DistillBatch(
            student_ids=ids,
            targets=ids.roll(-1, 1),
            target_bytes=torch.ones_like(ids),
            teacher_ids=ids,
            teacher_targets=ids.roll(-1, 1),
            teacher_index=ends,
            aligned=inside,
            rows=rows,
            aligned_rows=rows,
            taught=inside,
            taught_rows=rows,
            prefix=torch.zeros(len(rows), 3, dtype=torch.long),
            same=inside,
            same_rows=rows,
            whitespace=torch.zeros(b, dtype=torch.long),
            span_student=ends,
            span_teacher=ends,
            span_mask=inside[:, :-1],
            span_rows=torch.stack([rows, rows], dim=-1),
            document=torch.arange(b),
            sample=torch.tensor(list(samples)),
        )


def made_up(folder: Path, needs: Needs) -> Cache:
    """A cache of random numbers for all windows."""
    folder.mkdir()
    manifest = {"format": FORMAT, "precision": "half", "ids": "uint16", "windows": WINDOWS, "per_shard": PER_SHARD}
    cache = Cache(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    n = WINDOW - 1

    def some(*shape):
        return torch.rand(n, *shape, generator=generator).half()

    for number in range(cache.count):
        count = len(cache.windows_of(number))
        pieces: dict[str, list[torch.Tensor]] = {}
        for _ in range(count):
            ids = torch.randint(0, VOCABULARY, (n, K), generator=generator).to(torch.uint16).view(torch.int16)
            found = {f"{READING.key}/ids": ids, f"{READING.key}/log_probs": some(K), f"{READING.key}/tail": some()}
            found |= {"span_log_probs": some()} if needs.span_log_probs else {}
            found |= {f"states/{layer}": some(WIDTH) for layer in sorted(needs.teacher_states)}
            found |= {f"routing/{layer}": some(EXPERTS) for layer in sorted(needs.routing)}
            for name, rows in found.items():
                pieces.setdefault(name, []).append(rows)
        cache.write(number, pieces, {kind: [n] * count for kind in ("taught", "aligned", "same", "spans")})
    return cache


def plain_reader(cache: Cache, folder: Path, windows: Windows):
    """Copies as many bytes per window, in the same order of windows, out of one mapped file."""
    size = cache.size // WINDOWS
    np.random.default_rng(0).integers(0, 255, WINDOWS * size, dtype=np.uint8).tofile(folder / "plain")
    mapped = np.memmap(folder / "plain", dtype=np.uint8, mode="r")

    def read(samples) -> np.ndarray:
        out = np.empty(len(samples) * size, np.uint8)
        for n, sample in enumerate(samples):
            out[n * size : (n + 1) * size] = mapped[sample * size : (sample + 1) * size]
        return out

    return read


def feed(windows: Windows, then=None):
    return loading.batches(windows, 0, itertools.count(), then=then)


def steps(batches, device: torch.device, teacher: CachedTeacher | None) -> None:
    """A few steps: a batch, what the teacher says of it, and the time that the card would take."""
    for host in itertools.islice(batches, STEPS):
        batch = host.to(device, non_blocking=True)
        if teacher is not None:
            teacher.signal(batch, host)
        time.sleep(STEP)


def measured(name: str, needs: Needs, folder: Path) -> tuple[dict, Target]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = made_up(folder / "cache", needs)
    cache = Cache(made.folder, made.manifest)
    windows = Windows(WINDOWS, 8)
    live = LiveTeacher(torch.nn.Linear(1, 1), None, needs)
    teacher = CachedTeacher(live, cache, windows, home=device)
    plain = plain_reader(cache, folder, windows)
    turn = itertools.count()

    def some():
        return [windows.collate(windows.indices(1, next(turn))) for _ in range(STEPS)]

    def fetch(samples) -> list:
        return [cache.fetch(name, kind, samples) for name, kind in kinds_of_rows(needs).items()]

    todo = {"plain": some(), "read": some(), "asked": some()}
    ahead, alone = feed(windows, teacher.read_ahead), feed(windows)
    busy: dict[str, list[float]] = {"alone": [], "from the cache": []}

    def timed(what: str, batches, asked: CachedTeacher | None) -> None:
        began = time.thread_time()
        steps(batches, device, asked)
        busy[what].append(time.thread_time() - began)

    times = alternate(
        {
            "plain": lambda: [plain(b.sample.tolist()) for b in todo["plain"]],
            "read": lambda: [fetch(b.sample.tolist()) for b in todo["read"]],
            "asked": lambda: [teacher.signal(b.to(device), b) for b in todo["asked"]],
            "steps alone": lambda: timed("alone", alone, None),
            "steps from the cache": lambda: timed("from the cache", ahead, teacher),
        }
    )
    each = {what: statistics.median(seconds) / STEPS for what, seconds in times.items()}
    size = 8 * cache.size / WINDOWS
    spent = {what: statistics.median(seconds[1:]) for what, seconds in busy.items()}  # the first round warms up
    cost = ratio(times, "steps from the cache", "steps alone")
    row = {
        "content": name,
        "MB per batch": size / 1e6,
        "plain memory map, ms": 1e3 * each["plain"],
        "read as it is stored, ms": 1e3 * each["read"],
        "GB/s": size / each["read"] / 1e9,
        "tokens/s": 8 * WINDOW / each["read"],
        "as a signal, in the step, ms": 1e3 * each["asked"],
        "step of 100 ms that reads ahead / that does not": cost,
        "of it in the step's thread, ms": 1e3 * (spent["from the cache"] - spent["alone"]) / STEPS,
    }
    return row, Target(f"{name}: step that reads / step that does not", cost, 1.03)


def main() -> None:
    found = []
    for name, needs in CONTENTS.items():
        folder = Path(tempfile.mkdtemp())
        try:
            found.append(measured(name, needs, folder))
        finally:
            shutil.rmtree(folder)
    save(
        "cache_io",
        [row for row, _ in found],
        [target for _, target in found],
        "Batches of 8 windows of 512 positions out of 256 windows in four shards, in the machine's memory. A step is a "
        "pause of 100 ms, like that of a host that waits for its card; on a processor, reading and "
        "computing share the cores.",
    )


if __name__ == "__main__":
    main()
