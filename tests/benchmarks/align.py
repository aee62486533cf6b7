"""How fast two tokenizations are matched, cut and made into batches, beside what tokenising takes.

    python tests/benchmarks/align.py [--rounds 5]

Tokens are those of both sides. The texts are the embedded ones: chapters, and the same text in pieces of a few dozen
tokens as in a chat. The walk is two pointers in plain Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from measure import Target, alternate, save

import kd_kit as kd
from kd_kit import tokenised
from kd_kit.align import Ragged, align, align_many, cut_many
from kd_kit.offline import corpus

WINDOW, BATCH = 512, 8


def walk(student: list[int], teacher: list[int]) -> list[tuple[int, bool]]:
    """What ``align`` says of every student position, by two pointers."""
    out, at = [], -1
    for end in student:
        while at + 1 < len(teacher) and teacher[at + 1] <= end:
            at += 1
        out.append((at, at >= 0 and teacher[at] == end))
    return out


def in_a_file(build):
    """What ``build`` gives with all documents in a file of ``datasets``, however small they are."""
    import datasets

    large, cache = tokenised.LARGE, datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        tokenised.LARGE, datasets.config.HF_DATASETS_CACHE = 0, folder
        try:
            return build()  # the file stays mapped without its name
        finally:
            tokenised.LARGE, datasets.config.HF_DATASETS_CACHE = large, cache


def measure(kind: str, texts: list[str], pair, rounds: int) -> list[dict]:
    def build():
        return kd.build_data(texts, pair, held_out=texts[:1], window=WINDOW, batch_size=BATCH, max_refused=1)

    data, mapped = build(), in_a_file(build).train
    windows, documents = data.train, data.train.documents
    student = Ragged.of([d.student_ends for d in documents])
    teacher = Ragged.of([d.teacher_ends for d in documents])
    tokens = len(student.values) + len(teacher.values)
    some = documents[: max(1, len(documents) // 20)]
    few = sum(len(d.student_ids) + len(d.teacher_ids) for d in some)
    lists = [(d.student_ends.tolist(), d.teacher_ends.tolist()) for d in some]
    per_batch = BATCH if kind == "long" else 8 * BATCH  # about as many tokens
    order = np.random.default_rng(0).permutation(len(windows))
    batches = [order[i : i + per_batch].tolist() for i in range(0, min(len(order), 24 * per_batch), per_batch)]
    batched = sum(len(side) for batch in batches for index in batch for side in windows.ids(index))
    work = {
        "align, a call per document": (lambda: [align(d.student_ends, d.teacher_ends) for d in documents], tokens),
        "align_many, one call": (lambda: align_many(student, teacher), tokens),
        "cut_many, with align_many": (lambda: cut_many(student, teacher, length=WINDOW - 1), tokens),
        "collate": (lambda: [windows.collate(batch) for batch in batches], batched),
        "collate from a mapped file": (lambda: [mapped.collate(batch) for batch in batches], batched),
        "tokenising": (lambda: pair.encode(texts[: len(some)]), few),
        "walk of two pointers": (lambda: [walk(*both) for both in lists], few),
    }
    times = alternate({name: run for name, (run, _) in work.items()}, rounds=rounds)
    return [
        {"documents": kind, "work": name, "million tokens/s": count / statistics.median(times[name]) / 1e6}
        for name, (_, count) in work.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    pair, texts = kd.build_tokenizers(), corpus("student")
    pieces = [text[i : i + 120] for text in texts for i in range(0, len(text), 120)]
    rows = measure("long", texts, pair, rounds) + measure("short", [p for p in pieces if p.strip()], pair, rounds)
    speed = {(row["documents"], row["work"]): row["million tokens/s"] for row in rows}
    targets = [
        Target("align on long documents, million tokens/s", speed["long", "align, a call per document"], 5, "at least"),
        Target("align on short documents, million tokens/s", speed["short", "align_many, one call"], 5, "at least"),
    ]
    longest, count = max(map(len, texts)), f"{len(texts)} chapters"
    save("align", rows, targets, f"{count} of up to {longest:,} characters; the short ones have 120 each.")


if __name__ == "__main__":
    main()
