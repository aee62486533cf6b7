"""What it costs that a run survives its sessions: saving, going on, skipping text, copying, looking for places.

    python tests/benchmarks/sessions.py [--gigabytes 2]

A student of the width and depth that give a checkpoint of the wanted size is trained for two steps and saved; a fresh
process then goes on from there. Every figure is a single run unless it says otherwise, since a save of this size warms
nothing up. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kd_kit as kd
from kd_kit import checkpoint
from kd_kit.offline import STUDENT, asset_folder, corpus
from kd_kit.trainer import SAVE_SECONDS, SAVE_SHARE, save_interval

_BYTES = 12  # of a parameter in a checkpoint: itself, and the two numbers that AdamW keeps


def student_of(gigabytes: float):
    """The embedded student's family, wide and deep enough for a checkpoint of this size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(asset_folder(STUDENT))
    config.hidden_size, config.intermediate_size = 768, 2048
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 12, 12, 64
    of_layer = 4 * 768**2 + 3 * 768 * 2048  # attention and MLP
    config.num_hidden_layers = max(1, round(gigabytes * 1e9 / _BYTES / of_layer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float()


def trainer_of(folder: Path, gigabytes: float):
    tokenizers = kd.build_tokenizers()
    texts = corpus("student")[:10]
    data = kd.build_data(texts, tokenizers, held_out=corpus("held_out")[:1], window=64, batch_size=2)
    session = kd.build_session("run", folder=folder)
    return kd.build_trainer(
        student_of(gigabytes),
        kd.build_teacher(),
        data,
        session=session,
        steps=100,
        eval_every=100,
        eval_windows=2,
        measure_every=100,
    )


def go_on(folder: Path, gigabytes: float) -> None:
    """In a process of its own: from ``fit()`` to the end of the first step."""
    trainer = trainer_of(folder, gigabytes)
    started = time.monotonic()
    trainer.resume()
    resumed = time.monotonic()
    done = []
    step = trainer._train_step

    def timed(*arguments):
        result = step(*arguments)
        done.append(time.monotonic())
        return result

    trainer._train_step = timed
    trainer.callbacks = []
    trainer._save = lambda: None
    trainer.fit(steps=1)
    print(json.dumps({"resume": resumed - started, "first step": done[0] - started}))


def skipping() -> tuple[float, float]:
    """Seconds to the first batch at the start of the order, and 100,000 samples on; medians of 5, in turn."""
    tokenizers = kd.build_tokenizers()
    data = kd.build_data(corpus("student"), tokenizers, held_out=corpus("held_out")[:1], window=128, batch_size=8)
    near, far = [], []
    for seed in range(5):
        for position, times in ((0, near), (100_000 // 8, far)):
            started = time.perf_counter()
            next(iter(data.batches(seed, [position])))
            times.append(time.perf_counter() - started)
    return statistics.median(near), statistics.median(far)


def copying(folder: Path, info) -> tuple[float, float, float]:
    """Seconds to hand a checkpoint to the mirror's thread, until it has arrived in a folder, and to get it back."""
    from kd_kit.mirror import Mirror
    from kd_kit.mirror_places import open_place

    place = open_place(str(folder / "mirror"), "run")
    mirror = Mirror(place, folder / "run")
    started = time.monotonic()
    mirror.take(info)
    taken = time.monotonic() - started
    assert mirror.flush(600), mirror.news()
    sent = time.monotonic() - started
    mirror.close()
    started = time.monotonic()
    place.download(place.newest()[0], folder / "again")
    return taken, sent, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--go-on", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.go_on:
        return go_on(Path(given.go_on), given.gigabytes)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        trainer = trainer_of(folder, given.gigabytes)
        trainer.fit(steps=2)
        info, _ = checkpoint.find_checkpoint(folder / "run")
        saves = []
        for _ in range(3):
            trainer.save()
            saves.append(trainer._save_seconds)
        save = statistics.median(saves)
        del trainer
        command = [sys.executable, __file__, "--gigabytes", str(given.gigabytes), "--go-on", str(folder)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = json.loads(lines[-1])
        info, _ = checkpoint.find_checkpoint(folder / "run")
        taken, sent, back = copying(folder, info)
    near, far = skipping()
    interval = save_interval(None, save)
    rows = [
        ("checkpoint", f"{info.size / 1e9:.2f} GB"),
        ("a save, median of 3", f"{save:.1f} s"),
        (
            f"share of a run's time, one per {interval:.0f} s (the larger of {SAVE_SECONDS} s and {SAVE_SHARE} saves)",
            f"{save / (save + interval):.1%}",
        ),
        ("finding, checking and loading it, in a fresh process", f"{found['resume']:.1f} s"),
        ("... to the end of the first step", f"{found['first step']:.1f} s"),
        ("first batch at position 0", f"{1e3 * near:.0f} ms"),
        ("first batch 100,000 samples on", f"{1e3 * far:.0f} ms"),
        ("training waits for a copy off the machine", f"{1e3 * taken:.1f} ms"),
        ("until the copy is in another folder", f"{sent:.1f} s"),
        ("until it is back, every byte checked", f"{back:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value:>8}" for name, value in rows))


if __name__ == "__main__":
    main()
