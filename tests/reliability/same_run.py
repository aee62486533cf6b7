"""The run that the tests of this folder strike, and whether what came of it is the very run that nothing struck."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where helpers.py is, also for a script

import numpy as np
import torch
from helpers import make_trainer, measured, part_term, tiny_student
from safetensors.torch import load_file

from kd_kit import LearningRate, checkpoint_folder, gradient_share, kd_term, lm_term, piecewise
from kd_kit.checkpoint import find_checkpoint, load_checkpoint
from kd_kit.history import History

STEPS = 16
SETTINGS = {
    "steps": STEPS,
    "eval_every": 5,
    "eval_windows": 2,
    "accumulation": 2,
    "measure_every": 3,
    "early_stopping": None,
    "save_minutes": 0,  # after every step, on machines of any speed
}
TIMED = {"seconds", "step_seconds", "longest_pause", "save_number", "run"}
"""What two equal runs need not share of a checkpoint's state: how long, saved how often, called what."""

PARTS_OF_A_RUN = {"RUN.json", "metrics.jsonl", "initial.safetensors", "best.safetensors", "LOCK", "ckpt"}


def build_run(folder: Path, *, again: bool = False, **changes):
    """The trainer of a session: a student with dropout, three terms of which one is trained, weights that follow
    measured gradients. With ``again`` everything that the folder must replace is another: the weights of student and
    part.
    """
    settings = {
        "student": tiny_student(int(again), attention_dropout=0.2),
        "terms": [lm_term(0.2), kd_term(0.7, top_k=8), part_term(0.1, seed=int(again))],
        "schedule": piecewise(kd=[(0, 0.2), (0.4, 1)]),
        "lr_schedule": LearningRate(warmup=0.2, decay=0.3),
        "balance": gradient_share(lm=0.3, kd=0.6, part=0.1, smoothing=0.5, most=20),
    }
    return make_trainer(folder, **(settings | SETTINGS | changes))


def begin(seed: int) -> None:
    """The state of every random generator that a session begins with."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def outcome(folder: Path) -> dict[str, str]:
    """What the newest good checkpoint of a run holds and what the run measured, each by its name, without times."""
    info, _ = find_checkpoint(folder)
    groups, state = load_checkpoint(info)
    tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    if (folder / "best.safetensors").exists():
        tensors |= {f"best/{name}": tensor for name, tensor in load_file(folder / "best.safetensors").items()}
    found = {
        name: hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, t in tensors.items()
    }
    found |= {f"state/{name}": json.dumps(value) for name, value in state.items() if name not in TIMED}
    records = measured(History.load(folder / "metrics.jsonl"))
    return found | {f"history/{number}": json.dumps(record) for number, record in enumerate(records)}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names under which two outcomes differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(folder: Path) -> list[str]:
    """What lies about in a run folder and is no part of a run at rest; the records of faults are."""
    found = [p.name for p in folder.iterdir() if p.name not in PARTS_OF_A_RUN | {"faults", "last.safetensors"}]
    return sorted(found + [p.name for p in (folder / "ckpt").glob("*") if not p.name.startswith("step-")])


def newest_good(folder: Path) -> tuple[int, list]:
    """The step of the newest good checkpoint, -1 without any, and what was refused on the way."""
    if not (folder / "ckpt").is_dir():
        return -1, []
    info, refusals = find_checkpoint(folder)
    return -1 if info is None else info.step, refusals


def seal_anew(folder: Path, **changes) -> None:
    """What someone can do who knows the format: another manifest, with a seal that fits."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    del manifest["seal"]
    manifest |= changes
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"seal": checkpoint_folder.seal(manifest)}))
